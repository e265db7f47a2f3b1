"""Hold what every method of an experiment starts from, and write what it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerRow
from bidfmkd_fast.data import Dataset
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.pools.pool import Pool
from bidfmkd_fast.training import BiDfMKD, TrainConfig
from bidfmkd_fast.training.default_model import initial_module
from bidfmkd_fast.training.run_folder import META_MODEL, SUMMARY


@dataclass(frozen=True)
class Experiment:
    """What every method starts from: the same pool, data sets, settings and seed.

    `bidf_mkd` is the folder of the finished BiDf-MKD run, for methods that use the sets it
    recovered.
    """

    pool: Pool
    datasets: Sequence[Dataset]
    config: ExperimentConfig
    bidf_mkd: Path
    device: torch.device | str = "cpu"
    progress: bool = True

    @property
    def train(self) -> TrainConfig:
        """Return the settings of the run, from which all methods take their seed."""
        return self.config.train

    @property
    def episode_seed(self) -> int:
        """Return the seed of the episodes; by default all seeds of a comparison share it."""
        seed = self.config.evaluation.episode_seed
        return self.train.seed if seed is None else seed

    @property
    def replay_steps(self) -> int:
        """Return the replay steps of a run, which other methods train for as well."""
        return self.train.replay_steps(len(self.pool.entries))

    def fresh(self) -> nn.Module:
        """Return a new copy of the meta-model that all methods start from."""
        specs = [entry.spec for entry in self.pool.trained]
        return initial_module(specs, self.train).to(self.device)


def fit_run(
    experiment: Experiment, apis: Sequence[BlackBox], config: TrainConfig, folder: Path, label: str
) -> None:
    """Run BiDf-MKD on `apis` in `folder`; `label` is its name on progress bars."""
    learner = BiDfMKD(apis, config=config, device=experiment.device)
    learner.label = label
    learner.fit(folder, experiment.progress)


def finish_method(
    folder: Path,
    experiment: Experiment,
    module: nn.Module,
    queries: int,
    seconds: float,
    ledger: Sequence[LedgerRow] = (),
) -> None:
    """Write the folder of a finished method that is no run.

    `queries` is the number of queries that the method needs, even if another method has asked them.
    `ledger` has only the queries that this method asked itself.
    """
    config = experiment.train
    rows = [asdict(row) for row in ledger]
    summary = {"queries": queries, "seconds": {"training": round(seconds, 3)}, "ledger": rows}
    write_json(folder / SUMMARY, summary)
    meta_model = MetaModel(
        module, adapt_steps=config.adapt_steps, adapt_learning_rate=config.adapt_lr
    )
    meta_model.save(folder / META_MODEL)
