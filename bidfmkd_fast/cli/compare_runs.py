"""Define the command `compare-runs`, which sets finished runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli.evaluation import add_episode_options, datasets_to_evaluate, episode_options
from bidfmkd_fast.cli.next_command import known_data_sets, source_of
from bidfmkd_fast.cli.options import Command
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.compare_runs import compare_runs as compare
from bidfmkd_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def compare_runs(options: Any) -> None:
    """Meta-test two finished runs, or as many of one kind as of the other, on the same episodes,
    and show their paired difference and the settings in which they differ.
    """
    a, b = _sides(options)
    _check_data_sets([*a, *b])
    datasets = datasets_to_evaluate(options, RunFolder.open(a[0]))
    print(compare(a, b, datasets, adapt_lr=options.adapt_lr, **episode_options(options)))
    of_a, of_b = (
        [str(source_of(Path(run)).get("pool", "unknown")) for run in side] for side in (a, b)
    )
    if of_a != of_b:
        print(f"\nThe pools differ as well. A: {', '.join(of_a)}. B: {', '.join(of_b)}.")


def _sides(options: Any) -> tuple[list[str], list[str]]:
    """Return the runs of side A and of side B, as either way of giving them names them."""
    runs, a, b = options.runs or [], options.a or [], options.b or []
    if len(runs) == 2 and not (a or b):
        return [runs[0]], [runs[1]]
    if runs or not (a and b):
        raise InputError(
            "compare-runs: give two runs (A B), or the runs of both sides "
            "(--a RUN RUN RUN --b RUN RUN RUN)"
        )
    return a, b


def _check_data_sets(runs: Sequence[str]) -> None:
    """Raise InputError if runs are known to have learned from different data sets."""
    known = {}
    for run in runs:
        RunFolder.open(run)  # a folder without a run gets the better error
        if data_sets := known_data_sets(source_of(Path(run))):
            known[run] = data_sets
    for run, data_sets in list(known.items())[1:]:
        first = next(iter(known))
        if data_sets != known[first]:
            raise InputError(
                "compare-runs: all runs must have learned from the same data sets; "
                f"{first} has {_words(known[first])} and {run} has {_words(data_sets)}"
            )


def _words(data_sets: Sequence[dict[str, Any]]) -> str:
    """Return the data sets that `source.yaml` lists, for an error message."""
    return ", ".join(
        f"{entry.get('file', entry['name'])}{' inverted' if entry['inverted'] else ''}"
        for entry in data_sets
    )


def _add_compare_runs_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("runs", type=str, nargs="*", help="folders of two finished runs, A and B")
    parser.add_argument(
        "--a", type=str, nargs="+", help="runs of side A, which differ in the seed alone"
    )
    parser.add_argument(
        "--b", type=str, nargs="+", help="runs of side B; the first is paired with the first of A"
    )
    add_episode_options(parser)


COMPARE_RUNS = Command(
    compare_runs,
    _add_compare_runs_options,
    "bidfmkd compare-runs runs/train runs/train-2 --n-episodes 200",
    positional="runs",
)
