"""Walk through what a release needs, and say for each step whether it is so.

Usage: `make release-check`, in a clone with a clean tree. Each step runs even if one before it has
failed; the exit code is 1 if any has. What is built goes to a temporary folder. It takes as long as
the test suite and some minutes more.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
CONSTRAINTS = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
IDENTIFIERS = {
    f"cp{python}-manylinux_{machine}"
    for python in (310, 311, 312, 313, 314)
    for machine in ("x86_64", "aarch64")
}


class Failed(Exception):
    """A step that is not fulfilled; the text says what is missing."""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return what it printed; raise `Failed` with its last lines if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | CONSTRAINTS | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-5:]
        raise Failed(
            f"{' '.join(map(str, command))}: exit code {done.returncode}\n  " + "\n  ".join(last)
        )
    return done.stdout


def version() -> str:
    """Return the version, which stands in pyproject.toml and nowhere else."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (number,) = re.findall(r'^version = "([^"]+)"$', text, re.MULTILINE)
    return number


def clean_tree() -> str:
    if changed := run("git", "status", "--porcelain").strip():
        raise Failed(f"the tree has changes that are not committed:\n  {changed}")
    return run("git", "rev-parse", "--short", "HEAD").strip()


def changelog() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version())}\b", text, re.MULTILINE):
        raise Failed(f"CHANGELOG.md has no section '## {version()}'")
    if "## Unreleased" in text:
        raise Failed("CHANGELOG.md still has a section '## Unreleased'; give it the version")
    return f"has {version()}"


def one_version() -> str:
    number = re.escape(version())
    elsewhere = [
        path
        for path in run("git", "ls-files", "bidfmkd_fast", "CMakeLists.txt", "CITATION.cff").split()
        if re.search(rf"[\"' ]{number}[\"'\n]", (ROOT / path).read_text(encoding="utf-8"))
    ]
    if elsewhere:
        raise Failed(f"{version()} also stands in {', '.join(elsewhere)}")
    return version()


def lint() -> str:
    run("make", "lint")
    return "clean"


def tests() -> str:
    return run("make", "test").strip().splitlines()[-1].strip("= ")


def docs() -> str:
    run("make", "docs")
    return "built"


def wheel(folder: Path) -> Path:
    """Return the wheel that was built into `folder`."""
    paths = list(folder.glob("*.whl"))
    if len(paths) != 1:
        raise Failed("there is no wheel, since the step that builds it has failed")
    return paths[0]


def same_wheel(folder: Path) -> str:
    """Build the wheel from an sdist and from the tree, and compare every file."""
    run(PYTHON, "-m", "pip", "install", "--quiet", "build")
    run(PYTHON, "-m", "build", "--sdist", "--outdir", folder)
    (sdist,) = folder.glob("*.tar.gz")
    files = []
    for name, source in (("sdist", sdist), ("tree", ROOT)):
        command = (PYTHON, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / name, source)
        run(*command, BIDFMKD_CUDA="OFF")
        with zipfile.ZipFile(wheel(folder / name)) as archive:
            files.append({member.filename: member.CRC for member in archive.infolist()})
    if not any(re.search(r"/_C[^/]*\.so$", name) for name in files[0]):
        raise Failed(f"{wheel(folder / 'sdist').name} has no native module")
    if other := sorted({name for name, _ in files[0].items() ^ files[1].items()}):
        raise Failed(f"sdist and tree give different wheels: {', '.join(other)}")
    return wheel(folder / "sdist").name


def tag(folder: Path) -> str:
    """Return the platform that auditwheel grants to the wheel."""
    run(PYTHON, "-m", "pip", "install", "--quiet", "auditwheel")
    text = run(PYTHON, "-m", "auditwheel", "show", wheel(folder / "sdist"))
    granted = re.search(r'platform tag: "(manylinux_[^"]+)"', " ".join(text.split()))
    if not granted:
        raise Failed(f"no manylinux wheel:\n  {text}")
    return granted[1]


def identifiers() -> str:
    """Compare what cibuildwheel would build with what the project promises."""
    run(PYTHON, "-m", "pip", "install", "--quiet", "cibuildwheel")
    command = (PYTHON, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux")
    found = set(run(*command).split())
    if found != IDENTIFIERS:
        raise Failed(f"cibuildwheel differs in {', '.join(sorted(found ^ IDENTIFIERS))}")
    return f"{len(found)} wheels"


def quick_start(folder: Path) -> str:
    """Use the wheel in a new environment, away from the source tree."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel(folder / "sdist"), cwd=folder)
    about = run(python, "-m", "bidfmkd_fast", cwd=folder)
    if version() not in about or "loaded, built with" not in about:
        raise Failed(f"python -m bidfmkd_fast says:\n  {about}")
    return run(python, ROOT / "examples" / "quickstart.py", cwd=folder).strip().splitlines()[-1]


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps: dict[str, Callable[[], str]] = {
            "clean tree": clean_tree,
            "version in one place": one_version,
            "changelog": changelog,
            "lint and types": lint,
            "tests": tests,
            "docs": docs,
            "same wheel from sdist, tree": lambda: same_wheel(folder),
            "tag by auditwheel": lambda: tag(folder),
            "cibuildwheel's wheels": identifiers,
            "quick start of the wheel": lambda: quick_start(folder),
        }
        failed = 0
        for name, step in steps.items():
            started = time.monotonic()
            try:
                verdict, text = "ok", step()
            except Failed as error:
                verdict, text, failed = "FAILED", str(error), failed + 1
            print(f"{verdict:6}  {name:27} {time.monotonic() - started:5.0f} s  {text}", flush=True)
    print("ready for a release" if not failed else f"{failed} of {len(steps)} steps failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
