"""Define how processes that share work out see each other, and which of them this process is.

`runtime.job` joins the processes that `torchrun` has started. Without it there is one, `ALONE`.

State of the process: its ranks, inside `as_ranks` and `alone`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """The processes of a job as one of them sees them; by itself, the only process of a job.

    Attributes:
        rank: number of this process, from 0.
        size: the number of processes.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Return True in rank 0, which alone writes what the ranks have in common."""
        return self.rank == 0

    def exchange(self, value: Any = None) -> list[Any]:
        """Wait until every rank has called this; return what each of them gave, by rank.

        Values are plain, as JSON has them.

        Raises:
            RankLost: another rank has failed or died.
        """
        return [value]

    def first_alone(self, do: Callable[[], T]) -> T | None:
        """Call `do` in rank 0 while the others wait; return its result there, None elsewhere."""
        result = do() if self.first else None
        self.exchange()
        return result

    def turns(self, n: int) -> Iterator[int]:
        """Yield 0 to `n` - 1, each in one rank only: whoever is ready takes the next.

        Every rank has to call this equally often.
        """
        yield from range(n)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of `items`, the same in every run."""
        return items[self.rank :: self.size]

    def check(self) -> None:
        """Raise RankLost if another rank has failed or died; for work that takes long."""

    def gather(self, own: Tensor) -> Tensor:
        """Return the tensors `own` of all ranks, `[size, *own.shape]`; they have one shape."""
        return own[None]

    def send(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers that `module` has in rank 0."""

    def number(self) -> int:
        """Return a number that is new in this job, and the same in all ranks."""
        return 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one rank at a time into the block."""
        yield

    def keep(self, name: str, value: Any) -> None:
        """Give a name in the store of the job a value, which every rank can read."""

    def kept(self, name: str) -> Any:
        """Return the value of a name in the store; None without one."""
        return None


ALONE = Ranks()
_current: Ranks = ALONE


def current() -> Ranks:
    """Return the ranks of this process."""
    return _current


@contextmanager
def as_ranks(ranks: Ranks) -> Iterator[None]:
    """Let the block run as one of `ranks`."""
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before


@contextmanager
def alone() -> Iterator[None]:
    """Let the block run as if this process was the only one, for work that is this rank's own."""
    with as_ranks(ALONE):
        yield
