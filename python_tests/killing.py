"""Run work in processes that are killed at a chosen moment.

The functions here are the work. The processes are forked from a process that has imported the
package and done nothing else, which takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import FileIO
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.black_box import (
    APISpec,
    BlackBox,
    Budget,
    FunctionBlackBox,
    RemoteBlackBox,
    TorchBlackBox,
)
from bidfmkd_fast.black_box.remote.service import ServiceBlackBox
from bidfmkd_fast.errors import APIUnavailable, RankLost, ServiceWarning
from bidfmkd_fast.files import checkpoints
from bidfmkd_fast.recovery import RecoveryConfig, journal, record_file
from bidfmkd_fast.runtime import job, joined_ranks
from bidfmkd_fast.survey import SurveyConfig, cost
from bidfmkd_fast.training import BiDfMKD, DistillationConfig, ReplayConfig, TrainConfig
from bidfmkd_fast.training.run_folder import CHECKPOINTS
from bidfmkd_fast.training.run_state import RunState

N_CLASSES, SHAPE, N_PER_CLASS, STEPS, DIRECTIONS = 3, (1, 16, 16), 3, 8, 2
B = N_CLASSES * N_PER_CLASS
SET = STEPS * (1 + DIRECTIONS) * B  # queries of a set
CONFIG = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=N_PER_CLASS,
    meta_batch_size=3,
    meta_model_width=4,
    recovery=RecoveryConfig(
        steps=STEPS, num_directions=DIRECTIONS, generator_width=4, latent_dim=8
    ),
    distillation=DistillationConfig(inner_steps=2),
    replay=ReplayConfig(final_steps=2, n_query=2, inner_steps=1),
)
SURVEYED = replace(CONFIG, survey=SurveyConfig(n_images=35, chosen=0.5, epochs=2, batch_size=8))

CHECKPOINTED = replace(
    SURVEYED,
    meta_batch_size=1,
    replay=ReplayConfig(steps_per_round=3, final_steps=5, n_query=2, inner_steps=1),
)

RANKED = replace(CHECKPOINTED, meta_batch_size=3)
RANK_LOST = 75  # exit code of `fit_in_rank` when another rank is lost

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["bidfmkd_fast.cli.main", "bidfmkd_fast.pools", "torch._dynamo"])


def process(target: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that calls `target(*arguments)`."""
    _start_server()
    made = _context.Process(target=target, args=arguments)  # type: ignore[attr-defined]
    made.start()
    return made


def _start_server() -> None:
    """Start the process that the others are forked from, in a folder that holds no package.

    With Python 3.10, which does not know PYTHONSAFEPATH (see conftest.py), it looks for modules in
    its own folder first. In the folder of the tests it would find the source tree, without the
    native module, in the place of the installed package.
    """
    here = Path.cwd()
    os.chdir("/")
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def exit_code(target: Callable[..., None], *arguments: Any) -> int:
    made = process(target, *arguments)
    made.join(120)
    assert made.exitcode is not None, "it hangs"
    return int(made.exitcode)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spec_of(number: int) -> APISpec:
    names = tuple(f"class {number + k}" for k in range(N_CLASSES))
    return APISpec(
        N_CLASSES,
        SHAPE,
        class_names=names,
        data_set="made up",
        name=f"api_{number}",
        price_per_1000=1.0,
    )


def answers_of(number: int) -> Callable[[Tensor], Tensor]:
    """Return a linear classifier whose answers do not depend on the size of the batch.

    It computes in float64 and without a matrix product.
    """
    weight = (
        torch.randn(N_CLASSES, 256, generator=torch.Generator().manual_seed(number)).double() / 4
    )
    return lambda images: (images.flatten(1).double()[:, None] * weight).sum(-1).float()


class Watched(torch.nn.Module):
    """An API that notes each call in `log`.

    Calls of all these APIs are counted from 1; call number `kill_at` kills the process.
    """

    calls = 0

    def __init__(self, number: int, log: Path, kill_at: int | None) -> None:
        super().__init__()
        self.number, self.log, self.kill_at, self.answer = number, log, kill_at, answers_of(number)

    def forward(self, images: Tensor) -> Tensor:
        Watched.calls += 1
        note(self.log, self.number, images)
        if Watched.calls == self.kill_at:
            die()
        return self.answer(images)

    def __deepcopy__(self, memo: Any) -> Watched:
        return self


def note(log: Path, number: int, images: Tensor) -> None:
    """Write API, images (their digest) and number of images of a call to `log`."""
    digest = hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=8).hexdigest()
    with log.open("a") as file:
        file.write(f"{number} {digest} {len(images)}\n")


def asked(log: Path) -> Counter[str]:
    """Count how often each call was made."""
    return Counter(log.read_text().splitlines())


