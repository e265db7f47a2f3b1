"""The folder of a run: settings, metrics, recovered sets, models, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from bidfmkd_fast.meta import MetaModel, TaskMemory
    from bidfmkd_fast.training.run import RecoveredSet, Run

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
META_MODEL, INITIAL_MODEL, MEMORY = "meta_model.safetensors", "initial_model.safetensors", "memory.safetensors"


class RunFolder:
    """A run's folder: `create` a new one, or `open` a finished one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunFolder:
        """A new run folder with its `config.yaml`. Raises InputError if it holds a run already: none is overwritten."""
        folder = Path(path)
        cls.check_new(folder)
        try:
            (folder / "recovered").mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"run folder: cannot write to {folder}: {error.strerror}") from None
        return cls(folder)

    @staticmethod
    def check_new(path: str | Path) -> None:
        """Raises InputError if `path` holds a run already."""
        if (Path(path) / CONFIG).exists():
            raise InputError(f"run folder: {path} holds a run already; give another folder or remove it")

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
            file.write(json.dumps(record) + "\n")

    def withdraw(self) -> None:
        """Undo `create`."""
        (self.path / CONFIG).unlink()
        for folder in (self.path / "recovered", self.path):
            if not any(folder.iterdir()):
                folder.rmdir()

    def save_recovered(self, one: RecoveredSet) -> None:
        """Write a recovered set to `recovered/api_003_support.safetensors`."""
        save_recovered(one, self.path / "recovered" / f"api_{one.api_index:03d}_{one.part}.safetensors")

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
        }
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
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


def save_recovered(one: RecoveredSet, file: Path) -> None:
    """Write a recovered set as safetensors: `images` (unit range), `labels`, `scores` and `losses`."""
    from safetensors.torch import save_file

    tensors = {
        "images": one.images,
        "labels": one.recovered.labels,
        "scores": one.recovered.scores,
        "losses": one.recovered.losses,
    }
    about = {"api": one.api_name, "set": one.part, "class_names": json.dumps(one.class_names)}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file, metadata=about)
