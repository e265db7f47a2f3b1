"""Read settings into dataclasses, check them and write them back as plain values or YAML."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.yaml_files import dump_yaml, read_mapping, shortly

Settings = TypeVar("Settings")
# What `types_of` has worked out, since a list of APIs asks for the same ten thousand times.
_known_types: dict[Any, Mapping[str, Any]] = {}

# Widest layer of a network: twice the widest published ResNet. A larger number exhausts the memory.
MOST_WIDTH = 4096
# A settings class may have a static method of this name. It gets the values of a file and adds what
# a file of an older version lacks, so that it still means what it meant.
UPGRADED = "upgraded"


def settings_from_yaml(kind: type[Settings], path: str | Path) -> Settings:
    """Return the settings of class `kind` in the YAML file `path`.

    Raises:
        InputError: as for `settings_from_values`, or the file is missing or not YAML.
    """
    values = read_mapping(path, kind.__name__)
    with named(str(path)):
        return settings_from_values(kind, values)


def settings_from_values(kind: type[Settings], values: Any) -> Settings:
    """Return the settings of class `kind` in nested `values`, with defaults for missing keys.

    What is missing in a nested class is as in the default of its field.

    Raises:
        InputError: a key is unknown (the message names the closest known one), or a value is out of
            range.
    """
    return _built(kind, check_values(kind, values, f"{kind.__name__}: "))


def check_values(kind: type[Any], values: Any, name: str, where: str = "") -> dict[str, Any]:
    """Check keys and types of nested `values` for the settings class `kind`.

    Ranges are not checked, since the values may be only a part of the settings.

    Args:
        kind: a dataclass.
        values: a mapping from field names to values; nested for fields that are dataclasses.
        name: errors begin with it.
        where: the keys above these values, as "recovery.".

    Returns:
        The values, with lists as tuples.

    Raises:
        InputError: a key is unknown; the message names the closest known one.
        InputTypeError: a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        place = f"settings under {where.rstrip('.')!r}" if where else "settings by name"
        some = ", ".join(field.name for field in fields(kind)[:3])
        raise InputTypeError(f"{name}wanted {place} ({some}, ...); got {_in_words(values)}")
    if (upgraded := getattr(kind, UPGRADED, None)) is not None:
        values = upgraded(values)
    hints = types_of(kind)
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
            # A number in quotes, or 1e-3 in a file of an older version, which wrote it as text.
            given[key] = _number(value)
        if not fits(given[key], hints[key]):
            raise InputTypeError(
                f"{name}{where}{key} must be of type {_wanted(hints[key])}; got {_in_words(value)}"
            )
    return given


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put `where`, such as a file name, in front of an InputError raised inside the block."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def dotted_keys(kind: type[Any]) -> list[str]:
    """Return the keys of a settings class, with those of nested classes as "recovery.mu".

    Keys come in the order of their depth.
    """
    hints = types_of(kind)
    names = [field.name for field in fields(kind)]
    return names + [
        f"{name}.{key}"
        for name in names
        if is_dataclass(hints[name])
        for key in dotted_keys(hints[name])
    ]


def first_difference(held: Any, given: Any) -> str:
    """Name the first setting in which `given` differs from `held`, settings of one class.

    Returns for example "recovery.mu is 0.1 there; got 0.2".
    """
    key = differing_keys(held, given)[0]
    return f"{key} is {attrgetter(key)(held)!r} there; got {attrgetter(key)(given)!r}"


def differing_keys(a: Any, b: Any) -> list[str]:
    """Return the dotted keys in whose values two settings of one class differ."""
    pairs = {key: (attrgetter(key)(a), attrgetter(key)(b)) for key in dotted_keys(type(a))}
    return [key for key, (x, y) in pairs.items() if x != y and not is_dataclass(x)]


def closest(key: str, known: Sequence[str], where: str = "") -> str:
    """Return the end of an error about an unknown `key`: which known keys may be meant.

    If none is similar, it lists all keys of the top level. `where` is put in front of each.
    """
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    deeper = [name for name in known if name.endswith(f".{key}")]  # the key without its prefix
    longer = [name for name in known if name.startswith(f"{key}_")]
    if found := deeper or alike or longer:
        return f"did you mean {' or '.join(repr(where + name) for name in found[:3])}?"
    return f"known: {', '.join(where + name for name in known if '.' not in name)}"


