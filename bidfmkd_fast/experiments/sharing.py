"""Share the parts of an experiment out over the ranks of a job, each part made by one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.runtime.ranks import alone, current


@contextmanager
def one_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of `folder` for all ranks: rank 0 has it, and the others wait for that."""
    ranks = current()
    with ExitStack() as stack:
        ranks.first_alone(lambda: stack.enter_context(FolderLock(folder)))
        yield


def share_out(what: str, parts: Sequence[Callable[[], object]], progress: bool) -> None:
    """Make every part in one rank, which takes the next when it is free; return when all are made.

    A part is made as in a process by itself and keeps its result in the folder of the experiment,
    where all ranks then find it. A single process makes no part here, but where it needs it.
    """
    ranks = current()
    if ranks.size == 1:
        return
    with Bar(f"{what}, rank {ranks.rank}", len(parts), "parts", progress and ranks.first) as bar:
        for number in bar.over(ranks.turns(len(parts))):
            with alone():
                parts[number]()
    ranks.exchange()
