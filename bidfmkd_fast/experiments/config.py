"""An experiment: a pool, a run on it and the way it is judged, as one file of settings and one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bidfmkd_fast.data import SPLITS, Dataset, EpisodeSampler, load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import PARTIAL, cannot_write, write_exact
from bidfmkd_fast.files.folder_lock import LOCK
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.files.yaml_files import dump_yaml
from bidfmkd_fast.meta import Evaluation, MetaModel, evaluate
from bidfmkd_fast.meta.evaluate import mean_and_ci95
from bidfmkd_fast.pools.api_training import ARCHITECTURES, train_pool
from bidfmkd_fast.pools.pool import LIST, Pool, read_pool
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.settings import check_least, check_positive, check_types, to_yaml
from bidfmkd_fast.training import TrainConfig

EXPERIMENT, JUDGED = "experiment.yaml", "evaluation.json"


@dataclass(frozen=True)
class PoolConfig:
    """The APIs, as for `train_pool`.

    Args:
        scenario: "ss" (one data set and architecture), "sh" (mixed architectures) or "mh" (both
            mixed).
        data_sets: what the APIs learn from, and what is meta-tested: "glyphs", names in
            $BIDFMKD_DATA, or paths.
        inverted: those of `data_sets` whose images are inverted.
        n_apis: APIs to train.
        n_way: classes per API, and per task.
        width: filters of a Conv4.
        resnet_width: channels of a ResNet's first stage.
        epochs: passes over an API's images.
    """

    scenario: str = "ss"
    data_sets: tuple[str, ...] = ("glyphs",)
    inverted: tuple[str, ...] = ()
    n_apis: int = 20
    n_way: int = 5
    width: int = 32
    resnet_width: int = 64
    epochs: int = 30

    def __post_init__(self) -> None:
        check_types(self)
        if self.scenario not in ARCHITECTURES:
            raise InputError(
                f"PoolConfig: scenario must be one of {', '.join(ARCHITECTURES)}; got {self.scenario!r}"
            )
        if unknown := sorted(set(self.inverted) - set(self.data_sets)):
            raise InputError(
                f"PoolConfig: inverted must name data_sets, {list(self.data_sets)}; got {unknown}"
            )

    def load_datasets(self) -> list[Dataset]:
        """The data sets in order. Raises InputError as `load_dataset`."""
        return [load_dataset(name, invert=name in self.inverted) for name in self.data_sets]


@dataclass(frozen=True)
class EvaluationConfig:
    """How meta-models are judged.

    Args:
        n_shots: support images per class; one column each.
        n_query: query images per class.
        n_episodes: episodes per data set and number of shots.
        split: the classes to draw from: "meta_train", "meta_val" or "meta_test".
        adapt_lrs: learning rates of the adaptation, of which each model gets the one that is best
            on meta_val, for each data set and number of shots; none to keep the run's own. A model
            that never learned to adapt wants a larger one, so without a choice it looks weaker than
            it is.
        n_val_episodes: meta_val episodes of that choice.
    """

    n_shots: tuple[int, ...] = (1, 5)
    n_query: int = 15
    n_episodes: int = 600
    split: str = "meta_test"
    adapt_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    n_val_episodes: int = 40

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, n_query=1, n_episodes=2, n_val_episodes=1)
        if not self.n_shots or min(self.n_shots) < 1:
            raise InputError(
                f"EvaluationConfig: n_shots must be one or more numbers of 1 or more; got {self.n_shots}"
            )
        if not all(0 < rate < float("inf") for rate in self.adapt_lrs):
            raise InputError(
                f"EvaluationConfig: adapt_lrs must be finite and above 0; got {self.adapt_lrs}"
            )
        if self.split not in SPLITS:
            raise InputError(
                f"EvaluationConfig: split must be one of {', '.join(SPLITS)}; got {self.split!r}"
            )


@dataclass(frozen=True)
class BaselineConfig:
    """Distillation of one API in the baselines that have no meta-learning: Adam on the KD loss.

    Args:
        steps: optimisation steps.
        batch_size: images per step.
        learning_rate: Adam's learning rate.
    """

    steps: int = 300
    batch_size: int = 50
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, steps=1, batch_size=2)
        check_positive(self, "learning_rate")


@dataclass(frozen=True)
class ExperimentConfig:
    """One file of `configs/`.

    Args:
        pool: the APIs.
        train: BiDf-MKD; its seed is set by the command.
        baselines: what it is compared with.
        evaluation: how all are judged.
    """

    pool: PoolConfig = field(default_factory=PoolConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def check(self) -> list[Dataset]:
        """The data sets, once it is sure that they serve every episode. Raises InputError
        otherwise.
        """
        datasets, judged = self.pool.load_datasets(), self.evaluation
        for dataset in datasets:
            for split in {judged.split} | ({"meta_val"} if judged.adapt_lrs else set()):
                EpisodeSampler(
                    dataset, split, self.pool.n_way, max(judged.n_shots), judged.n_query, 0
                )
        return datasets

    def with_seed(self, seed: int) -> ExperimentConfig:
        """The same experiment under another seed."""
        return replace(self, train=replace(self.train, seed=seed))


@dataclass(frozen=True, eq=False)
class Judged:
    """One accuracy: of a meta-model on a data set, with the adaptation's learning rate that was
    chosen for it.
    """

    learning_rate: float
    evaluation: Evaluation


def open_folder(out: str | Path, values: Mapping[str, object]) -> Path:
    """The folder of an experiment with these settings: new, or the same one again, to go on where
    it was cut off.

    Raises InputError if it holds another experiment, or anything else.
    """
    folder, text = Path(out), to_yaml_text(values)
    file = folder / EXPERIMENT
    if file.is_file():
        if file.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{folder} holds an experiment with other settings; give another --out, or its {file.name}"
            )
    elif folder.exists() and (
        not folder.is_dir() or any(one.name != LOCK for one in folder.iterdir())
    ):
        raise InputError(f"{folder} is there already, and is no experiment; give another --out")
    else:
        write_exact(file, text)
    return folder


def to_yaml_text(values: Mapping[str, object]) -> str:
    """Plain values as YAML text."""
    return dump_yaml(dict(values))


def made_once(folder: Path, make: Callable[[Path], object], last: str, goes_on: str = "") -> Path:
    """`folder`, made by `make(unfinished folder)` unless it is there.

    `last` is the file that `make` writes last: an unfinished folder with it is finished. One that
    was cut off before is made anew, unless it holds the file `goes_on`: then `make` goes on in it.
    """
    if not folder.exists():
        partial = folder.with_name(folder.name + PARTIAL)
        if not (partial / last).is_file():
            if partial.exists() and not (goes_on and (partial / goes_on).is_file()):
                shutil.rmtree(partial)
            make(partial)
        try:
            partial.rename(folder)
        except OSError as error:
            raise cannot_write(folder, error) from None
    return folder


def pool_of(
    out: Path, config: PoolConfig, datasets: Sequence[Dataset], seed: int, progress: bool
) -> Pool:
    """The pool of these settings and this seed in `out/pools`, trained unless it is there."""
    digest = hashlib.blake2b(to_yaml(config).encode(), digest_size=4).hexdigest()
    folder = out / "pools" / f"seed_{seed}_{digest}"

    def make(partial: Path) -> None:
        train_pool(
            datasets,
            partial,
            scenario=config.scenario,
            n_apis=config.n_apis,
            n_way=config.n_way,
            width=config.width,
            resnet_width=config.resnet_width,
            epochs=config.epochs,
            seed=seed,
            progress=progress,
        )

    return read_pool(made_once(folder, make, LIST) / LIST)


def judge(
    meta_model: MetaModel,
    datasets: Sequence[Dataset],
    config: EvaluationConfig,
    n_way: int,
    seed: int,
    progress: bool,
) -> list[Judged]:
    """Every data set and number of shots: the learning rate chosen on meta_val, then meta-test
    with it.
    """
    judged = []
    for dataset in datasets:
        for n_shot in config.n_shots:

            def score(
                rate: float,
                split: str,
                n_episodes: int,
                dataset: Dataset = dataset,
                n_shot: int = n_shot,
            ) -> Evaluation:
                adapting = MetaModel(
                    meta_model.module, adapt_steps=meta_model.adapt_steps, adapt_learning_rate=rate
                )
                return evaluate(
                    adapting,
                    dataset,
                    n_way=n_way,
                    n_shot=n_shot,
                    n_query=config.n_query,
                    n_episodes=n_episodes,
                    split=split,
                    seed=seed,
                    progress=progress,
                )

            rate = meta_model.adapt_learning_rate
            if config.adapt_lrs:
                means = {
                    rate: score(rate, "meta_val", config.n_val_episodes).mean
                    for rate in config.adapt_lrs
                }
                rate = max(means, key=lambda one: means[one])
            judged.append(Judged(rate, score(rate, config.split, config.n_episodes)))
    return judged


def judged_once(folder: Path, make: Callable[[], list[Judged]]) -> list[Judged]:
    """What `folder/evaluation.json` holds, written first if it is not there."""
    file = folder / JUDGED
    if not file.is_file():
        records = [
            {
                "learning_rate": one.learning_rate,
                **asdict(replace(one.evaluation, per_episode=torch.empty(0))),
            }
            | {"per_episode": one.evaluation.per_episode.tolist()}
            for one in make()
        ]
        write_exact(file, json.dumps(scrubbed(records)))
    return [_judged(record) for record in read_json(file, "evaluation")]


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Several seeds' episodes as one evaluation."""
    per_episode = torch.cat([part.per_episode for part in parts])
    mean, ci95 = mean_and_ci95(per_episode)
    return replace(parts[0], mean=mean, ci95=ci95, per_episode=per_episode)


def _judged(record: dict[str, Any]) -> Judged:
    values = dict(record)
    rate = values.pop("learning_rate")
    values["per_episode"] = torch.tensor(values["per_episode"], dtype=torch.float64)
    return Judged(rate, Evaluation(**values))
