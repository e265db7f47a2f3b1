"""The folder of a run: settings, metrics, recovered sets, models, memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import scrubbed, write_json
from bidfmkd_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from bidfmkd_fast.black_box import BlackBox
    from bidfmkd_fast.meta import MetaModel, TaskMemory
    from bidfmkd_fast.training.run import RecoveredSet, Run

CONFIG, METRICS, SUMMARY, LEDGER = "config.yaml", "metrics.jsonl", "summary.json", "ledger.sqlite"
META_MODEL, INITIAL_MODEL, MEMORY = "meta_model.safetensors", "initial_model.safetensors", "memory.safetensors"

_RECORD = ("step", "loss", "best_loss", "matched", "queries")


class RunFolder:
    """A run's folder: `create` a new one or go on with one that did not finish, or `open` a finished one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ledger: LedgerFile | None = None

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig, *, again: bool = False) -> RunFolder:
        """A run folder with its `config.yaml`: a new one, or one whose run was cut off, with what it recovered.

        Raises InputError if it holds a finished run (unless `again`), or one of other settings: none is overwritten.
        """
        folder = Path(path)
        if not again:
            cls.check_new(folder)
        if (folder / CONFIG).exists() and (held := cls(folder).config()) != config:
            raise InputError(
                f"run folder: {folder} holds a run of other settings ({_first_difference(held, config)}); go on with "
                "those, or give another folder"
            )
        try:
            (folder / "recovered").mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
            (folder / METRICS).unlink(missing_ok=True)  # they are made anew, from what is recovered already
        except OSError as error:
            raise InputError(f"run folder: cannot write to {folder}: {error.strerror}") from None
        return cls(folder)

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raises InputError if `path` holds a finished run."""
        if (Path(path) / META_MODEL).exists():
            raise InputError(f"run folder: {path} holds a run already; give another folder or remove it")

    @property
    def ledger(self) -> LedgerFile:
        """What the run has asked; there inside `counting` only."""
        assert self._ledger is not None
        return self._ledger

    @contextmanager
    def counting(self, apis: Sequence[BlackBox]) -> Iterator[LedgerFile]:
        """Inside the block the ledgers of `apis` are written to the folder's, as things are asked."""
        self._ledger = LedgerFile(self.path / LEDGER)
        try:
            with ExitStack() as stack:
                for number, api in enumerate(apis):
                    stack.enter_context(api.ledger.written_to(self._ledger, number, api.name))
                yield self._ledger
        finally:
            self._ledger.close()
            self._ledger = None

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
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(scrubbed(record)) + "\n")

    def withdraw(self) -> None:
        """Undo `create` where nothing was recovered; what was spent all the same stays in the ledger."""
        if any((self.path / "recovered").iterdir()):
            return
        (self.path / CONFIG).unlink()
        if (self.path / LEDGER).exists():
            ledger = LedgerFile(self.path / LEDGER)
            spent = any(row.queries for row in ledger.rows())
            ledger.close()
            if not spent:
                (self.path / LEDGER).unlink()
        for folder in (self.path / "recovered", self.path):
            if not any(folder.iterdir()):
                folder.rmdir()

    def recovered_file(self, index: int, part: str) -> Path:
        """`recovered/api_003_support.safetensors`."""
        return self.path / "recovered" / f"api_{index:03d}_{part}.safetensors"

    def save_recovered(self, one: RecoveredSet) -> None:
        """Write a recovered set to its file, whole or not at all."""
        file = self.recovered_file(one.api_index, one.part)
        partial = file.with_suffix(".partial")
        save_recovered(one, partial)
        os.replace(partial, file)

    def load_recovered(self, index: int, part: str, api: BlackBox) -> RecoveredSet | None:
        """The recovered set of API number `index`, if it is there.

        Raises:
            InputError: it is damaged, or of another API.
        """
        file = self.recovered_file(index, part)
        return read_recovered(file, index, part, api) if file.is_file() else None

    def finish(self, run: Run) -> None:
        """Write models, memory and summary."""
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in run.memory.state_dict().items()}, self.path / MEMORY)
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
        return TrainConfig.from_yaml(self.path / CONFIG)

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
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from bidfmkd_fast.meta import TaskMemory

        memory = TaskMemory()
        try:
            state = load_file(self.path / MEMORY)
        except (OSError, SafetensorError) as error:
            raise InputError(f"run folder: {self.path / MEMORY} is not readable: {error}") from None
        memory.load_state_dict(state)
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


def save_recovered(one: RecoveredSet, file: Path) -> None:
    """Write a recovered set as safetensors: `images` (unit range), `labels`, `scores`, `losses` and how it was made.

    `history` float64 `[steps, 5]` has the columns `step`, `loss`, `best_loss`, `matched` and `queries`; `state` is
    `[complete, mu]`, mu NaN where no step was taken.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {
        "images": one.images,
        "labels": one.recovered.labels,
        "scores": one.recovered.scores,
        "losses": one.recovered.losses,
    }
    history = [[record[name] for name in _RECORD] for record in one.recovered.history]
    tensors["history"] = torch.tensor(history, dtype=torch.float64).reshape(-1, len(_RECORD))
    mu = one.recovered.mu
    tensors["state"] = torch.tensor([one.recovered.complete, math.nan if mu is None else mu], dtype=torch.float64)
    about = {"api": one.api_name, "set": one.part, "class_names": json.dumps(one.class_names)}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file, metadata=about)


def read_recovered(file: Path, index: int, part: str, api: BlackBox) -> RecoveredSet:
    """What `save_recovered` wrote. Raises InputError for a damaged file and for one of another API."""
    from safetensors import SafetensorError, safe_open

    from bidfmkd_fast.recovery import Recovered
    from bidfmkd_fast.training.run import RecoveredSet

    spec = api.spec
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            images, labels, scores, losses, history, state = (
                opened.get_tensor(name) for name in ("images", "labels", "scores", "losses", "history", "state")
            )
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"run folder: {file} is damaged ({reason}); remove it to have it asked for again") from None
    names = json.dumps(list(spec.names))
    if (about.get("api"), about.get("set"), about.get("class_names")) != (api.name, part, names):
        held = f"the {about.get('set')} set of {about.get('api')!r}"
        raise InputError(f"run folder: {file} is {held}, not the {part} set of {api.name!r}; is this another pool?")
    complete, mu = state.tolist()
    recovered = Recovered(
        spec.from_unit(images),
        labels,
        scores,
        losses,
        [dict(zip(_RECORD, row)) for row in history.tolist()],
        bool(complete),
        None if math.isnan(mu) else mu,
    )
    return RecoveredSet(index, api.name, spec.names, part, images, recovered)
