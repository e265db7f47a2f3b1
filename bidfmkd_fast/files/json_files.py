"""Reads the JSON files of the package and of its users: no key twice, every fault in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bidfmkd_fast.errors import InputError


def read_json(path: str | Path, reader: str) -> Any:
    """Return what the JSON file `path` holds; `reader` opens the errors ("convert_dataset").

    Raises:
        InputError: the file is missing, no UTF-8, no JSON, or has a key twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{reader}: cannot read {path}: {error.strerror}") from None
    return parse_json(content, f"{reader}: {path}")


def parse_json(content: str | bytes, where: str) -> Any:
    """Return what the JSON text `content` holds. Raises InputError as `read_json`; `where` opens
    its message.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} cannot be read as JSON: byte {error.start} is no UTF-8 text"
        ) from None
    except RecursionError:
        raise InputError(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:  # also of integers with more digits than Python reads
        raise InputError(f"{where} cannot be read as JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} comes twice; keep one of the two")
        values[key] = value
    return values
