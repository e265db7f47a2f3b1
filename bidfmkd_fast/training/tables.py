"""Write tables for people: as text for a terminal, Markdown for a report, LaTeX for a paper."""

from __future__ import annotations

import re

Table = list[list[str]]  # the header, then the rows; the first cell of a row names it

# A bracket or star at the start of a row would be read as an argument of the command before it.
_LATEX: dict[str, str | int | None] = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
}


def text_table(rows: Table) -> str:
    """Align the columns under a ruled header: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Table) -> str:
    """Write the same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def latex_text(text: str) -> str:
    """Return `text` in one line, with the characters that LaTeX would read as commands escaped.

    The sign of a number at the start is set as in mathematics.
    """
    escaped = " ".join(text.split()).translate(str.maketrans(_LATEX))
    return re.sub(r"^([-+])(?=\d)", r"$\1$", escaped)


def latex_table(rows: Table, caption: str, label: str) -> str:
    """Write the same as a LaTeX table with the rules of the package booktabs.

    No row is bold: which differences are clear of zero is for the reader to say.

    Args:
        rows: the table.
        caption: plain text, which is escaped here.
        label: the name for `\\ref`: letters, digits, colons and hyphens.
    """
    header, *body = [" & ".join(map(latex_text, row)) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
            *(r"\toprule", header, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