def queries(log: Path) -> int:
    """Return the number of images in all calls."""
    return sum(int(line.split()[2]) * times for line, times in asked(log).items())


def local(log: Path, kill_at: int | None) -> list[BlackBox]:
    """Make two local APIs, a function and a torch module."""
    # A black box asks its module when it is made; these calls are taken out of the log.
    kept = log.read_text() if log.exists() else ""
    watched = [Watched(number, log, None) for number in range(2)]
    apis = [
        FunctionBlackBox(watched[0], spec_of(0)),
        TorchBlackBox(watched[1], spec_of(1), micro_batch=10**6),
    ]
    log.write_text(kept)
    Watched.calls = 0
    for module in watched:
        module.kill_at = kill_at
    return apis


def fit_local(
    folder: Path, log: Path, moment: tuple[str, int] | None, max_queries: int | None = None
) -> None:
    """Run on local APIs, and die at `moment`, a kind and a number n.

    The kinds are "call" (in call n), "record" (half way through writing record n) and "snapshot"
    (before snapshot n gets its name).
    """
    what, number = moment or ("", 0)
    apis = _dying(log, what, number)
    if what == "snapshot":
        _die_in_snapshot(number)
    budget = None if max_queries is None else Budget(max_queries=max_queries)
    run = BiDfMKD(apis, config=CONFIG, budget=budget).fit(folder, progress=False)
    assert run.complete
    assert run.queries == queries(log) and (budget is None or budget.remaining_queries == 0)


def fit_surveyed(folder: Path, log: Path, moment: tuple[str, int] | None) -> None:
    """Run with a survey of 35 pictures in pieces of 10 on local APIs, and die at `moment`."""
    cost.LOCAL_PIECE = 10  # type: ignore[misc]
    run = BiDfMKD(_dying(log, *(moment or ("", 0))), config=SURVEYED).fit(folder, progress=False)
    assert run.complete and run.queries == queries(log)


def fit_checkpointed(folder: Path, log: Path, moment: tuple[str, int] | None) -> None:
    """Run as `fit_surveyed`, with a checkpoint after every step of a model, and die at `moment`.

    The kinds are those of `fit_local` but "snapshot", and "step" (at the end of step n, before any
    checkpoint has it) and "checkpoint" (before checkpoint n gets its name). The number of steps is
    written to `<log>.steps`.
    """
    cost.LOCAL_PIECE = 10  # type: ignore[misc]
    checkpoints.SECONDS = 0.0  # type: ignore[misc]
    what, number = moment or ("", 0)
    apis = _dying(log, what, number)
    if what == "checkpoint":
        _die_in_checkpoint(number)
    steps = _count_steps(number if what == "step" else None)
    run = BiDfMKD(apis, config=CHECKPOINTED).fit(folder, progress=False)
    log.with_suffix(".steps").write_text(str(next(steps) - 1))
    assert run.complete and run.queries == queries(log)


def fit_in_rank(
    rank: int,
    size: int,
    port: int,
    folder: Path,
    log: Path,
    moment: tuple[str, int] | None = None,
    max_queries: int | None = None,
) -> None:
    """Run on four local APIs as one of `size` ranks that meet at `port`; die at `moment`.

    The kinds are those of `fit_checkpointed`, and "start": before any rank has been met. Rank n
    notes its calls in `<log>.n`, and the end of a lost job in `<log>.n.lost`.
    """
    _begin_rank(rank, size, port)
    what, number = moment or ("", 0)
    own = log.with_suffix(f".{rank}")
    watched = [Watched(n, own, None) for n in range(4)]
    apis: list[BlackBox] = [
        FunctionBlackBox(module, spec_of(n)) for n, module in enumerate(watched)
    ]
    own.write_text("")
    Watched.calls = 0
    for module in watched:
        module.kill_at = number if what == "call" else None
    if what == "step":
        _count_steps(number)
    if what == "start":
        die()
    budget = None if max_queries is None else Budget(max_queries=max_queries)
    try:
        with job.joined():
            run = BiDfMKD(apis, config=RANKED, budget=budget).fit(folder, progress=False)
    except RankLost as error:
        own.with_suffix(f".{rank}.lost").write_text(str(error))
        os._exit(RANK_LOST)
    if rank == 0:
        (folder / "asked").write_text(str(run.queries))


