"""Kill a run in the middle of sets, again and again: it ends the same, and asks little twice."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from killing import (
    CONFIG,
    DIRECTIONS,
    SET,
    STEPS,
    B,
    answers_of,
    asked,
    command,
    exit_code,
    fit_local,
    fit_remote,
    process,
    queries,
    spec_of,
)  # fmt: skip
from safetensors.torch import load_file
from torch import Tensor

from bidfmkd_fast.black_box import FunctionBlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.recovery import journal
from bidfmkd_fast.training import BiDfMKD, Run
from bidfmkd_fast.training.run_folder import LEDGER, META_MODEL, METRICS

KILLED = -signal.SIGKILL
# Kills in a call to an API, half way through writing a record, and before a snapshot gets its name.
MOMENTS = [
    ("call", 1), ("call", 2), ("call", 6), ("record", 2), ("snapshot", 1),
    ("call", 1), ("record", 5), ("call", 7), ("snapshot", 2), ("call", 3),
]  # fmt: skip


def assert_same_sets(folder: Path, other: Path) -> None:
    """Check that two folders hold files of the same names and tensors."""
    names = sorted(file.name for file in other.iterdir())
    assert names == sorted(file.name for file in folder.iterdir())
    for name in names:
        ours, theirs = load_file(folder / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def spent(folder: Path) -> int:
    """Return the queries that the ledger of a run has counted."""
    ledger = LedgerFile(folder / LEDGER)
    try:
        return sum(row.queries for row in ledger.rows())
    finally:
        ledger.close()


def test_ten_kills_in_the_middle_of_sets(tmp_path: Path) -> None:
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert exit_code(fit_local, whole, tmp_path / "whole log", None) == 0
    once = asked(tmp_path / "whole log")
    assert set(once.values()) == {1} and len(once) == 4 * STEPS
    for number, moment in enumerate(MOMENTS, start=1):
        assert exit_code(fit_local, folder, log, moment) == KILLED, moment
        again = asked(log)
        # The call that this kill cut off has not been repeated yet.
        assert sum(again.values()) - len(again) <= number - 1
        assert spent(folder) == queries(log)
    # The budget pays exactly for what is left and for the call that the last kill cut off.
    left = sum(times for call, times in (once - again).items()) * (1 + DIRECTIONS) * B
    last = (1 + DIRECTIONS) * B
    assert exit_code(fit_local, folder, log, None, queries(log) + left + last) == 0
    again = asked(log)
    assert again.keys() == once.keys()
    assert sum(again.values()) - len(again) <= len(MOMENTS)
    # Tensors are compared, not bytes, since safetensors writes the metadata's keys in any order.
    learned, wanted = load_file(folder / META_MODEL), load_file(whole / META_MODEL)
    assert learned.keys() == wanted.keys()
    assert all(torch.equal(learned[name], wanted[name]) for name in wanted)
    assert_same_sets(folder / "recovered", whole / "recovered")  # the journals are gone
    assert len((folder / METRICS).read_text().splitlines()) == len(
        (whole / METRICS).read_text().splitlines()
    )


def test_a_task_model_that_draws_goes_on_with_the_draws_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut a query set off in its fifth step, after a snapshot; the meta-model has dropout."""
    monkeypatch.setattr(journal, "SNAPSHOT_STEPS", 3)
    monkeypatch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)
    meta_model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(256, 3)
    )
    answer = answers_of(0)

    def run(at: int | None, folder: Path) -> Run:
        calls = itertools.count(1)

        def score(images: Tensor) -> Tensor:
            if next(calls) == at:
                raise OSError("no such device")
            return answer(images)

        api = FunctionBlackBox(score, spec_of(0))
        return BiDfMKD([api], meta_model=meta_model, config=CONFIG).fit(folder, progress=False)

    wanted = run(None, tmp_path / "whole")
    with pytest.raises(OSError, match="device"):
        run(STEPS + 5, tmp_path / "run")
    assert (tmp_path / "run" / "recovered" / "api_000_query.journal" / "snapshot").is_file()
    resumed = run(None, tmp_path / "run")
    for ours, theirs in zip(resumed.recovered, wanted.recovered, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.recovered.history == theirs.recovered.history
    assert resumed.queries == wanted.queries + (1 + DIRECTIONS) * B


def test_services_asked_side_by_side_and_killed(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("uvicorn")
    from bidfmkd_fast.serving.behaviour import Behaviour
    from bidfmkd_fast.serving.server import Service, running

    lock, seen, kills = (
        threading.Lock(),
        [Counter[bytes]() for _ in range(3)],
        [40, 200, 300, 500, 800],
    )
    victim: list[int] = []

    def watched(number: int) -> FunctionBlackBox:
        answer = answers_of(number)

        def score(images: Tensor) -> Tensor:
            with lock:
                seen[number].update(image.numpy().tobytes() for image in images)
                if kills and victim and sum(map(Counter.total, seen)) >= kills[0]:
                    kills.pop(0)
                    os.kill(victim.pop(), signal.SIGKILL)
            return answer(images)

        return FunctionBlackBox(score, spec_of(number))

    folder = tmp_path / "run"
    service = Service(
        [watched(number) for number in range(3)],
        {f"api_{n}": Behaviour(max_batch=9) for n in range(3)},
        seed,
    )
    with running(service) as url:
        for killed in range(len(kills) + 1):
            worker = process(fit_remote, folder, url)
            victim.append(worker.pid)
            worker.join(120)
            assert worker.exitcode == (KILLED if killed < 5 else 0)
    wanted = BiDfMKD(
        [FunctionBlackBox(answers_of(n), spec_of(n)) for n in range(3)], config=CONFIG
    ).fit(progress=False)
    state = load_file(folder / META_MODEL)
    for name, value in wanted.meta_model.module.state_dict().items():
        assert torch.equal(state[name] if name in state else state[f"module.{name}"], value), name
    for images in seen:
        assert len(images) == 2 * SET
        # At each of the 5 kills a service had at most one step under way.
        assert images.total() - 2 * SET <= 5 * (1 + DIRECTIONS) * B


def test_recover_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    settings = [
        f"--config.{name}"
        for name in ("steps=8", "num_directions=2", "generator_width=4", "latent_dim=8", "mu=auto")
    ]
    log, other = tmp_path / "log", tmp_path / "whole log"

    def arguments(out: str, *more: str) -> list[str]:
        return [
            "recover",
            "--pool",
            "any",
            "--n-per-class",
            "3",
            "--out",
            str(tmp_path / out),
            *settings,
            *more,
        ]

    assert exit_code(command, arguments("whole"), None, other) == 0
    for kill_at in (5, 1, 3):  # the first call measures mu
        assert exit_code(command, arguments("out"), kill_at, log) == KILLED
    assert (tmp_path / "out" / "api_000_support.journal").is_dir()
    other_settings = arguments("out", "--config.learning_rate=1")
    assert exit_code(command, other_settings, None, log) == 2
    # `log` holds three calls that were killed, which are made again: a step for each.
    rest = queries(other) - queries(log)
    step = (1 + DIRECTIONS) * B
    budget = str(queries(log) + rest + 3 * step)
    assert exit_code(command, arguments("out", "--max-queries", budget), None, log) == 0
    assert queries(log) == int(budget)
    ours, whole = ({file.name for file in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert ours == whole == {"api_000_support.safetensors", "api_000_support.png"}
    (tmp_path / "out" / "api_000_support.png").unlink()
    (tmp_path / "whole" / "api_000_support.png").unlink()
    assert_same_sets(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("empty", [False, True])
def test_recover_counts_what_it_was_answered_where_the_ledger_was_lost(
    tmp_path: Path, empty: bool
) -> None:
    settings = ("steps=8", "num_directions=2", "generator_width=4", "latent_dim=8", "mu=auto")
    arguments = ["recover", "--pool", "any", "--n-per-class", "3", "--out", str(tmp_path / "out")]
    arguments += [f"--config.{name}" for name in settings]
    log = tmp_path / "log"
    assert exit_code(command, arguments, 4, log) == KILLED
    # The last call was killed before it was answered.
    answered = queries(log) - (1 + DIRECTIONS) * B
    ledger = tmp_path / "out" / "api_000_support.journal" / LEDGER
    for file in ledger.parent.glob(f"{LEDGER}*"):
        file.unlink()
    if empty:
        ledger.touch()
    assert (
        exit_code(
            command, [*arguments, "--max-queries", str(answered + (1 + DIRECTIONS) * B)], None, log
        )
        == 0
    )
    # The budget pays one step more; the step that was killed is in the log as well.
    assert queries(log) == answered + 2 * (1 + DIRECTIONS) * B
