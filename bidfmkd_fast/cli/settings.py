"""Take the settings behind `--config` off the command line, before its parser sees the rest.

jsonargparse shows these settings in `--help`. It is not used to read them, because it reads YAML
1.1 (`010` is eight) and its errors do not name the wrong value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.shipped import config_file
from bidfmkd_fast.files.yaml_files import parse_yaml, read_mapping
from bidfmkd_fast.settings import check_values, fits

_OPTION = re.compile(r"(?P<option>--config(?P<keys>(\.[^=]*)?))(=(?P<value>.*))?", re.DOTALL)


def take_settings(
    arguments: Sequence[str], kind: type[Any] | None
) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without `--config`, and the settings it names as nested values.

    `--config run.yaml` and `--config '{seed: 3}'` set several values, `--config.recovery.steps 3` a
    single one. If a value is set twice, the later one counts. For an experiment, the name of a
    configuration that comes with the package serves as its file. `kind` is the class whose fields
    are the keys; a command without settings (None) keeps its arguments as they are.

    Raises:
        InputError: a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    rest, waiting = [], list(arguments)
    taken: dict[str, Any] = {}
    while waiting:
        argument = waiting.pop(0)
        found = _OPTION.fullmatch(argument)
        if found is None or kind is None:
            rest.append(argument)
            continue
        text = found["value"]
        if text is None:
            if not waiting or waiting[0].startswith("--"):
                raise InputError(
                    f"{argument} needs a value: a file of settings, or the value of the setting"
                )
            text = waiting.pop(0)
        merge(taken, _values(kind, found["option"], found["keys"].split(".")[1:], text))
    return rest, taken


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Overwrite nested `values`, in place, with what `more` holds."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _values(kind: type[Any], option: str, keys: Sequence[str], text: str) -> dict[str, Any]:
    """Return the nested values that one option sets, once their keys and types are checked."""
    hint: Any = kind
    for key in keys:
        hint = get_type_hints(hint).get(key) if is_dataclass(hint) else None
    value: Any
    name, where = "", "config."
    if not is_dataclass(hint):
        value = _single(text) if hint is not str else text
        if hint is not None and not fits(value, hint) and fits(text, hint):
            value = text  # YAML reads auto:1, for instance, as a mapping, and here text is wanted
    elif text.lstrip().startswith("{") or ": " in text:
        value = parse_yaml(text, option)
    else:
        file = config_file(text, option) if hint is ExperimentConfig else text
        value, name, where = read_mapping(file, option), f"{option} {text}: ", ""
    for key in reversed(keys):
        value = {key: value}
    return check_values(kind, value, name, where)


def _single(text: str) -> Any:
    """Return what `text` is as YAML, with a list as a tuple; the text itself if it is no YAML."""
    try:
        value = parse_yaml(text, "")
    except InputError:
        return text
    return tuple(value) if isinstance(value, list) else value
