"""Provide a small run with everything that a page can show."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from training.test_comparison import comparison

import bidfmkd_fast as bf
from bidfmkd_fast.reporting import read_facts, write_page
from bidfmkd_fast.training.comparison import write_comparisons

CONFIG = bf.TrainConfig(
    n_per_class=3,
    meta_model_width=2,
    survey=bf.SurveyConfig(n_images=24, epochs=2, batch_size=12),
    recovery=bf.RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=bf.DistillationConfig(inner_steps=1),
    replay=bf.ReplayConfig(final_steps=50, n_query=2, inner_steps=1),
)


@pytest.fixture(scope="session")
def glyphs_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a pool of three APIs of glyphs."""
    pool = tmp_path_factory.mktemp("reporting") / "pool"
    glyphs = bf.load_dataset("glyphs")
    bf.train_pool([glyphs], pool, n_apis=3, n_way=3, width=2, epochs=1, progress=False)
    return pool


@pytest.fixture(scope="session")
def made_run(glyphs_pool: Path) -> Path:
    """Return the folder of a finished, evaluated run on the pool."""
    folder = glyphs_pool.with_name("run ü")
    learner = bf.BiDfMKD(
        bf.load_pool(glyphs_pool), config=CONFIG, budget=bf.Budget(max_queries=10_000)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # APIs that have hardly learned anything hardly react
        learner.fit(folder, progress=False)
    write_comparisons(folder, [comparison()])
    return folder


@pytest.fixture(scope="session")
def made_page(made_run: Path) -> Path:
    """Return the page of the run, which names a command with a long argument."""
    following = f"next: bidfmkd status '{'run ü' * 60}'"
    return write_page(read_facts(made_run), made_run.with_name("page.html"), following)
