"""Kill a comparison at any moment: it goes on from there and ends with the same tables."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.conftest import TINY
from killing import die, exit_code

from bidfmkd_fast.experiments import meta_test
from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.meta_test import EVALUATION, UNFINISHED
from bidfmkd_fast.files import checkpoints
from bidfmkd_fast.pools import api_training
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training.kept_steps import KeptSteps
from bidfmkd_fast.training.run_folder import CHECKPOINTS, META_MODEL, STAND_INS
from bidfmkd_fast.training.run_state import RunState

KILLED = -signal.SIGKILL
METHODS = ["random", "zero_query", "random_teachers", "bidf_mkd", "maml"]
CONFIG = replace(
    TINY,
    train=replace(
        TINY.train,
        survey=SurveyConfig(n_images=20, epochs=2, batch_size=8),
        replay=replace(TINY.train.replay, final_steps=4),
    ),
)


def compare(folder: Path, moment: tuple[str, int] | None) -> None:
    """Compare in `folder` with a checkpoint after every step; die at `moment`.

    The kinds are "api" (in the training of API n), "method" (at the end of step n of a method),
    "run" (at the end of step n of a run) and "evaluation" (after evaluation n, before it is kept).
    """
    torch.set_num_threads(1)
    checkpoints.SECONDS = 0.0  # type: ignore[misc]
    what, number = moment or ("", 0)
    counts = {kind: itertools.count(1) for kind in ("api", "method", "run", "evaluation")}

    def passed(kind: str) -> None:
        if next(counts[kind]) == number and kind == what:
            die()

    def dying_step(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def step(self: Any, *arguments: Any) -> Iterator[None]:
            with plain(self, *arguments):
                yield
                passed(kind)

        return step

    def dying_after(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **keywords: Any) -> Any:
            result = plain(*arguments, **keywords)
            passed(kind)
            return result

        return function

    KeptSteps.steps = dying_step("method", KeptSteps.steps)  # type: ignore[method-assign]
    RunState.whole = dying_step("run", RunState.whole)  # type: ignore[method-assign]
    fit_classifier = api_training.fit_classifier
    api_training.fit_classifier = dying_after("api", fit_classifier)
    meta_test.evaluate = dying_after("evaluation", meta_test.evaluate)
    run_comparison(CONFIG, folder, methods=METHODS, progress=False)


def assert_same(folder: Path, whole: Path) -> None:
    """Check that all models and meta-tests are the same, and that nothing unfinished is left."""
    for method in METHODS:
        ours, theirs = (place / "seed_0" / method for place in (folder, whole))
        for name in (META_MODEL, EVALUATION):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (method, name)
        held = {path.name for path in ours.iterdir()}
        assert held == {path.name for path in theirs.iterdir()}
        assert not held & {CHECKPOINTS, STAND_INS, UNFINISHED}


def test_killed_at_five_random_moments_and_continued(tmp_path: Path, seed: int) -> None:
    """Kill it in the pool, a meta-test, zero_query, a run, and MAML, in one folder."""
    assert exit_code(compare, tmp_path / "whole", None) == 0
    draw = random.Random(seed)
    for kind, most in (("api", 3), ("evaluation", 6), ("method", 4), ("run", 24), ("method", 4)):
        moment = kind, draw.randint(1, most)
        assert exit_code(compare, tmp_path / "cut off", moment) == KILLED, moment
    assert exit_code(compare, tmp_path / "cut off", None) == 0
    assert_same(tmp_path / "cut off", tmp_path / "whole")
