"""Define the commands about one API: `recover` makes a set of images, `probe` tests it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box import BlackBox, RemoteBlackBox
from bidfmkd_fast.cli.options import (
    Command,
    add_caps,
    add_out,
    add_pool_and_device,
    add_seed,
    budget_of,
    out_folder,
    train_config,
)
from bidfmkd_fast.cli.plan_text import print_probe
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable, reserved
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.pools import load_pool
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.recovery import recover as recover_images
from bidfmkd_fast.recovery.cost import measuring_cost
from bidfmkd_fast.training import TrainConfig
from bidfmkd_fast.training.grids import save_grid
from bidfmkd_fast.training.kept_set import kept_set
from bidfmkd_fast.training.recovered_set import bytes_of_set, save_recovered
from bidfmkd_fast.training.run import RecoveredSet

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def recover(options: Any) -> None:
    """Recover one set of images from one API of a pool; a second call with the same --out continues
    a set that was cut off.
    """
    api = _api_of_pool(options)
    out = out_folder(options, "recover")
    file = out / f"api_{options.api:03d}_support.safetensors"
    if file.exists():
        raise InputError(f"{file} exists already; give another --out")
    config = RecoveryConfig(**options.config)
    api.budget = budget_of(options)
    size = bytes_of_set(api.spec, options.n_per_class, config.steps)
    measuring = measuring_cost(api, config, options.n_per_class * api.spec.n_classes).queries
    with (
        FolderLock(out),
        reserved(file, size),
        kept_set(file, options.api, api, measuring) as (journal, ledger),
    ):
        check_writable(file.with_suffix(".png"))
        recovered = recover_images(
            api,
            options.n_per_class,
            config=config,
            seed=options.seed,
            device=options.device,
            progress=True,
            journal=journal,
        )
        in_unit_range = replace(recovered, images=api.spec.to_unit(recovered.images))
        kept = RecoveredSet(options.api, api.name, api.spec.names, "support", in_unit_range)
        save_recovered(kept, file)
        save_grid([kept], file.with_suffix(".png"))
        queries = sum(row.queries for row in ledger.rows())
    state = "" if recovered.complete else " (the budget ended before the last step)"
    print(
        f"{len(kept.images)} images from {api.name}, {100 * kept.matched.float().mean():.0f} % as "
        f"wanted, {queries:,} queries{state}: {file} and .png"
    )


def _add_recover_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_out(parser, "recover")
    add_seed(parser)
    parser.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    parser.add_argument("--n-per-class", type=int, default=10, help="images per class")
    parser.add_class_arguments(RecoveryConfig, "config", help="settings of the recovery")
    add_caps(parser)
    add_pool_and_device(parser)


def probe(options: Any) -> None:
    """Ask an API a few questions: what it can give, the step it resolves, and what a run would
    cost.
    """
    has_url, has_model = options.url is not None, options.model is not None
    if (options.pool is not None) == has_url or has_url != has_model:
        raise InputError("give either --pool with --api, or --url with --model")
    config = train_config(options)
    api = RemoteBlackBox(options.url, options.model) if has_url else _api_of_pool(options)
    if not print_probe(api, config, budget_of(options)):
        sys.exit(1)


def _add_probe_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_seed(parser, from_settings=True)
    parser.add_argument("--pool", type=str, help="folder of a pool")
    parser.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    parser.add_argument(
        "--url",
        type=str,
        help="address of a server of the Open Inference Protocol v2, instead of a pool",
    )
    parser.add_argument("--model", type=str, help="name of the model on that server")
    parser.add_class_arguments(TrainConfig, "config", help="settings of the run that is planned")
    add_caps(parser)


def _api_of_pool(options: Any) -> BlackBox:
    """Return the API number `--api` of the pool in the folder `--pool`."""
    apis = load_pool(options.pool)
    if not 0 <= options.api < len(apis):
        raise InputError(
            f"--api must be in 0..{len(apis) - 1}, the APIs of {options.pool}; got {options.api}"
        )
    return apis[options.api]


RECOVER = Command(
    recover,
    _add_recover_options,
    "bidfmkd recover --pool runs/pool --api 0 --config.num_directions 20",
    RecoveryConfig,
)
PROBE = Command(
    probe,
    _add_probe_options,
    "bidfmkd probe --url http://127.0.0.1:8000 --model api_000",
    TrainConfig,
)
