"""Define the commands about a run: `train` makes it, `status` watches it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box import BlackBox, Budget
from bidfmkd_fast.cli.next_command import SOURCE, after_run, source_of, write_source
from bidfmkd_fast.cli.options import (
    Command,
    add_caps,
    add_out,
    add_pool_and_device,
    add_seed,
    add_stop_after,
    budget_of,
    out_folder,
    train_config,
)
from bidfmkd_fast.cli.plan_text import print_plan
from bidfmkd_fast.cli.services import add_services, print_found, services_of
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable
from bidfmkd_fast.files.folder_lock import check_free
from bidfmkd_fast.pools import Services, find_services, load_pool, read_pool
from bidfmkd_fast.pools.pool import LIST, boxes_of
from bidfmkd_fast.pools.services_of_run import check_same, listed_in
from bidfmkd_fast.runtime.machine import usable_device
from bidfmkd_fast.runtime.ranks import current
from bidfmkd_fast.survey.pictures import check_drawable
from bidfmkd_fast.training import BiDfMKD, Run, TrainConfig, fit_with_control, paper
from bidfmkd_fast.training.grids import write_grids
from bidfmkd_fast.training.pseudo_tasks import keep_zero_query, zero_query_file
from bidfmkd_fast.training.report import REPORT, outcome_rows, write_report
from bidfmkd_fast.training.run_folder import META_MODEL, RunFolder
from bidfmkd_fast.training.shared_folder import wait_until_seen
from bidfmkd_fast.training.spending import read_spending
from bidfmkd_fast.training.status import status_text
from bidfmkd_fast.training.tables import text_table
from bidfmkd_fast.training.with_control import count_spent

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def train(options: Any) -> None:
    """Meta-learn from a pool of APIs, or from prediction services (--url); a second call with the
    same --out continues a run that was cut off.
    """
    services = services_of(options, "--url")
    if (services is None) == (options.pool is None):
        raise InputError("give either --pool FOLDER or --url URL [URL ...]")
    config, ranks = train_config(options), current()
    out, budget = out_folder(options, "train"), budget_of(options)
    if not options.dry_run:
        ranks.first_alone(lambda: check_free(out))
    elif not ranks.first:  # it asks the APIs, and once is enough
        return
    if services is None:
        _train(options, load_pool(options.pool), config, budget, out)
        return
    usable_device("train", options.device)  # before anything is asked
    if options.dry_run:
        _train(options, _boxes_to_plan(services, budget, out), config, budget, out)
        return
    options.pool = str(out)  # the list of services lies in the folder of the run
    with ExitStack() as stack:
        listed = listed_in(out, services, budget)
        if (found := ranks.first_alone(lambda: stack.enter_context(listed))) is not None:
            print_found(found)
            print(f'look at the lines of {out / LIST} that say "check"\n', flush=True)
        if not ranks.first:
            wait_until_seen(out / LIST)
        _train(options, load_pool(out), config, budget, out)


def _train(
    options: Any,
    apis: list[BlackBox],
    config: TrainConfig,
    budget: Budget | None,
    out: Path,
) -> None:
    """Make the run of `train`, or with `--dry-run` print its plan. Rank 0 writes and prints."""
    if options.controls:
        for api in apis:
            check_drawable(api.spec, "zero_query", "leave --controls out")
    if options.dry_run:
        if not print_plan(apis, config, budget, options.device, options.controls):
            sys.exit(1)
        return
    ranks = current()
    if ranks.first and out.exists():
        places = [out / SOURCE, out / REPORT, out / "grids" / "api_000.png"]
        check_writable(*places, *([zero_query_file(out)] if options.controls else []))
    source, folder = _source_of_run(options.pool), RunFolder(out)
    run = _fit(options, apis, config, budget, folder)
    if not ranks.first:
        return
    if run is not None:
        write_source(out, source)
        write_grids(run, folder)
    if options.controls:
        keep_zero_query(folder, apis, options.device)
    report, summary = write_report(folder), folder.summary()
    if summary["budget_ended"]:
        print("a budget ended before every API was recovered in full; the sets so far were used\n")
    if summary["skipped"]:
        print(f"left out: {', '.join(summary['skipped'])}; the report says why\n")
    print(f"{text_table(read_spending(out).rows())}\n")
    print(f"{text_table(outcome_rows(summary))}\n")
    print(f"report: {report}\n{after_run(out)}")


def _boxes_to_plan(services: Services, budget: Budget | None, out: Path) -> list[BlackBox]:
    """Return the APIs that a run in `out` would learn from; write nothing."""
    if (out / LIST).is_file():
        check_same(read_pool(out), services)
        return load_pool(out)
    found = find_services(services, budget)
    print_found(found)
    print(flush=True)
    return boxes_of(found.pool(out), "services")


def _fit(
    options: Any,
    apis: Sequence[BlackBox],
    config: TrainConfig,
    budget: Budget | None,
    folder: RunFolder,
) -> Run | None:
    """Make the run of `train`, and the no-recovery control before it if it is asked for.

    Return None if both are finished and an earlier command was cut off while it made zero_query.
    """
    control = RunFolder(folder.path / "control")
    if not options.controls:
        # Of an earlier command with controls.
        current().first_alone(lambda: count_spent(control, config.control(), apis, budget))
        return BiDfMKD(apis, config=config, device=options.device, budget=budget).fit(folder.path)

    def finished() -> bool:
        done = all((part.path / META_MODEL).is_file() for part in (folder, control))
        if done := done and not zero_query_file(folder.path).is_file():
            count_spent(folder, config, apis, budget)  # refuses other settings and another pool
        return done

    if any(current().exchange(current().first and finished())):
        return None
    run, _ = fit_with_control(apis, folder.path, config, device=options.device, budget=budget)
    return run


def _source_of_run(pool: str) -> dict[str, Any]:
    """Return what `source.yaml` of a run on this pool says: the pool, and the images behind it."""
    entries = read_pool(pool).entries
    known = dict.fromkeys((entry.data_set, entry.inverted) for entry in entries)
    files = source_of(Path(pool)).get("files", {})
    data_sets = [
        {"name": name, "inverted": inverted} | ({"file": files[name]} if name in files else {})
        for name, inverted in known
        if name
    ]
    return {"pool": str(Path(pool).resolve()), "data_sets": data_sets}


def _add_train_options(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    add_out(parser, "train")
    add_seed(parser, from_settings=True)
    add_stop_after(parser)
    presets = {
        "default": TrainConfig(),
        "v01": TrainConfig.v01(),
        "paper": paper(),
        "paper_compat": paper(compat=True),
    }
    parser.add_argument(
        "--preset", choices=tuple(presets), default="default", help="settings to start from"
    )
    parser.add_class_arguments(TrainConfig, "config", help="settings of the run")
    for name, settings in presets.items():
        if f"--preset={name}" in arguments or ("--preset", name) in itertools.pairwise(arguments):
            parser.set_defaults({"config": settings.to_dict()})
    parser.add_argument(
        "--dry-run", action="store_true", help="only probe the APIs and show what a run would cost"
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also make a control without recovery, which asks queries, and one of procedural "
        "pictures alone (zero_query), which asks none",
    )
    add_caps(parser)
    add_pool_and_device(parser, required=False)
    add_services(
        parser,
        "--url",
        "servers of the Open Inference Protocol v2, instead of a pool; their list is kept in --out",
    )


def status(options: Any) -> None:
    """Show how far a run is and what it has spent, while it works or afterwards; also for a
    comparison or a sweep.
    """
    print(status_text(options.run))


def _add_status_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "run", type=str, help="folder of a run, or of several: a comparison or a sweep"
    )


TRAIN = Command(
    train,
    _add_train_options,
    "bidfmkd train --pool runs/pool --config.recovery.steps 40",
    TrainConfig,
    shared=True,
)
STATUS = Command(status, _add_status_options, "bidfmkd status runs/train", positional="run")
