"""Let the ranks of a job meet: at its store, in collectives, and when one of them is lost.

Ranks tell each other plain values through the store of `torch.distributed`, as JSON; tensors go
through its collectives. A rank that waits for another one checks meanwhile that it lives: each
writes a beat to the store, so that a process or machine that dies is named instead of being waited
for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

from bidfmkd_fast.errors import RankLost
from bidfmkd_fast.runtime.interrupt import pause
from bidfmkd_fast.runtime.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

START_SECONDS = 120.0  # until all ranks must have begun
LOST_SECONDS = 30.0  # without a beat, until a rank counts as lost
# After an error, until the others have seen why, if this process holds the store of the job.
_END_SECONDS = 5.0
SAVE_SECONDS = 25.0  # until rank 0 has saved its work, after a signal to all
_BEAT, _CHECK, _POLL = 1.0, 0.5, 0.01  # seconds between beats, between checks of others, of a key


class JoinedRanks(Ranks):
    """The ranks of a job of several processes."""

    def __init__(self, store: Store, rank: int, size: int, holds_store: bool = False) -> None:
        self.rank, self.size = rank, size
        self.store, self._holds_store = store, holds_store
        self._n_exchanges = self._n_queues = self._n_numbers = 0
        self._ended = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}  # last beat, and when it was new here
        self._checked, self._here = 0.0, _Place.here()
        self._locked = threading.Lock()  # of the threads of this rank
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def wait_for_all(self) -> None:
        """Wait until all ranks have begun.

        Raises RankLost, naming those that have not begun within `START_SECONDS`.
        """
        self._set(f"here/{self.rank}", self._here.to_json())
        end = time.monotonic() + START_SECONDS
        while missing := [i for i in range(self.size) if not self._there(f"here/{i}")]:
            self._check_others(set(range(self.size)) - set(missing))
            if time.monotonic() > end:
                raise RankLost(
                    f"ranks: {_named(missing)} of {self.size} has not begun within "
                    f"{START_SECONDS:.0f} s; look at what it wrote, and start the job again"
                )
            pause(_POLL)

    def exchange(self, value: Any = None) -> list[Any]:
        number, self._n_exchanges = self._n_exchanges, self._n_exchanges + 1
        self._set(f"value/{number}/{self.rank}", json.dumps(value))
        values = []
        for rank in range(self.size):
            key = f"value/{number}/{rank}"
            while not self._there(key):
                self._check_others()
                if self._there(f"done/{rank}") and not self._there(key):
                    raise RankLost(
                        f"ranks: {_named([rank])} of {self.size} has ended and takes no part in "
                        "this step; every rank must run the same program"
                    )
                pause(_POLL)
            values.append(json.loads(self._call(self.store.get, key)))
        # All have begun this exchange, so none still reads what belongs to the one before it.
        if number:
            with suppress(RuntimeError):
                self.store.delete_key(f"value/{number - 1}/{self.rank}")
        return values

    def turns(self, n: int) -> Iterator[int]:
        number, self._n_queues = self._n_queues, self._n_queues + 1
        while (turn := self._call(self.store.add, f"turn/{number}", 1) - 1) < n:
            self._check_others()
            yield turn

    def gather(self, own: Tensor) -> Tensor:
        import torch.distributed as dist

        out = own.new_empty(self.size, *own.shape)
        self.collective(dist.all_gather, list(out.unbind()), own.contiguous())
        return out

    def send(self, module: nn.Module) -> None:
        import torch.distributed as dist

        self.exchange()
        for value in module.state_dict().values():
            self.collective(dist.broadcast, value, 0)

    def number(self) -> int:
        self._n_numbers += 1
        return self._n_numbers

    @contextmanager
    def locked(self) -> Iterator[None]:
        mine = str(self.rank)
        with self._locked:
            while self._call(self.store.compare_set, "lock", "", mine) != mine.encode():
                self._check_others()
                pause(_POLL / 10)
            try:
                yield
            finally:
                self._call(self.store.delete_key, "lock")

    def kept(self, name: str) -> Any:
        if not self._there(f"kept/{name}"):
            return None
        return json.loads(self._call(self.store.get, f"kept/{name}"))

    def keep(self, name: str, value: Any) -> None:
        self._set(f"kept/{name}", json.dumps(value))

    def end(self, error: BaseException | None) -> None:
        """Tell the others that this rank has ended, and why if it failed."""
        self._ended.set()
        with suppress(RuntimeError, KeyboardInterrupt):
            how = "left" if isinstance(error, RankLost) else "done" if error is None else "failed"
            text = " ".join(str(error).split()) or type(error).__name__
            self.store.set(f"{how}/{self.rank}", text)
            if isinstance(error, KeyboardInterrupt) and not self.first:
                # torchrun ends all ranks once one has ended; rank 0 may be writing a checkpoint.
                self._wait(lambda: self._over(0) or self._gone(0), SAVE_SECONDS)
            if self._holds_store:
                seconds = START_SECONDS if error is None else _END_SECONDS
                self._wait(self._all_over, seconds)

    def _all_over(self) -> bool:
        """Return True if no other rank needs the store any more."""
        others = [i for i in range(self.size) if i != self.rank]
        begun = [i for i in others if self.store.check([f"here/{i}"])]
        return all(self._over(i) or self._gone(i) for i in begun)

    def _wait(self, over: Callable[[], bool], seconds: float) -> None:
        """Wait until `over`; a stop of the process does not end this wait, which is its last."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not over():
            time.sleep(_POLL)

    def lost(self) -> str:
        """Name the ranks on this machine whose process has died."""
        dead = []
        for rank in range(self.size):
            with suppress(RuntimeError):
                begun = self.store.check([f"here/{rank}"])
                if begun and not self._over(rank) and self._gone(rank):
                    dead.append(f"{_named([rank])} of {self.size} ({self._place(rank)})")
        return " and ".join(dead)

    def _over(self, rank: int) -> bool:
        """Return True if a rank has told that it ends."""
        return any(self.store.check([f"{how}/{rank}"]) for how in ("done", "failed", "left"))

    def speaks(self) -> bool:
        """Return True in the first rank that asks, and in all if the store is gone."""
        try:
            mine = str(self.rank)
            return bool(self.store.compare_set("speaker", "", mine) == mine.encode())
        except RuntimeError:
            return True

    def _beat(self) -> None:
        n = 0
        while not self._ended.wait(_BEAT):
            n += 1
            try:
                self.store.set(f"beat/{self.rank}", str(n))
            except RuntimeError:  # the main thread notices that by itself
                return

    def _check_others(self, among: set[int] | None = None) -> None:
        """Raise RankLost if another rank has failed, or gives no beat any more."""
        now = time.monotonic()
        if now - self._checked < _CHECK:
            return
        self._checked = now
        others = [i for i in range(self.size) if i != self.rank and (among is None or i in among)]
        for rank in others:
            if self._there(f"failed/{rank}"):
                reason = self._call(self.store.get, f"failed/{rank}").decode()
                error = RankLost(f"ranks: {_named([rank])} of {self.size} has failed: {reason}")
                error.told = True
                raise error
            key = f"beat/{rank}"
            beat = self._call(self.store.get, key) if self._there(key) else b""
            if rank not in self._beats or self._beats[rank][0] != beat:
                self._beats[rank] = beat, now
            silent = now - self._beats[rank][1]
            gone = self._call(self._gone, rank)
            if (silent > LOST_SECONDS or gone) and not self._call(self._over, rank):
                how = "has died" if gone else f"gives no sign of life for {silent:.0f} s"
                raise RankLost(
                    f"ranks: {_named([rank])} of {self.size} ({self._place(rank)}) {how}; start "
                    "the job again, with any number of ranks, and it continues"
                )
        for rank in others:  # they have found a rank lost that this one still takes for alive
            if self._there(f"left/{rank}"):
                error = RankLost(self._call(self.store.get, f"left/{rank}").decode())
                # What they found may be a failure that came after this rank had looked.
                error.told = any(self._there(f"failed/{other}") for other in range(self.size))
                raise error

    def check(self) -> None:
        self._check_others()

    def _place(self, rank: int) -> str:
        return str(_Place.from_json(self.store.get(f"here/{rank}").decode()))

    def _gone(self, rank: int) -> bool:
        return _Place.from_json(self.store.get(f"here/{rank}").decode()).is_gone(self._here)

    def collective(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run a collective; if it fails, find out which rank is lost and raise RankLost."""
        try:
            call(*arguments)
        except RuntimeError as error:
            end = time.monotonic() + LOST_SECONDS + 5 * _BEAT
            while time.monotonic() < end:
                self._check_others()
                pause(_CHECK)
            reason = " ".join(str(error).split())
            raise RankLost(f"ranks: the connection to another rank was lost: {reason}") from None

    def _there(self, key: str) -> bool:
        return bool(self._call(self.store.check, [key]))

    def _set(self, key: str, value: str) -> None:
        self._call(self.store.set, key, value)

    def _call(self, call: Callable[..., T], *arguments: Any) -> T:
        """Use the store; raise RankLost if the process that holds it has gone."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RankLost(
                "ranks: the store of the job is gone, so the first node has died or torchrun has "
                f"ended there ({reason}); start the job again, with any number of ranks, and it "
                "continues"
            ) from None


class _Place(NamedTuple):
    """Where a rank runs: its process, its host, and what tells process numbers apart there."""

    process: int
    host: str
    space: str

    @classmethod
    def here(cls) -> _Place:
        """Return the place of this process."""
        parts = []
        with suppress(OSError):
            parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
            parts.append(os.readlink("/proc/self/ns/pid"))  # a container has numbers of its own
        return cls(os.getpid(), socket.gethostname(), " ".join(parts))

    @classmethod
    def from_json(cls, text: str) -> _Place:
        """Return the place that `to_json` wrote."""
        return cls(*json.loads(text))

    def to_json(self) -> str:
        """Return the place as text for the store."""
        return json.dumps(self)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_gone(self, here: _Place) -> bool:
        """Return True if the process was on the machine of the process `here` and is no more."""
        if (self.host, self.space) != here[1:]:
            return False
        try:
            state = Path(f"/proc/{self.process}/stat").read_text("utf-8", errors="replace")
        except OSError:
            return True
        return state.rpartition(")")[2].split()[0] == "Z"  # a zombie: nobody asked how it ended


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
