"""Find the configurations that come with the package, `configs/` of the source tree, by name."""

from __future__ import annotations

from pathlib import Path

from bidfmkd_fast.errors import InputError


def shipped_folder() -> Path:
    """Return the folder of the configurations: in an installed package, or beside its source."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_file(given: str | Path, reader: str, kind: str = "") -> Path:
    """Return the file that is meant by a path, or by the name of a shipped configuration.

    A file in the file system comes first. Names have no `.yaml`.

    Args:
        given: the path or the name.
        reader: the operation that reads it, such as "sweep"; the error begins with it.
        kind: the folder inside `configs/` where names are looked for: "sweeps", or empty for
            experiments.

    Raises:
        InputError: it is neither; the message lists the names.
    """
    path = Path(given)
    shipped = {file.stem: file for file in sorted((shipped_folder() / kind).glob("*.yaml"))}
    if not path.is_file() and str(given) in shipped:
        return shipped[str(given)]  # also beside a folder of that name, such as that of the results
    if path.exists():
        return path
    raise InputError(
        f"{reader}: cannot read {given}: No such file, and no configuration of that name; "
        f"there are {', '.join(shipped) or 'none'}"
    )
