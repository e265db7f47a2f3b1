"""Share a run out over several processes: the bits, the budget and what a dead process costs."""

from __future__ import annotations

import json
import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from killing import (
    CHECKPOINTED,
    RANK_LOST,
    asked,
    fit_beside_a_service,
    fit_in_rank,
    fit_twice,
    process,
    queries,
)

from bidfmkd_fast.black_box.ledger_file import read_ledger
from bidfmkd_fast.training.run_folder import CHECKPOINTS, LEDGER, META_MODEL, METRICS
from bidfmkd_fast.training.shared_folder import RANK_LEDGERS

KILLED = -signal.SIGKILL
Moment = tuple[str, int]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run_ranks(
    size: int,
    folder: Path,
    log: Path,
    moments: dict[int, Moment] | None = None,
    max_queries: int | None = None,
) -> list[int | None]:
    """Run in `size` processes, which die at their `moments`; return their exit codes."""
    port = free_port()
    started = [
        process(fit_in_rank, rank, size, port, folder, log, (moments or {}).get(rank), max_queries)
        for rank in range(size)
    ]
    for one in started:
        one.join(120)
    return [one.exitcode for one in started]


def n_asked(log: Path) -> int:
    """Return the queries that all ranks together have sent since the last start."""
    return sum(queries(file) for file in log.parent.glob(f"{log.stem}.[0-9]"))


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "queries")} for r in lines]


def assert_same(folder: Path, whole: Path) -> None:
    assert (folder / META_MODEL).read_bytes() == (whole / META_MODEL).read_bytes()
    assert records(folder) == records(whole)
    assert not (folder / CHECKPOINTS).exists() and not list(folder.glob(RANK_LEDGERS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run by one process, with its calls in "log.0"."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(1, folder / "run", folder / "log") == [0]
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_changes_no_bit(size: int, whole: Path, tmp_path: Path) -> None:
    assert run_ranks(size, tmp_path / "run", tmp_path / "log") == [0] * size
    assert_same(tmp_path / "run", whole / "run")
    once = asked(whole / "log.0")
    together = [asked(tmp_path / f"log.{rank}") for rank in range(size)]
    assert sum(together, start=type(once)()) == once  # each call by one rank
    assert sum(map(bool, together)) >= 2
    rows = read_ledger(tmp_path / "run" / LEDGER)
    assert sum(row.queries for row in rows) == n_asked(tmp_path / "log")
    assert (tmp_path / "run/asked").read_text() == (whole / "run/asked").read_text()


def n_calls(whole: Path) -> int:
    return sum(asked(whole / "log.0").values())


@pytest.mark.parametrize(
    ("who", "stage", "then"),
    [(1, "survey", 3), (1, "recovery", 1), (0, "recovery", 2), (2, "replay", 4), (0, "replay", 3)],
)
def test_a_rank_dies_and_the_run_continues_with_another_number(
    who: int, stage: str, then: int, whole: Path, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    moment = {
        "survey": ("call", 1),
        "recovery": ("call", draw.randint(n_calls(whole) // 6, n_calls(whole) // 5)),
        "replay": ("step", draw.randint(10, 14)),
    }[stage]
    folder, log = tmp_path / "run", tmp_path / "log"
    codes = run_ranks(3, folder, log, {who: moment})
    assert codes[who] == KILLED
    others = [code for rank, code in enumerate(codes) if rank != who]
    assert others == [RANK_LOST] * 2
    for rank in {0, 1, 2} - {who}:
        reason = log.with_suffix(f".{rank}.lost").read_text()
        # Rank 0 holds the store here; the agent of torchrun would outlive it.
        assert f"rank {who} of 3" in reason or (who == 0 and "the store of the job" in reason)
    spent = n_asked(log)
    assert run_ranks(then, folder, log) == [0] * then
    assert_same(folder, whole / "run")
    spent += sum(queries(log.with_suffix(f".{rank}")) for rank in range(then))
    once = int((whole / "run/asked").read_text())
    assert int((folder / "asked").read_text()) == spent
    # Of each rank the call in flight, and the points of a step that its journal did not hold.
    assert once <= spent <= once + 3 * max(len_of_step(), 10)


def len_of_step() -> int:
    recovery = CHECKPOINTED.recovery
    return 3 * CHECKPOINTED.n_per_class * (1 + recovery.num_directions)


def test_a_rank_that_does_not_begin_is_named(tmp_path: Path) -> None:
    codes = run_ranks(3, tmp_path / "run", tmp_path / "log", {2: ("start", 0)})
    assert codes == [RANK_LOST, RANK_LOST, KILLED]
    for rank in range(2):
        reason = (tmp_path / f"log.{rank}.lost").read_text()
        assert reason.startswith("ranks: rank 2 of 3 has not begun within 4 s")
    assert not (tmp_path / "run").exists()


def test_a_service_that_fails_is_left_out_by_all_ranks(tmp_path: Path) -> None:
    """Its error is of a class of its own, which the other ranks need not know."""
    port = free_port()
    both = [
        process(fit_beside_a_service, rank, 2, port, tmp_path / "run", tmp_path) for rank in (0, 1)
    ]
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["skipped"]) == ["api_3"] and summary["images"] > 0
    warned = [(tmp_path / f"warned.{rank}").read_text() for rank in (0, 1)]
    assert "api_3: it is left out: too many images" in warned[0] and warned[1] == ""


def test_two_runs_of_one_job_share_nothing(whole: Path, tmp_path: Path) -> None:
    port = free_port()
    both = [process(fit_twice, rank, 2, port, tmp_path) for rank in (0, 1)]
    for one in both:
        one.join(120)
    assert [one.exitcode for one in both] == [0, 0]
    for name in ("one", "two"):
        assert_same(tmp_path / name, whole / "run")


def test_a_budget_caps_all_ranks_together(whole: Path, tmp_path: Path, seed: int) -> None:
    once = int((whole / "run/asked").read_text())
    cap = random.Random(seed).randint(once // 2, once - 1)
    folder, log = tmp_path / "run", tmp_path / "log"
    assert run_ranks(3, folder, log, max_queries=cap) == [0] * 3
    spent = n_asked(log)
    assert cap - 4 * len_of_step() < spent <= cap
    assert sum(row.queries for row in read_ledger(folder / LEDGER)) == spent
    assert json.loads((folder / "summary.json").read_text())["budget_ended"]
    assert not list(folder.glob(RANK_LEDGERS))
