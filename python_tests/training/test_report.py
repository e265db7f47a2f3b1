"""Tables, the report, and the grids of recovered images pixel by pixel."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bidfmkd_fast.data import make_glyphs
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import Evaluation, MetaModel, TaskMemory
from bidfmkd_fast.models import build_model
from bidfmkd_fast.recovery import Recovered
from bidfmkd_fast.training import RecoveredSet, Run, TrainConfig
from bidfmkd_fast.training.comparison import Comparison, compare
from bidfmkd_fast.training.grids import save_grid, write_grids
from bidfmkd_fast.training.report import write_report
from bidfmkd_fast.training.run_folder import RunFolder
from bidfmkd_fast.training.tables import markdown_table, text_table

BLUE, ORANGE = (0, 114, 178), (230, 120, 0)


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
    told = comparison()
    # by hand: sd of (0.1, 0.3) is 0.1414, of (0.2, 0.5) 0.2121, of the differences (0.1, 0.2)
    # 0.0707
    assert told.accuracies == [
        ["model", "1-shot", "5-shot"],
        ["plain", "20.00 ± 19.60", "50.00 ± 0.00"],
        ["ours", "35.00 ± 29.40", "50.00 ± 19.60"],
    ]
    assert told.differences[1:] == [["ours less plain", "+15.00 ± 9.80", "+0.00 ± 19.60"]]
    assert "5-way accuracy on 2 episodes" in told.title
    assert "made up meta_test" in told.title


def test_tables_are_aligned() -> None:
    rows = [["model", "1-shot"], ["a", "5.00 ± 1.00"], ["a longer name", "15.00 ± 1.00"]]
    assert text_table(rows).splitlines() == [
        "model                1-shot",
        "-------------  ------------",
        "a               5.00 ± 1.00",
        "a longer name  15.00 ± 1.00",
    ]
    assert markdown_table(rows).splitlines()[:3] == [
        "| model | 1-shot |",
        "|---|---:|",
        "| a | 5.00 ± 1.00 |",
    ]


def test_one_model_alone_has_no_differences() -> None:
    alone = Comparison({"ours": {1: evaluation([0.2, 0.5], 1)}})
    assert len(alone.differences) == 1
    assert "less" not in str(alone)


def test_compare_judges_every_model_on_the_same_episodes() -> None:
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
    told = compare(models, dataset, n_shots=[1, 2], n_query=2, n_episodes=3)
    assert list(told.evaluations["one"]) == [1, 2]
    assert torch.equal(
        told.evaluations["one"][2].per_episode, told.evaluations["one again"][2].per_episode
    )
    assert told.differences[1][1] == "+0.00 ± 0.00"
    with pytest.raises(InputError, match="at least one model"):
        compare({}, dataset)


def recovered_set(
    images: Tensor, labels: list[int], answers: list[int], part: str = "support"
) -> RecoveredSet:
    n_classes = max(labels) + 1
    scores = torch.eye(n_classes)[answers]
    recovered = Recovered(images, torch.tensor(labels), scores, torch.zeros(len(labels)), [], True)
    return RecoveredSet(
        0, "the api", tuple(f"class {k}" for k in range(n_classes)), part, recovered
    )


def test_a_grid_shows_every_image_enlarged_in_its_row_and_framed(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, 16, 16, generator=draws)
    images[0] += 3  # out of range: shown as white
    one = recovered_set(images, [0, 0, 1, 1], [0, 1, 1, 0])
    save_grid([one], tmp_path / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    zoom, cell, head = 3, 16 * 3 + 6, 24
    left = int((pixels[head + 2] == BLUE).all(axis=1).argmax()) - 1  # where the first frame starts
    for position in range(4):
        top, start = head + (position // 2) * cell, left + (position % 2) * cell
        shown = pixels[top + 3 : top + 3 + 48 : zoom, start + 3 : start + 3 + 48 : zoom]
        wanted = (images[position].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        right = position in (0, 2)
        rows, columns = np.indices((16, 16))
        seen = (
            np.ones((16, 16), bool) if right else columns - rows < 10
        )  # the rest is under the filled corner
        assert np.abs(shown - wanted)[seen].max() <= 0.5
        assert tuple(pixels[top + 2, start + 2]) == (BLUE if right else ORANGE)
        corner = pixels[
            top + 3 : top + 7, start + 47 : start + 51
        ]  # a shape, for whoever sees no colours
        assert (corner == ORANGE).all() == (not right)
    names = pixels[head:, :left]
    assert (names.min(axis=(1, 2)) < 128).any(), "the class names are missing"


def test_both_sets_stand_side_by_side_and_large_sets_are_cut(tmp_path: Path) -> None:
    labels = [label for label in range(30) for _ in range(15)]
    one = recovered_set(torch.zeros(450, 1, 8, 8), labels, labels)
    save_grid([one], tmp_path / "one.png")
    save_grid([one, one], tmp_path / "two.png")
    width, height = Image.open(tmp_path / "one.png").size
    assert Image.open(tmp_path / "two.png").size == (2 * width + 16, height)
    assert height == 24 + 20 * 54
    assert width < 12 * 54 + 100


def folder_of(tmp_path: Path, n_apis: int, complete: bool = True) -> tuple[Run, RunFolder]:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    memory, sets = TaskMemory(), []
    for index in range(n_apis):
        for part in ("support", "query"):
            one = recovered_set(torch.rand(2, 1, 8, 8), [0, 1], [0, 0], part)
            sets.append(RecoveredSet(index, one.api_name, one.class_names, part, one.recovered))
            memory.add(one.images, [("", "a"), ("", "b")])
    seconds = {"recovery": 1.25, "distillation": 0.5, "replay": 2.0}
    model = MetaModel(module)
    run = Run(model, model, memory, sets, [], 12345, 7, seconds, complete, TrainConfig())
    folder = RunFolder.create(tmp_path / "run", run.config)
    folder.finish(run)
    return run, folder


def test_the_report_has_table_cost_and_pictures_that_are_there(tmp_path: Path) -> None:
    run, folder = folder_of(tmp_path, n_apis=5)
    assert [path.name for path in write_grids(run, folder, n_apis=2)] == [
        "api_000.png",
        "api_001.png",
    ]
    text = write_report(folder, [comparison()], extra_seconds={"meta-test": 3.0}).read_text()
    for wanted in (
        "| ours | 35.00 ± 29.40 | 50.00 ± 19.60 |",
        "| ours less plain | +15.00 ± 9.80 |",
        "| run | 12,345 | 7 | 0 |",
        "| cap | none | none | none |",
        "| seconds, replay | 2.0 |",
        "| seconds, meta-test | 3.0 |",
        "| recovered as wanted, query sets | 50 % |",
        "](grids/api_001.png)",
        "orange frame with a filled corner",
        "Recovered images need not look like anything",
    ):
        assert wanted in text
    assert "budget ended" not in text
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert all((folder.path / link).exists() for link in links if link != "metrics.jsonl")


def test_the_report_says_when_a_budget_ended(tmp_path: Path) -> None:
    _, folder = folder_of(tmp_path, n_apis=1, complete=False)
    text = write_report(folder).read_text()
    assert "budget ended before every API" in text
    assert "## Accuracy" not in text
