"""Build the tables of a comparison and of a sweep from their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bidfmkd_fast.experiments.differences import difference_table
from bidfmkd_fast.experiments.meta_test import Result, Results, over_seeds, share_episodes
from bidfmkd_fast.experiments.methods import METHODS, OURS, REFERENCES
from bidfmkd_fast.meta import Evaluation, paired_difference
from bidfmkd_fast.training.tables import Table

TitledTable = tuple[str, Table]

METHOD, CELL = "method", "cell"  # the first column of a main table

OWN_RATE = "the run's own rate of adaptation, for which no real image was used"

ONE_SEED = (
    "One training seed proves nothing: the intervals are over episodes, and runs differ by more.\n"
    "With one seed the demo was 4.9 points above random initialisation on one processor, and 3.1\n"
    "points below it on another. Give several --seeds for intervals over seeds."
)


def comparison_tables(results: Results, seeds: Sequence[int]) -> Iterator[TitledTable]:
    """Yield the tables of each data set, and a warning if there is a single seed.

    The first has the accuracies and the differences to the reference, which is the first of
    `REFERENCES` that is in the comparison; without a reference there are none. The second has
    BiDf-MKD less each other method (see `difference_table`), and so has the third, at the rate of
    the run instead of the one chosen on meta_val. The last has the differences to the reference
    under each seed. With a single seed the last is left out, and so is the second if it would only
    repeat the first. The warning is a title without rows.
    """
    own = _at_own_rate(results)
    reference = next((method for method in REFERENCES if method in results), None)
    for data_set, positions in _positions(next(iter(results.values()))[0]).items():
        evaluations = {
            method: [_over_seeds(method_results, position) for position in positions]
            for method, method_results in results.items()
        }
        of_reference = evaluations[reference] if reference else None
        first = next(iter(results))
        shots = _shots(evaluations[first])
        own_shots = [] if own is None else [f"{shot} at own rate" for shot in shots]
        rows = [_header(METHOD, shots, reference, own_shots)]
        for method, of_method in evaluations.items():
            label = METHODS[method][0]
            theirs = [] if own is None else [_over_seeds(own[method], at) for at in positions]
            rows.append(_row(label, results[method], positions, of_method, of_reference, theirs))
        yield _title(results[first], positions[0]), rows
        others = results.keys() - {OURS}
        if OURS in results and (others if len(seeds) > 1 else others - {reference}):
            title = _differences_title(data_set, len(seeds))
            yield title, difference_table(results, positions, shots)
            if own is not None:
                yield f"{title}; at {OWN_RATE}", difference_table(own, positions, shots)
        if reference and len(seeds) > 1 and len(results) > 1:
            yield (
                f"by seed, {data_set}",
                _by_seed(results, reference, positions, seeds, shots),
            )
    if len(seeds) == 1:
        yield ONE_SEED, []


def sweep_tables(
    names: Sequence[str], results: Sequence[Sequence[Result]]
) -> Iterator[TitledTable]:
    """Yield a table for each data set: the accuracy of each cell, and its difference to the first.

    `names` and `results` are those of the cells.
    """
    for positions in _positions(results[0][0]).values():
        by_cell = [
            [_over_seeds(cell_results, position) for position in positions]
            for cell_results in results
        ]
        first = by_cell[0]
        rows = [_header(CELL, _shots(first), "the first", [])]
        for name, cell_results, evaluations in zip(names, results, by_cell, strict=True):
            rows.append(_row(name, cell_results, positions, evaluations, first, []))
        yield _title(results[0], positions[0]), rows


def main_tables(tables: Sequence[TitledTable]) -> list[TitledTable]:
    """Return those with the accuracies of all methods or cells: one for each data set."""
    return [(title, rows) for title, rows in tables if rows and rows[0][0] in (METHOD, CELL)]


def by_data_set(results: Sequence[Result]) -> dict[str, list[Evaluation]]:
    """Return for each data set the evaluations over all seeds, one per number of shots."""
    return {
        data_set: [_over_seeds(results, position) for position in positions]
        for data_set, positions in _positions(results[0]).items()
    }


def _at_own_rate(results: Results) -> Results | None:
    """Return the results with the rates of the runs, or None if some are not known."""
    own = {
        method: [at_own for result in of_method if (at_own := result.at_own_rate) is not None]
        for method, of_method in results.items()
    }
    return own if all(len(own[method]) == len(results[method]) for method in results) else None


def _positions(result: Result) -> dict[str, list[int]]:
    """Return for each data set the positions of its entries in `meta_tests`."""
    positions: dict[str, list[int]] = {}
    for position, test in enumerate(result.meta_tests):
        positions.setdefault(test.evaluation.dataset, []).append(position)
    return positions


def _over_seeds(results: Sequence[Result], position: int) -> Evaluation:
    return over_seeds([result.meta_tests[position].evaluation for result in results])


def _shots(evaluations: Sequence[Evaluation]) -> list[str]:
    return [f"{evaluation.n_shot}-shot" for evaluation in evaluations]


def _title(results: Sequence[Result], position: int) -> str:
    by_seed = [result.meta_tests[position].evaluation for result in results]
    whole, n_seeds = over_seeds(by_seed), len(by_seed)
    if n_seeds > 1 and share_episodes(by_seed):
        seeds = f", the same under each of {n_seeds} seeds"
    else:
        seeds = f" over {n_seeds} seed{'s' if n_seeds > 1 else ''}"
    return (
        f"{whole.n_way}-way accuracy in %, 95 % CI, {len(whole.per_episode)} episodes of unseen "
        f"classes ({whole.dataset} {whole.split}){seeds}; differences paired by episode"
    )


def _differences_title(data_set: str, n_seeds: int) -> str:
    if n_seeds == 1:
        return f"paired differences, {data_set}"
    return (
        f"over seeds, {data_set}: paired differences, mean over {n_seeds} seeds with its 95 % "
        "t-interval; beside it the 95 % CI over episodes"
    )


def _header(
    first: str, shots: Sequence[str], reference: str | None, own: Sequence[str]
) -> list[str]:
    differences = [f"{shot} less {reference}" for shot in shots] if reference else []
    return [first, *shots, *differences, *own, "queries", "seconds", "adapt lr"]


def _row(
    name: str,
    results: Sequence[Result],
    positions: Sequence[int],
    evaluations: Sequence[Evaluation],
    reference: Sequence[Evaluation] | None,
    own: Sequence[Evaluation],
) -> list[str]:
    """Return a row of a main table, with its differences to the row `reference`, if any.

    The row of the reference itself has empty cells there. `own` has the evaluations at the rate of
    the run.
    """
    if reference is None:
        differences = []
    elif evaluations is reference:
        differences = [""] * len(evaluations)
    else:
        differences = [_difference(a, b) for a, b in zip(evaluations, reference, strict=True)]
    return [
        name,
        *(f"{100 * e.mean:.2f} ± {100 * e.ci95:.2f}" for e in evaluations),
        *differences,
        *(f"{100 * e.mean:.2f}" for e in own),
        f"{sum(result.queries for result in results) // len(results):,}",
        f"{sum(result.seconds for result in results) / len(results):,.0f}",
        _learning_rates(results, positions),
    ]


def _by_seed(
    results: Results,
    reference: str,
    positions: Sequence[int],
    seeds: Sequence[int],
    shots: Sequence[str],
) -> Table:
    def every(method: str) -> list[Evaluation]:
        return [
            result.meta_tests[position].evaluation
            for result in results[method]
            for position in positions
        ]

    header = [f"less {reference}", *(f"seed {seed}, {shot}" for seed in seeds for shot in shots)]
    rows = [
        [METHODS[method][0], *map(_difference, every(method), every(reference))]
        for method in results
        if method != reference
    ]
    return [header, *rows]


def _difference(a: Evaluation, b: Evaluation) -> str:
    difference = paired_difference(a, b)
    return f"{100 * difference.mean:+.2f} ± {100 * difference.ci95:.2f}"


def _learning_rates(results: Sequence[Result], positions: Sequence[int]) -> str:
    """Return the learning rates of the adaptation: commas between seeds, slashes between shots."""
    return " / ".join(
        ", ".join(
            dict.fromkeys(f"{result.meta_tests[position].learning_rate:g}" for result in results)
        )
        for position in positions
    )
