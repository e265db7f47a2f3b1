"""Settings as plain dataclasses: read from YAML or nested values, checked, written back."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.yaml_files import dump_yaml, read_mapping, shortly

Settings = TypeVar("Settings")


def settings_from_yaml(kind: type[Settings], path: str | Path) -> Settings:
    """The settings of class `kind` in a YAML file.

    Raises InputError as `settings_from_values`, and for a file that is missing or no YAML.
    """
    values = read_mapping(path, kind.__name__)
    with named(str(path)):
        return settings_from_values(kind, values)


def settings_from_values(kind: type[Settings], values: Any) -> Settings:
    """The settings of class `kind` in nested `values`, defaults for what is not there.

    Raises:
        InputError: an unknown key (the closest known one is named), or a value out of its range.
    """
    return _built(kind, check_values(kind, values, f"{kind.__name__}: "))


def check_values(kind: type[Any], values: Any, name: str, where: str = "") -> dict[str, Any]:
    """Return nested `values` for the settings class `kind`, lists as tuples, once every key and
    type is right.

    Ranges are not checked, since the values may be a part of the settings only. `name` opens the
    errors; `where` is the place of these values in the whole, as "recovery.".

    Raises:
        InputError: an unknown key (the closest known one is named); InputTypeError for a value of
            the wrong type.
    """
    if not isinstance(values, Mapping):
        place = f"settings under {where.rstrip('.')!r}" if where else "settings by name"
        some = ", ".join(one.name for one in fields(kind)[:3])
        raise InputTypeError(f"{name}wanted {place} ({some}, ...); got {_came(values)}")
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            unknown = f"{name}unknown key {where + str(key)!r}"
            raise InputError(f"{unknown}; {closest(str(key), dotted_keys(kind), where)}")
        if is_dataclass(hints[key]):
            given[key] = check_values(hints[key], value, name, f"{where}{key}.")
            continue
        given[key] = tuple(value) if isinstance(value, list) else value
        if hints[key] is float and isinstance(value, str):
            given[key] = _number(
                value
            )  # 1e-3 in quotes, or out of a file that an older version wrote
        if not fits(given[key], hints[key]):
            raise InputTypeError(
                f"{name}{where}{key} must be of type {_wanted(hints[key])}; got {_came(value)}"
            )
    return given


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put `where`, such as a file, in front of an InputError raised inside the block."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def dotted_keys(kind: type[Any]) -> list[str]:
    """Return the keys of a settings class in the order of their depth, those of nested classes
    after a dot.
    """
    hints = get_type_hints(kind)
    names = [one.name for one in fields(kind)]
    return names + [
        f"{name}.{key}"
        for name in names
        if is_dataclass(hints[name])
        for key in dotted_keys(hints[name])
    ]


def closest(key: str, known: Sequence[str], where: str = "") -> str:
    """Return the end of an error about an unknown `key`: the known ones that it may stand for, or
    all of the top.

    `where` is put in front of the keys that are named.
    """
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    deeper = [
        one for one in known if one.endswith(f".{key}")
    ]  # the same key, with more in front of it
    longer = [one for one in known if one.startswith(f"{key}_")]
    if found := deeper or alike or longer:
        return f"did you mean {' or '.join(repr(where + one) for one in found[:3])}?"
    return f"known: {', '.join(where + one for one in known if '.' not in one)}"


def plain_values(settings: Any) -> dict[str, Any]:
    """Nested plain values, as `settings_from_values` takes them; tuples become lists, which YAML
    has.
    """
    return {key: _without_tuples(value) for key, value in asdict(settings).items()}


def to_yaml(settings: Any) -> str:
    """The settings as YAML text."""
    return dump_yaml(plain_values(settings))


def check_types(settings: Any) -> None:
    """Raises InputTypeError unless every field holds what its annotation says."""
    for name, wanted in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, wanted):
            told = wanted.__name__ if get_origin(wanted) is None else str(wanted)
            raise InputTypeError(
                f"{type(settings).__name__}: {name} must be of type {told}; got {value!r}"
            )


def check_least(settings: Any, **least: int) -> None:
    """Raises InputError for a field below the number given for it."""
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise InputError(
                f"{type(settings).__name__}: {name} must be at least {low}; got {getattr(settings, name)}"
            )


def check_positive(settings: Any, *names: str) -> None:
    """Raises InputError for a field of these that is not finite and above 0."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"{type(settings).__name__}: {name} must be finite and above 0; got {value}"
            )


def _built(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    hints = get_type_hints(kind)
    return kind(
        **{
            key: _built(hints[key], one) if is_dataclass(hints[key]) else one
            for key, one in values.items()
        }
    )


def _wanted(hint: Any) -> str:
    """Return what a hint asks for, in words."""
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"list of {'' if inner[-1] is Ellipsis else f'{len(inner)} '}{_wanted(inner[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    words = {int: "int (a whole number)", bool: "bool (true or false)", type(None): "null"}
    return words.get(hint, hint.__name__)


def _came(value: Any) -> str:
    return "nothing (null)" if value is None else shortly(value)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(one) for key, one in value.items()}
    return [_without_tuples(one) for one in value] if isinstance(value, (list, tuple)) else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def fits(value: Any, wanted: Any) -> bool:
    """Return whether a value is of the type that an annotation of a settings class asks for."""
    if get_origin(wanted) is tuple:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(fits(one, get_args(wanted)[0]) for one in value)
    if isinstance(wanted, types.UnionType):
        return any(fits(value, one) for one in get_args(wanted))
    if isinstance(value, bool) and wanted is not bool:
        return False
    return isinstance(value, (int, float) if wanted is float else get_origin(wanted) or wanted)
