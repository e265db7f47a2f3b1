"""Define the command `evaluate`, and the options of every meta-test of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli.next_command import datasets_of, source_of
from bidfmkd_fast.cli.options import Command, add_seed
from bidfmkd_fast.cli.pools import load_datasets
from bidfmkd_fast.data import SPLITS, Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable
from bidfmkd_fast.meta import MetaModel
from bidfmkd_fast.training.comparison import (
    ACCURACY,
    LEARNED,
    RANDOM,
    compare,
    controls_of,
    write_comparisons,
)
from bidfmkd_fast.training.report import REPORT, write_report
from bidfmkd_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def evaluate(options: Any) -> None:
    """Meta-test a run on unseen classes, beside its random initialisation and the controls that it
    has, on the same episodes.
    """
    folder = RunFolder.open(options.run)
    check_writable(folder.path / REPORT, folder.path / ACCURACY)
    folder.summary()  # the report needs it; damage is found now and not after all episodes
    datasets = datasets_to_evaluate(options, folder)
    models = {RANDOM: folder.initial_model()}
    models |= {name: control.meta_model() for name, control in controls_of(folder).items()}
    models[LEARNED] = folder.meta_model()
    if options.adapt_lr is not None:
        models = {
            name: MetaModel(
                model.module, adapt_steps=model.adapt_steps, adapt_learning_rate=options.adapt_lr
            )
            for name, model in models.items()
        }
    comparisons = [compare(models, dataset, **episode_options(options)) for dataset in datasets]
    write_comparisons(folder.path, comparisons)
    report = write_report(folder, comparisons)
    print("\n\n".join([*map(str, comparisons), f"report: {report}"]))


def datasets_to_evaluate(options: Any, folder: RunFolder) -> list[Dataset]:
    """Load the data sets of `--dataset`, or by default those that the run's pool learned from."""
    if options.dataset:
        return load_datasets(options.dataset, options.invert or [False])
    if options.invert:
        raise InputError(
            "--invert goes with --dataset; without both, the data sets are those that the run's "
            "pool learned from, inverted as they were there"
        )
    datasets = datasets_of(source_of(folder.path))
    if not datasets:
        raise InputError(
            f"{folder.path} does not say which data set its APIs learned from; give --dataset"
        )
    return datasets


def _add_evaluate_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("--run", type=str, required=True, help="folder of a finished run")
    add_episode_options(parser)


def episode_options(options: Any) -> dict[str, Any]:
    """Return what `add_episode_options` adds, as the arguments of `compare`."""
    names = ("n_way", "n_query", "n_episodes", "split", "seed")
    chosen = {name: options[name] for name in names}
    return {**chosen, "n_shots": options.n_shot, "progress": True}


def add_episode_options(parser: ArgumentParser) -> None:
    """Add the options of a meta-test of runs: data sets, rate of the adaptation and episodes."""
    add_seed(parser)
    parser.add_argument(
        "--dataset",
        type=str,
        nargs="+",
        help="as for pool; default: what the run's pool learned from",
    )
    parser.add_argument("--invert", type=bool, nargs="+", help="as for pool, with --dataset")
    parser.add_argument(
        "--adapt-lr", type=float, help="learning rate of the adaptation; default: the run's"
    )
    parser.add_argument("--n-way", type=int, default=5, help="classes per episode")
    parser.add_argument(
        "--n-shot",
        type=int,
        nargs="+",
        default=[1, 5],
        help="support images per class; one column each",
    )
    parser.add_argument("--n-query", type=int, default=15, help="query images per class")
    parser.add_argument("--n-episodes", type=int, default=600, help="episodes")
    parser.add_argument("--split", choices=SPLITS, default="meta_test", help="classes to draw from")


EVALUATE = Command(
    evaluate, _add_evaluate_options, "bidfmkd evaluate --run runs/train --n-shot 1 5"
)
