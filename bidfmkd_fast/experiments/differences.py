"""Build the table of BiDf-MKD less the other methods, over training seeds and over episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast.experiments.intervals import mean_and_t95
from bidfmkd_fast.experiments.meta_test import Results, over_seeds
from bidfmkd_fast.experiments.methods import METHODS, OURS
from bidfmkd_fast.meta import Evaluation, paired_difference
from bidfmkd_fast.meta.evaluate import mean_and_ci95
from bidfmkd_fast.training.tables import Table

# What asks no API: whatever is above the better of these is knowledge of the APIs.
ASK_NO_API = ("zero_query", "random_teachers")
# The gain share is 0 for the first method and 1 for the second.
NO_GAIN, FULL_GAIN = "random", "maml"

Runs = Sequence[Evaluation]  # of one method with one number of shots: one entry per seed


@dataclass(frozen=True, eq=False)
class Difference:
    """Differences of the accuracies of two methods, paired.

    `by_seed` is float64 `[n_seeds]`, each the mean over the episodes of a seed. `by_episode` is
    float64 `[n_episodes]`, over all seeds as in `over_seeds`.
    """

    by_seed: Tensor
    by_episode: Tensor

    @classmethod
    def of(cls, a: Runs, b: Runs) -> Difference:
        """Return `a` less `b`. Raises InputError if a seed has evaluated them differently."""
        means = [paired_difference(x, y).mean for x, y in zip(a, b, strict=True)]
        by_episode = over_seeds(a).per_episode - over_seeds(b).per_episode
        return cls(torch.tensor(means, dtype=torch.float64), by_episode)


def difference_table(results: Results, positions: Sequence[int], shots: Sequence[str]) -> Table:
    """Return the table of one data set, whose meta-tests are at `positions`.

    There is a row for each other method. The row "knowledge" follows if both methods that ask no
    API are there, and the row "gain share" if random initialisation and MAML are. With several
    seeds each number of shots has a second column, with the interval over episodes.
    """
    runs = {
        method: [
            [result.meta_tests[position].evaluation for result in of_method]
            for position in positions
        ]
        for method, of_method in results.items()
    }
    ours, label, several = runs[OURS], METHODS[OURS][0], len(results[OURS]) > 1
    rows = [
        [f"{label} less {METHODS[method][0]}", *difference_cells(ours, theirs, several)]
        for method, theirs in runs.items()
        if method != OURS
    ]
    if runs.keys() >= set(ASK_NO_API):
        better = [
            max(pair, key=lambda of_method: over_seeds(of_method).mean)
            for pair in zip(*(runs[method] for method in ASK_NO_API), strict=True)
        ]
        name = f"knowledge: {label} less what asks no API"
        rows.append([name, *difference_cells(ours, better, several)])
    if runs.keys() >= {NO_GAIN, FULL_GAIN}:
        shares = [
            cell
            for of_method, none, full in zip(ours, runs[NO_GAIN], runs[FULL_GAIN], strict=True)
            for cell in _share(Difference.of(of_method, none), Difference.of(full, none), several)
        ]
        rows.append([f"gain share of {label}", *shares])
    return [difference_header(shots, several), *rows]


def difference_header(shots: Sequence[str], several: bool) -> list[str]:
    """Return the header of a table of `difference_cells`."""
    if several:
        shots = [f"{shot} over {units}" for shot in shots for units in ("seeds", "episodes")]
    return ["points", *shots]


def difference_cells(ours: Sequence[Runs], theirs: Sequence[Runs], several: bool) -> Iterator[str]:
    """Yield the cells of a row: one per number of shots, or two if there are `several` seeds."""
    for a, b in zip(ours, theirs, strict=True):
        difference = Difference.of(a, b)
        mean, by_episode = mean_and_ci95(difference.by_episode)
        if several:
            mean, by_seed = mean_and_t95(difference.by_seed)
            yield f"{100 * mean:+.2f} ± {100 * by_seed:.2f}"
            yield f"± {100 * by_episode:.2f}"
        else:
            yield f"{100 * mean:+.2f} ± {100 * by_episode:.2f}"


def _share(gain: Difference, full: Difference, several: bool) -> list[str]:
    """Return the cells of a ratio of mean gains, as `_differences` does.

    With r the ratio of the means, the error of r is that of the mean of `gain - r * full`, divided
    by the mean of `full` (to first order). There is no share if the full gain is not above zero.
    """
    mean = float(full.by_episode.mean())
    if mean <= 0:
        return ["-"] * (1 + several)
    share = float(gain.by_episode.mean()) / mean
    _, by_episode = mean_and_ci95(gain.by_episode - share * full.by_episode)
    if not several:
        return [f"{100 * share:.1f} % ± {100 * by_episode / mean:.1f}"]
    _, by_seed = mean_and_t95(gain.by_seed - share * full.by_seed)
    return [
        f"{100 * share:.1f} % ± {100 * by_seed / mean:.1f}",
        f"± {100 * by_episode / mean:.1f}",
    ]
