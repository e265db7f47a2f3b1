"""Write settings as YAML that explains itself: above each setting the text of its docstring."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from bidfmkd_fast.files.yaml_files import dump_yaml
from bidfmkd_fast.settings import plain_values

_WIDTH = 100


def annotated_yaml(settings: Any, title: str) -> str:
    """Return every setting of a dataclass as YAML, which `settings_from_yaml` reads back.

    Above each stands what the docstring of its class says under `Args:`. `title` is the comment at
    the top.
    """
    return "\n".join([*_comment(title, ""), *_lines(settings, "")]) + "\n"


def _lines(settings: Any, indent: str) -> Iterator[str]:
    """Yield the lines of the settings of one class and of those nested in it."""
    from docstring_parser import parse

    described = parse(type(settings).__doc__ or "").params
    texts = {entry.arg_name: entry.description for entry in described}
    values = plain_values(settings)
    for field in fields(settings):
        nested = getattr(settings, field.name)
        if not indent:
            yield ""  # groups of the top level stand apart
        yield from _comment(texts.get(field.name) or "", indent)
        if is_dataclass(nested):
            yield f"{indent}{field.name}:"
            yield from _lines(nested, f"{indent}  ")
        else:
            value = values[field.name]
            style = None if isinstance(value, list) else False  # a list in one line, as [1, 5]
            text = dump_yaml({field.name: value}, default_flow_style=style)
            yield from textwrap.indent(text.rstrip("\n"), indent).splitlines()


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