def plain_values(settings: Any) -> dict[str, Any]:
    """Return nested plain values, as `settings_from_values` takes them.

    Tuples become lists, since YAML has no tuples.
    """
    return {key: _without_tuples(value) for key, value in asdict(settings).items()}


def flat_values(settings: Any) -> dict[str, Any]:
    """Return the plain values by their dotted keys, in the order of `dotted_keys`."""
    flat, nested = dict[str, Any](), plain_values(settings)
    for key in dotted_keys(type(settings)):
        value: Any = nested
        for part in key.split("."):
            value = value[part]
        if not isinstance(value, dict):
            flat[key] = value
    return flat


def to_yaml(settings: Any) -> str:
    """Return the settings as YAML text."""
    return dump_yaml(plain_values(settings))


def types_of(annotated: Any) -> Mapping[str, Any]:
    """Return the types that a class or function gives its fields or arguments."""
    if annotated not in _known_types:
        _known_types[annotated] = get_type_hints(annotated)
    return _known_types[annotated]


def check_types(settings: Any) -> None:
    """Raise InputTypeError unless the value of every field has the type of its annotation."""
    for name, wanted in types_of(type(settings)).items():
        value = getattr(settings, name)
        if not fits(value, wanted):
            type_name = wanted.__name__ if get_origin(wanted) is None else str(wanted)
            raise InputTypeError(
                f"{type(settings).__name__}: {name} must be of type {type_name}; got {value!r}"
            )


def check_least(settings: Any, **least: int) -> None:
    """Raise InputError if a field is below the number given for it."""
    for name, low in least.items():
        value = getattr(settings, name)
        if value < low:
            raise InputError(
                f"{type(settings).__name__}: {name} must be at least {low}; got {value}"
            )


def check_most(settings: Any, **most: int) -> None:
    """Raise InputError if a field is above the number given for it."""
    for name, high in most.items():
        value = getattr(settings, name)
        if value > high:
            raise InputError(
                f"{type(settings).__name__}: {name} must be at most {high:,}; got {value}"
            )


def check_positive(settings: Any, *names: str) -> None:
    """Raise InputError unless every named field is finite and above 0."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"{type(settings).__name__}: {name} must be finite and above 0; got {value}"
            )


def _built(
    kind: type[Settings], values: Mapping[str, Any], default: Settings | None = None
) -> Settings:
    """Return the settings made of checked values; what is missing is as in `default`, if given."""
    hints, made = types_of(kind), dict(values)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values and is_dataclass(hints[field.name]):
            inner = None
            if default is not None:
                inner = getattr(default, field.name)
            elif field.default_factory is not MISSING:
                inner = field.default_factory()
            made[field.name] = _built(hints[field.name], values[field.name], inner)
    return kind(**made) if default is None else replace(default, **made)  # type: ignore[type-var]


def _wanted(hint: Any) -> str:
    """Return the type that an annotation asks for, in words."""
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        return f"list of {'' if inner[-1] is Ellipsis else f'{len(inner)} '}{_wanted(inner[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_wanted, get_args(hint)))
    words = {int: "int (a whole number)", bool: "bool (true or false)", type(None): "null"}
    return words.get(hint, hint.__name__)


def _in_words(value: Any) -> str:
    """Return a value for an error message."""
    return "nothing (null)" if value is None else shortly(value)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tuples(inner) for inner in value]
    return value


def _number(text: str) -> float | str:
    """Return the number that a text holds; the text itself if it holds none."""
    try:
        return float(text)
    except ValueError:
        return text


def fits(value: Any, wanted: Any) -> bool:
    """Return True if a value has the type that an annotation of a settings class asks for."""
    if get_origin(wanted) is tuple:  # tuple[kind, ...]
        return isinstance(value, tuple) and all(fits(inner, get_args(wanted)[0]) for inner in value)
    if isinstance(wanted, types.UnionType):
        return any(fits(value, kind) for kind in get_args(wanted))
    if isinstance(value, bool) and wanted is not bool:
        return False
    return isinstance(value, (int, float) if wanted is float else get_origin(wanted) or wanted)
