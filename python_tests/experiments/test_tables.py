"""Check the tables of comparisons and sweeps against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.meta_test import MetaTest, Result
from bidfmkd_fast.experiments.tables import comparison_tables
from bidfmkd_fast.meta import Evaluation
from bidfmkd_fast.meta.evaluate import mean_and_ci95


def meta_test(values: list[float], n_shot: int, seed: int, rate: float) -> MetaTest:
    per_episode = torch.tensor(values, dtype=torch.float64)
    mean, ci95 = mean_and_ci95(per_episode)
    return MetaTest(
        rate, Evaluation(mean, ci95, per_episode, "made up", "meta_test", 5, n_shot, 15, seed, 10)
    )


def test_the_tables_of_a_comparison_against_numbers_by_hand() -> None:
    results = {
        "random": [
            Result([meta_test([0.1, 0.2], 1, 0, 0.1)], 0, 0.0),
            Result([meta_test([0.2, 0.3], 1, 1, 0.3)], 0, 0.0),
        ],
        "control": [
            Result([meta_test([0.2, 0.2], 1, 0, 0.1)], 10, 4.0),
            Result([meta_test([0.3, 0.3], 1, 1, 0.1)], 10, 8.0),
        ],
        "bidf_mkd": [
            Result([meta_test([0.4, 0.4], 1, 0, 0.1)], 500, 9.0),
            Result([meta_test([0.4, 0.6], 1, 1, 0.1)], 700, 9),
        ],
    }
    (title, rows), (_, ours), (_, by_seed) = comparison_tables(results, [0, 1])
    assert "4 episodes of unseen classes (made up meta_test) over 2 seeds" in title
    # The episodes of both seeds together: 0.4 0.4 0.4 0.6 has a standard deviation of 0.1; 1.96 *
    # 0.1 / 2 is 0.098. Less `random`, 0.1 0.2 0.2 0.3, that is 0.3 0.2 0.2 0.3, of 0.0577.
    assert rows == [
        ["method", "1-shot", "1-shot less random", "queries", "seconds", "adapt lr"],
        ["random initialisation", "20.00 ± 8.00", "", "0", "0", "0.1, 0.3"],
        ["no-recovery control", "25.00 ± 5.66", "+5.00 ± 5.66", "10", "6", "0.1"],
        ["BiDf-MKD", "45.00 ± 9.80", "+25.00 ± 5.66", "600", "9", "0.1"],
    ]
    # The mean differences are 0.25 0.25 and 0.2 0.2 in the two seeds, up to rounding.
    assert ours[1:] == [
        ["BiDf-MKD less random initialisation", "+25.00 ± 0.00", "± 5.66"],
        ["BiDf-MKD less no-recovery control", "+20.00 ± 0.00", "± 8.00"],
    ]
    assert by_seed == [
        ["less random", "seed 0, 1-shot", "seed 1, 1-shot"],
        ["no-recovery control", "+5.00 ± 9.80", "+5.00 ± 9.80"],
        ["BiDf-MKD", "+25.00 ± 9.80", "+25.00 ± 9.80"],
    ]


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (("random", "control", "zero_query", "bidf_mkd"), "zero_query"),
        (("control", "random", "random_teachers"), "random"),
        (("control", "bidf_mkd"), "control"),
        (("random_teachers", "bidf_mkd", "maml"), None),
        (("zero_query",), "zero_query"),
    ],
)
def test_the_reference_is_the_first_that_is_there(
    methods: tuple[str, ...], reference: str | None
) -> None:
    results = {
        method: [Result([meta_test([0.1 * (number + 1), 0.2], 1, 0, 0.1)], 0, 0.0)]
        for number, method in enumerate(methods)
    }
    _, (header, *rows) = next(comparison_tables(results, [0]))
    differences = [cell for cell in header if " less " in cell]
    assert differences == ([f"1-shot less {reference}"] if reference else [])
    if reference:
        assert [rows[number][2] == "" for number, _ in enumerate(methods)] == [
            method == reference for method in methods
        ]
    assert {len(row) for row in rows} == {len(header)}


def runs_of(by_shot: list[list[list[float]]]) -> list[Result]:
    """Return results from accuracies by number of shots (1, 5), training seed and episode.

    All seeds have the same episodes.
    """
    return [
        Result([meta_test(v, n, 0, 0.1) for v, n in zip(values, (1, 5), strict=True)], 0, 0.0)
        for values in zip(*by_shot, strict=True)
    ]


OURS = [[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]]


def always(accuracy: float) -> list[list[float]]:
    return [[accuracy, accuracy]] * 3


def test_differences_over_seeds_against_numbers_by_hand() -> None:
    results = {
        "random": runs_of([always(0.3), always(0.3)]),
        "zero_query": runs_of([always(0.4), always(0.5)]),
        "random_teachers": runs_of([always(0.5), always(0.4)]),
        "bidf_mkd": runs_of([OURS, OURS]),
        "maml": runs_of([[[0.7, 0.9]] * 3, always(0.2)]),
    }
    (title, main), (over_seeds, rows), _ = comparison_tables(results, [0, 1, 2])
    assert "2 episodes of unseen classes (made up meta_test), the same under each of 3" in title
    assert over_seeds.startswith("over seeds, made up: ") and "mean over 3 seeds" in over_seeds
    # The mean over the seeds is 0.6 on the first episode and 0.8 on the second, with a standard
    # deviation of 0.141; 1.96 * 0.141 / 1.414 is 0.196.
    assert main[4][1] == "70.00 ± 19.60"
    # The means of the seeds are 0.6 0.7 0.8, with a standard deviation of 0.1; 4.303 * 0.1 / 1.732
    # is 0.2484. The better method that asks no API is random_teachers in 1-shot, and zero_query in
    # 5-shot. The gain is 0.4 of 0.5, or 80 %. By seed, gain less 80 % of the full gain is -0.1 0
    # 0.1; 4.303 * 0.1 / 1.732 / 0.5 is 0.497. By episode it is 0.3 - 0.8 * 0.4 = -0.02 and
    # 0.5 - 0.8 * 0.6 = 0.02; 1.96 * 0.0283 / 1.414 / 0.5 is 0.078. In 5-shot MAML gains nothing.
    assert rows == [
        ["points", *(f"{n}-shot over {units}" for n in (1, 5) for units in ("seeds", "episodes"))],
        ["BiDf-MKD less random initialisation", *["+40.00 ± 24.84", "± 19.60"] * 2],
        [
            "BiDf-MKD less zero_query: pictures alone",
            *["+30.00 ± 24.84", "± 19.60", "+20.00 ± 24.84", "± 19.60"],
        ],
        [
            "BiDf-MKD less random_teachers",
            *["+20.00 ± 24.84", "± 19.60", "+30.00 ± 24.84", "± 19.60"],
        ],
        [
            "BiDf-MKD less MAML on real meta-train data",
            *["-10.00 ± 24.84", "± 0.00", "+50.00 ± 24.84", "± 19.60"],
        ],
        ["knowledge: BiDf-MKD less what asks no API", *["+20.00 ± 24.84", "± 19.60"] * 2],
        ["gain share of BiDf-MKD", "80.0 % ± 49.7", "± 7.8", "-", "-"],
    ]


def with_own_rate(result: Result, accuracy: float) -> Result:
    """Return a result that reaches `accuracy` on every episode at the rate of the run."""
    tests = [
        replace(test, own=meta_test([accuracy, accuracy], 1, 0, 0.1).evaluation)
        for test in result.meta_tests
    ]
    return replace(result, meta_tests=tests)


def test_the_rates_of_the_runs_stand_beside_the_chosen_ones() -> None:
    ours = [Result([meta_test([0.4, 0.6], 1, 0, 0.3)], 9, 1.0)] * 2
    theirs = [Result([meta_test([0.3, 0.3], 1, 0, 0.3)], 0, 0.0)] * 2
    results = {
        "random": [with_own_rate(result, 0.25) for result in theirs],
        "bidf_mkd": [with_own_rate(ours[0], 0.30), with_own_rate(ours[1], 0.40)],
    }
    (_, main), _, (title, own), _ = comparison_tables(results, [0, 1])
    assert [row[3] for row in main] == ["1-shot at own rate", "25.00", "35.00"]
    assert title.endswith("at the run's own rate of adaptation, for which no real image was used")
    # The seeds' differences are 0.05 and 0.15: 12.706 * 0.0707 / 1.414 is 0.635.
    assert own[1:] == [["BiDf-MKD less random initialisation", "+10.00 ± 63.53", "± 0.00"]]
    # A file of version 0.1 has no accuracy at the rate of the run: then nothing is shown of it.
    assert len(list(comparison_tables({**results, "random": theirs}, [0, 1]))) == 3


def test_a_table_of_one_seed_says_that_it_proves_nothing() -> None:
    results = {
        "random": runs_of([always(0.3), always(0.3)])[:1],
        "zero_query": runs_of([always(0.4), always(0.5)])[:1],
        "bidf_mkd": runs_of([OURS, OURS])[:1],
        "maml": runs_of([[[0.7, 0.9]] * 3, always(0.9)])[:1],
    }
    _, (title, rows), (warning, none) = comparison_tables(results, [4])
    assert title == "paired differences, made up"
    assert rows[0] == ["points", "1-shot", "5-shot"]
    assert rows[-1] == ["gain share of BiDf-MKD", "60.0 % ± 15.7", "50.0 % ± 32.7"]
    assert not any("knowledge" in row[0] for row in rows)  # random_teachers is missing
    assert warning.startswith("One training seed proves nothing") and none == []
    # A table that would only repeat the differences to the reference is left out.
    two = {"zero_query": results["zero_query"], "bidf_mkd": results["bidf_mkd"]}
    assert [title for title, _ in comparison_tables(two, [4])][1:] == [warning]


def test_methods_on_different_episodes_are_not_compared() -> None:
    theirs, ours = (
        [Result([meta_test([0.1, 0.2], 1, seed, 0.1)], 0, 0.0) for seed in seeds]
        for seeds in ((0, 1), (0, 2))
    )
    with pytest.raises(InputError, match="must be of the same episodes; seed is 2 and 1"):
        list(comparison_tables({"maml": theirs, "bidf_mkd": ours}, [0, 1]))
