"""Check the tables of a comparison: accuracies and paired differences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bidfmkd_fast.data import make_glyphs
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import Evaluation, MetaModel
from bidfmkd_fast.models import build_model
from bidfmkd_fast.training.comparison import (
    ACCURACY,
    Comparison,
    compare,
    read_comparisons,
    write_comparisons,
)


def evaluation(values: list[float], n_shot: int) -> Evaluation:
    per_episode = torch.tensor(values, dtype=torch.float64)
    mean, ci95 = float(per_episode.mean()), 1.96 * float(per_episode.std()) / math.sqrt(len(values))
    return Evaluation(mean, ci95, per_episode, "made up", "meta_test", 5, n_shot, 15, 0, 10)


def comparison() -> Comparison:
    return Comparison(
        {
            "plain": {1: evaluation([0.1, 0.3], 1), 5: evaluation([0.5, 0.5], 5)},
            "ours": {1: evaluation([0.2, 0.5], 1), 5: evaluation([0.4, 0.6], 5)},
        }
    )


def test_accuracies_and_paired_differences() -> None:
    compared = comparison()
    # Computed by hand: the standard deviation of (0.1, 0.3) is 0.1414, that of (0.2, 0.5) is
    # 0.2121, and that of the differences (0.1, 0.2) is 0.0707.
    assert compared.accuracies == [
        ["model", "1-shot", "5-shot"],
        ["plain", "20.00 ± 19.60", "50.00 ± 0.00"],
        ["ours", "35.00 ± 29.40", "50.00 ± 19.60"],
    ]
    assert compared.differences[1:] == [["ours less plain", "+15.00 ± 9.80", "+0.00 ± 19.60"]]
    assert "5-way accuracy on 2 episodes" in compared.title
    assert "made up meta_test" in compared.title


def test_one_model_alone_has_no_differences() -> None:
    alone = Comparison({"ours": {1: evaluation([0.2, 0.5], 1)}})
    assert len(alone.differences) == 1
    assert "less" not in str(alone)


def test_compare_evaluates_every_model_on_the_same_episodes() -> None:
    dataset = make_glyphs(size=16, n_per_class=4)
    torch.manual_seed(0)
    arguments = {
        "in_channels": 1,
        "n_classes": 5,
        "image_size": (16, 16),
        "width": 4,
        "batch_statistics": True,
    }
    models = {
        name: MetaModel(build_model("conv4", **arguments), adapt_steps=1) for name in ("one", "two")
    }  # type: ignore[arg-type]
    models["one again"] = models["one"]
    compared = compare(models, dataset, n_shots=[1, 2], n_query=2, n_episodes=3)
    assert list(compared.evaluations["one"]) == [1, 2]
    assert torch.equal(
        compared.evaluations["one"][2].per_episode, compared.evaluations["one again"][2].per_episode
    )
    assert compared.differences[1][1] == "+0.00 ± 0.00"
    with pytest.raises(InputError, match="at least one model"):
        compare({}, dataset)


def test_what_was_evaluated_is_read_back_from_the_folder(tmp_path: Path) -> None:
    assert read_comparisons(tmp_path) == []
    kept = comparison()
    write_comparisons(tmp_path, [kept, kept])
    first, second = read_comparisons(tmp_path)
    assert str(first) == str(second) == str(kept)


@pytest.mark.parametrize(
    "content", ["{", "7", "[7]", "[{}]", '[{"ours": []}]', '[{"ours": [{"mean": 1}]}]']
)
def test_a_damaged_evaluation_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / ACCURACY).write_text(content)
    with pytest.raises(InputError, match="accuracy.json") as raised:
        read_comparisons(tmp_path)
    assert "\n" not in str(raised.value)
