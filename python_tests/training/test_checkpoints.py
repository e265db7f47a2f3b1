"""Kill a run at any moment: it goes on from its checkpoint and ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from killing import (
    CHECKPOINTED,
    DIRECTIONS,
    B,
    asked,
    exit_code,
    fit_checkpointed,
    fit_local,
    local,
)

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files import checkpoints
from bidfmkd_fast.models import build_model
from bidfmkd_fast.training import BiDfMKD, Run, bidf_mkd, replay
from bidfmkd_fast.training.run_folder import (
    CHECKPOINTS,
    MEMORY,
    META_MODEL,
    METRICS,
    RunFolder,
)

KILLED = -signal.SIGKILL


def records(folder: Path, *left_out: str) -> list[dict[str, Any]]:
    """Return the records of a run without seconds and the keys `left_out`."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", *left_out)} for r in lines]


def assert_same(folder: Path, whole: Path, n_repeated: int = 0) -> None:
    """Compare two runs; in that of `folder` so many queries were asked twice."""
    for name in (META_MODEL, MEMORY):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert records(folder, "queries") == records(whole, "queries")
    for ours, theirs in zip(records(folder), records(whole), strict=True):
        assert ours["queries"] - theirs["queries"] in (0, n_repeated)
    assert not (folder / CHECKPOINTS).exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has cut off, with its calls in the file "log"."""
    folder = tmp_path_factory.mktemp("whole")
    assert exit_code(fit_checkpointed, folder / "run", folder / "log", None) == 0
    return folder


def fit(folder: Path, log: Path) -> Run:
    return BiDfMKD(local(log, None), config=CHECKPOINTED).fit(folder, progress=False)


def test_killed_at_six_random_moments_and_continued(whole: Path, tmp_path: Path, seed: int) -> None:
    n_steps = int((whole / "log.steps").read_text())
    draw = random.Random(seed)
    steps = [("step", n) for n in sorted(draw.sample(range(1, n_steps + 1), 4))]
    others = [("checkpoint", n) for n in draw.sample(range(1, n_steps + 1), 2)]
    once = asked(whole / "log")
    for what, number in (*steps, *others):
        folder, log = tmp_path / f"{what} {number}", tmp_path / f"{what} {number} log"
        assert exit_code(fit_checkpointed, folder, log, (what, number)) == KILLED, (what, number)
        assert exit_code(fit_checkpointed, folder, log, None) == 0, (what, number)
        assert_same(folder, whole / "run")
        assert asked(log) == once  # no training step asks anything
        if what == "step":  # all steps before it are in a checkpoint
            assert int(log.with_suffix(".steps").read_text()) == n_steps - number + 1


def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    """Each process takes two further steps and is killed in the third."""
    folder, log = tmp_path / "run", tmp_path / "log"
    n_steps, n_kills = int((whole / "log.steps").read_text()), 0
    while exit_code(fit_checkpointed, folder, log, ("step", 3)) == KILLED:
        n_kills += 1
        assert n_kills <= n_steps
    assert n_kills >= n_steps // 3
    assert_same(folder, whole / "run")
    assert asked(log) == asked(whole / "log")


def test_a_signal_leaves_a_checkpoint_of_the_step_under_way(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval is 30 seconds, so no other checkpoint is written after the survey."""
    taken, step = [], replay.outer_replay_step

    def interrupted(*arguments: Any) -> dict[str, float]:
        metrics = step(*arguments)
        taken.append(metrics)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGINT)
        return metrics

    monkeypatch.setattr(replay, "outer_replay_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", tmp_path / "log")
    fit(tmp_path / "run", tmp_path / "log")
    assert len(taken) == 8  # three in the second round, five at the end
    assert_same(tmp_path / "run", whole / "run")


@pytest.mark.parametrize("step", [2, 7, 20])
def test_cut_off_again_before_its_first_step(whole: Path, tmp_path: Path, step: int) -> None:
    """Cut off in the first distillation, the joint one and a replay, and twice more at once."""
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_checkpointed, folder, log, ("step", step)) == KILLED
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bidf_mkd, "run_loop", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fit(folder, log)
    fit(folder, log)
    assert_same(folder, whole / "run")


