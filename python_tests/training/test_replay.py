"""Check when the replay of a round ends."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from training.test_bidf_mkd import TINY, pool

from bidfmkd_fast.training import BiDfMKD
from bidfmkd_fast.training import replay as training_replay
from bidfmkd_fast.training.position import Position


def test_patience_where_metrics_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count patience from the best step; stop only when metrics are read; record every step.

    On a GPU the metrics are read every few steps only.
    """
    accuracies, recorded, taken = [0.1, 0.2, 0.3, 0.4, 0.5, *[0.5] * 30], [], []

    def take_steps(most: int) -> list[dict[str, float]]:
        first = sum(taken)
        taken.append(most)
        return [{"loss": 0.0, "accuracy": value} for value in accuracies[first : first + most]]

    monkeypatch.setattr(training_replay, "step_taker", lambda run: take_steps)
    run = SimpleNamespace(
        recovered=True,
        config=SimpleNamespace(task_replay=True),
        progress=False,
        label="run",
        record=lambda stage, **values: recorded.append(values["accuracy"]),
        log=lambda what: None,
        outer_step=0,
        position=Position(),
        whole=nullcontext,
    )
    training_replay.replay(run, 35, patience=3)  # type: ignore[arg-type]
    assert taken == [3, 3, 3]  # the fifth step was the best
    assert sum(recorded) * 9 == pytest.approx(sum(accuracies[:9]))


def test_replay_between_rounds_ends_early_when_patience_runs_out() -> None:
    # A step has 2 tasks x 3 classes x 2 query images, so its accuracy has 13 values and can improve
    # at most 12 times in a row. A patience of 1 therefore ends the replay soon after.
    config = replace(
        TINY, meta_batch_size=1, replay=replace(TINY.replay, steps_per_round=40, patience=1)
    )
    steps = [
        record["step"]
        for record in BiDfMKD(pool(2), config=config).fit().history
        if record["stage"] == "replay"
    ]
    fixed = replace(config, replay=replace(config.replay, patience=0))
    fixed_steps = [
        r["step"] for r in BiDfMKD(pool(2), config=fixed).fit().history if r["stage"] == "replay"
    ]
    assert steps[0] <= 1 + 14
    assert fixed_steps == [1 + 25, 1 + 40, 2 + 40 + 2]
