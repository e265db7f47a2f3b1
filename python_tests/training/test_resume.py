"""Continue runs that were cut off: nothing is asked twice, and what was spent counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import APIUnavailable, BudgetExhausted, InputError
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    TrainConfig,
    fit_with_control,
)
from bidfmkd_fast.training.run_folder import LEDGER, META_MODEL, METRICS

STEP = 27
TINY = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=2),
    replay=ReplayConfig(final_steps=2, steps_per_round=1, n_query=2, inner_steps=1),
)


def pool(log: Path, kill_at: int | None = None, n: int = 4) -> list[BlackBox]:
    """Make linear APIs that note each call in `log` before they answer.

    Call number `kill_at`, counted from 1, kills the process.
    """

    def api(number: int) -> BlackBox:
        weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(number))

        def answer(images: torch.Tensor) -> torch.Tensor:
            with log.open("a") as file:
                file.write(f"{number} {len(images)}\n")
            if len(log.read_text().splitlines()) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return images.flatten(1) @ weight

        names = tuple(f"class {number + k}" for k in range(3))
        spec = APISpec(
            3, (1, 16, 16), (-1.0, 1.0), class_names=names, name=f"api {number}", price_per_1000=2.0
        )
        return FunctionBlackBox(answer, spec)

    return [api(number) for number in range(n)]


def asked(log: Path) -> list[int]:
    """Return the number of images of each call."""
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def run_in_process(folder: Path, log: Path, kill_at: int, control: bool = False) -> None:
    """Fit in a process of its own, which call number `kill_at` kills; 0 kills at no call."""
    fit = (
        "fit_with_control(pool(log, at), folder, TINY)"
        if control
        else "BiDfMKD(pool(log, at), config=TINY).fit(folder)"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from test_resume import *\n"
        f"folder, log, at = Path({str(folder)!r}), Path({str(log)!r}), {kill_at}\n{fit}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr


# Every set takes two calls of STEP images, so call 11 is the first of the third API's query set.
@pytest.mark.parametrize(("kill_at", "n_kept"), [(1, 0), (11, 5)])
def test_killed_in_the_middle_and_started_again(tmp_path: Path, kill_at: int, n_kept: int) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run_in_process(folder, log, kill_at)
    assert len(list((folder / "recovered").glob("*.safetensors"))) == n_kept
    before = asked(log)
    ledger = LedgerFile(folder / LEDGER)
    # The ledger has counted the call that was killed, too.
    assert sum(row.queries for row in ledger.rows()) == sum(before)
    ledger.close()

    budget = Budget(max_queries=10**6)
    run = BiDfMKD(pool(log), config=TINY, budget=budget).fit(folder)
    assert len(asked(log)) - len(before) == 16 - 2 * n_kept
    assert run.complete and len(run.recovered) == 8
    assert run.queries == budget.queries == sum(asked(log))
    assert sum(row.cost for row in run.ledger) == pytest.approx(sum(asked(log)) * 2 / 1000)
    assert all(
        (found.recovered.mu, found.recovered.complete) == (0.025, True) for found in run.recovered
    )


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Kill a run, start it again, and run it as a whole, each in a process of its own."""
    folder, log, whole = tmp_path / "run", tmp_path / "log", tmp_path / "whole"
    run_in_process(folder, log, 11)
    run_in_process(folder, log, 0)
    run_in_process(whole, tmp_path / "other", 0)
    files = [
        META_MODEL,
        *(str(file.relative_to(whole)) for file in sorted((whole / "recovered").iterdir())),
    ]
    assert len(files) == 1 + 8
    for name in files:
        ours, theirs = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    lines = [(path / METRICS).read_text().splitlines() for path in (folder, whole)]
    assert len(lines[0]) == len(lines[1])


