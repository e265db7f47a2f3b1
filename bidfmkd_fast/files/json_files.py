"""Read JSON files: refuse repeated keys, and report every fault in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bidfmkd_fast.errors import InputError


def read_json(path: str | Path, reader: str) -> Any:
    """Return the content of the JSON file `path`.

    Args:
        path: the file.
        reader: the operation that reads it, such as "convert_dataset"; errors begin with it.

    Raises:
        InputError: the file is missing, not UTF-8, not JSON, or has a key twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{reader}: cannot read {path}: {error.strerror}") from None
    return parse_json(content, f"{reader}: {path}")


def parse_json(content: str | bytes, where: str) -> Any:
    """Return the content of the JSON text `content`.

    Args:
        content: the text, or its bytes in UTF-8.
        where: the place of the text; errors begin with it.

    Raises:
        InputError: as for `read_json`.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} cannot be read as JSON: byte {error.start} is not UTF-8 text"
        ) from None
    except RecursionError:
        raise InputError(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:  # also for an integer with more digits than Python reads
        raise InputError(f"{where} cannot be read as JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; raise ValueError if a key comes twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} comes twice; keep one of the two")
        values[key] = value
    return values
