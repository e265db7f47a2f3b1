"""Run the demo: from nothing to a meta-model and a table of accuracies, in minutes on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools.api_training import train_pool
from bidfmkd_fast.pools.pool import load_pool
from bidfmkd_fast.training import BiDfMKD, ReplayConfig, TrainConfig
from bidfmkd_fast.training.comparison import LEARNED, RANDOM, ZERO_QUERY, compare, controls_of
from bidfmkd_fast.training.grids import write_grids
from bidfmkd_fast.training.pseudo_tasks import keep_zero_query
from bidfmkd_fast.training.report import outcome_rows, write_report
from bidfmkd_fast.training.run_folder import RunFolder
from bidfmkd_fast.training.spending import read_spending
from bidfmkd_fast.training.tables import text_table


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Args:
        n_apis: Conv4 APIs to train.
        n_way: classes per API, and per task.
        api_width: filters of an API's Conv4.
        api_epochs: passes over an API's images.
        n_episodes: meta-test episodes.
        train: the run on that pool.
    """

    n_apis: int = 12
    n_way: int = 5
    api_width: int = 32
    api_epochs: int = 30
    n_episodes: int = 200
    train: TrainConfig = field(default_factory=TrainConfig)


def demo_config() -> DemoConfig:
    """Return the settings of `bidfmkd demo`, chosen to end within five minutes on two cores."""
    return DemoConfig(train=TrainConfig(replay=ReplayConfig(final_steps=120, rotations=4)))


def run_demo(out: str | Path, config: DemoConfig | None = None, progress: bool = True) -> str:
    """Train a pool, run BiDf-MKD on it, meta-test it beside its controls, and return the tables.

    The controls are the untrained meta-model and one trained on procedural pictures alone.

    All files are written to the new folder `out`. Every random draw of pool and training comes from
    `config.train.seed`; the episodes are the same for all seeds.

    Raises:
        InputError: `out` exists already, or a setting does not fit.
    """
    config = demo_config() if config is None else config
    out, seed = Path(out), config.train.seed
    if config.n_episodes < 1:
        raise InputError(f"demo: n_episodes must be at least 1; got {config.n_episodes}")
    if out.exists():
        raise InputError(f"demo: {out} exists already; give another folder or remove it")
    dataset = load_dataset("glyphs")
    seconds = {}
    started = time.perf_counter()
    pool = train_pool(
        dataset,
        out / "pool",
        n_apis=config.n_apis,
        n_way=config.n_way,
        width=config.api_width,
        epochs=config.api_epochs,
        seed=seed,
        progress=progress,
    )
    apis = load_pool(pool.folder)
    seconds["training the APIs"] = time.perf_counter() - started

    run = BiDfMKD(apis, config=config.train).fit(out, progress)
    folder = RunFolder(out)
    write_grids(run, folder)
    started = time.perf_counter()
    keep_zero_query(folder, apis, progress=progress)
    seconds["zero_query"] = time.perf_counter() - started

    started = time.perf_counter()
    zero_query = controls_of(folder)[ZERO_QUERY].meta_model()
    comparison = compare(
        {RANDOM: run.initial_model, ZERO_QUERY: zero_query, LEARNED: run.meta_model},
        dataset,
        n_way=config.n_way,
        n_episodes=config.n_episodes,
        seed=0,  # seeds differ only by pool and training
        progress=progress,
    )
    seconds["meta-test"] = time.perf_counter() - started
    report = write_report(folder, [comparison], extra_seconds=seconds)
    apis_text = (
        f"{config.n_apis} APIs ({100 * pool.accuracy:.0f} % accurate on held-out images of their "
        "own classes), asked for scores only"
    )
    spending = text_table(read_spending(out).rows())
    outcome = text_table(outcome_rows(folder.summary(), seconds))
    return "\n\n".join([apis_text, str(comparison), spending, outcome, f"report: {report}"])


def with_seed(config: DemoConfig, seed: int) -> DemoConfig:
    """Return the same settings with another seed."""
    return replace(config, train=replace(config.train, seed=seed))
