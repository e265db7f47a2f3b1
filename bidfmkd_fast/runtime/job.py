"""Join the processes that `torchrun` has started, the ranks of a job, which run one program.

State of the process: the job that it has joined, which stays after the end of `joined`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from bidfmkd_fast.errors import InputError, RankLost
from bidfmkd_fast.runtime import joined_ranks
from bidfmkd_fast.runtime.joined_ranks import JoinedRanks
from bidfmkd_fast.runtime.ranks import ALONE, Ranks, as_ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# Ranks enter a collective together, so none waits for another's work there.
_COLLECTIVE_SECONDS = 300.0
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
_job: JoinedRanks | None = None
# The connection to the store of the job, and how often this process has joined: a second job of the
# same processes meets under other names.
_store: TCPStore | None = None
_n_joined = 0


def lost() -> str:
    """Name the other processes of the job on this machine that have died; empty without any."""
    return "" if _job is None else _job.lost()


def n_started() -> int:
    """Return how many processes `torchrun` has started; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdecimal() else 1


def speaks() -> bool:
    """Return True if this process should show why it ends: the first rank that asks does.

    Else each process of a job would show the same line.
    """
    if _job is None:  # not joined yet: all ranks have the same to say
        return n_started() == 1 or os.environ["RANK"] == "0"
    return _job.speaks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other ranks for the block, if `torchrun` has started several.

    They are known by the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    Only rank 0 writes to standard output and shows progress.

    Raises:
        RankLost: a rank does not begin, or dies later.
        InputError: the variables are incomplete, or torch was built without `torch.distributed`.
    """
    if n_started() == 1:
        yield ALONE
        return
    global _job
    ranks = _job = _join()
    error: BaseException | None = None
    try:
        ranks.wait_for_all()
        _start_collectives(ranks)
        with as_ranks(ranks), _quiet() if ranks.rank else nullcontext():
            yield ranks
    except BaseException as ended:
        error = ended
        raise
    finally:
        ranks.end(error)
        _end_collectives(error)


def _join() -> JoinedRanks:
    """Connect to the store of the job, which the agent of torchrun or else rank 0 holds."""
    import torch.distributed as dist

    global _store, _n_joined
    if not dist.is_available():
        raise InputError("ranks: this torch has no torch.distributed; start without torchrun")
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        holds = False
        rank, size, host, port = (os.environ[name] for name in names)
        holds = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if _store is None:
            _store = _connected(host, port, holds)
    except KeyError as missing:
        raise InputError(
            f"ranks: the environment variable {missing} is not set; start the command with "
            "torchrun, which sets what it needs"
        ) from None
    except (ValueError, RuntimeError) as error:
        reason, seconds = " ".join(str(error).split())[:200], joined_ranks.START_SECONDS
        if holds:
            raise InputError(
                f"ranks: rank 0 cannot listen at {host}:{port} ({reason}); give torchrun another "
                "--master-port"
            ) from None
        raise RankLost(
            f"ranks: rank 0 does not answer at {host}:{port} within {seconds:.0f} s ({reason}); "
            "look at what it wrote, and start the job again"
        ) from None
    attempt = os.environ.get(_ATTEMPT, "0")  # the agent's store outlives one
    _n_joined += 1
    place = dist.PrefixStore(f"bidfmkd {attempt} {_n_joined}", _store)
    return JoinedRanks(place, int(rank), int(size), holds)


def _connected(host: str, port: str, holds: bool) -> TCPStore:
    """Return a connection to the store of the job; with `holds` this process holds the store."""
    import torch.distributed as dist

    return dist.TCPStore(
        host,
        int(port),
        is_master=holds,
        wait_for_workers=False,  # `wait_for_all` does, and names those that do not come
        timeout=timedelta(seconds=joined_ranks.START_SECONDS),
    )


def _start_collectives(ranks: JoinedRanks) -> None:
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        n_devices, n_here = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE", "1")
        if int(n_here) > n_devices:
            raise InputError(
                f"ranks: {n_here} processes on a machine with {n_devices} GPUs, and each takes "
                'one; start no more than that, or set CUDA_VISIBLE_DEVICES="" to use none'
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    ranks.exchange()  # so that none waits long for another inside torch, where none is named
    # A connection of its own, since collectives wait inside of it, which beats must not.
    own = _connected(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], False)
    store = dist.PrefixStore(f"collectives {os.environ.get(_ATTEMPT, '0')} {_n_joined}", own)
    ranks.collective(
        lambda: dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
        )
    )


def _end_collectives(error: BaseException | None) -> None:
    """Close the connections; after an error the end of the process does, without waiting."""
    import torch.distributed as dist

    if error is None and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing in ranks above 0, which would repeat what rank 0 prints."""
    shown = sys.stdout
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        try:
            yield
        finally:
            sys.stdout = shown
