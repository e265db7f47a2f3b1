"""Check what the folder of a run holds, that it reads back the same, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    Run,
    TrainConfig,
    run_folder,
)
from bidfmkd_fast.training.run_folder import RunFolder

CONFIG = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=3,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=1, num_directions=1, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=1),
    replay=ReplayConfig(final_steps=30, n_query=2, inner_steps=1),
)


def finished_api() -> FunctionBlackBox:
    weight = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    spec = APISpec(
        2,
        (1, 16, 16),
        input_range=(-1, 1),
        class_names=("a", "b"),
        data_set="made up",
        name="the api",
    )
    return FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    path = tmp_path_factory.mktemp("runs") / "one"
    return BiDfMKD([finished_api()], config=CONFIG).fit(path), path


def test_sets_beyond_the_limit_stay_on_the_disk(
    finished: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are the same, and the images of the run are those of the files."""
    (expected, path), api = finished, finished_api()
    monkeypatch.setattr(run_folder, "IN_MEMORY", 0)
    run = BiDfMKD([api], config=CONFIG).fit(tmp_path / "run")
    for name in ("meta_model.safetensors", "memory.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (path / name).read_bytes()
    for ours, theirs in zip(run.recovered, expected.recovered, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.recovered.history == theirs.recovered.history
        mapped = Path("/proc/self/maps").read_text()  # the files that stand for memory
        assert f"{tmp_path}/run/recovered/api_000_{ours.part}.safetensors" in mapped
        assert f"{path}/recovered" not in mapped


def test_models_memory_and_settings_come_back(finished: tuple[Run, Path]) -> None:
    run, path = finished
    folder = RunFolder.open(path)
    assert folder.config() == CONFIG
    for loaded, model in (
        (folder.meta_model(), run.meta_model),
        (folder.initial_model(), run.initial_model),
    ):
        state = model.module.state_dict()
        assert loaded.module.state_dict().keys() == state.keys()
        assert all(
            torch.equal(value, state[name]) for name, value in loaded.module.state_dict().items()
        )
        assert (loaded.adapt_steps, loaded.adapt_learning_rate) == (
            CONFIG.adapt_steps,
            CONFIG.adapt_lr,
        )
    memory = folder.memory()
    assert memory.classes == run.memory.classes
    assert all(
        torch.equal(memory.images_of(key), run.memory.images_of(key)) for key in memory.classes
    )


def test_summary_and_metrics_hold_the_numbers_of_the_run(finished: tuple[Run, Path]) -> None:
    run, path = finished
    summary = RunFolder.open(path).summary()
    assert summary["queries"] == run.queries == 2 * 2 * 6
    assert summary["requests"] == run.requests
    assert summary["complete"] is True
    assert summary["images"] == 12
    assert summary["apis"] == 1
    support = run.recovered[0].recovered
    share = (
        sum(int(s.argmax()) == int(y) for s, y in zip(support.scores, support.labels, strict=True))
        / 6
    )
    assert summary["matched"]["support"] == pytest.approx(share)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.history
    assert [line["stage"] for line in lines] == [
        "recovery",
        "recovery",
        "distillation",
        "replay",
        "replay",
    ]
    assert {"stage", "step", "loss", "accuracy", "queries", "seconds"} <= set.intersection(
        *map(set, lines)
    )


def test_recovered_sets_are_on_disk(finished: tuple[Run, Path]) -> None:
    run, path = finished
    for kept, name in zip(run.recovered, ("support", "query"), strict=True):
        file = path / "recovered" / f"api_000_{name}.safetensors"
        stored = load_file(file)
        assert torch.equal(stored["images"], kept.images)
        assert torch.equal(stored["scores"], kept.recovered.scores)
        assert torch.equal(stored["labels"], kept.recovered.labels)
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            assert len(about.pop("checksum")) == 32
            assert about == {"api": "the api", "set": name, "class_names": '["a", "b"]'}


def test_a_run_is_never_overwritten(finished: tuple[Run, Path]) -> None:
    _, path = finished
    before = (path / "config.yaml").read_text()
    with pytest.raises(InputError, match="holds a run already"):
        RunFolder.create(path, TrainConfig(seed=9))
    assert (path / "config.yaml").read_text() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)


def test_folders_that_hold_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        RunFolder.open(tmp_path)
    RunFolder.create(tmp_path / "begun", CONFIG)
    with pytest.raises(InputError, match="a run that did not finish"):
        RunFolder.open(tmp_path / "begun")


def test_withdrawing_leaves_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path, CONFIG).withdraw()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    RunFolder.create(tmp_path / "new", CONFIG).withdraw()
    assert not (tmp_path / "new").exists()


def test_damaged_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("memory.safetensors", "meta_model.safetensors", "summary.json"):
        (tmp_path / name).write_text("nothing of the kind")
    for read, message in (
        (folder.memory, "not readable"),
        (folder.meta_model, "not a saved meta-model"),
        (folder.summary, r"summary\.json cannot be read as JSON"),
    ):
        with pytest.raises(InputError, match=message):
            read()
    with pytest.raises(InputError, match=r"cannot read .*config\.yaml"):
        folder.config()
