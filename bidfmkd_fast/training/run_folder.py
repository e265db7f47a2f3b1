"""Keep a run on disk: its settings, metrics, recovered sets, models and memory."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import PARTIAL, check_writable, reserve, write_exact, write_json
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.runtime.machine import machine_text, versions
from bidfmkd_fast.runtime.ranks import current
from bidfmkd_fast.settings import first_difference
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.kept_values import read_summary
from bidfmkd_fast.training.recovered_set import (
    PARTS,
    bytes_of_set,
    read_recovered,
    read_set,
    save_recovered,
)

if TYPE_CHECKING:
    from bidfmkd_fast.black_box import APISpec, BlackBox
    from bidfmkd_fast.meta import MetaModel, TaskMemory
    from bidfmkd_fast.training.run import RecoveredSet, Run

CONFIG, METRICS, SUMMARY, LEDGER = "config.yaml", "metrics.jsonl", "summary.json", "ledger.sqlite"
IN_MEMORY = 2**28  # bytes of recovered images; those beyond stay on the disk
PLAN = "plan.json"  # what the run is expected to ask, and the cap on it
CHECKPOINTS = "checkpoints"  # of a run that is not finished
STAND_INS = "stand_ins"  # a run on networks with random weights, whose queries are none to an API
META_MODEL, INITIAL_MODEL = "meta_model.safetensors", "initial_model.safetensors"
MEMORY = "memory.safetensors"


class RunFolder:
    """The folder of a run.

    `create` makes a new one, or continues one whose run was cut off. `open` opens the folder of a
    finished run.
    """

    def __init__(self, path: Path, config: TrainConfig | None = None) -> None:
        self.path = path
        self._lock: FolderLock | None = None
        self._config = config
        self._continued = False  # whether an earlier process has left checkpoints
        self._n_bytes = 0  # of the images of the sets that this object has written
        self._sets: dict[tuple[int, str], RecoveredSet] = {}  # the sets read from disk

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: TrainConfig,
        *,
        again: bool = False,
        lock: FolderLock | None = None,
    ) -> RunFolder:
        """Make a run folder with its `config.yaml`, or continue one with what its run recovered.

        Args:
            path: the folder.
            config: the settings of the run.
            again: whether the folder may hold a finished run. A complete run is left as it is.
            lock: the folder's lock, if the caller holds it; else the folder is locked here. `close`
                releases it.

        Raises:
            InputError: the folder holds a finished run (unless `again`), a run of other settings,
                or a run that is under way; or it cannot be written to. Nothing is overwritten.
        """
        folder = cls(Path(path))
        if not again:
            cls.check_new(path)
        folder._lock = FolderLock(path) if lock is None else lock
        try:
            if not again:
                cls.check_new(path)  # another process may have finished it before the lock
            folder._prepare(config)
        except BaseException:
            folder.close()
            raise
        return folder

    def check_settings(self, config: TrainConfig) -> None:
        """Raise InputError if the folder holds a run of other settings."""
        if (self.path / CONFIG).exists() and (held := self.config()) != config:
            raise InputError(
                f"run folder: {self.path} holds a run of other settings "
                f"({first_difference(held, config)}); use those settings, or give another folder"
            )

    def _prepare(self, config: TrainConfig) -> None:
        self.check_settings(config)
        self._config = config
        if self.complete:
            return
        self.check_writable(self.path)
        check_writable(self.path / "recovered" / "any")
        if config.survey.n_images:
            check_writable(self.survey_file(0).with_name("any"))
        self._continued = (self.path / CHECKPOINTS).is_dir()
        self._clear()
        write_exact(self.path / CONFIG, config.to_yaml())

    def close(self) -> None:
        """Release the folder for other runs."""
        if self._lock is not None:
            self._clear_alone()
            self._lock.release()

    def _clear_alone(self) -> None:
        """Do as `_clear`, unless another rank may be writing a set still."""
        if current().size == 1:
            self._clear()

    def _clear(self) -> None:
        """Remove the disk space reserved for sets that were never written."""
        for file in (self.path / "recovered").glob(f"*{PARTIAL}"):
            file.unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Return True if the folder holds a finished run with the sets of all its APIs."""
        return (self.path / META_MODEL).is_file() and self.summary().get("complete") is True

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raise InputError if `path` holds a finished run."""
        if (Path(path) / META_MODEL).exists():
            raise InputError(
                f"run folder: {path} holds a run already; give another folder or remove it"
            )

    @staticmethod
    def check_writable(path: Path) -> None:
        """Raise InputError unless the files of a run can be written in the folder `path`."""
        check_writable(
            *(path / name for name in (CONFIG, METRICS, SUMMARY, MEMORY, INITIAL_MODEL, META_MODEL))
        )

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the folder of a finished run. Raises InputError if it holds none."""
        folder = Path(path)
        if not (folder / META_MODEL).is_file():
            state = "a run that did not finish" if (folder / CONFIG).is_file() else "no run"
            raise InputError(
                f"run folder: {folder} holds {state}; give one that `bidfmkd train` or "
                "fit(run_dir) wrote"
            )
        return cls(folder)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the lines of `metrics.jsonl`. Raises InputError if they are not readable."""
        try:
            return [
                json.loads(line)
                for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()
            ]
        except (OSError, ValueError) as error:
            raise InputError(
                f"run folder: {self.path / METRICS} is not readable: {error}"
            ) from None

    def withdraw(self) -> None:
        """Undo `create` if no API has answered; queries that were asked stay in the ledger.

        A run that an earlier process has left with checkpoints stays.
        """
        self._clear_alone()
        answers = [self.path / "recovered", self.path / "survey"]
        answered = any(place.is_dir() and any(place.iterdir()) for place in answers)
        if not (answered or self._continued):
            for place in answers:
                with suppress(OSError):  # another rank may write there by now
                    place.rmdir()
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
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
        """Return the path of a set, such as `recovered/api_003_support.safetensors`."""
        return self.path / "recovered" / f"api_{index:03d}_{part}.safetensors"

    def reserve(self, index: int, part: str, spec: APISpec) -> None:
        """Take the disk space of a set before it is asked for, so that it can be saved afterwards.

        Raises InputError if there is too little.
        """
        config = self.config()
        reserve(
            self.recovered_file(index, part),
            bytes_of_set(spec, config.n_per_class, config.recovery.steps),
        )

    def survey_file(self, index: int) -> Path:
        """Return the path of an API's answers to the survey, such as `survey/api_003.answers`."""
        return self.path / "survey" / f"api_{index:03d}.answers"

    @property
    def choice_file(self) -> Path:
        """Return the path of the scenes that the survey has chosen."""
        return self.path / "survey" / "chosen.safetensors"

    def journal(self, index: int, part: str) -> Path:
        """Return the folder of a set's journal, such as `recovered/api_003_support.journal`."""
        return self.recovered_file(index, part).with_suffix(".journal")

    def save_recovered(self, recovered_set: RecoveredSet) -> RecoveredSet:
        """Write a recovered set to its file, whole or not at all; return the set to go on with.

        Once the sets written fill more than `IN_MEMORY`, that is the file, memory-mapped.
        """
        file = self.recovered_file(recovered_set.api_index, recovered_set.part)
        save_recovered(recovered_set, file)
        self._n_bytes += recovered_set.images.nbytes
        return recovered_set if self._n_bytes <= IN_MEMORY else read_set(file)

    def load_recovered(self, index: int, part: str, api: BlackBox) -> RecoveredSet | None:
        """Read the recovered set of API number `index`; None if there is none.

        Raises InputError if the set is damaged, or belongs to another API.
        """
        file = self.recovered_file(index, part)
        if (index, part) not in self._sets:
            if not file.exists():
                return None
            self._sets[index, part] = read_recovered(
                file, index, part, api, self.config().n_per_class
            )
        return self._sets[index, part]

    def finish(self, run: Run) -> None:
        """Write the memory, the summary and the models of a finished run."""
        self._clear()
        write_tensors(self.path / MEMORY, run.memory.in_pieces())
        run.initial_model.save(self.path / INITIAL_MODEL)
        summary = {
            "queries": run.queries,
            "requests": run.requests,
            "apis": run.n_apis,
            "images": len(run.memory),
            "matched": {part: run.matched(part) for part in PARTS},
            "seconds": {stage: round(seconds, 3) for stage, seconds in run.seconds.items()},
            "complete": run.complete,
            "budget_ended": run.budget_ended,
            "skipped": run.skipped,
            "ledger": [asdict(row) for row in run.ledger],
            "labels_only": list(run.labels_only),
            "environment": versions() | {"device": machine_text(run.device)},
        }
        write_json(self.path / SUMMARY, summary)
        run.meta_model.save(self.path / META_MODEL)  # last, since it marks a finished run

    def config(self) -> TrainConfig:
        """Read the settings of the run."""
        if self._config is None:
            self._config = TrainConfig.from_yaml(self.path / CONFIG)
        return self._config

    def summary(self) -> dict[str, Any]:
        """Read the summary that `finish` wrote. Raises InputError if it is damaged."""
        return read_summary(self.path / SUMMARY)

    def meta_model(self) -> MetaModel:
        """Load the meta-learned model.

        Raises InputError if this package cannot build its module, as with a module of the user's.
        """
        from bidfmkd_fast.meta import MetaModel

        return MetaModel.load(self.path / META_MODEL)

    def initial_model(self) -> MetaModel:
        """Load the model as it was before training."""
        from bidfmkd_fast.meta import MetaModel

        return MetaModel.load(self.path / INITIAL_MODEL)

    def memory(self) -> TaskMemory:
        """Load the task memory. Raises InputError if its file is damaged."""
        from bidfmkd_fast.meta import TaskMemory

        memory = TaskMemory()
        state, _ = read_tensors(self.path / MEMORY)
        try:
            memory.load_state_dict(state)
        except InputError as error:
            raise InputError(f"run folder: {self.path / MEMORY} is damaged: {error}") from None
        return memory