def test_the_control_is_not_asked_for_again_either(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    # The control takes 8 calls; the fifth call after them is in the second API's support set.
    run_in_process(folder, log, 8 + 5, control=True)
    before = len(asked(log))
    budget = Budget(max_queries=sum(asked(log)) + 12 * STEP)
    run, control = fit_with_control(pool(log), folder, TINY, budget=budget)
    assert len(asked(log)) - before == 16 - 4 and run.complete and control.complete
    assert budget.remaining_queries == 0  # what was spent before counts exactly
    with pytest.raises(InputError, match="holds a run already"):
        fit_with_control(pool(log), folder, TINY)


def test_what_was_spent_before_counts_against_the_budget(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    run_in_process(folder, log, 11)
    before = len(asked(log))
    run = BiDfMKD(pool(log), config=TINY, budget=Budget(max_queries=12 * STEP)).fit(folder)
    assert len(asked(log)) == before + 1 and run.budget_ended
    assert len(run.recovered) == 6  # five from before, and the set of one step more


def interrupted(tmp_path: Path) -> tuple[Path, Path]:
    """Make a folder of a run that was cut off after its first API."""
    folder, log = tmp_path / "run", tmp_path / "log"
    apis = pool(log)

    def fail(images: torch.Tensor) -> torch.Tensor:
        raise OSError("no space left")

    apis[1] = FunctionBlackBox(fail, apis[1].spec)
    with pytest.raises(OSError, match="no space"):
        BiDfMKD(apis, config=TINY).fit(folder)
    return folder, log


def test_what_this_very_process_spent_before_counts_as_well(tmp_path: Path) -> None:
    """Count what was spent before in a new budget, as in a notebook cell that is run again."""
    folder, log = interrupted(tmp_path)
    before = LedgerFile(folder / LEDGER)
    spent = sum(row.queries for row in before.rows())
    before.close()
    assert spent == 5 * STEP  # two sets, and the call that failed
    budget = Budget(max_queries=12 * STEP)
    apis = pool(log)

    def fail(images: torch.Tensor) -> torch.Tensor:
        raise OSError("no space left")

    apis[2] = FunctionBlackBox(fail, apis[2].spec)
    with pytest.raises(OSError, match="no space"):
        BiDfMKD(apis, config=TINY, budget=budget).fit(folder)
    assert budget.queries == spent + 4 * STEP + STEP
    run = BiDfMKD(pool(log), config=TINY, budget=budget).fit(folder)
    assert run.budget_ended and run.queries == budget.queries == 12 * STEP


def test_the_control_asks_nothing_that_the_run_has_spent(tmp_path: Path) -> None:
    """Let the control ask a service again only with what the run has left of the budget."""
    log, down = tmp_path / "log", True
    out_of_disk = 0  # queries after which the run is cut off

    class Service(FunctionBlackBox):
        is_service = True

    def services() -> list[BlackBox]:
        def answering(number: int, api: BlackBox) -> BlackBox:
            def answer(images: torch.Tensor) -> torch.Tensor:
                if number == 1 and down:
                    raise APIUnavailable("it is down")
                if out_of_disk and sum(asked(log)) >= out_of_disk:
                    raise OSError("no space left")
                return api(images)

            return Service(answer, api.spec)

        return [answering(number, api) for number, api in enumerate(pool(log, n=2))]

    cap, out_of_disk = 150, 2 * STEP  # the control spends 36, the run 108 until it is cut off
    with pytest.raises(OSError, match="no space"):
        fit_with_control(services(), tmp_path / "run", TINY, budget=Budget(max_queries=cap))
    down, out_of_disk = False, 0
    budget = Budget(max_queries=cap)
    fit_with_control(services(), tmp_path / "run", TINY, budget=budget)
    ledgers = [
        LedgerFile(folder / LEDGER) for folder in (tmp_path / "run", tmp_path / "run" / "control")
    ]
    assert sum(row.queries for ledger in ledgers for row in ledger.rows()) == budget.queries <= cap
    for ledger in ledgers:
        ledger.close()


def test_other_settings_or_another_pool_are_refused(tmp_path: Path) -> None:
    folder, log = interrupted(tmp_path)
    other = replace(TINY, recovery=replace(TINY.recovery, steps=3))
    with pytest.raises(
        InputError, match=r"a run of other settings \(recovery.steps is 2 there; got 3\)"
    ):
        BiDfMKD(pool(log), config=other).fit(folder)
    with pytest.raises(InputError, match="is 'api 0'; got 'api 1'; is this another pool"):
        BiDfMKD(pool(log)[1:], config=TINY).fit(folder)
    n_asked = len(asked(log))
    BiDfMKD(pool(log), config=TINY).fit(folder)
    assert len(asked(log)) == n_asked + 12


def test_damaged_and_foreign_sets_are_named(tmp_path: Path) -> None:
    folder, log = interrupted(tmp_path)
    file = folder / "recovered" / "api_000_support.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(
        InputError,
        match="api_000_support.safetensors is damaged .*remove it to have it asked for again",
    ):
        BiDfMKD(pool(log), config=TINY).fit(folder)
    file.write_bytes((folder / "recovered" / "api_000_query.safetensors").read_bytes())
    with pytest.raises(
        InputError,
        match="api_000_support.safetensors is the query set of 'api 0', not the support set",
    ):
        BiDfMKD(pool(log), config=TINY).fit(folder)
    file.unlink()
    n_asked = len(asked(log))
    assert BiDfMKD(pool(log), config=TINY).fit(folder).complete
    assert len(asked(log)) == n_asked + 14


def test_sets_are_written_whole(tmp_path: Path) -> None:
    folder, _ = interrupted(tmp_path)
    names = sorted(file.name for file in (folder / "recovered").iterdir())
    assert names == ["api_000_query.safetensors", "api_000_support.safetensors"]
    assert load_file(folder / "recovered" / names[0])["history"].shape == (2, 5)


def test_a_budget_that_is_used_up_already(tmp_path: Path) -> None:
    folder, log = interrupted(tmp_path)
    n_asked = len(asked(log))
    run = BiDfMKD(pool(log), config=TINY, budget=Budget(max_queries=0)).fit(folder)
    assert run.budget_ended and len(run.recovered) == 2 and len(asked(log)) == n_asked
    with pytest.raises(BudgetExhausted):
        BiDfMKD(pool(log), config=TINY, budget=Budget(max_queries=0)).fit(tmp_path / "new")
