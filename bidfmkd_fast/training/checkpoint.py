"""The folder of a run: settings, metrics, recovered sets, models, memory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files import (
    PARTIAL,
    append_line,
    check_writable,
    read_tensors,
    reserve,
    write_exact,
    write_json,
    write_tensors,
)
from bidfmkd_fast.folder_lock import FolderLock
from bidfmkd_fast.recovery.cost import measuring_cost
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.recovered_set import PARTS, bytes_of_set, least_queries, read_recovered, save_recovered

if TYPE_CHECKING:
    from bidfmkd_fast.black_box import APISpec, BlackBox
    from bidfmkd_fast.meta import MetaModel, TaskMemory
    from bidfmkd_fast.training.run import RecoveredSet, Run

CONFIG, METRICS, SUMMARY, LEDGER = "config.yaml", "metrics.jsonl", "summary.json", "ledger.sqlite"
PLAN = "plan.json"  # what the run is to ask, and its cap
META_MODEL, INITIAL_MODEL, MEMORY = "meta_model.safetensors", "initial_model.safetensors", "memory.safetensors"


class RunFolder:
    """A run's folder: `create` a new one or go on with one that did not finish, or `open` a finished one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None
        self._ledger: LedgerFile | None = None
        self._config: TrainConfig | None = None
        self._sets: dict[tuple[int, str], RecoveredSet] = {}  # those read from disk

    @classmethod
    def create(
        cls, path: str | Path, config: TrainConfig, *, again: bool = False, lock: FolderLock | None = None
    ) -> RunFolder:
        """A run folder with its `config.yaml`: a new one, or one whose run was cut off, with what it recovered.

        It is locked until `close`, with `lock` where the caller has locked it before. With `again` it may hold a
        finished run; one that is complete is left as it is, see `complete`.
        Raises InputError if it holds a finished run (unless `again`), one of other settings, or a run that is under
        way, and if it cannot be written to: none is overwritten.
        """
        folder = cls(Path(path))
        if not again:
            cls.check_new(path)
        folder._lock = FolderLock(path) if lock is None else lock
        try:
            if not again:
                cls.check_new(path)  # it may have been finished since
            folder._prepare(config)
        except BaseException:
            folder.close()
            raise
        return folder

    def check_settings(self, config: TrainConfig) -> None:
        """Raises InputError if the folder holds a run of other settings."""
        if (self.path / CONFIG).exists() and (held := self.config()) != config:
            raise InputError(
                f"run folder: {self.path} holds a run of other settings ({_first_difference(held, config)}); go on "
                "with those, or give another folder"
            )

    def _prepare(self, config: TrainConfig) -> None:
        self.check_settings(config)
        self._config = config
        if self.complete:
            return
        self.check_writable(self.path)
        check_writable(self.path / "recovered" / "any")
        self._clear()
        write_exact(self.path / CONFIG, config.to_yaml())
        (self.path / METRICS).unlink(missing_ok=True)  # they are made anew, from what is recovered already

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            self._clear()
            self._lock.release()

    def _clear(self) -> None:
        """Remove what was reserved for sets that were never written."""
        for file in (self.path / "recovered").glob(f"*{PARTIAL}"):
            file.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether the folder holds a finished run that no budget and no service has cut short."""
        return (self.path / META_MODEL).is_file() and self.summary().get("complete") is True

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raises InputError if `path` holds a finished run."""
        if (Path(path) / META_MODEL).exists():
            raise InputError(f"run folder: {path} holds a run already; give another folder or remove it")

    @staticmethod
    def check_writable(path: Path) -> None:
        """Raises InputError unless the files of a run can be written in the folder `path`."""
        check_writable(*(path / name for name in (CONFIG, METRICS, SUMMARY, MEMORY, INITIAL_MODEL, META_MODEL)))

    @property
    def ledger(self) -> LedgerFile:
        """What the run has asked; there inside `counting` only."""
        assert self._ledger is not None
        return self._ledger

    @contextmanager
    def counting(self, apis: Sequence[BlackBox]) -> Iterator[LedgerFile]:
        """Inside the block the ledgers of `apis` are written to the folder's, as things are asked.

        Raises InputError for a ledger or a recovered set that is damaged or of another pool.

        Warns:
            UserWarning: the ledger told less than the recovered sets have cost, so it was rebuilt from them.
        """
        self._ledger = LedgerFile(self.path / LEDGER)
        try:
            with ExitStack() as stack:
                for number, api in enumerate(apis):
                    stack.enter_context(api.ledger.written_to(self._ledger, number, api.name))
                self._count_recovered(apis, self._ledger)
                yield self._ledger
        finally:
            self._ledger.close()
            self._ledger = None

    def _count_recovered(self, apis: Sequence[BlackBox], ledger: LedgerFile) -> None:
        """Where the ledger was lost, or lost its end, count at least what whole and half-made sets have cost."""
        told = {row.number: row.queries for row in ledger.rows()}
        config, added = self.config(), 0
        for number, api in enumerate(apis):
            measuring = measuring_cost(api, config.recovery, config.n_per_class * api.spec.n_classes).queries
            queries = requests = 0
            for part in PARTS:
                one = self.load_recovered(number, part, api)
                if one is not None:
                    queries += least_queries(one, measuring)
                    requests += max(1, len(one.recovered.history))
                elif self.journal(number, part).exists():
                    begun = Journal(self.journal(number, part))
                    queries += begun.queries + (0 if begun.mu is None else measuring)
                    requests += begun.steps
            missing = queries - told.get(number, 0)
            if missing > 0:
                ledger.restore(number, missing, requests, missing * api.spec.price_per_1000 / 1000)
                added += missing
        if added:
            warnings.warn(
                f"run folder: {ledger.path} was lost, or its end: it told fewer queries than the recovered sets have "
                f"cost; {added:,} were added, as these sets tell, and what was asked besides them is not known",
                stacklevel=2,
            )

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a finished run. Raises InputError if it is none."""
        folder = Path(path)
        if not (folder / META_MODEL).is_file():
            state = "a run that did not finish" if (folder / CONFIG).is_file() else "no run"
            raise InputError(f"run folder: {folder} holds {state}; give one that `bidfmkd train` or fit(run_dir) wrote")
        return cls(folder)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One more line of `metrics.jsonl`."""
        append_line(self.path / METRICS, json.dumps(scrubbed(record)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`. Raises InputError if they are not readable."""
        try:
            return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise InputError(f"run folder: {self.path / METRICS} is not readable: {error}") from None

    def withdraw(self) -> None:
        """Undo `create` where nothing was recovered; what was spent all the same stays in the ledger."""
        self._clear()
        recovered = self.path / "recovered"
        if recovered.is_dir() and not any(recovered.iterdir()):
            recovered.rmdir()
            (self.path / CONFIG).unlink(missing_ok=True)
            (self.path / PLAN).unlink(missing_ok=True)
            if (self.path / LEDGER).exists():
                ledger = LedgerFile(self.path / LEDGER)
                spent = any(row.queries for row in ledger.rows())
                ledger.close()
                if not spent:
                    (self.path / LEDGER).unlink()
        self.close()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def recovered_file(self, index: int, part: str) -> Path:
        """`recovered/api_003_support.safetensors`."""
        return self.path / "recovered" / f"api_{index:03d}_{part}.safetensors"

    def reserve(self, index: int, part: str, spec: APISpec) -> None:
        """Take the disk space for a set that is about to be asked for. Raises InputError if there is not as much."""
        config = self.config()
        reserve(self.recovered_file(index, part), bytes_of_set(spec, config.n_per_class, config.recovery.steps))

    def journal(self, index: int, part: str) -> Path:
        """`recovered/api_003_support.journal`, the folder in which that set is kept while it is made."""
        return self.recovered_file(index, part).with_suffix(".journal")

    def save_recovered(self, one: RecoveredSet) -> None:
        """Write a recovered set to its file, whole or not at all."""
        save_recovered(one, self.recovered_file(one.api_index, one.part))

    def load_recovered(self, index: int, part: str, api: BlackBox) -> RecoveredSet | None:
        """The recovered set of API number `index`, if it is there.

        Raises:
            InputError: it is damaged, or of another API.
        """
        file = self.recovered_file(index, part)
        if (index, part) not in self._sets:
            if not file.exists():
                return None
            self._sets[index, part] = read_recovered(file, index, part, api, self.config().n_per_class)
        return self._sets[index, part]

    def finish(self, run: Run) -> None:
        """Write models, memory and summary."""
        write_tensors(self.path / MEMORY, run.memory.state_dict())
        run.initial_model.save(self.path / INITIAL_MODEL)
        summary = {
            "queries": run.queries,
            "requests": run.requests,
            "apis": len({one.api_index for one in run.recovered}),
            "images": len(run.memory),
            "matched": {part: run.matched(part) for part in ("support", "query")},
            "seconds": {stage: round(seconds, 3) for stage, seconds in run.seconds.items()},
            "complete": run.complete,
            "budget_ended": run.budget_ended,
            "skipped": run.skipped,
            "ledger": [asdict(row) for row in run.ledger],
        }
        write_json(self.path / SUMMARY, summary)
        run.meta_model.save(self.path / META_MODEL)  # last: a folder with it is a finished run

    def config(self) -> TrainConfig:
        """The run's settings."""
        if self._config is None:
            self._config = TrainConfig.from_yaml(self.path / CONFIG)
        return self._config

    def summary(self) -> dict[str, Any]:
        """Queries, requests, seconds per stage, and whether the run was complete."""
        try:
            content = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"run folder: {self.path / SUMMARY} is not readable: {error}") from None
        return dict(content)

    def meta_model(self) -> MetaModel:
        """The meta-learned model. Raises InputError if its module is none that this package can build."""
        from bidfmkd_fast.meta import MetaModel

        return MetaModel.load(self.path / META_MODEL)

    def initial_model(self) -> MetaModel:
        """The model before anything was learned."""
        from bidfmkd_fast.meta import MetaModel

        return MetaModel.load(self.path / INITIAL_MODEL)

    def memory(self) -> TaskMemory:
        """The task memory, with images as they were recovered. Raises InputError for a damaged file."""
        from bidfmkd_fast.meta import TaskMemory

        memory = TaskMemory()
        state, _ = read_tensors(self.path / MEMORY)
        try:
            memory.load_state_dict(state)
        except InputError as error:
            raise InputError(f"run folder: {self.path / MEMORY} is damaged: {error}") from None
        return memory


def _first_difference(held: TrainConfig, config: TrainConfig) -> str:
    old, new = _flat(held.to_dict()), _flat(config.to_dict())
    key = next(key for key in new if old.get(key) != new[key])
    return f"{key} is {old.get(key)!r} there; got {new[key]!r}"


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat
