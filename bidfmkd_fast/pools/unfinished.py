"""Continue a pool whose training was cut off: which settings it has, and which APIs are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.pools.pool import LIST

SETTINGS = "training.json"  # of a pool that is not finished
_ACCURACY = "held_out_accuracy"


def check_unfinished(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if `folder` holds APIs that were trained with other settings."""
    if not any(folder.glob("api_*.safetensors")):
        return
    file = folder / SETTINGS
    held = read_json(file, "train_pool") if file.is_file() else None
    if held == settings:
        return
    differ = [name for name in settings if held and held.get(name) != settings[name]]
    if not differ:
        raise InputError(
            f"train_pool: {folder} holds a pool that was cut off in training, and no {SETTINGS} "
            "that says with what settings; give another folder or remove it"
        )
    raise InputError(
        f"train_pool: {folder} holds a pool that was cut off in training, with another "
        f"{', '.join(differ)}; give the same to continue it, or another folder, or remove it"
    )


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a pool whose training begins."""
    write_json(folder / SETTINGS, settings)


def end(folder: Path) -> None:
    """Remove the settings if the pool is finished, or if none of its APIs is trained."""
    if (folder / LIST).is_file() or not any(folder.glob("api_*.safetensors")):
        (folder / SETTINGS).unlink(missing_ok=True)


def keep_trained(path: Path, state: Mapping[str, Tensor], accuracy: float) -> None:
    """Write the weights of a trained API, and its accuracy on held-out images."""
    write_tensors(path, state, {_ACCURACY: repr(accuracy)})


def trained_accuracy(path: Path) -> float | None:
    """Return the accuracy of an API that is trained already; None if it is not.

    Raises InputError if its file is damaged.
    """
    if not path.is_file():
        return None
    _, about = read_tensors(path)
    return float(about[_ACCURACY])
