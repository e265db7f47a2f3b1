"""Test the advice for users who lack a package that only some commands need."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bidfmkd_fast.extras import EXTRAS, installed, not_installed

ROOT = Path(__file__).parents[1]


def test_the_advice_names_the_packages_of_the_extra() -> None:
    message = str(not_installed("serve", "uvicorn", "serve"))
    assert (
        message
        == "serve: uvicorn is not installed; `pip install 'starlette>=0.40' 'uvicorn>=0.30'`"
    )
    for extra, packages in EXTRAS.items():
        (command,) = re.findall("`(.*)`", str(not_installed("it", "this", extra)))
        assert shlex.split(command) == [
            "pip",
            "install",
            *packages,
        ]  # a shell hands over whole names


def test_an_extra_is_installed_if_all_its_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("pytest>=8", "numpy", "pip-with-a-name_that-is-not-there[all]>=1")
    monkeypatch.setitem(EXTRAS, "made up", packages[:2])
    assert installed("made up")
    monkeypatch.setitem(EXTRAS, "made up", packages)
    assert not installed("made up")


def test_the_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {extra: list(packages) for extra, packages in EXTRAS.items()} == {
        extra: packages for extra, packages in declared.items() if extra in EXTRAS
    }


def test_no_advice_names_what_pip_cannot_find() -> None:
    """Check that no text advises `bidfmkd-fast[...]`, which pip finds on no index."""
    texts = [
        *ROOT.glob("bidfmkd_fast/**/*.py"),
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
        *ROOT.glob("*.py"),
    ]
    assert len(texts) > 50
    assert [path.name for path in texts if "install 'bidfmkd-fast" in path.read_text()] == []
