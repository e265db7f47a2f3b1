"""Join the processes that `torchrun` has started, the ranks of a job, which run one program.

State of the process: the job that it has joined, which stays after the end of `joined`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch

from bidfmkd_fast.errors import InputError, RankLost, ServiceWarning
from bidfmkd_fast.runtime import joined_ranks
from bidfmkd_fast.runtime.joined_ranks import JoinedRanks
from bidfmkd_fast.runtime.ranks import ALONE, Ranks, as_ranks

# Ranks enter a collective together, so none waits for another's work there.
_COLLECTIVE_SECONDS = 300.0
_job: JoinedRanks | None = None


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
    return _job is None or _job.speaks()


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

    if not dist.is_available():
        raise InputError("ranks: this torch has no torch.distributed; start without torchrun")
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    try:
        rank, size, host, port = (os.environ[name] for name in names)
        holds = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(
            host,
            int(port),
            is_master=holds,
            wait_for_workers=False,  # `wait_for_all` does, and names those that do not come
            timeout=timedelta(seconds=joined_ranks.START_SECONDS),
        )
    except KeyError as missing:
        raise InputError(
            f"ranks: the environment variable {missing} is not set; start the command with "
            "torchrun, which sets what it needs"
        ) from None
    except (ValueError, RuntimeError) as error:
        reason, seconds = " ".join(str(error).split())[:200], joined_ranks.START_SECONDS
        raise RankLost(
            f"ranks: rank 0 does not answer at {host}:{port} within {seconds:.0f} s ({reason}); "
            "look at what it wrote, and start the job again"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the agent's store outlives one
    return JoinedRanks(dist.PrefixStore(f"bidfmkd {attempt}", store), int(rank), int(size), holds)


def _start_collectives(ranks: JoinedRanks) -> None:
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store = dist.PrefixStore("collectives", ranks.store)
    seconds = timedelta(seconds=_COLLECTIVE_SECONDS)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=seconds
    )


def _end_collectives(error: BaseException | None) -> None:
    """Close the connections; after an error the end of the process does, without waiting."""
    import torch.distributed as dist

    if error is None and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """Show nothing in ranks above 0, whose output would repeat that of rank 0."""
    shown = sys.stdout
    with open(os.devnull, "w", encoding="utf-8") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore", ServiceWarning)
        sys.stdout = nowhere
        try:
            yield
        finally:
            sys.stdout = shown
