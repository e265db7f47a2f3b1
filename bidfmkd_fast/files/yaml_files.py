"""Read and write all YAML of the package: the core schema of YAML 1.2, without surprises.

PyYAML follows YAML 1.1, where `010` is eight, `1:30` is ninety, `yes` is true and `1e-3` is text.
The loader here differs from PyYAML's safe loader in such scalars, in refusing repeated keys, and in
limits of size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bidfmkd_fast.errors import InputError, InputTypeError

_MOST_BYTES = 1 << 23  # several times the size of a pool.yaml with a thousand APIs
# The most values that a file may hold once its aliases are expanded. Ten nested levels of aliases
# can expand to billions.
_MOST_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_CORE: tuple[tuple[str, re.Pattern[str], list[str], Callable[[str], Any]], ...] = (
    # Types of plain scalars: name, pattern, possible first characters, conversion. A scalar has the
    # first type whose pattern matches all of it; if none does, it is text.
    ("null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""], lambda text: None),
    (
        "bool",
        re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
        list("tTfF"),
        lambda text: text[0] in "tT",
    ),
    (
        "int",
        re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
        list("-+0123456789"),
        lambda text: _integer(text),
    ),
    (
        "float",
        re.compile(
            r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of the core schema.

    The loader refuses repeated keys, and aliases that expand to too many values.
    """

    # These two names are PyYAML's. They start without the rules of YAML 1.1: no dates, sets, bytes.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag in (None, f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map")
    }

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        sizes: dict[int, int] = {}
        if _size(node, sizes) > max(len(sizes), _MOST_VALUES):
            raise _refusal(f"its aliases (*name) expand to more than {_MOST_VALUES:,} values", node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class refuses it below
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key!r} comes twice; keep one of the two",
                    key_node.start_mark,
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which here also quotes text that the core schema reads as a number."""


def _constructor(
    name: str, pattern: re.Pattern[str], make: Callable[[str], Any]
) -> Callable[..., Any]:
    """Return the function that makes a value of a scalar with the tag `name`."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            if pattern.match(text):
                return make(text)
        except ValueError:  # an integer of more than 4300 digits, which Python refuses to read
            pass
        raise _refusal(f"{text[:40]!r} is not readable as {name}", node)

    return construct


for _name, _pattern, _first, _make in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Loader.add_constructor(_TAG + _name, _constructor(_name, _pattern, _make))


def read_yaml(path: str | Path, reader: str) -> Any:
    """Return the content of the YAML file `path`; None if it is empty.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte-order mark.
        reader: the operation that reads it, such as "sweep"; errors begin with it.

    Raises:
        InputError: the file is missing, not text, not YAML, has a key twice, or is too large.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{reader}: cannot read {path}: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise InputError(
            f"{reader}: {path} holds more than {_MOST_BYTES:,} bytes; "
            "a file of settings is far smaller"
        )
    return parse_yaml(content, f"{reader}: {path}")


def read_mapping(path: str | Path, reader: str, wanted: str = "settings by name") -> dict[str, Any]:
    """Return the mapping in the YAML file `path`; an empty file is an empty mapping.

    Args:
        path, reader: as for `read_yaml`.
        wanted: what the file must hold, for the message.

    Raises:
        InputError: as for `read_yaml`.
        InputTypeError: the file holds no mapping, or a key that is not text.
    """
    content = read_yaml(path, reader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputTypeError(f"{reader}: {path} must hold {wanted}; got {shortly(content)}")
    for key in content:
        if not isinstance(key, str):
            raise InputTypeError(f"{reader}: {path} must hold {wanted}; got the key {shortly(key)}")
    return content


def parse_yaml(content: str | bytes, where: str) -> Any:
    """Return the content of the YAML text `content`.

    JSON is YAML, and is read a hundred times as fast, which a list of ten thousand APIs needs.

    Args:
        content: the text or its bytes.
        where: the place of the text; errors begin with it.

    Raises:
        InputError: as for `read_yaml`.
    """
    if content.lstrip()[:1] in ("{", b"{"):
        with suppress(ValueError, RecursionError):  # YAML, and perhaps right, but no JSON
            return json.loads(content, object_pairs_hook=_once, parse_constant=_no_constant)
    try:
        return yaml.load(content, _Loader)
    except RecursionError:
        raise InputError(f"{where} is not readable YAML: it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not readable YAML: {_fault(error)}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse keys that come twice, which YAML then names with their place."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which JSON has not and YAML writes otherwise."""
    raise ValueError(f"{name} is no JSON")


def dump_yaml(values: Any, **style: Any) -> str:
    """Return plain values as YAML text, which readers of YAML 1.1 and 1.2 understand alike.

    `style` holds options of `yaml.dump`.
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **style)


def shortly(value: Any, most: int = 80) -> str:
    """Return a value for an error message: in one line, cut after `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values under `node` once its aliases are expanded.

    `known` maps the ids of nodes that were counted to their numbers, and those of nodes that are
    being counted to 0.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise _refusal("an alias (*name) refers to itself", node)
        return known[id(node)]
    known[id(node)], size = 0, 1
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            pair_or_item = inner if isinstance(inner, tuple) else (inner,)
            size += sum(_size(child, known) for child in pair_or_item)
    known[id(node)] = size
    return size


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _fault(error: yaml.YAMLError) -> str:
    """Return what is wrong, and where, in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.reason} at position {error.position}; save it as UTF-8 text"
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    problem = " ".join(str(error.problem or error.context).split())
    if problem.startswith("but "):
        problem = f"{error.context} {problem}"
    if "'\\t'" in problem:
        problem = "a tab where YAML wants spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
