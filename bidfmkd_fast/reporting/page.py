"""Render the page of a run or a comparison: one HTML file that needs no other file or network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.finished import FinishedComparison
from bidfmkd_fast.extras import not_installed
from bidfmkd_fast.files.atomic import check_writable, write_text
from bidfmkd_fast.reporting.comparison import comparison_sections, comparison_sentence
from bidfmkd_fast.reporting.facts import RunFacts
from bidfmkd_fast.reporting.sections import Section, sections_of, sentence
from bidfmkd_fast.reporting.svg import chart_style, need_matplotlib

PAGE = "report.html"
_GENERATOR = "bidfmkd_fast report"  # in the head of every page, by which a page is recognised
TEMPLATE = Path(__file__).with_name("page.html.j2")
GLOSSARY = {
    "query, request": "An image that an API scores; a call with one or more of them.",
    "survey": "All APIs are asked once about the same procedural pictures; the meta-model's "
    "features learn to answer as they do.",
    "recovery": "Images are optimised by an API's answers alone: a support set, and a boundary "
    "query set on which the API and its task model disagree.",
    "episode": "A task of n classes (n-way) with k labelled images each (k-shot), to which the "
    "model adapts before it is tested on other images.",
    "controls": "Models made without recovery, or without any API: what the queries must beat.",
}


def write_page(facts: RunFacts, out: Path, next_lines: str = "") -> Path:
    """Write the page about a run to the file `out`; return its path.

    A page that is there is replaced; any other file is left alone.

    Args:
        facts: what `read_facts` has found in the run's folder.
        out: the HTML file.
        next_lines: which command to give next; none if empty.

    Raises:
        InputError: Jinja2 or matplotlib is missing, or `out` cannot be written or is another file.
            Nothing is written then.
    """
    return _write(out, f"Run {facts.name}", sentence(facts), lambda: sections_of(facts), next_lines)


def write_comparison_page(name: str, finished: FinishedComparison, out: Path) -> Path:
    """Write the page about the comparison in the folder `name`; otherwise as `write_page`."""
    about = comparison_sentence(name, finished)
    return _write(out, f"Comparison {name}", about, lambda: comparison_sections(finished), "")


def _write(
    out: Path,
    heading: str,
    about: str,
    sections: Callable[[], list[Section]],
    next_lines: str,
) -> Path:
    need_matplotlib()
    try:
        import jinja2
    except ImportError:
        raise not_installed("report", "Jinja2, which the page needs,", "report") from None
    check_writable(out)
    _check_replaceable(out)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    with chart_style():
        drawn = sections()
    text = template.render(
        heading=heading,
        sentence=about,
        sections=drawn,
        glossary=GLOSSARY,
        next_lines=next_lines,
        generator=_GENERATOR,
    )
    write_text(out, text)
    return out


def _check_replaceable(out: Path) -> None:
    """Raise InputError if `out` is a file that is no page of this command."""
    if not out.exists():
        return
    with out.open("rb") as file:
        if f'content="{_GENERATOR}"'.encode() not in file.read(4096):
            raise InputError(
                f"report: {out} exists and is no page of `bidfmkd report`; give another --out"
            )
