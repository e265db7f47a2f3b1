"""Provide the smallest experiment there is, on images that need no data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.experiments.config import (
    BaselineConfig,
    EvaluationConfig,
    ExperimentConfig,
    PoolConfig,
)
from bidfmkd_fast.experiments.folder import pool_of
from bidfmkd_fast.pools import Pool
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import DistillationConfig, ReplayConfig, TrainConfig

N_APIS, N_WAY, N_PER_CLASS, STEPS, DIRECTIONS = 3, 3, 3, 2, 2
SET = N_WAY * N_PER_CLASS  # images of a set
RUN_QUERIES = N_APIS * 2 * STEPS * (1 + DIRECTIONS) * SET

TINY = ExperimentConfig(
    pool=PoolConfig(n_apis=N_APIS, n_way=N_WAY, width=2, epochs=2),
    train=TrainConfig(
        survey=SurveyConfig(n_images=0),
        n_per_class=N_PER_CLASS,
        meta_batch_size=2,
        meta_model_width=3,
        recovery=RecoveryConfig(
            steps=STEPS, num_directions=DIRECTIONS, generator_width=4, latent_dim=8
        ),
        distillation=DistillationConfig(inner_steps=1),
        replay=ReplayConfig(final_steps=2, n_query=2, inner_steps=1),
    ),
    baselines=BaselineConfig(steps=3, batch_size=4),
    evaluation=EvaluationConfig(
        n_shots=(1, 2), n_query=2, n_episodes=4, adapt_lrs=(0.01, 0.3), n_val_episodes=2
    ),
)


@pytest.fixture(scope="session")
def tiny() -> ExperimentConfig:
    return TINY


@pytest.fixture(scope="session")
def datasets(tiny: ExperimentConfig) -> list[Dataset]:
    return tiny.check()


@pytest.fixture(scope="session")
def tiny_pool(
    tiny: ExperimentConfig, datasets: list[Dataset], tmp_path_factory: pytest.TempPathFactory
) -> Pool:
    return pool_of(tmp_path_factory.mktemp("experiment"), tiny.pool, datasets, 0, False)


@pytest.fixture
def experiment_file(tiny: ExperimentConfig, tmp_path: Path) -> Path:
    from bidfmkd_fast.settings import to_yaml

    file = tmp_path / "tiny.yaml"
    file.write_text(to_yaml(tiny))
    return file
