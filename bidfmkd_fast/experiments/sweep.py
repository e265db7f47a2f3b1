"""Run `bidfmkd sweep`: BiDf-MKD over a grid of settings, cell by cell, with a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.experiments.config import check_seeds
from bidfmkd_fast.experiments.experiment import Experiment
from bidfmkd_fast.experiments.folder import open_folder, pool_of
from bidfmkd_fast.experiments.meta_test import Result, train_and_test
from bidfmkd_fast.experiments.result_files import CSV, TEX, Tested, write_results
from bidfmkd_fast.experiments.sharing import one_lock, share_out
from bidfmkd_fast.experiments.sweep_file import Cell, Sweep, read_sweep
from bidfmkd_fast.experiments.sweep_plot import need_matplotlib, plot_sweep
from bidfmkd_fast.experiments.tables import by_data_set, sweep_tables
from bidfmkd_fast.files.atomic import check_writable, write_text
from bidfmkd_fast.runtime.machine import machine_text, usable_device
from bidfmkd_fast.runtime.ranks import alone, current
from bidfmkd_fast.training.tables import markdown_table, text_table

TABLE, PLOT = "sweep.md", "sweep.png"


def run_sweep(
    path: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> str:
    """Train and meta-test every cell under every seed, and return the table.

    Everything is kept in the folder `out`, the table in `sweep.md` beside the plot `sweep.png`, for
    other programs in `results.csv` and `results.tex`. A second call with the same folder continues
    a sweep that was cut off, in the cell that was under way. Finished cells are kept, also if the
    file has more cells than before.

    Raises:
        InputError: the file is wrong (see `read_sweep`), found before anything is trained; or `out`
            holds another experiment, is in use, or cannot be written to.
    """
    need_matplotlib()
    sweep = read_sweep(path)
    check_seeds("sweep", seeds)
    usable_device("sweep", device)
    with one_lock(out):
        datasets = sweep.base.check()
        folder, ranks = Path(out), current()
        ranks.first_alone(lambda: _open(folder, sweep))
        results = _run_cells(folder, sweep, datasets, seeds, device, progress and ranks.first)
        if not ranks.first:
            return ""
        plot_sweep(sweep.cells, [by_data_set(of_cell) for of_cell in results], folder / PLOT)
        names = [cell.name for cell in sweep.cells]
        tables = list(sweep_tables(names, results))
        head = (
            f"# Sweep `{Path(path).name}`\n\n"
            f"seeds {', '.join(map(str, seeds))}; {machine_text(device)}.\n"
        )
        report = [head, *(f"{title}\n\n{markdown_table(rows)}" for title, rows in tables)]
        write_text(folder / TABLE, "\n\n".join([*report, f"![sweep]({PLOT})"]) + "\n")
        tested = [
            Tested(cell.name, cell.method, cell.config, of_cell)
            for cell, of_cell in zip(sweep.cells, results, strict=True)
        ]
        write_results(folder, tested, tables, seeds, device)
    texts = [f"{title}\n\n{text_table(rows)}" for title, rows in tables]
    return "\n\n".join([*texts, f"plot: {folder / PLOT}"])


def _open(folder: Path, sweep: Sweep) -> None:
    """Open the folder, and check that the results can be written there."""
    open_folder(folder, sweep.base)
    check_writable(*(folder / name for name in (TABLE, PLOT, CSV, TEX)))


def _run_cells(
    folder: Path,
    sweep: Sweep,
    datasets: Sequence[Dataset],
    seeds: Sequence[int],
    device: torch.device | str,
    progress: bool,
) -> list[list[Result]]:
    """Train and meta-test the cells; return the results of each, one per seed.

    Ranks share pools and cells out; those above 0 return nothing.
    """

    def test(cell: Cell, seed: int) -> Result:
        config = cell.config.with_seed(seed)
        pool = pool_of(folder, config.pool, datasets, seed, progress)
        at = folder / "cells" / cell.folder_name / f"seed_{seed}"
        experiment = Experiment(pool, datasets, config, at, device, progress)
        return train_and_test(cell.method, experiment, at)

    wanted = [(cell, seed) for cell in sweep.cells for seed in seeds]
    # Cells may have a pool in common, which one rank trains.
    pools = dict.fromkeys((cell.config.with_seed(seed).pool, seed) for cell, seed in wanted)
    share_out(
        "sweep: pools",
        [partial(pool_of, folder, pool, datasets, seed, progress) for pool, seed in pools],
        progress,
    )
    share_out("sweep: cells", [partial(test, cell, seed) for cell, seed in wanted], progress)
    results: list[list[Result]] = []
    if not current().first:
        return results
    with alone():  # where several ranks have made the cells, they are read here
        for number, cell in enumerate(sweep.cells, 1):
            results.append([])
            for seed in seeds:
                if progress:
                    about = f"cell {number} of {len(sweep.cells)}: {cell.name}, seed {seed}"
                    print(about, flush=True)
                results[-1].append(test(cell, seed))
    return results
