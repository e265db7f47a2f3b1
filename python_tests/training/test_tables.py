"""Check tables as text, as Markdown and as LaTeX."""

from __future__ import annotations

import re

from bidfmkd_fast.training.tables import latex_table, markdown_table, text_table


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


def columns_of(line: str) -> int:
    r"""Count the cells of a row of LaTeX: those between `&`, without `\&`."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*&", line.removesuffix(r"\\"))) + 1


def test_a_latex_table_is_balanced_whatever_it_holds() -> None:
    odd = ["{", "}", r"\input{x}", "a & b", "50 %", "$x$", "x_1^2", "~", "[1]", "* <|> #", "a\nb"]
    rows = [["name", *("1-shot" for _ in odd)], [r"\\", *odd], ["-1.5 ± 0.2", *odd[::-1]]]
    text = latex_table(rows, "100 % of {it}", "tab:x-1")
    lines = text.splitlines()
    assert lines[:2] == [r"\begin{table}", r"\centering"] and lines[-1] == r"\end{table}"
    assert lines[2:4] == [r"\caption{100 \% of \{it\}}", r"\label{tab:x-1}"]
    assert lines[4] == rf"\begin{{tabular}}{{l{'r' * len(odd)}}}"
    body = [line for line in lines if line.endswith(r" \\")]
    assert [columns_of(line) for line in body] == [len(odd) + 1] * 3
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert body[2].startswith(r"$-$1.5 $\pm$ 0.2 & ") and body[1].startswith(r"\textbackslash{}")
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    assert not re.search(r"(?<!\\)[%#_^~]", text)
    # A bracket or star after the end of a row would be an argument of the row's end.
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)
