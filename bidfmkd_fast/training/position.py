"""Say where in the loop a run is, in plain values that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# The stages of the survey, in order.
FIRST_ROUND, CHOICE, SECOND_ROUND, DISTILLATION, OVER = (
    "first round",
    "choice",
    "second round",
    "distillation",
    "over",
)


N_PASSES = 2  # through the pool; services that failed in the first are asked again in the second


@dataclass
class ReplayPosition:
    """Where the run is in a replay.

    Attributes:
        steps: outer steps taken.
        over: whether the replay has ended.
        best, best_step: the best accuracy so far and the step that had it.
        unrecorded: metrics of the steps since the last record.
    """

    steps: int = 0
    over: bool = False
    best: float = -1.0
    best_step: int = 0
    unrecorded: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Position:
    """Where a run is.

    Attributes:
        survey: stage of the survey.
        passes: passes through the pool that have ended.
        waiting: the APIs of this pass through the pool; None before it has begun.
        first: how many of them earlier rounds have taken.
        replay: the replay of this round; after the last round, the final one.
    """

    survey: str = FIRST_ROUND
    passes: int = 0
    waiting: list[int] | None = None
    first: int = 0
    replay: ReplayPosition = field(default_factory=ReplayPosition)

    def group(self, size: int) -> list[int]:
        """Return the APIs of this round; none at the end of the pass."""
        return [] if self.waiting is None else self.waiting[self.first : self.first + size]

    def end_round(self, size: int) -> None:
        """Go on to the next round."""
        self.first += size
        self.replay = ReplayPosition()

    def end_pass(self) -> None:
        """Go on to the second pass, or to the final replay after that."""
        self.waiting, self.first, self.replay = None, 0, ReplayPosition()
        self.passes += 1

    def to_state(self) -> dict[str, Any]:
        """Return the position as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Position:
        """Return the position that `to_state` described."""
        return cls(**{**state, "replay": ReplayPosition(**state["replay"])})