def _begin_rank(rank: int, size: int, port: int) -> None:
    """Set what torchrun sets, and what makes runs short."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cost.LOCAL_PIECE = 10  # type: ignore[misc]
    checkpoints.SECONDS = 0.0  # type: ignore[misc]
    joined_ranks.START_SECONDS = 4.0  # type: ignore[misc]
    _begin()


def fit_twice(rank: int, size: int, port: int, folder: Path) -> None:
    """Join the job twice, and run in "one" and "two" of `folder`."""
    _begin_rank(rank, size, port)
    for name in ("one", "two"):
        apis = [FunctionBlackBox(answers_of(n), spec_of(n)) for n in range(4)]
        with job.joined():
            BiDfMKD(apis, config=RANKED).fit(folder / name, progress=False)


class Refusal(APIUnavailable):
    """A service takes no request."""


class Refusing(ServiceBlackBox):
    """A service that refuses every request with an error of its own."""

    def _request(self, images: Tensor, attempt: Callable[[], None]) -> Tensor:
        attempt()
        raise Refusal("too many images")


def fit_beside_a_service(rank: int, size: int, port: int, folder: Path, log: Path) -> None:
    """Run on three local APIs and a service that fails; keep this rank's warnings in `log`."""
    _begin_rank(rank, size, port)
    apis: list[BlackBox] = [FunctionBlackBox(answers_of(n), spec_of(n)) for n in range(3)]
    with job.joined(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        BiDfMKD([*apis, Refusing(spec_of(3))], config=RANKED).fit(folder, progress=False)
    own = [w for w in warned if issubclass(w.category, ServiceWarning)]
    (log / f"warned.{rank}").write_text("\n".join(str(w.message) for w in own))


def fit_labels(folder: Path, log: Path, kill_at: int | None) -> None:
    """Run as `fit_surveyed` on two APIs that give labels only, and die in call `kill_at`."""
    _begin()
    cost.LOCAL_PIECE = 10  # type: ignore[misc]
    Watched.calls = 0
    apis: list[BlackBox] = []
    for number in range(2):
        spec = replace(spec_of(number), scores_kind="labels")
        apis.append(FunctionBlackBox(Watched(number, log, kill_at), spec))
    run = BiDfMKD(apis, config=SURVEYED).fit(folder, progress=False)
    assert run.complete and not run.recovered and run.queries == queries(log)


def fit_remote(folder: Path, url: str) -> None:
    """Run on three services of the server at `url`."""
    _begin()
    apis = [RemoteBlackBox(url, f"api_{number}", spec_of(number)) for number in range(3)]
    assert BiDfMKD(apis, config=CONFIG).fit(folder, progress=False).complete


def command(arguments: list[str], kill_at: int | None, log: Path) -> None:
    """Run `bidfmkd` with a local API in the place of the pool's."""
    _begin()
    from bidfmkd_fast.cli import apis
    from bidfmkd_fast.cli.main import main

    def load_pool(path: object) -> list[BlackBox]:
        return [FunctionBlackBox(Watched(0, log, kill_at), spec_of(0))]

    apis.load_pool = load_pool  # type: ignore[assignment]
    raise SystemExit(main(arguments))


def _begin() -> None:
    """Use one thread, and make snapshots due at every third step."""
    torch.set_num_threads(1)
    journal.SNAPSHOT_STEPS, journal.SNAPSHOT_SECONDS = 3, 0.0  # type: ignore[misc]


def _dying(log: Path, what: str, number: int) -> list[BlackBox]:
    """Begin, and return two local APIs; the process dies in a "call" or a "record"."""
    _begin()
    if what == "record":
        record_file.FileIO = _dying_file(number)  # type: ignore[misc]
    return local(log, number if what == "call" else None)


def _dying_file(number: int) -> type[FileIO]:
    """Return a class of files that die half way through write number `number`."""

    class Dying(FileIO):
        written = 0

        def write(self, data: Any) -> int:
            Dying.written += 1
            if Dying.written == number:
                super().write(data[: len(data) // 2])
                die()
            return super().write(data)

    return Dying


def _die_in_snapshot(number: int) -> None:
    """Die before snapshot number `number` gets its name."""
    replace, seen = os.replace, iter(range(1, 10**6))

    def replacing(source: Any, target: Any) -> None:
        if Path(target).name == journal.SNAPSHOT and next(seen) == number:
            die()
        replace(source, target)

    os.replace = replacing  # type: ignore[assignment]


def _die_in_checkpoint(number: int) -> None:
    """Die before checkpoint number `number` gets its name."""
    rename, seen = os.rename, iter(range(1, 10**6))

    def renaming(source: Any, target: Any) -> None:
        if Path(target).parent.name == CHECKPOINTS and next(seen) == number:
            die()
        rename(source, target)

    os.rename = renaming  # type: ignore[assignment]


def _count_steps(kill_at: int | None) -> Iterator[int]:
    """Count the steps of runs; die at the end of number `kill_at`."""
    whole, seen = RunState.whole, itertools.count(1)

    @contextlib.contextmanager
    def counting(run: RunState) -> Iterator[None]:
        with whole(run):
            yield
            if next(seen) == kill_at:
                die()

    RunState.whole = counting  # type: ignore[method-assign]
    return seen
