"""Check that plan, folder under way and finished run give the same numbers of what was spent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox, RemoteBlackBox
from bidfmkd_fast.black_box.ledger_file import read_ledger
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import DistillationConfig, ReplayConfig, TrainConfig, fit_with_control
from bidfmkd_fast.training.plan import plan
from bidfmkd_fast.training.run_cost import run_cost
from bidfmkd_fast.training.spending import Cap, Spending, over_cap, read_spending
from bidfmkd_fast.training.status import LOCK, status_text

TINY = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=1),
    replay=ReplayConfig(final_steps=1, n_query=2, inner_steps=1),
)
# The costs for one API: 2 sets of 9 images, without steps and with 2 steps of 1 + 2 rows.
CONTROL, RUN = Cost(18, 2, 0.036), Cost(108, 4, 0.216)


def api(number: int = 0) -> BlackBox:
    weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(number)) / 8
    spec = APISpec(3, (1, 16, 16), name=f"api {number}", price_per_1000=2.0)
    return FunctionBlackBox(lambda images: images.flatten(1) @ weight, spec)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file below a folder."""
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")}


def numbers(rows: list[list[str]]) -> dict[str, list[str]]:
    """Return the cells of a spending table by the first cell of their row."""
    return {row[0]: row[1:] for row in rows[1:]}


def test_a_plan_has_the_numbers_that_the_run_then_spends(tmp_path: Path) -> None:
    assert list(numbers(plan([api()], TINY).spending.rows()))[:2] == ["probes", "run, planned"]
    planned = numbers(plan([api()], TINY, controls=True).spending.rows())
    assert planned["control, planned"] == ["18", "2", "0.036"]
    assert planned["run, planned"] == ["108", "4", "0.22"]
    fit_with_control(
        [api()],
        tmp_path / "run",
        TINY,
        budget=Budget(max_queries=5000, max_cost=12.5),
        progress=False,
    )
    read = read_spending(tmp_path / "run")
    assert read.parts["control"] == CONTROL
    assert read.parts["run"].queries == RUN.queries and read.parts["run"].price == pytest.approx(
        RUN.price
    )
    assert read.planned is not None and read.planned.queries == read.total.queries
    assert numbers(read.rows())["cap"] == ["5,000", "none", "12.50"]
    assert numbers(read.rows())["all"] == ["126", "6", "0.25"]


def test_a_plan_over_its_budget_says_so() -> None:
    parts = {"probes": Cost(166, 8, 1.0), "control, planned": CONTROL, "run, planned": RUN}
    assert over_cap(Spending(parts, cap=Cap(queries=292, requests=14))) == []
    (line,) = over_cap(Spending(parts, cap=Cap(queries=291)))
    assert line == "over the budget with the probes: queries are 292, the cap is 291"
    (line,) = over_cap(Spending(parts, cap=Cap(queries=125)))
    assert "queries of control and run are 126, the cap is 125" in line and "--max-queries" in line
    (line,) = over_cap(Spending(parts, cap=Cap(price=0.1)))
    assert "cost of control and run are 0.25, the cap is 0.1" in line
    del parts["control, planned"]
    assert over_cap(Spending(parts, cap=Cap(queries=274))) == []
    (line,) = over_cap(Spending(parts, cap=Cap(queries=107)))
    assert "queries of the run are 108, the cap is 107" in line


def test_an_api_that_cannot_be_used_has_no_plan() -> None:
    spec = APISpec(3, (1, 16, 16), name="labels", price_per_1000=2.0)
    labels = FunctionBlackBox(lambda images: torch.eye(3)[images.flatten(1)[:, :3].argmax(1)], spec)
    made = plan([labels, api()], TINY)
    assert made.rows()[1][-3:] == ["-", "-", "-"]
    assert made.total.queries == RUN.queries
    made = plan([labels, api()], TINY, controls=True)
    assert made.total.queries == CONTROL.queries + RUN.queries
    assert list(plan([labels], TINY).spending.parts) == ["probes"]


def test_the_cap_of_several_apis() -> None:
    first, second = Budget(max_queries=5, max_cost=1.5), Budget(max_queries=7)
    assert Cap.of([first, first]) == Cap(5, None, 1.5)
    assert Cap.of([first, second]) == Cap(12, None, None)
    assert Cap.of([first, None]) == Cap.of([None]) == Cap.of([]) == Cap()


def test_a_service_is_not_contacted_to_be_counted() -> None:
    spec = APISpec(3, (1, 16, 16), name="dead", max_batch=4)
    dead = RemoteBlackBox("http://127.0.0.1:9", "dead", spec=spec, retries=0)
    assert run_cost(dead, TINY) == Cost(108, 2 * 2 * 7)  # 27 images a step, in requests of 4
    assert dead.ledger.requests == 0


WRITER = """
import os, signal, sys
from pathlib import Path
from bidfmkd_fast.black_box.ledger_file import LedgerFile
ledger = LedgerFile(Path(sys.argv[1]))
ledger.begin(0, "api 0")
for _ in range(100):
    ledger.add(0, queries=3, requests=1, cost=0.5)
print("counted", flush=True)
if sys.stdin.readline() == "kill\\n":
    os.kill(os.getpid(), signal.SIGKILL)
ledger.close()
"""