def interrupted(*arguments: Any, **keywords: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "function", ["survey_learning.choose_scenes", "survey_learning.write_choice", "loop.distil"]
)
def test_a_signal_between_two_steps(function: str, whole: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"bidfmkd_fast.training.{function}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, log)
    fit(folder, log)
    assert_same(folder, whole / "run")


def test_a_signal_while_the_run_is_written_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, log, finish = tmp_path / "run", tmp_path / "log", RunFolder.finish

    def signalled(self: RunFolder, run: Run) -> None:
        signal.raise_signal(signal.SIGINT)
        finish(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish", signalled)
        with pytest.raises(KeyboardInterrupt):
            fit(folder, log)
    assert RunFolder.open(folder).complete and not (folder / CHECKPOINTS).exists()


@pytest.mark.parametrize("moment", [("step", 28), ("call", 7)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    moment: tuple[str, int], whole: Path, tmp_path: Path
) -> None:
    """Damage it at the end, and in the second round, before which the pictures were chosen."""
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_checkpointed, folder, log, moment) == KILLED
    newest = max((folder / CHECKPOINTS).iterdir())
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"checkpoint {newest} is damaged .*going on from the"):
        fit(folder, log)
    assert_same(folder, whole / "run", 10 if moment[0] == "call" else 0)


def test_records_hold_the_queries_that_were_asked_before_them(tmp_path: Path) -> None:
    """Kill a run in its last set, with no checkpoint."""
    assert exit_code(fit_local, tmp_path / "whole", tmp_path / "whole log", None) == 0
    assert exit_code(fit_local, tmp_path / "run", tmp_path / "log", ("call", 30)) == KILLED
    assert exit_code(fit_local, tmp_path / "run", tmp_path / "log", None) == 0
    assert_same(tmp_path / "run", tmp_path / "whole", (1 + DIRECTIONS) * B)


def test_another_meta_model_is_refused(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_checkpointed, folder, log, ("step", 10)) == KILLED
    other = build_model(
        "conv4", in_channels=1, n_classes=3, image_size=(16, 16), width=4, batch_statistics=True
    )
    with pytest.raises(InputError, match="began with another meta-model; give the same one, or"):
        BiDfMKD(local(log, None), other, config=CHECKPOINTED).fit(folder, progress=False)


def test_a_set_that_was_learned_from_must_be_there(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_checkpointed, folder, log, ("call", 25)) == KILLED
    (folder / "recovered" / "api_000_support.safetensors").unlink()
    before = sorted((folder / CHECKPOINTS).rglob("*"))
    with pytest.raises(InputError, match=r"api_000_support.safetensors is missing, from which"):
        fit(folder, log)
    assert sorted((folder / CHECKPOINTS).rglob("*")) == before


def test_other_apis_are_refused(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_checkpointed, folder, log, ("step", 10)) == KILLED
    with pytest.raises(InputError, match="began with 2 APIs; got 1; give the same ones, or remove"):
        BiDfMKD(local(log, None)[:1], config=CHECKPOINTED).fit(folder, progress=False)


def test_a_full_disk_leaves_the_checkpoints_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    write, seen = checkpoints.write_tensors, []

    def full(path: Path, *arguments: Any) -> None:
        seen.append(path)
        if len(seen) > 15:
            path.write_bytes(b"half")
            raise InputError(f"cannot write to {path}: No space left on device; free some space")
        write(path, *arguments)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        fit(folder, log)
    assert [path.name for path in sorted((folder / CHECKPOINTS).iterdir())] == ["000014", "000015"]
    monkeypatch.setattr(checkpoints, "write_tensors", write)
    fit(folder, log)
    assert_same(folder, whole / "run")


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    held = checkpoints.Checkpoints(tmp_path)
    held.write({}, {"format": 2})
    with pytest.raises(InputError, match="has format 2, and this version reads format 1"):
        held.newest()
