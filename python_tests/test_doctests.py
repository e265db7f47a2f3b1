"""Run the examples in docstrings and pages."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import bidfmkd_fast

PACKAGE = Path(bidfmkd_fast.__file__).parent
PAGES = Path(__file__).parents[1] / "docs"


def modules_with_examples() -> list[str]:
    """Return the names of the modules whose source has an example."""
    return [
        ".".join(("bidfmkd_fast", *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in sorted(PACKAGE.rglob("*.py"))
        if ">>> " in file.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


def test_the_main_names_have_examples() -> None:
    names = ("ZerothOrder", "as_differentiable", "FunctionBlackBox", "TorchBlackBox", "APISpec")
    names += ("Budget", "EpisodeSampler", "procedural_images", "evaluate", "paired_difference")
    lacking = [name for name in names if ">>> " not in (getattr(bidfmkd_fast, name).__doc__ or "")]
    assert lacking == []


def test_pages() -> None:
    pages = [page for page in sorted(PAGES.glob("*.md")) if ">>> " in page.read_text("utf-8")]
    if not PAGES.is_dir():
        pytest.skip("the pages are in the source tree only")
    assert pages
    for page in pages:
        found = doctest.testfile(str(page), module_relative=False)
        assert found.attempted > 0 and found.failed == 0, page.name
