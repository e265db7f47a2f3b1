"""Turn figures of matplotlib into SVG that stands inside an HTML page and follows its colours."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bidfmkd_fast.extras import not_installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.0  # inches of 72 units: charts are drawn for a narrow screen, and scaled up at most
# Colours of Okabe and Ito that are seen on white and on black, with a marker and a line style for
# each, so that no series is told by its colour alone.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS, LINES = "os^DvP", ("-", "--", "-.", ":", "-", "--")
# These two stand for colours of the page, which differ between its light and its dark scheme.
INK, RULE = "#010203", "#040506"
_OF_PAGE = {INK: "currentColor", RULE: "var(--rule)"}
_STYLE: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "bidfmkd", "text.parse_math": False},
    **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK},
    **{"axes.edgecolor": RULE, "grid.color": RULE, "axes.grid": True, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"},
    **{"font.size": 11, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 10},
    **{"lines.linewidth": 1.6, "lines.markersize": 5, "figure.facecolor": "none"},
    **{"savefig.facecolor": "none", "axes.facecolor": "none", "font.sans-serif": ["DejaVu Sans"]},
    **{"axes.formatter.useoffset": False, "axes.unicode_minus": False},
}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


def need_matplotlib() -> None:
    """Raise InputError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise not_installed("report", "matplotlib, which the charts need,", "report") from None


@contextmanager
def chart_style() -> Iterator[None]:
    """Draw in the style of the page inside the block, whatever the user's own style is."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page's font draws the text, so a glyph that matplotlib's own font lacks is no loss.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float) -> Figure:
    """Return an empty figure of the usual width; `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def label(text: str, most: int = 22) -> str:
    """Return a name as a chart shows it: one line, with at most `most` characters."""
    shown = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def svg_of(figure: Figure, name: str, about: str) -> str:
    """Return the figure as an `<svg>` element.

    Args:
        figure: drawn within `chart_style`.
        name: letters and hyphens, different for each chart of a page; opens every id in it.
        about: what the chart shows, for readers who do not see it.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-label": about}
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key in (f"{{{_LINK}}}href", "href"):
                value = value.replace("#", f"#{name}-")
            elif key in ("style", "clip-path", "fill", "stroke"):
                value = value.replace("url(#", f"url(#{name}-")
                for colour, in_page in _OF_PAGE.items():
                    value = value.replace(colour, in_page)
            element.attrib[key] = value
    return ElementTree.tostring(root, encoding="unicode")
