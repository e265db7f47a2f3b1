"""Define the command that writes a page about a run or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli.next_command import after_report
from bidfmkd_fast.cli.options import Command

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def report(options: Any) -> None:
    """Write one HTML page about a run or a comparison, finished or not: accuracy, queries, learning
    curves, images and settings. The page needs no network and no other file.
    """
    from bidfmkd_fast.experiments.finished import is_experiment, read_finished
    from bidfmkd_fast.reporting import read_facts, write_comparison_page, write_page
    from bidfmkd_fast.reporting.page import PAGE

    folder = Path(options.run)
    out = folder / PAGE if options.out is None else Path(options.out)
    if is_experiment(folder):
        page = write_comparison_page(folder.resolve().name, read_finished(folder), out)
        print(f"page: {page}")
        return
    facts = read_facts(folder)
    following = after_report(folder)
    page = write_page(facts, out, following)
    print(f"page: {page}\n{following}")


def _add_report_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("run", type=str, help="folder of a run or a comparison")
    parser.add_argument("--out", type=str, help="the HTML file; default: report.html in the folder")


REPORT = Command(report, _add_report_options, "bidfmkd report runs/train", positional="run")
