"""Run every Python snippet of docs/library.md, in order and in one program."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bidfmkd_fast as bf

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def given() -> dict[str, Any]:
    """Return what the page says that the snippets have."""

    def api(number: int) -> bf.BlackBox:
        weight = torch.randn(784, 3, generator=torch.Generator().manual_seed(number))
        spec = bf.APISpec(3, (1, 28, 28), name=f"api {number}")
        return bf.FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)

    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=8, epochs=2, batch_size=4), meta_model_width=4
    )
    apis = [api(0), api(1)]
    return {"apis": apis, "config": config, "dataset": bf.load_dataset("glyphs")}


def hub(place: Path) -> ModuleType:
    """Return a stand-in for huggingface_hub with one repository, in `place`."""
    module = ModuleType("huggingface_hub")

    def upload_folder(repo_id: str, folder_path: str, commit_message: str) -> Any:
        shutil.copytree(folder_path, place)
        return SimpleNamespace(commit_url="https://hub/commit")

    api = SimpleNamespace(create_repo=lambda **_: None, upload_folder=upload_folder)
    module.HfApi = lambda **_: api  # type: ignore[attr-defined]
    module.hf_hub_download = lambda filename, **_: place / filename  # type: ignore[attr-defined]
    return module


def test_every_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(tmp_path / "uploaded"))
    logger = logging.getLogger("bidfmkd_fast")
    level, handlers = logger.level, list(logger.handlers)
    names, parts = given(), snippets()
    assert len(parts) == 5
    try:
        for part in parts:
            exec(compile(part, str(PAGE), "exec"), names)
        bf.BiDfMKD(names["apis"], config=names["config"]).fit("runs/third", progress=False)
    finally:
        for handler in logger.handlers[:]:
            if handler not in handlers:
                logger.removeHandler(handler)
                handler.close()
        logger.setLevel(level)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 APIs, 16 queries planned in runs/first"
    assert [line.split()[:3] for line in said[1:-1]] == 2 * [["survey", "0", "16"]]
    assert said[-1] == "finished with 16 queries"
    assert list(Path("boards/second").glob("events.*"))
    assert "run: the survey has ended with a loss of " in Path("run.log").read_text()
    assert "| 3-way 5-shot |" in Path("models/first/README.md").read_text()
    assert "`api 0`, `api 1`" in Path("uploaded/README.md").read_text()
    assert names["meta_model"].adapt_steps == names["config"].adapt_steps
