"""Callbacks see what metrics.jsonl gets, change no number, and end a run without a loss."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputTypeError
from bidfmkd_fast.secrets import register
from bidfmkd_fast.training import BiDfMKD, Run, RunInfo, TrainConfig
from bidfmkd_fast.training.run_folder import META_MODEL, METRICS, RunFolder

TINY = TrainConfig(
    survey=bf.SurveyConfig(n_images=8, epochs=3, batch_size=4),
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=bf.RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=bf.DistillationConfig(inner_steps=2),
    replay=bf.ReplayConfig(final_steps=3, steps_per_round=1, n_query=2, inner_steps=1),
)


def pool(n: int = 3, name: str = "api") -> list[BlackBox]:
    """Make linear APIs of three classes."""

    def api(number: int) -> BlackBox:
        weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(number))
        spec = bf.APISpec(3, (1, 16, 16), (-1.0, 1.0), name=f"{name} {number}")
        return bf.FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)

    return [api(number) for number in range(n)]


class Notes(bf.Callback):
    """Keep all that is called; raise an error at record number `fails_at`, counted from 1."""

    def __init__(self, fails_at: int = 0) -> None:
        self.infos: list[RunInfo] = []
        self.records: list[dict[str, Any]] = []
        self.ends: list[Run | None] = []
        self.fails_at = fails_at

    def on_start(self, info: RunInfo) -> None:
        self.infos.append(info)

    def on_record(self, record: dict[str, Any]) -> None:
        self.records.append(dict(record))
        if len(self.records) == self.fails_at:
            raise RuntimeError("the disk of the board is full")

    def on_end(self, run: Run | None) -> None:
        self.ends.append(run)


class Meddler(bf.Callback):
    """Draw from every global generator and spoil the records it is given."""

    def on_record(self, record: dict[str, Any]) -> None:
        torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
        record.clear()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record | {"seconds": 0} for record in records]


def assert_same(a: Run, b: Run) -> None:
    left, right = a.meta_model.module.state_dict(), b.meta_model.module.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for ours, theirs in zip(a.recovered, b.recovered, strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_callbacks_get_the_lines_of_the_metrics_and_change_no_number(tmp_path: Path) -> None:
    plain = BiDfMKD(pool(), config=TINY).fit(tmp_path / "plain", progress=False)
    folder, notes = tmp_path / "run", Notes()
    run = BiDfMKD(pool(), config=TINY).fit(folder, False, [Meddler(), notes])
    assert_same(run, plain)
    assert notes.records == lines_of(folder) == run.history
    assert without_seconds(run.history) == without_seconds(plain.history)
    assert {record["stage"] for record in notes.records} == {
        "survey",
        "recovery",
        "distillation",
        "replay",
    }
    assert [r["epoch"] for r in notes.records if r["stage"] == "survey"] == [1, 2, 3]
    assert [r["sets"] for r in notes.records if r["stage"] == "recovery"] == [1, 2, 3, 4, 5, 6]
    (info,), (end,) = notes.infos, notes.ends
    assert end is run and (folder / META_MODEL).is_file()
    assert info == RunInfo(TINY, ("api 0", "api 1", "api 2"), run.queries, folder)


def test_a_run_without_a_folder_has_callbacks_too() -> None:
    notes = Notes()
    run = BiDfMKD(pool(), config=TINY).fit(progress=False, callbacks=[notes])
    assert notes.records == run.history and notes.ends == [run]
    assert notes.infos[0].run_dir is None


# Records 1 to 3 are of the survey, 4 to 7 of the first group, 8 of its distillation.
@pytest.mark.parametrize("fails_at", [2, 5, 9])
def test_what_a_callback_raises_ends_a_run_that_can_be_continued(
    tmp_path: Path, fails_at: int
) -> None:
    whole = BiDfMKD(pool(), config=TINY).fit(tmp_path / "whole", progress=False)
    folder, first, other = tmp_path / "run", Notes(fails_at), Notes()
    with pytest.raises(RuntimeError, match="the board is full"):
        BiDfMKD(pool(), config=TINY).fit(folder, False, [first, other])
    assert len(first.records) == fails_at == len(lines_of(folder))
    assert len(other.records) == fails_at - 1  # it comes after the one that failed
    assert first.ends == other.ends == [None]

    notes, apis = Notes(), pool()
    run = BiDfMKD(apis, config=TINY).fit(folder, False, [notes])
    assert_same(run, whole)
    assert run.queries == whole.queries  # nothing was asked twice
    assert without_seconds(first.records + notes.records) == without_seconds(whole.history)
    assert lines_of(folder) == run.history and notes.ends == [run]


def test_a_run_cut_off_twice_gives_no_record_twice(tmp_path: Path) -> None:
    """Cut the second process off before it reaches the place where the first one was."""
    folder, seen = tmp_path / "run", []
    notes = Notes(9)
    with pytest.raises(RuntimeError):
        BiDfMKD(pool(), config=TINY).fit(folder, False, [notes])
    seen += notes.records
    before = (folder / METRICS).read_text()
    # A process that is killed may leave half a line behind.
    (folder / METRICS).write_text(before + '{"stage": "repl')

    class Interrupted(Exception):
        pass

    def cut_off(*_: object) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("bidfmkd_fast.training.loop.replay", cut_off)
        BiDfMKD(pool(), config=TINY).fit(folder, False, [second := Notes()])
    assert second.records == [] and (folder / METRICS).read_text().startswith(before)
    run = BiDfMKD(pool(), config=TINY).fit(folder, False, [third := Notes()])
    about = [
        {name: r.get(name) for name in ("stage", "step", "epoch", "api", "set", "loss")}
        for r in (*seen, *third.records, *run.history)
    ]
    assert about[: len(run.history)] == about[len(run.history) :]
    assert lines_of(folder) == run.history


def test_a_failing_start_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(Notes):
        def on_start(self, info: RunInfo) -> None:
            raise ConnectionError("no board here")

    folder, first, broken, apis = tmp_path / "run", Notes(), Broken(), pool()
    with pytest.raises(ConnectionError, match="no board here"):
        BiDfMKD(apis, config=TINY).fit(folder, False, [first, broken])
    assert not folder.exists() and sum(api.ledger.queries for api in apis) == 0
    assert first.ends == [None] and broken.ends == []


def test_a_failing_end_leaves_a_finished_run(tmp_path: Path) -> None:
    class Broken(Notes):
        def on_end(self, run: Run | None) -> None:
            raise ConnectionError("no board here")

    folder, first = tmp_path / "run", Notes()
    with pytest.raises(ConnectionError, match="no board here"):
        BiDfMKD(pool(), config=TINY).fit(folder, False, [first, Broken()])
    assert first.ends[0] is not None and RunFolder.open(folder).complete


def test_callbacks_see_no_secret() -> None:
    register("s3cret-token")
    apis, notes = pool(1, "s3cret-token"), Notes()
    BiDfMKD(apis, config=TINY).fit(progress=False, callbacks=[notes])
    assert notes.infos[0].apis == ("<secret> 0",)
    assert {r["api"] for r in notes.records if "api" in r} == {"<secret> 0"}


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (Notes(), "callbacks must be a list of bf.Callback; got Notes"),
        (print, "callbacks must be a list of bf.Callback; got builtin_function_or_method"),
        ([Notes], "must be instances of a subclass of bf.Callback; got the class Notes"),
        ([Notes(), print], "must be instances of a subclass of bf.Callback; got builtin"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_asked(
    tmp_path: Path, callbacks: Any, said: str
) -> None:
    apis = pool()
    with pytest.raises(InputTypeError, match=f"^BiDfMKD.fit: callbacks .*{said.split(' ', 1)[1]}"):
        BiDfMKD(apis, config=TINY).fit(tmp_path / "run", False, callbacks)
    assert not (tmp_path / "run").exists() and not apis[0].ledger.queries
