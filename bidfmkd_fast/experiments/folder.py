"""Keep the folder of an experiment: its settings, its pools, and results that are made only once.

A command that was cut off finds there what is finished and continues from it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig, PoolConfig
from bidfmkd_fast.files.atomic import PARTIAL, cannot_write, write_exact
from bidfmkd_fast.files.folder_lock import LOCK
from bidfmkd_fast.files.yaml_files import dump_yaml
from bidfmkd_fast.pools.api_training import train_pool
from bidfmkd_fast.pools.pool import LIST, Pool, read_pool
from bidfmkd_fast.pools.unfinished import SETTINGS
from bidfmkd_fast.settings import plain_values, settings_from_yaml, to_yaml

EXPERIMENT = "experiment.yaml"


def open_folder(out: str | Path, config: ExperimentConfig) -> Path:
    """Open the folder of an experiment: a new one, or the one that has the same settings.

    The seed is no part of the settings here, because one folder holds the results of several seeds.
    A setting that an older version did not write means there what that version did.

    Raises:
        InputError: the folder holds another experiment, or anything else.
    """
    folder, config = Path(out), config.with_seed(0)
    file = folder / EXPERIMENT
    if file.is_file():
        if settings_from_yaml(ExperimentConfig, file).with_seed(0) != config:
            raise InputError(
                f"{folder} holds an experiment with other settings; "
                f"give another --out, or its {file.name}"
            )
    elif folder.exists() and not _is_empty_folder(folder):
        raise InputError(f"{folder} exists already and is not an experiment; give another --out")
    else:
        write_exact(file, to_yaml(config))
    return folder


def _is_empty_folder(path: Path) -> bool:
    """Return True for a folder that holds nothing but the lock of this command."""
    return path.is_dir() and all(inside.name == LOCK for inside in path.iterdir())


def made_once(
    folder: Path,
    make: Callable[[Path], object],
    last: str,
    goes_on: Collection[str] = (),
    scratch: Collection[str] = (),
) -> Path:
    """Return `folder`; if it is not there, call `make` with an unfinished folder and rename that.

    `last` is the file that `make` writes last, so an unfinished folder that holds it is complete
    and only has to be renamed. An incomplete folder, left by a command that was cut off, is removed
    first. If it holds a file or folder named in `goes_on` or `scratch`, it stays, and `make`
    continues in it. What `scratch` names is removed from the complete folder.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + PARTIAL)
    if not (partial / last).is_file():
        begun = any((partial / name).exists() for name in (*goes_on, *scratch))
        if partial.exists() and not begun:
            shutil.rmtree(partial)
        make(partial)
    for name in scratch:
        shutil.rmtree(partial / name, ignore_errors=True)
        with suppress(OSError):
            (partial / name).unlink()
    try:
        partial.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def pool_of(
    out: Path, config: PoolConfig, datasets: Sequence[Dataset], seed: int, progress: bool
) -> Pool:
    """Return the pool of these settings; train it in `out/pools` if it is missing.

    `seed` is that of the run, which the pool has as well unless its settings name another.
    """
    seed = seed if config.seed is None else config.seed
    values = plain_values(config)
    del values["seed"]  # it is in the name, and version 0.1 had no such setting
    digest = hashlib.blake2b(dump_yaml(values).encode(), digest_size=4).hexdigest()
    folder = out / "pools" / f"seed_{seed}_{digest}"

    def make(partial: Path) -> None:
        train_pool(
            datasets,
            partial,
            scenario=config.scenario,
            n_apis=config.n_apis,
            n_way=config.n_way,
            width=config.width,
            resnet_width=config.resnet_width,
            epochs=config.epochs,
            seed=seed,
            progress=progress,
        )

    return read_pool(made_once(folder, make, LIST, scratch=[SETTINGS]) / LIST)
