"""Settings as plain dataclasses: read from YAML or nested values, checked, written back."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bidfmkd_fast.errors import InputError, InputTypeError

Settings = TypeVar("Settings")


def settings_from_yaml(kind: type[Settings], path: str | Path) -> Settings:
    """The settings of class `kind` in a YAML file.

    Raises InputError as `settings_from_values`, and for a file that is missing or no YAML.
    """
    import yaml

    name = kind.__name__
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name}: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: {path} is not readable YAML: {' '.join(str(error).split())}") from None
    return settings_from_values(kind, {} if values is None else values)


def settings_from_values(kind: type[Settings], values: Any) -> Settings:
    """The settings of class `kind` in nested `values`, defaults for what is not there.

    Raises:
        InputError: an unknown key (the closest known one is named), or a value out of its range.
    """
    return _from_values(kind, values, kind.__name__, "")


def plain_values(settings: Any) -> dict[str, Any]:
    """Nested plain values, as `settings_from_values` takes them; tuples become lists, which YAML has."""
    return {key: _without_tuples(value) for key, value in asdict(settings).items()}


def to_yaml(settings: Any) -> str:
    """The settings as YAML text."""
    import yaml

    return yaml.safe_dump(plain_values(settings), sort_keys=False)


def check_types(settings: Any) -> None:
    """Raises InputTypeError unless every field holds what its annotation says."""
    for name, wanted in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, wanted):
            told = wanted.__name__ if get_origin(wanted) is None else str(wanted)
            raise InputTypeError(f"{type(settings).__name__}: {name} must be of type {told}; got {value!r}")


def check_least(settings: Any, **least: int) -> None:
    """Raises InputError for a field below the number given for it."""
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise InputError(f"{type(settings).__name__}: {name} must be at least {low}; got {getattr(settings, name)}")


def check_positive(settings: Any, *names: str) -> None:
    """Raises InputError for a field of these that is not finite and above 0."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{type(settings).__name__}: {name} must be finite and above 0; got {value}")


def _from_values(kind: type[Settings], values: Any, name: str, where: str) -> Settings:
    if not isinstance(values, Mapping):
        wanted = f"settings under {where.rstrip('.')!r}" if where else "settings by name"
        raise InputTypeError(f"{name}: wanted {wanted}; got {values!r}")
    hints = get_type_hints(kind)
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    given = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"{name}: unknown key {where + str(key)!r}; did you mean {where + close!r}?")
        if is_dataclass(hints[key]):
            value = _from_values(hints[key], value, name, f"{where}{key}.")
        elif hints[key] is float and isinstance(value, str):
            value = _number(value)  # YAML 1.1 reads 1e-3 as text
        elif isinstance(value, list):
            value = tuple(value)
        given[key] = value
    return kind(**given)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(one) for key, one in value.items()}
    return [_without_tuples(one) for one in value] if isinstance(value, (list, tuple)) else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _fits(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is tuple:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(_fits(one, get_args(wanted)[0]) for one in value)
    if isinstance(wanted, types.UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if isinstance(value, bool) and wanted is not bool:
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)
