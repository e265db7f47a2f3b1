"""Read the file of a sweep: an experiment, and the grid of settings to run it with."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.methods import METHODS, OURS, USES_OUR_SETS, check_recovered
from bidfmkd_fast.experiments.shipped import config_file
from bidfmkd_fast.files.yaml_files import read_mapping
from bidfmkd_fast.settings import closest, dotted_keys, named, settings_from_values

_MOST_CELLS = 10_000  # each is a whole run
_KEYS = ("experiment", "variants", "grid")
# Cells that differed in these settings would be tested on different episodes.
_SHARED = ("evaluation", "pool.data_sets", "pool.inverted", "pool.n_way")


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep: a variant at one point of the grid.

    Args:
        name: name of the cell in tables.
        variant: the name of the variant; empty if the file has none.
        point: the dotted keys of the grid with their values here.
        changes: all dotted keys that differ from the experiment, those of the variant included.
        config: the settings of the experiment with these changes.
        method: what is trained, one of `METHODS`.
    """

    name: str
    variant: str
    point: Mapping[str, Any]
    changes: Mapping[str, Any]
    config: ExperimentConfig
    method: str = OURS

    @property
    def folder_name(self) -> str:
        """Return the name in characters that any file system takes, and a digest of `changes`."""
        digest = hashlib.blake2b(
            repr(sorted(self.changes.items())).encode(), digest_size=4
        ).hexdigest()
        return f"{re.sub('[^0-9A-Za-z.=-]+', '_', self.name)[:60]}_{digest}"


@dataclass(frozen=True)
class Sweep:
    """The experiment that all cells start from, and the cells; the first is the reference."""

    base: ExperimentConfig
    cells: tuple[Cell, ...]


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file with three keys, or the one of that name in `configs/sweeps/`.

    `experiment` is a file of `configs/`, relative to this one. `variants` gives names to sets of
    dotted keys with values; the key `method` trains another method of `compare` than BiDf-MKD.
    `grid` gives dotted keys lists of values. The cells are all variants at all points of the grid.

    Raises:
        InputError: the file is missing or not of this form, a setting is unknown, or a value is out
            of range.
    """
    file = config_file(path, "sweep", "sweeps")
    content = read_mapping(file, "sweep")
    if unknown := [str(key) for key in content if key not in _KEYS]:
        raise InputError(
            f"sweep: {file}: wanted the keys {', '.join(_KEYS)}; got {', '.join(unknown)}"
        )
    if not isinstance(content.get("experiment"), str):
        raise InputError(f"sweep: {file} must name a file of settings under 'experiment'; got none")
    experiment = file.parent / content["experiment"]
    base = read_mapping(experiment, "sweep")
    with named(f"sweep: {experiment}"):
        config = settings_from_values(ExperimentConfig, base)
    variants, grid = content.get("variants") or {"": {}}, content.get("grid") or {}
    _check_form(file, variants, grid)
    n_cells = len(variants) * math.prod(map(len, grid.values()))
    if n_cells > _MOST_CELLS:
        raise InputError(
            f"sweep: {file} has {n_cells:,} cells, more than {_MOST_CELLS:,}; shorten its lists"
        )
    cells = []
    for variant, changes in variants.items():
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            with named(f"sweep: {file}"):
                cells.append(_cell(base, str(variant), changes, point))
    if len({cell.folder_name for cell in cells}) < len(cells):
        raise InputError(f"sweep: {file} has the same cell twice")
    return Sweep(config, tuple(cells))


def _check_form(file: Path, variants: Any, grid: Any) -> None:
    for name, given in (("variants", variants), ("grid", grid)):
        if not isinstance(given, dict):
            raise InputTypeError(f"sweep: {file}: {name} must be settings by name; got {given!r}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputTypeError(
                f"sweep: {file}: grid must give a list of values for {key}; got {values!r}"
            )
    for variant, changes in variants.items():
        if not isinstance(changes, dict):
            raise InputTypeError(
                f"sweep: {file}: variant {variant!r} must be dotted keys and values; "
                f"got {changes!r}"
            )


def _cell(
    base: Mapping[str, Any], variant: str, changes: Mapping[str, Any], point: Mapping[str, Any]
) -> Cell:
    """Return the cell of a variant at one point of the grid; `base` holds the experiment's file."""
    every: dict[str, Any] = {}
    values, known = _copied(base), dotted_keys(ExperimentConfig)
    for key, value in (*_dotted(changes), *_dotted(point)):
        if key in every:
            raise InputError(
                f"{key} is set twice for one cell, to {every[key]!r} and {value!r}; "
                "keep one of the two"
            )
        every[key] = value
        if key == "method":
            _check_method(variant, value)
            continue
        if key.split(".")[0] not in known:
            raise InputError(f"unknown key {key!r}; {closest(key, known)}")
        if any(key == shared or key.startswith(f"{shared}.") for shared in _SHARED):
            raise InputError(
                f"{key} must be the same for all cells, or their episodes would differ; got {value}"
            )
        *where, last = key.split(".")
        inside = values
        for name in where:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise InputError(f"there are no settings under {name!r} in {key!r}")
        inside[last] = value
    parts = [variant] if variant else []
    parts += [f"{key.split('.')[-1]}={value}" for key, value in point.items()]
    name = ", ".join(parts) or "as it is"
    config, method = settings_from_values(ExperimentConfig, values), every.get("method", OURS)
    check_recovered(f"cell {name!r}", [method], config.train)
    return Cell(name, variant, point, every, config, method)


def _check_method(variant: str, method: Any) -> None:
    known = [name for name in METHODS if name not in USES_OUR_SETS]
    if method not in known:
        raise InputError(
            f"variant {variant!r}: method must be one of {', '.join(known)}; got {method!r}"
        )


def _dotted(changes: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as pairs of dotted key and value.

    A dotted key changes the setting that it names. A nested mapping would replace all settings
    beside it in the experiment's file, too.
    """
    for key, value in changes.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dicts that shares none of them."""
    return {
        key: _copied(value) if isinstance(value, dict) else value for key, value in values.items()
    }
