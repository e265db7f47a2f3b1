"""Test the benchmark harness, its comparison with older results, and the pages of results."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are in the source tree only", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import bench, gallery, harness, report, scaling  # noqa: E402
from benchmarks.baselines import BestEager, functional, keyed_points, paper_order  # noqa: E402
from benchmarks.cases import pictures  # noqa: E402
from benchmarks.harness import OURS, Case, Prepared, Row, run_case  # noqa: E402
from bidfmkd_fast.priors import KINDS, draw_pictures  # noqa: E402
from bidfmkd_fast.priors.library import kinds_of  # noqa: E402


def prepared(check: bool = True) -> Prepared:
    def verify() -> None:
        assert check, "ours is wrong"

    work = torch.ones(200, 200)
    return Prepared(
        {OURS: lambda: work @ work, "twice": lambda: (work @ work, work @ work)}, verify, n_bytes=8
    )


def test_a_case_is_checked_then_timed() -> None:
    rows = run_case(Case("one", prepared), runs=9, threads=1)
    assert [(row.case, row.contender, row.threads, row.runs) for row in rows] == [
        ("one", OURS, 1, 9),
        ("one", "twice", 1, 9),
    ]
    assert rows[0].ratio_to_ours == 1
    assert all(row.median_ms > 0 for row in rows)
    with pytest.raises(AssertionError, match="ours is wrong"):
        run_case(Case("one", lambda: prepared(check=False)), runs=9, threads=1)


def test_compare_flags_what_became_slower(tmp_path: Path) -> None:
    rows = run_case(Case("one", prepared), runs=3, threads=1)
    old = [asdict(row) for row in rows]
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"rows": old}))
    text, bad = bench.compare(rows, file)
    assert not bad
    assert "1.00x the time it took" in text
    old[1]["ratio_to_ours"] *= 2  # the other was twice as slow beside ours as it is now
    file.write_text(json.dumps({"rows": old}))
    text, bad = bench.compare(rows, file)
    assert bad
    assert "2.00x the time it took, against twice  REGRESSION" in text


def test_results_of_other_cases_stay(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        bench.write(run_case(Case(name, prepared), runs=3, threads=1), tmp_path, 3)
    (file,) = tmp_path.glob("*.json")
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == [
        "two",
        "two",
        "one",
        "one",
    ]
    assert len(next(tmp_path.glob("*.csv")).read_text().splitlines()) == 5


def test_a_run_that_is_cut_off_keeps_and_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Prepared:
        raise KeyboardInterrupt

    cases = {
        "one": Case("one", prepared),
        "two": Case("two", prepared),
        "three": Case("three", interrupted),
    }
    monkeypatch.setattr(harness, "CASES", cases)
    with pytest.raises(KeyboardInterrupt):
        bench.bench(["*"], [1], 3, tmp_path, None, seed=0)
    (file,) = tmp_path.glob("*.json")
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == [
        "one",
        "one",
        "two",
        "two",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "case",
        lines[1].split()[0],
        "one",
        "one",
        "two",
        "two",
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
def test_baselines_estimate_a_gradient(kind: str, seed: int) -> None:
    """Check that the implementations that benchmarks compare with do the same work as ours."""
    torch.manual_seed(seed)
    x, slope = torch.randn(4, 3, 4, 4), torch.randn(48)

    def losses(points: torch.Tensor) -> torch.Tensor:
        return points.flatten(2) @ slope

    for estimate in (
        paper_order(x, 4003, 0.1, kind, losses),
        BestEager(x, 4000, kind)(x, 0.1, losses),
        functional(x, 4000, 0.1, kind, losses),
    ):
        # The relative error of the estimate has variance (d - 1) / q = 0.012.
        error = (estimate.flatten(1) - slope).norm(dim=1) / slope.norm()
        assert float(error.max()) < 0.25


def test_points_of_torchs_keyed_generator(capsys: pytest.CaptureFixture[str]) -> None:
    """Check their mean and deviation, or that the benchmark says why it leaves them out."""
    x = torch.rand(50, 3, 8, 8)
    make = keyed_points(x, 40, 0.5)
    if make is None:
        assert re.match(r"left out: torch.func._random on cpu \(.+\)\n", capsys.readouterr().err)
    else:
        steps = (make() - x) * (192**0.5 / 0.5)  # 384,000 numbers
        assert abs(steps.mean().item()) < 0.01 and abs(steps.std().item() - 1) < 0.01


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 7), (3, 32, 32)])
def test_the_plain_loop_draws_the_pictures_of_the_library(
    shape: tuple[int, int, int], seed: int
) -> None:
    """From the same random numbers; so it is timed at the same work, and checks every kind."""
    kind = kinds_of(torch.arange(1000), seed)
    for number in range(len(KINDS)):
        scenes = (kind == number).nonzero()[:6, 0]
        wanted = [pictures.plainly_drawn(scene, shape, seed) for scene in scenes.split(1)]
        got = draw_pictures(scenes, torch.zeros_like(scenes), shape, seed)
        assert (got - torch.stack(wanted)).abs().max() < 1.01 / 255


def test_a_gpu_has_a_section_of_its_own(tmp_path: Path) -> None:
    rows = [asdict(Row("fit/one of replay", OURS, 0, 2.5, 0.0, 1.0, None, None, None, 1))]
    native = {"cuda_architectures": ["80", "90"]}
    meta = {
        "device": "A GPU",
        "torch": "2",
        "cuda": "13",
        "python": "3",
        "native": native,
        "runs": 3,
    }
    meta["whole"] = {"APIs": 7, "outer steps": 8000}
    content = {
        "meta": meta | {"minutes_of_the_whole": {"replay": 2.5, "recovery": 1.25}},
        "rows": rows,
    }
    (tmp_path / "a-gpu.json").write_text(json.dumps(content))
    text = report.tables(tmp_path)
    assert "### A GPU\n\ntorch 2, Python 3, CUDA 13, kernels for 80, 90; medians of 3 runs." in text
    minutes = "takes, in minutes: replay 2.5, recovery 1.2."
    assert f"At these speeds a run of 7 APIs and 8,000 outer steps {minutes}" in text
    assert ".png" not in text


@pytest.mark.parametrize("name", report.PAGES)
def test_the_page_shows_the_committed_results(name: str) -> None:
    """Check that `python benchmarks/report.py` was run after the results changed."""
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert report.rendered(page, report.PAGES[name]()) == page


def test_the_scaling_picture_says_what_its_letters_are_and_keeps_its_data_free() -> None:
    results = json.loads((ROOT / "docs/images/scaling.json").read_text(encoding="utf-8"))
    figure = scaling.draw(results)
    figure.draw_without_rendering()
    below = figure.axes[3:]
    for axis, words in zip(
        below, ("q: random directions per image", "B: images", "d: numbers in an image")
    ):
        assert axis.get_xlabel().startswith(words)
    assert [label.get_text() for label in below[0].get_xticklabels()] == [
        "10",
        "20",
        "50",
        "100",
        "200",
    ]
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None]
    assert len(legends) == 2
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(box.overlaps(axis.bbox) for axis in figure.axes)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1


def test_the_gallery_shows_the_pictures_as_they_are_drawn() -> None:
    """`python benchmarks/gallery.py --out docs/images` was run after the library changed."""
    file = ROOT / "docs/images/pictures.png"
    assert file.stat().st_size < 300_000
    with Image.open(file) as image:
        size, shown = image.size, image.convert("RGB").reduce(gallery.ZOOM)
    wanted = gallery.canvas()
    assert size == (gallery.ZOOM * wanted.shape[2], gallery.ZOOM * wanted.shape[1])
    found = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
    pictures = (slice(None), slice(gallery.TOP, None), slice(gallery.LEFT, None))  # no labels there
    assert (found[pictures] - wanted[pictures]).abs().max() < 1.01 / 255


@pytest.mark.parametrize("data_set", ["omniglot", "cifar_fs"])
def test_the_committed_cells_of_the_economy_go_together(data_set: str) -> None:
    """Check that no cell is in two files, with which the documented command would end."""
    from benchmarks.query_economy import economy

    files = sorted((ROOT / "benchmarks" / "query_economy" / "results").glob(f"{data_set}*.csv"))
    points = economy.read_points(files, "1")
    assert {"chosen and jittered", "neither", "random_teachers"} <= set(points)


def test_a_comparison_is_told_over_seeds(tmp_path: Path) -> None:
    """Check means and paired differences against numbers worked out by hand."""
    from benchmarks.query_economy import economy

    lines = ["name,seed,data_set,n_shot,rate_protocol,accuracy"]
    for method, order, one_shot in (  # the rows of the seeds come in any order
        ("random", (2, 0, 1), (0.3, 0.4, 0.2)),
        ("ours", (0, 1, 2), (0.4, 0.6, 0.5)),
    ):
        for seed in order:
            lines.append(f"{method},{seed},birds,1,own,{one_shot[seed]}")
            lines.append(f"{method},{seed},birds,5,own,0.75")
            lines.append(f"{method},{seed},birds,1,meta_val,0.9")
    file = tmp_path / "results.csv"
    file.write_text("\n".join(lines))
    made = economy.table_of_methods(file, {"Birds": ("birds", "own")})
    assert made.splitlines()[2:] == [
        "| random | 30.0 / 75.0 |",
        "| ours | 50.0 / 75.0 |",
        "| less random | +20.0 ± 24.8 / +0.0 ± 0.0 |",
    ]


def test_the_economy_of_queries_is_told_over_seeds(tmp_path: Path) -> None:
    """Check means, t-intervals and differences against numbers worked out by hand."""
    from benchmarks.query_economy import economy

    file = tmp_path / "results.csv"
    lines = ["name,seed,n_shot,rate_protocol,accuracy,n_episodes,queries,seconds"]
    for seed, (ours, alone) in enumerate(((0.5, 0.4), (0.6, 0.45), (0.7, 0.5))):
        lines.append(f'"ours, n_images=20",{seed},1,meta_val,{ours},600,200,{10 + seed}')
        lines.append(f'"neither, n_images=20",{seed},1,meta_val,{alone},600,200,5')
        lines.append(f'"ours, n_images=20",{seed},1,own,0.1,600,200,{10 + seed}')
    lines.append('"neither, n_images=90",0,1,meta_val,0.5,200,900,5')
    lines.append('"ours, n_images=90",0,1,meta_val,0.9,600,900,5')
    file.write_text("\n".join(lines))
    rows = economy.table({"1": economy.read_points([file], "1")})
    assert rows[1:] == [
        ["ours", "200", "11", "60.0 ± 24.8", "+15.0 ± 12.4"],
        ["ours", "900", "5", "90.0", ""],  # other episodes than the survey alone
        ["the survey alone", "200", "5", "45.0 ± 12.4", ""],
        ["the survey alone", "900", "5", "50.0", ""],
    ]
    assert economy.apart([720, 200, 20, 198, 18]) == [18, 198, 720]
    economy.draw({"1": economy.read_points([file], "1")}, tmp_path / "economy.svg")
    drawn = (tmp_path / "economy.svg").read_text(encoding="utf-8")
    for label in ("queries of all APIs together", "seconds of training", "the survey alone"):
        assert f"<!-- {label} -->" in drawn  # beside the shapes of its letters
