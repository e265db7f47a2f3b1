"""Check tables as text and as Markdown."""

from __future__ import annotations

from bidfmkd_fast.training.tables import markdown_table, text_table


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