@pytest.mark.parametrize("ending", ["kill", "close"])
def test_a_ledger_is_read_while_it_is_written_and_after(ending: str, tmp_path: Path) -> None:
    file = tmp_path / "a folder%20" / "ledger.sqlite"
    file.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "counted\n"
    for done in (False, True):
        if done:
            process.communicate(f"{ending}\n", timeout=60)
        before = files(tmp_path)
        (row,) = read_ledger(file)
        assert (row.name, row.queries, row.requests, row.cost) == ("api 0", 300, 100, 50.0)
        assert files(tmp_path) == before
    assert process.returncode == (-signal.SIGKILL if ending == "kill" else 0)
    file.write_bytes(b"no ledger" * 1000)
    Path(f"{file}-wal").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"ledger\.sqlite cannot be read"):
        read_ledger(file)


def test_status_of_a_run_that_is_finished_cut_off_or_under_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit_with_control([api(0), api(1)], folder, TINY, progress=False)
    before = files(tmp_path)
    text = status_text(folder)
    assert text.startswith(f"{folder}: finished\n")
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:] if line}
    assert lines["control"][0] == "36" and lines["run"][0] == "216"
    assert lines["all"] == lines["planned"] == ["252", "12", "0.5"]
    assert files(tmp_path) == before
    (folder / "meta_model.safetensors").unlink()
    (folder / "recovered" / "api_001_query.safetensors").unlink()
    (folder / "summary.json").unlink()
    assert status_text(folder).startswith(f"{folder}: cut off, 3 of 4 sets recovered\n")
    assert "run           216" in status_text(folder)  # read from the ledger
    (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    assert (
        f"under way (process {os.getpid()} on {socket.gethostname()}), 3 of 4 sets"
        in status_text(folder)
    )
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    (folder / LOCK).write_text(f"process {gone.stdout.strip()} on {socket.gethostname()}")
    assert "cut off, 3 of 4 sets" in status_text(folder)  # the process of the lock is gone


def test_status_while_a_run_is_under_way(tmp_path: Path) -> None:
    """Ask for the status from inside the run, in the middle of a set."""
    seen: list[str] = []
    weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(0)) / 8

    def scores(images: torch.Tensor) -> torch.Tensor:
        if (tmp_path / "run" / "config.yaml").is_file():
            seen.append(status_text(tmp_path / "run"))
        return images.flatten(1) @ weight

    spec = APISpec(3, (1, 16, 16), name="api 0")
    fit_with_control([FunctionBlackBox(scores, spec)], tmp_path / "run", TINY, progress=False)
    asked = [
        next(line.split()[1] for line in text.splitlines() if line.startswith("run "))
        for text in seen
    ]
    assert asked == ["27", "54", "81", "108"]  # queries are counted before they are asked
    assert "0 of 2 sets" in seen[0] and "1 of 2 sets" in seen[-1]
    assert all("planned" in text for text in seen)


def test_status_of_a_folder_of_several_runs(tmp_path: Path) -> None:
    for name in ("one", "two.partial"):
        at = tmp_path / "cells" / name
        fit_with_control([api()], at, TINY, progress=False)
    # A method that uses the sets of another method and has asked nothing itself.
    average = tmp_path / "cells" / "average"
    average.mkdir()
    (average / "summary.json").write_text(json.dumps({"queries": 108, "seconds": {}, "ledger": []}))
    (average / "meta_model.safetensors").touch()
    text = status_text(tmp_path)
    assert "cells/one/control" in text and "cells/two " in text
    assert next(line.split()[1] for line in text.splitlines() if line.startswith("all ")) == "252"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("plan.json", lambda held: [held], "it must hold values by name; got list"),
        ("plan.json", lambda held: {"planned": held["planned"]}, "it lacks cap, sets"),
        (
            "plan.json",
            lambda held: held | {"planned": {"queries": "many"}},
            "planned.queries must be of type int",
        ),
        ("plan.json", lambda held: held | {"cap": {"query": 3}}, "unknown key 'cap.query'"),
        ("summary.json", lambda held: None, "it must hold values by name; got NoneType"),
        (
            "summary.json",
            lambda held: {"requests": 3} | {"ledger": held["ledger"]},
            "it lacks queries, seconds, apis",
        ),
        (
            "summary.json",
            lambda held: held | {"matched": 3},
            "matched must be of type dict; got int",
        ),
        (
            "summary.json",
            lambda held: held | {"ledger": [{"queries": 1}]},
            "it lacks number, name, requests",
        ),
        (
            "summary.json",
            lambda held: held | {"ledger": [held["ledger"][0] | {"cost": "x"}]},
            "cost must be of type",
        ),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, damage: Callable[[Any], Any], says: str
) -> None:
    fit_with_control([api()], tmp_path, TINY, progress=False)
    file = tmp_path / name
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        status_text(tmp_path)


def test_what_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run; give a folder of"):
        status_text(tmp_path)
    with pytest.raises(InputError, match="there is no folder .*nowhere"):
        status_text(tmp_path / "nowhere")
    fit_with_control([api()], tmp_path / "old", TINY, progress=False)
    for file in tmp_path.rglob("plan.json"):  # folders of older versions have none
        file.unlink()
    assert "planned" not in status_text(tmp_path / "old")
    (tmp_path / "old" / "plan.json").write_text("[")
    with pytest.raises(InputError, match="plan.json cannot be read as JSON"):
        status_text(tmp_path / "old")


def test_a_run_that_came_to_nothing_leaves_no_plan(tmp_path: Path) -> None:
    dead = RemoteBlackBox(
        "http://127.0.0.1:9",
        "dead",
        spec=APISpec(3, (1, 16, 16), name="dead"),
        retries=0,
        timeout=1.0,
    )
    with pytest.warns(UserWarning), pytest.raises(Exception, match="dead"):
        fit_with_control([dead], tmp_path / "run", TINY, progress=False)
    assert not list(tmp_path.rglob("plan.json"))
