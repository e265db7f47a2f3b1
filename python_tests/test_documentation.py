"""Test what the pages say: links lead somewhere, named files exist, imports are as allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bidfmkd_fast"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
FOLDERS = ("", "bidfmkd_fast", "bidfmkd_fast/black_box", "bidfmkd_fast/black_box/remote")


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not target.startswith("https://") and (
            not file.exists() or (anchor and anchor not in anchors(file))
        ):
            broken.append(target)
    assert broken == []


def test_the_page_of_the_package_index_stands_alone() -> None:
    """Check that it has no relative link, which would be dead there, and the README's code."""
    page = (ROOT / "docs" / "package_index.md").read_text(encoding="utf-8")
    assert 'readme = "docs/package_index.md"' in (ROOT / "pyproject.toml").read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links and all(link.startswith("https://") for link in links)
    (code,) = re.findall(r"```python\n.*?```", page, re.DOTALL)
    assert code in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_source_files_exist(page: Path) -> None:
    """Check that named files exist; NAME stands for a file that a contributor is to write."""
    named = set(re.findall(r"`([\w/.]+\.(?:py|cpp|cu|cuh|h))`", page.read_text(encoding="utf-8")))
    missing = [
        name
        for name in sorted(named)
        if "NAME" not in name and not any((ROOT / folder / name).is_file() for folder in FOLDERS)
        if "/" in name or not list(PACKAGE.rglob(name))
    ]
    assert missing == []


def imported_rooms(file: Path) -> Iterator[str]:
    """Yield the rooms that a module imports, other than for type annotations."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in for_types:
            package, _, rest = node.module.partition(".")
            if package == "bidfmkd_fast":
                yield from [rest.split(".")[0]] if rest else [alias.name for alias in node.names]


def allowed_imports() -> dict[str, set[str]]:
    """Read the table of docs/architecture.md: every room with the rooms that it may import."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("### Which imports are allowed")[2].partition("###")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    ground = {name for left, right in rows if "ground floor" in left for name in names_in(left)}
    allowed = {
        room: ground | set(names_in(right)) for left, right in rows for room in names_in(left)
    }
    every = set(allowed)
    for left, right in rows:
        if "everything" in right:
            allowed |= {room: every - set(names_in(right)) for room in names_in(left)}
    return allowed


def names_in(cell: str) -> list[str]:
    return [name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)]


def test_rooms_import_only_what_the_architecture_page_allows() -> None:
    allowed = allowed_imports()
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(allowed) == {room for room in rooms if not room.startswith("_")}
    wrong = [
        f"{file.relative_to(ROOT)} imports {room}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if (here := file.relative_to(PACKAGE).parts[0].removesuffix(".py")) in allowed
        for room in imported_rooms(file)
        if room not in allowed[here] | {here, "_C", "__version__"}
    ]
    assert wrong == []


def test_the_table_is_read_as_it_is_meant() -> None:
    allowed = allowed_imports()
    assert "recovery" not in allowed["files"] and allowed["files"] == allowed["errors"]
    assert "cli" not in allowed["experiments"] and "meta" not in allowed["black_box"]
