"""Walk through what a release needs, and say for each step whether it is so.

Usage: `make release-check`, in a clone with a clean tree. Each step runs even if one before it has
failed; the exit code is 1 if any has. What is built goes to a temporary folder. It takes as long as
the test suite and some minutes more.
"""

from __future__ import annotations

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
QUICK_START = (
    "import bidfmkd_fast as bf, torch\n"
    "box = bf.FunctionBlackBox(lambda x: x.flatten(1)[:, :3], bf.APISpec(3, (1, 4, 4)))\n"
    "x = torch.rand(2, 1, 4, 4, requires_grad=True)\n"
    "bf.ZerothOrder(4, 0.05).estimate(lambda points: box(points).sum(1), x).backward()\n"
    "assert x.grad.any() and bf.__version__ == {version!r}, bf.__version__\n"
)


class Failed(Exception):
    """A step that is not fulfilled; the text says what is missing."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return what it printed; raise `Failed` with its last lines if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
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
        for path in run("git", "ls-files", "bidfmkd_fast", "CMakeLists.txt").split()
        if re.search(rf"[\"']{number}[\"']", (ROOT / path).read_text(encoding="utf-8"))
    ]
    if elsewhere:
        raise Failed(f"{version()} also stands in {', '.join(elsewhere)}")
    return version()


def lint() -> str:
    run("make", "lint")
    return "clean"


def tests() -> str:
    return run("make", "test").strip().splitlines()[-1].strip("= ")


def wheels(folder: Path) -> str:
    """Build an sdist, a wheel from it, and use the wheel in a new environment."""
    python = ROOT / ".venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "build")
    run(python, "-m", "build", "--outdir", folder)  # the wheel is built from the sdist
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if not any(re.search(r"/_C[^/]*\.so$", name) for name in archive.namelist()):
            raise Failed(f"{wheel.name} has no native module")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=folder)
    run(python, "-m", "bidfmkd_fast", cwd=folder)
    run(python, "-c", QUICK_START.format(version=version()), cwd=folder)
    return wheel.name


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], str]] = {
            "clean tree": clean_tree,
            "version in one place": one_version,
            "changelog": changelog,
            "lint and types": lint,
            "tests": tests,
            "sdist, wheel, quick start": lambda: wheels(Path(folder)),
        }
        failed = 0
        for name, step in steps.items():
            started = time.monotonic()
            try:
                verdict, text = "ok", step()
            except Failed as error:
                verdict, text, failed = "FAILED", str(error), failed + 1
            print(f"{verdict:6}  {name:26} {time.monotonic() - started:5.0f} s  {text}", flush=True)
    print("ready for a release" if not failed else f"{failed} of {len(steps)} steps failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
