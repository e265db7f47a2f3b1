"""Define what a program may do while a run works: the base class `Callback`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputTypeError
from bidfmkd_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from bidfmkd_fast.training.run import Run
    from bidfmkd_fast.training.run_state import RunState


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before it asks anything.

    Attributes:
        config: the settings.
        apis: the names of the APIs, in the order of the pool.
        planned_queries: the queries that the run asks of all APIs together if no budget ends it,
            those of an earlier process included.
        run_dir: the folder of the run; None if it is kept in memory only.
    """

    config: TrainConfig
    apis: tuple[str, ...]
    planned_queries: int
    run_dir: Path | None


class Callback:
    """Base class of what `BiDfMKD.fit(..., callbacks=[...])` calls while the run works.

    All methods do nothing here; override those that you need. They are called in the thread that
    called `fit`, callback after callback, and the run waits for them. They get copies, so that no
    callback changes the numbers of a run.

    An exception that a method raises ends the run, as an error of a local API does, and `fit`
    raises it. What was asked until then is in the run's folder, and `fit` with the same folder
    continues the run.
    """

    def on_start(self, info: RunInfo) -> None:
        """Take note that a run begins or continues; nothing has been asked in this process yet."""

    def on_record(self, record: dict[str, Any]) -> None:
        """Take the next record of `metrics.jsonl`, with the keys and values of its line.

        Every record has `stage` ("survey", "recovery", "distillation" or "replay"), `step` (outer
        steps of the meta-model so far), `loss`, `accuracy`, `queries` (of all APIs so far, every
        attempt counted) and `seconds` (of all stages so far). The survey has a record for each of
        its epochs, with `epoch` and `accuracy_by_api`. Recovery has a record for each set, with
        `api`, `set` ("support" or "query"), `sets` (kept so far) and `complete`.

        A run that was cut off makes the records after its last checkpoint again when it is
        continued. Its callbacks get the new ones only, those that `metrics.jsonl` did not hold yet.
        """

    def on_end(self, run: Run | None) -> None:
        """Take the finished run, whose files are written; None if an error ended the run.

        It is called for every callback whose `on_start` has returned, so that files and
        connections can be closed here.
        """


def check_callbacks(operation: str, callbacks: object) -> list[Callback]:
    """Return `callbacks` as a list; raise InputTypeError unless they are some callbacks."""
    if not isinstance(callbacks, Sequence):
        raise InputTypeError(
            f"{operation}: callbacks must be a list of bf.Callback; got {_kind(callbacks)}"
        )
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise InputTypeError(
                f"{operation}: callbacks must be instances of a subclass of bf.Callback; got "
                f"{_kind(callback)}"
            )
    return list(callbacks)


@contextmanager
def started(callbacks: Sequence[Callback], info: RunInfo, state: RunState) -> Iterator[None]:
    """Call `on_start` of all callbacks before the block, and `on_end` after it."""

    def end(callback: Callback) -> None:
        callback.on_end(state.result)

    with ExitStack() as stack:
        for callback in callbacks:
            callback.on_start(info)
            stack.callback(end, callback)
        yield


def _kind(value: object) -> str:
    """Name the type of a value, or the value itself if it is a class."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
