"""Check the tables of comparisons and sweeps against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

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
    assert ours[1:] == [
        ["BiDf-MKD less random initialisation", "+25.00 ± 5.66"],
        ["BiDf-MKD less no-recovery control", "+20.00 ± 8.00"],
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
