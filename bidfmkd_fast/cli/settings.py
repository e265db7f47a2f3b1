"""The settings behind `--config`, which are taken from the command line before its parser sees the rest.

jsonargparse shows these settings in `--help`, but reads them as YAML 1.1 and says little of what is wrong with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.yaml_files import parse_yaml, read_mapping

_OPTION = re.compile(r"(?P<option>--config(?P<keys>(\.[^=]*)?))(=(?P<value>.*))?", re.DOTALL)


def settings_class(command: str) -> type[Any] | None:
    """Return the class whose fields are the keys under `--config` of a command; None for one
    without.
    """
    from bidfmkd_fast.experiments.config import ExperimentConfig
    from bidfmkd_fast.experiments.demo import DemoConfig
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.serving import Behaviour
    from bidfmkd_fast.training import TrainConfig

    kinds: dict[str, type[Any]] = {
        "demo": DemoConfig,
        "train": TrainConfig,
        "recover": RecoveryConfig,
        "probe": TrainConfig,
        "serve": Behaviour,
        "compare": ExperimentConfig,
    }
    return kinds.get(command)


def take_settings(arguments: Sequence[str], command: str) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments without `--config`, and what it sets as nested values; of two values the
    later one counts.

    `--config run.yaml` and `--config '{seed: 3}'` set several values, `--config.recovery.steps 3` a
    single one.

    Raises:
        InputError: a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    kind, rest, waiting = settings_class(command), [], list(arguments)
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
                    f"{argument} needs a value: a file of settings, or what the setting is to be"
                )
            text = waiting.pop(0)
        merge(taken, _values(kind, found["option"], found["keys"].split(".")[1:], text))
    return rest, taken


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    """Set in nested `values` what `more` holds."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def _values(kind: type[Any], option: str, keys: Sequence[str], text: str) -> dict[str, Any]:
    """Return the nested values that one option sets, checked."""
    from bidfmkd_fast.settings import check_values, fits

    hint: Any = kind
    for key in keys:
        hint = get_type_hints(hint).get(key) if is_dataclass(hint) else None
    value: Any
    if is_dataclass(hint):
        name, where = "", "config."
        if text.lstrip().startswith("{") or ": " in text:
            value = parse_yaml(text, option)
        else:
            value, name, where = read_mapping(text, option), f"{option} {text}: ", ""
    else:
        name, where = "", "config."
        value = _single(text) if hint is not str else text
        if hint is not None and not fits(value, hint) and fits(text, hint):
            value = text  # such as auto:1 where a number or text is wanted
    for key in reversed(keys):
        value = {key: value}
    return check_values(kind, value, name, where)


def _single(text: str) -> Any:
    try:
        value = parse_yaml(text, "")
    except InputError:
        return text
    return tuple(value) if isinstance(value, list) else value
