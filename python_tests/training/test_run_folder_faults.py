"""Break run folders: second runs, lost ledgers, damaged files, full disks, removed folders."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training.test_resume import STEP, TINY, asked, interrupted, pool, run_in_process

from bidfmkd_fast.black_box import BlackBox, Budget, FunctionBlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.training import BiDfMKD, Run, TrainConfig, fit_with_control, with_control
from bidfmkd_fast.training.recovered_set import bytes_of_set
from bidfmkd_fast.training.run_folder import LEDGER, META_MODEL, RunFolder
from bidfmkd_fast.training.run_state import RunState

SUPPORT = "recovered/api_000_support.safetensors"
SET = 2 * STEP  # queries of a set


def calling(api: BlackBox, act: Callable[[], Any]) -> BlackBox:
    """Return the same API, which calls `act` before it answers."""

    def answer(images: torch.Tensor) -> torch.Tensor:
        act()
        return api.score(images)

    return FunctionBlackBox(answer, api.spec)


def test_a_second_fit_in_the_same_process_is_refused_before_it_asks(tmp_path: Path) -> None:
    folder, log, other_log = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    refused: list[str] = []

    def fit_again() -> None:
        for fit in (
            lambda: BiDfMKD(pool(other_log), config=TINY).fit(folder),
            lambda: fit_with_control(pool(other_log), folder, TINY),
        ):
            with pytest.raises(InputError) as caught:
                fit()
            refused.append(str(caught.value))

    apis = pool(log)
    run = BiDfMKD([calling(apis[0], fit_again), *apis[1:]], config=TINY).fit(folder)
    assert len(refused) == 2 * 4
    assert (
        set(refused) == {refused[0]}
        and f"{folder} is in use by process {os.getpid()} on " in refused[0]
    )
    assert asked(other_log) == [] and run.complete and run.queries == sum(asked(log))
    assert not (folder / "run.lock").exists()


def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "from training.test_run_folder_faults import *\n"
        "def wait(): print('asked', flush=True); time.sleep(600)\n"
        f"apis = pool(Path({str(log)!r}))\n"
        f"BiDfMKD([calling(apis[0], wait)], config=TINY).fit({str(folder)!r})\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "asked\n"
        started = time.monotonic()
        with pytest.raises(InputError, match=f"in use by process {first.pid} on "):
            BiDfMKD(pool(log)[:1], config=TINY).fit(folder)
        assert time.monotonic() - started < 1 and asked(log) == []
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert BiDfMKD(pool(log)[:1], config=TINY).fit(folder).complete


def lost_ledger(folder: Path, how: str) -> None:
    """Remove the ledger, or replace it by one that is empty or has no rows."""
    if how == "missing":
        (folder / LEDGER).unlink()
    elif how == "empty":
        (folder / LEDGER).write_bytes(b"")
    else:
        (folder / LEDGER).unlink()
        LedgerFile(folder / LEDGER).close()


@pytest.mark.parametrize("how", ["missing", "empty", "without rows"])
def test_a_lost_ledger_is_rebuilt_from_the_sets(tmp_path: Path, how: str) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run_in_process(folder, log, 11)  # five sets are finished
    before = sum(asked(log))
    lost_ledger(folder, how)
    budget = Budget(max_queries=10**6)
    with pytest.warns(
        UserWarning, match="ledger.sqlite or the end of it was lost, .*; 270 queries were added"
    ):
        run = BiDfMKD(pool(log), config=TINY, budget=budget).fit(folder)
    # All calls are counted but the killed one, which is in no set.
    assert run.queries == budget.queries == sum(asked(log)) - STEP == before - STEP + 3 * SET
    assert sum(row.cost for row in run.ledger) == pytest.approx(run.queries * 2 / 1000)


def test_a_budget_that_is_spent_stays_spent_without_the_ledger(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run_in_process(folder, log, 11)
    lost_ledger(folder, "missing")
    n_asked = len(asked(log))
    with pytest.warns(UserWarning, match="queries were added"):
        run = BiDfMKD(pool(log), config=TINY, budget=Budget(max_queries=5 * SET)).fit(folder)
    assert run.budget_ended and len(asked(log)) == n_asked


@pytest.mark.parametrize(
    "spoil", [lambda data: b"x" * 500, lambda data: data[:100] + b"x" * 5000 + data[5100:]]
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    folder, log = interrupted(tmp_path)
    (folder / LEDGER).write_bytes(spoil((folder / LEDGER).read_bytes()))
    n_asked = len(asked(log))
    with pytest.raises(
        InputError, match="ledger.sqlite cannot be used: .*; remove it, and the run counts"
    ):
        BiDfMKD(pool(log), config=TINY).fit(folder)
    assert len(asked(log)) == n_asked
    (folder / LEDGER).unlink()
    with pytest.warns(UserWarning, match="queries were added"):
        assert BiDfMKD(pool(log), config=TINY).fit(folder).queries == sum(asked(log))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("mu", [0.025, "auto"])
def test_a_whole_ledger_is_left_alone(tmp_path: Path, mu: float | str) -> None:
    config = replace(TINY, recovery=replace(TINY.recovery, mu=mu))
    log = tmp_path / "log"
    run = BiDfMKD(pool(log), config=config).fit(tmp_path / "run")
    (tmp_path / "run" / META_MODEL).unlink()
    again = BiDfMKD(pool(log), config=config).fit(tmp_path / "run")
    assert again.queries == run.queries == sum(asked(log))


def test_a_finished_control_is_read_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    _, control = fit_with_control(pool(log), folder, TINY)
    (folder / META_MODEL).unlink()  # as if the run had been cut off at its end
    files = {file: file.read_bytes() for file in (folder / "control").rglob("*.*")}
    made: list[TrainConfig] = []
    run_loop = with_control.run_loop

    def counted(run: RunState) -> Run:
        made.append(run.config)
        return run_loop(run)

    monkeypatch.setattr(with_control, "run_loop", counted)
    budget = Budget(max_queries=10**6)
    _, again = fit_with_control(pool(log), folder, TINY, budget=budget)
    assert made == [TINY]
    assert files == {file: file.read_bytes() for file in (folder / "control").rglob("*.*")}
    assert (again.queries, again.requests, again.ledger) == (
        control.queries,
        control.requests,
        control.ledger,
    )
    assert again.history == control.history and again.memory.classes == control.memory.classes
    assert (
        len(again.recovered) == len(control.recovered)
        and again.complete
        and again.config == control.config
    )
    for read, made_before in zip(again.recovered, control.recovered):
        assert torch.equal(read.images, made_before.images)
        assert (read.api_name, read.part) == (made_before.api_name, made_before.part)
    ours, theirs = again.meta_model.module.state_dict(), control.meta_model.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_control_that_a_budget_ended_goes_on(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    BiDfMKD(pool(log), config=TINY.control(), budget=Budget(max_queries=3 * 9)).fit(
        folder / "control"
    )
    _, control = fit_with_control(pool(log), folder, TINY)
    assert control.complete and len(control.recovered) == 8


def spoilt(file: Path, **changes: torch.Tensor) -> None:
    """Write other tensors to a file without a checksum, as earlier versions did."""
    with safe_open(file, framework="pt") as opened:
        about = {key: value for key, value in opened.metadata().items() if key != "checksum"}
    save_file({**load_file(file), **changes}, file, metadata=about)


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def folder_in_its_place(file: Path) -> None:
    """Put a folder in the place of a file."""
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip, "it is damaged: its content does not match its checksum"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "is not readable"),
        (folder_in_its_place, "it is a folder"),
        (
            lambda file: spoilt(file, images=torch.full((9, 1, 16, 16), torch.nan)),
            "its images must be finite",
        ),
        (
            lambda file: spoilt(file, scores=torch.full((9, 3), torch.inf)),
            "its scores must be finite",
        ),
        (
            lambda file: spoilt(file, images=torch.zeros(8, 1, 16, 16)),
            r"must be \[9, 1, 16, 16\]; got \[8, 1, 16, 16\]",
        ),
        (
            lambda file: spoilt(file, labels=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 77])),
            r"in order, 3 .*got 0\.\.77",
        ),
        (lambda file: spoilt(file, history=torch.zeros(3)), "its history is not a table of steps"),
        (lambda file: save_file({"x": torch.zeros(1)}, file), "it lacks images, labels"),
    ],
)
def test_a_spoilt_set_is_refused_by_name_before_anything_is_asked(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    folder, log = interrupted(tmp_path)
    spoil(folder / SUPPORT)
    n_asked = len(asked(log))
    with pytest.raises(
        InputError, match=f"{folder / SUPPORT} is damaged .*{reason}.*remove it to have it"
    ) as caught:
        BiDfMKD(pool(log), config=TINY).fit(folder)
    assert len(asked(log)) == n_asked and "\n" not in str(caught.value)


def test_sets_without_a_checksum_still_open(tmp_path: Path) -> None:
    folder, log = interrupted(tmp_path)
    spoilt(folder / SUPPORT)
    n_asked = len(asked(log))
    assert BiDfMKD(pool(log), config=TINY).fit(folder).complete
    assert len(asked(log)) == n_asked + 12


def test_a_memory_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    BiDfMKD(pool(tmp_path / "log", n=1), config=TINY).fit(tmp_path / "run")
    flip(tmp_path / "run" / "memory.safetensors")
    with pytest.raises(InputError, match="memory.safetensors is damaged"):
        RunFolder(tmp_path / "run").memory()


def test_the_size_of_a_set_is_known_before_it_is_asked_for(tmp_path: Path) -> None:
    folder, log = interrupted(tmp_path)
    size = (folder / SUPPORT).stat().st_size
    wanted = bytes_of_set(pool(log)[0].spec, TINY.n_per_class, TINY.recovery.steps)
    assert size <= wanted < size + 5000


def test_a_disk_that_runs_full_loses_nothing_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    take, left = os.posix_fallocate, [3]

    def limited(*arguments: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        take(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    with pytest.raises(
        InputError, match="api_001_query.safetensors: No space left on device; free some space"
    ):
        BiDfMKD(pool(log), config=TINY).fit(folder)
    assert sum(asked(log)) == 3 * SET and len(list((folder / "recovered").iterdir())) == 3
    monkeypatch.undo()
    run = BiDfMKD(pool(log), config=TINY).fit(folder)
    assert run.complete and sum(asked(log)) == run.queries == 8 * SET


@pytest.mark.parametrize(
    "name", ["config.yaml", "summary.json", "recovered/api_000_support.safetensors"]
)
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, name: str) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    (folder / "recovered").mkdir(parents=True)
    (folder / f"{name}.partial").symlink_to("/dev/full")
    if "recovered" in name:
        (folder / "recovered").rename(folder / "before")
        (folder / "recovered").symlink_to("/proc/self/fd")  # no file can be made there
    with pytest.raises(InputError, match="cannot write to "):
        BiDfMKD(pool(log), config=TINY).fit(folder)
    assert asked(log) == []


def test_a_folder_that_is_removed_midway_stops_the_run_before_the_next_request(
    tmp_path: Path,
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    apis = pool(log)
    apis[1] = calling(apis[1], lambda: shutil.rmtree(folder))
    with pytest.raises(
        InputError, match=r"ledger.sqlite was removed or replaced during the run"
    ) as caught:
        BiDfMKD(apis, config=TINY).fit(folder)
    # There were 4 calls for both sets of the first API, and the call that removed the folder.
    assert "\n" not in str(caught.value) and len(asked(log)) == 5 and not folder.exists()


def test_a_ledger_that_cannot_be_written_stops_before_the_request(tmp_path: Path) -> None:
    log = tmp_path / "log"
    file, api = LedgerFile(tmp_path / LEDGER), pool(log)[0]
    with api.ledger.written_to(file, 0, api.name):
        file._connection.execute("PRAGMA query_only=ON")
        with pytest.raises(
            InputError,
            match="ledger: cannot count in .*readonly database; nothing was sent uncounted",
        ):
            api(torch.zeros(2, 1, 16, 16))
    assert asked(log) == []
    file.close()
