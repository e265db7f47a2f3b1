"""Write files of settings, read them back, and compare their comments with the docstrings."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bidfmkd_fast.cli.annotated import annotated_yaml
from bidfmkd_fast.cli.init_config import PRESETS
from bidfmkd_fast.cli.main import main
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.settings import dotted_keys, settings_from_yaml
from bidfmkd_fast.training import TrainConfig, paper

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type[Any]] = {"train": TrainConfig, "experiment": ExperimentConfig}


def wanted(kind: str, preset: str) -> Any:
    """Return the settings of a preset by other ways than the command takes."""
    if kind == "train" and preset != "small":
        return {"default": TrainConfig(), "paper": paper(), "v01": TrainConfig.v01()}[preset]
    if preset == "default":
        return ExperimentConfig()
    file = {"paper": "omniglot_ss", "v01": "omniglot_ss_small_v01", "small": "omniglot_ss_small"}
    experiment = settings_from_yaml(ExperimentConfig, CONFIGS / f"{file[preset]}.yaml")
    return experiment.train if kind == "train" else experiment


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_holds_the_settings_of_the_preset(
    kind: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "my ü.yaml"
    assert main(["init-config", "--kind", kind, "--preset", preset, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"settings: {out}\n"
    assert settings_from_yaml(KINDS[kind], out) == wanted(kind, preset)
    text = out.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    names = [line.split(":")[0].strip() for line in text.splitlines() if line.strip(" ")[:1] != "#"]
    every = sorted(key.rpartition(".")[2] for key in dotted_keys(KINDS[kind]))
    assert sorted(name for name in names if name) == every  # each once, and each nested one


def test_each_setting_has_the_text_of_its_docstring() -> None:
    lines = annotated_yaml(ExperimentConfig(), "a title").splitlines()
    assert lines[0] == "# a title"
    above = "\n".join(lines[: lines.index("    mu: 0.025")]).splitlines()
    start = len(above) - next(
        number for number, line in enumerate(reversed(above)) if not line.startswith("    #")
    )
    text = " ".join(line.strip("# ") for line in above[start:])
    assert text.startswith("step length (mu): how far a point lies from its image")
    assert text.endswith("for 112 queries more per set.")

    def undocumented(kind: type[Any]) -> list[str]:
        hints = get_type_hints(kind)
        inner = [
            name for hint in hints.values() if is_dataclass(hint) for name in undocumented(hint)
        ]
        return inner + [name for name in hints if f"        {name}: " not in (kind.__doc__ or "")]

    assert undocumented(ExperimentConfig) == []
    settings = [number for number, line in enumerate(lines) if line.strip() and "#" not in line]
    assert all("# " in lines[number - 1] for number in settings)


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my.yaml"
    out.write_text("mine")
    assert main(["init-config", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"init-config: {out} exists already; give another --out or remove it\n" in error
    assert error.count("\n") == 1 and out.read_text() == "mine"


@pytest.mark.parametrize("arguments", ["", "--preset best --out a", "--kind pool --out a"])
def test_bad_options_are_one_line(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init-config", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
