"""Check that no modules of the package import each other in a circle, other than for types."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bidfmkd_fast

ROOT = Path(bidfmkd_fast.__file__).parent
PACKAGE = ROOT.name


def modules_of(root: Path) -> dict[str, Path]:
    """Return the files by dotted module name, packages without `.__init__`."""
    names = {
        ".".join(file.relative_to(root.parent).with_suffix("").parts): file
        for file in root.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(nodes: Iterable[ast.AST], known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that `nodes` import, inside functions as well.

    Imports for type annotations are left out, and so is the package itself, which only collects
    names.
    """
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole in known else str(node.module))
        found |= imported(ast.iter_child_nodes(node), known)
    return found - {PACKAGE}


def circle_in(root: Path) -> list[str] | None:
    known = modules_of(root)
    graph = {
        name: imported(ast.parse(file.read_text()).body, known)
        for name, file in known.items()
        if name != PACKAGE
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle_in(ROOT) is None


def test_a_circle_inside_functions_is_found(tmp_path: Path) -> None:
    root = tmp_path / PACKAGE
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "a.py").write_text(f"def f():\n    from {PACKAGE}.b import g\n")
    (root / "b.py").write_text(f"from {PACKAGE} import a\n")
    circle = circle_in(root)
    assert circle is not None and set(circle) == {f"{PACKAGE}.a", f"{PACKAGE}.b"}
    (root / "a.py").write_text(
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {PACKAGE}.b import g\n"
    )
    assert circle_in(root) is None


@pytest.mark.parametrize("name", [f"{PACKAGE}.training.loop", f"{PACKAGE}.ops.functions"])
def test_the_modules_are_those_of_the_package(name: str) -> None:
    assert name in modules_of(ROOT)
