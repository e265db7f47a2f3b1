"""Write the results of a comparison or a sweep for other programs: `results.csv`, `results.tex`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.meta_test import Result
from bidfmkd_fast.experiments.tables import ONE_SEED, TitledTable, main_tables
from bidfmkd_fast.files.atomic import write_text
from bidfmkd_fast.meta import Evaluation
from bidfmkd_fast.runtime.machine import machine_text
from bidfmkd_fast.training.tables import latex_table

CSV, TEX = "results.csv", "results.tex"
# The columns of the CSV, which docs/files.md explains.
COLUMNS = (
    *("name", "method", "seed", "data_set", "split", "n_way", "n_shot", "n_query"),
    *("rate_protocol", "learning_rate", "accuracy", "ci95", "n_episodes"),
    *("queries", "seconds", "device"),
)
CHOSEN, OWN = "meta_val", "own"  # how the learning rate of the adaptation was found


@dataclass(frozen=True, eq=False)
class Tested:
    """A row of the main table: a method, or a cell of a sweep.

    Args:
        name: what the Markdown table calls it.
        method: one of `METHODS`.
        config: the settings, of which the seed is no part.
        results: one per seed.
    """

    name: str
    method: str
    config: ExperimentConfig
    results: Sequence[Result]


def write_results(
    folder: Path,
    tested: Sequence[Tested],
    tables: Sequence[TitledTable],
    seeds: Sequence[int],
    device: torch.device | str,
) -> None:
    """Write `results.csv` with every meta-test, and `results.tex` with the main table.

    `tables` are those of the Markdown report, the main table of each data set among them.
    """
    text = io.StringIO()
    writer = csv.writer(text)  # ends lines with CR LF, as RFC 4180 says
    writer.writerow(COLUMNS)
    for row in tested:
        writer.writerows(_records(row, seeds, machine_text(device)))
    write_text(folder / CSV, text.getvalue())
    write_text(folder / TEX, _latex(tables, seeds, machine_text(device)))


def _records(row: Tested, seeds: Sequence[int], machine: str) -> Iterator[tuple[object, ...]]:
    """Yield the records of a row of the table, in the order of `COLUMNS`.

    Where a rate was chosen on meta_val, a second record has the rate of the run, unless version 0.1
    made the meta-test, which did not test at that rate.
    """
    own_rate, is_chosen = row.config.train.adapt_lr, bool(row.config.evaluation.adapt_lrs)
    for seed, result in zip(seeds, row.results, strict=True):
        for test in result.meta_tests:
            found: list[tuple[str, float, Evaluation | None]] = [
                (CHOSEN if is_chosen else OWN, test.learning_rate, test.evaluation),
                (OWN, own_rate, test.own),
            ]
            for protocol, rate, e in found:
                if e is not None:
                    yield (
                        *(row.name, row.method, seed, e.dataset, e.split),
                        *(e.n_way, e.n_shot, e.n_query, protocol, rate, e.mean, e.ci95),
                        *(len(e.per_episode), result.queries, result.seconds, machine),
                    )


def _latex(tables: Sequence[TitledTable], seeds: Sequence[int], machine: str) -> str:
    notes = ["Needs \\usepackage{booktabs}; the tables are wide."]
    notes += ONE_SEED.splitlines() if len(seeds) == 1 else []
    made_with = f"seeds {', '.join(map(str, seeds))}; {machine}"
    drawn = [
        latex_table(rows, f"{title}; {made_with}.", f"tab:results-{number}")
        for number, (title, rows) in enumerate(main_tables(tables), 1)
    ]
    return "\n\n".join(["\n".join(f"% {note}" for note in notes), *drawn]) + "\n"
