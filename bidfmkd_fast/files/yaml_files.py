"""Reads and writes every YAML text of the package: YAML 1.2's core schema, no key twice, bounded in size.

PyYAML reads YAML 1.1, where `010` is eight, `1:30` is ninety, `yes` is true and `1e-3` is text. The loader here differs
from PyYAML's safe loader in these rules only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from bidfmkd_fast.errors import InputError, InputTypeError

_MOST_BYTES = 1 << 23  # several times the list of a pool of a thousand APIs
_MOST_VALUES = 100_000  # that aliases may make of a file; a bomb of ten levels makes billions
_TAG = "tag:yaml.org,2002:"
_CORE: tuple[tuple[str, re.Pattern[str], list[str], Callable[[str], Any]], ...] = (
    # What a plain scalar is: the first whose pattern fits all of it, text otherwise; and its first
    # characters.
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
            r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's types, without repeated keys and without alias
    bombs.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's name; 1.1's rules are left out)
    yaml_constructors = {  # noqa: RUF012 (likewise: no dates, sets or bytes)
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
            raise _refusal(
                f"its aliases (*name) make more than {_MOST_VALUES:,} values of it", node
            )
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the parent refuses it
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
    """PyYAML's safe dumper that also quotes text which the core schema would read as a number."""


def _constructor(
    name: str, pattern: re.Pattern[str], make: Callable[[str], Any]
) -> Callable[..., Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            if pattern.match(text):
                return make(text)
        except ValueError:  # Python reads integers of 4300 digits at most
            pass
        raise _refusal(f"{text[:40]!r} is not readable as {name}", node)

    return construct


for _name, _pattern, _first, _make in _CORE:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Loader.add_constructor(_TAG + _name, _constructor(_name, _pattern, _make))


def read_yaml(path: str | Path, reader: str) -> Any:
    """Return what the YAML file `path` holds; None for an empty one. `reader` opens the errors
    ("sweep").

    Raises:
        InputError: the file is missing, no UTF-8 (or UTF-16 with its mark), no YAML, has a key
            twice, or is too large.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{reader}: cannot read {path}: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise InputError(
            f"{reader}: {path} holds more than {_MOST_BYTES:,} bytes; no file of settings does"
        )
    return parse_yaml(content, f"{reader}: {path}")


def read_mapping(path: str | Path, reader: str, wanted: str = "settings by name") -> dict[str, Any]:
    """Return the mapping that the YAML file `path` holds, with text as keys; an empty file is an
    empty mapping.

    Raises:
        InputError: as `read_yaml`, and InputTypeError for a file that holds anything else; it was
            to hold `wanted`.
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
    """Return what the YAML text `content` holds. Raises InputError as `read_yaml`; `where` opens
    its message.
    """
    try:
        return yaml.load(content, _Loader)
    except RecursionError:
        raise InputError(f"{where} is not readable YAML: it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not readable YAML: {_told(error)}") from None


def dump_yaml(values: Any, **style: Any) -> str:
    """Return plain values as YAML text that readers of YAML 1.1 and 1.2 read alike; `style` is
    PyYAML's.
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, **style)


def shortly(value: Any, most: int = 80) -> str:
    """Return a value as an error shows it: in one line, cut after `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values under `node` once aliases are written out; `known` has those of
    nodes seen.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise _refusal("an alias (*name) refers to itself", node)
        return known[id(node)]
    known[id(node)], size = 0, 1
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            size += sum(
                _size(one, known) for one in (inner if isinstance(inner, tuple) else (inner,))
            )
    known[id(node)] = size
    return size


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _told(error: yaml.YAMLError) -> str:
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
