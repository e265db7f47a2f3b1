"""Run sweeps: cells of variants and grid points, again after a break, in a plot."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments import methods as baselines
from bidfmkd_fast.experiments.sweep import run_sweep
from bidfmkd_fast.experiments.sweep_file import read_sweep
from bidfmkd_fast.experiments.sweep_plot import draw_sweep, numeric_axis
from bidfmkd_fast.meta import Evaluation


def write(folder: Path, **content: Any) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"experiment": "tiny.yaml"} | content, sort_keys=False))
    return file


def test_cells_are_variants_at_grid_points(experiment_file: Path) -> None:
    sweep = read_sweep(
        write(
            experiment_file.parent,
            variants={
                "full": {},
                "first order": {
                    "train.replay.first_order": True,
                    "train.distillation.first_order": True,
                },
            },
            grid={"train.recovery.num_directions": [2, 4], "pool.n_apis": [1]},
        )
    )
    assert [cell.name for cell in sweep.cells] == [
        "full, num_directions=2, n_apis=1",
        "full, num_directions=4, n_apis=1",
        "first order, num_directions=2, n_apis=1",
        "first order, num_directions=4, n_apis=1",
    ]
    last = sweep.cells[-1].config
    assert (last.train.recovery.num_directions, last.pool.n_apis) == (4, 1)
    assert last.train.replay.first_order and last.train.distillation.first_order
    assert (
        sweep.base.pool.n_apis == 3 and not sweep.base.train.replay.first_order
    )  # the cells share nothing
    assert len({cell.folder_name for cell in sweep.cells}) == 4


def test_a_sweep_goes_on_cell_by_cell(
    experiment_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[int] = []
    label, plain = baselines.METHODS["bidf_mkd"]

    def watched(experiment: Any, folder: Path) -> None:
        trained.append(experiment.train.recovery.num_directions)
        if len(trained) == 2:
            raise KeyboardInterrupt
        plain(experiment, folder)

    monkeypatch.setitem(baselines.METHODS, "bidf_mkd", (label, watched))
    grid = {"train.recovery.num_directions": [1, 2]}
    file = write(experiment_file.parent, grid=grid)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(file, tmp_path / "out", progress=False)
    text = run_sweep(file, tmp_path / "out", progress=False)
    assert trained == [1, 2, 2]
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[4:6]] == ["num_directions=1", "num_directions=2"]
    assert "216" in lines[4] and "324" in lines[5]  # queries: 3 APIs, 2 sets, 2 steps, (1 + q) x 9
    assert "1-shot less the first" in lines[2]
    assert Image.open(tmp_path / "out" / "sweep.png").size[0] > 300
    assert "![sweep](sweep.png)" in (tmp_path / "out" / "sweep.md").read_text()
    # The file grows: only what is new is trained.
    write(experiment_file.parent, grid={"train.recovery.num_directions": [1, 2, 3]})
    run_sweep(file, tmp_path / "out", progress=False)
    assert trained == [1, 2, 2, 3]
    assert capsys.readouterr().out == ""


def test_a_variant_may_be_another_method(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []
    for name, (label, plain) in list(baselines.METHODS.items()):

        def method(experiment: Any, folder: Path, name: str = name, plain: Any = plain) -> None:
            trained.append((name, experiment.train.replay.final_steps))
            plain(experiment, folder)

        monkeypatch.setitem(baselines.METHODS, name, (label, method))
    variants = {"pictures": {"method": "zero_query"}, "real": {"method": "maml"}, "ours": {}}
    grid = {"train.replay.final_steps": [1, 2]}
    file = write(experiment_file.parent, variants=variants, grid=grid)
    text = run_sweep(file, tmp_path / "out", progress=False)
    assert trained == [(m, n) for m in ("zero_query", "maml", "bidf_mkd") for n in (1, 2)]
    assert "real, final_steps=2" in text


def test_variants_are_plotted_by_name(experiment_file: Path, tmp_path: Path) -> None:
    """Check that the plot has the names, and that two seeds share their episodes.

    The first cell is the reference of the differences.
    """
    variants = {"full": {}, "without replay": {"train.task_replay": False}}
    text = run_sweep(
        write(experiment_file.parent, variants=variants),
        tmp_path / "out",
        seeds=[0, 1],
        progress=False,
    )
    assert "4 episodes" in text and "the same under each of 2 seeds" in text
    assert len(list((tmp_path / "out" / "pools").iterdir())) == 2  # one a seed, shared by the cells
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000


def test_when_there_is_one_number_to_plot_over(experiment_file: Path) -> None:
    def axis(**content: Any) -> str | None:
        return numeric_axis(read_sweep(write(experiment_file.parent, **content)).cells)

    assert axis(grid={"train.recovery.mu": [0.1, 0.2]}) == "train.recovery.mu"
    assert axis(grid={"train.recovery.mu": [0.1]}) is None
    assert axis(grid={"train.recovery.mu": [0.1, 0.2], "pool.n_apis": [1, 2]}) is None
    assert axis(grid={"train.recovery.directions": ["sphere", "gaussian"]}) is None
    assert axis(grid={"train.task_replay": [True, False]}) is None
    assert axis(variants={"a": {}, "b": {"pool.n_apis": 1}}) is None


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        (
            "train.recovery.mu",
            [0.1, 0.025],
            "log",
        ),  # lengths of steps, though they span a factor of 4 only
        ("train.recovery.num_directions", [1, 2, 4], "log"),
        ("pool.n_apis", [1, 2, 3], "linear"),
        ("train.recovery.boundary_weight", [0.0, 0.5], "linear"),
    ],
)
def test_ticks_are_at_the_values_that_were_tried(
    experiment_file: Path, key: str, values: list[float], scale: str
) -> None:
    cells = read_sweep(write(experiment_file.parent, grid={key: values})).cells
    evaluation = Evaluation(0.5, 0.1, torch.rand(4), "made up", "meta_test", 5, 1, 15, 0, 10)
    figure = draw_sweep(cells, [{"made up": [evaluation]} for _ in cells])
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert axis.get_xscale() == scale
    assert sorted(values) == list(axis.get_xticks())
    assert [f"{value:g}" for value in sorted(values)] == [
        tick.get_text() for tick in axis.get_xticklabels()
    ]
    assert not len(axis.get_xticks(minor=True))


def test_labels_of_close_values_and_the_legend_cover_nothing(experiment_file: Path) -> None:
    grid = {"train.recovery.mu": [0.005, 0.025, 0.03, 0.5]}
    variants = {"plain": {}, "first order": {"train.replay.first_order": True}}
    cells = read_sweep(write(experiment_file.parent, grid=grid, variants=variants)).cells
    evaluation = Evaluation(0.5, 0.1, torch.rand(4), "made up", "meta_test", 5, 1, 15, 0, 10)
    figure = draw_sweep(cells, [{"made up": [evaluation]} for _ in cells])
    figure.draw_without_rendering()
    axis = figure.axes[0]
    boxes = [tick.get_window_extent() for tick in axis.get_xticklabels()]
    assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes))
    assert axis.get_legend() is None
    assert not figure.legends[0].get_window_extent().overlaps(axis.get_tightbbox())


def test_a_legend_of_long_names_stays_in_the_figure(experiment_file: Path) -> None:
    """Draw the sweep of replay steps, whose four names fill two lines."""
    cells = read_sweep("replay_steps").cells
    evaluation = Evaluation(0.5, 0.1, torch.rand(4), "made up", "meta_test", 5, 1, 15, 0, 10)
    for n_panels in (1, 2):
        figure = draw_sweep(cells, [{"made up": n_panels * [evaluation]} for _ in cells])
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_nested_settings_change_what_they_name_and_nothing_else(experiment_file: Path) -> None:
    base, *_ = read_sweep(write(experiment_file.parent)).cells
    nested = {"train": {"recovery": {"mu": 0.3}}, "train.recovery": {"num_directions": 3}}
    (cell,) = read_sweep(write(experiment_file.parent, variants={"nested": nested})).cells
    wanted = replace(base.config.train.recovery, mu=0.3, num_directions=3)
    assert cell.config == replace(base.config, train=replace(base.config.train, recovery=wanted))
    (listed,) = read_sweep(
        write(experiment_file.parent, grid={"train.recovery": [{"mu": 0.3}]})
    ).cells
    assert listed.config.train.recovery == replace(base.config.train.recovery, mu=0.3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"experiment": "nowhere.yaml"}, "cannot read .*nowhere.yaml"),
        ({"experiment": None}, "must name a file of settings under 'experiment'"),
        ({"grids": {}}, "wanted the keys experiment, variants, grid; got grids"),
        ({"variants": ["a"]}, "variants must be settings by name"),
        ({"variants": {"a": 3}}, "variant 'a' must be dotted keys and values"),
        ({"grid": {"pool.n_apis": 3}}, "grid must give a list of values for pool.n_apis"),
        ({"grid": {"pool.n_apis": []}}, "grid must give a list of values"),
        ({"grid": {"pool.n_api": [1]}}, "unknown key 'pool.n_api'; did you mean 'pool.n_apis'"),
        (
            {"grid": {"recovery.mu": [0.1]}},
            "sweep.yaml: unknown key 'recovery.mu'; did you mean 'train.recovery.mu'",
        ),
        (
            {"variants": {"a": {"train.recovery.steps": 1.5}}},
            "sweep.yaml: .*train.recovery.steps must be of type int",
        ),
        ({"grid": {"train.seed.x": [1]}}, "no settings under 'seed' in 'train.seed.x'"),
        ({"grid": {"train.recovery.mu": [0.1, -1.0]}}, "mu must be finite and above 0"),
        ({"grid": {"evaluation.n_episodes": [1, 2]}}, "must be the same for all cells"),
        ({"grid": {"pool.n_way": [2, 3]}}, "must be the same for all cells"),
        ({"variants": {"a": {"pool": {"n_way": 2}}}}, "must be the same for all cells"),
        (
            {"variants": {"a": {"pool.n_apis": 2}}, "grid": {"pool.n_apis": [3]}},
            "pool.n_apis is set twice",
        ),
        (
            {"variants": {"a": {"pool.n_apis": 2, "pool": {"n_apis": 3}}}},
            "pool.n_apis is set twice for one cell",
        ),
        ({"grid": {"pool.n_apis": [2, 2]}}, "the same cell twice"),
        ({"variants": {"a": {"method": "average"}}}, "variant 'a': method must be one of random, "),
        ({"variants": {"a": {"method": {"x": 1}}}}, "unknown key 'method.x'"),
        (
            {"variants": {"a": {"method": "white_box", "train.recovery.steps": 0}}},
            "cell 'a': recovered sets are needed by white_box, and train.recovery.steps is 0",
        ),
        (
            {"grid": {f"pool.{key}": [*range(1, 301)] for key in ("n_apis", "width", "epochs")}},
            "sweep.yaml has 27,000,000 cells, more than 10,000; shorten its lists",
        ),
    ],
)
def test_a_file_that_is_no_sweep(
    experiment_file: Path, tmp_path: Path, content: dict, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        run_sweep(write(experiment_file.parent, **content), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_readable(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="not readable YAML"):
        read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("- 1")
    with pytest.raises(InputError, match="must hold settings by name"):
        read_sweep(tmp_path / "bad.yaml")


def test_without_matplotlib_nothing_is_trained(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib, .*`pip install 'matplotlib>=3.7'`"):
        run_sweep(write(experiment_file.parent), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
