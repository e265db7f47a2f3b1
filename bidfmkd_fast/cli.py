"""The command `bidfmkd`: each function here reads options and calls the library."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli_ending import last_line
from bidfmkd_fast.cli_options import build_parser, check_seeds, plain_error
from bidfmkd_fast.cli_settings import merge, take_settings
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.interruption import Terminated, ended_by_signals
from bidfmkd_fast.streams import Output, guarded_stdout, open_missing, say

if TYPE_CHECKING:
    from bidfmkd_fast.data import Dataset


def demo(options: Any) -> None:
    """The whole thing on the embedded characters: a pool, a run, its control and the table of accuracies."""
    from bidfmkd_fast.scenarios.demo import DemoConfig, run_demo, with_seed
    from bidfmkd_fast.training import TrainConfig

    values = _plain_values(options.config.as_dict())
    config = DemoConfig(**{**values, "train": TrainConfig.from_dict(values["train"])})
    print(run_demo(_out(options, "demo"), config if options.seed is None else with_seed(config, options.seed)))


def pool(options: Any) -> None:
    """Train a pool of APIs on random class subsets: one data set and architecture (ss), mixed (sh), both mixed (mh)."""
    from bidfmkd_fast.cli_next import after_pool, files_of, write_source
    from bidfmkd_fast.scenarios import train_pool
    from bidfmkd_fast.training.report import text_table

    datasets = _datasets(options.dataset, options.invert)
    made = train_pool(
        datasets,
        _out(options, "pool"),
        scenario=options.scenario,
        n_apis=options.n_apis,
        n_way=options.n_way,
        width=options.width,
        resnet_width=options.resnet_width,
        epochs=options.epochs,
        seed=options.seed,
    )
    write_source(made.folder, {"files": files_of(datasets, options.dataset)})
    accuracies = made.accuracies
    print(
        f"{len(accuracies)} APIs in {made.folder}; held-out accuracy: mean {100 * made.accuracy:.1f} %, "
        f"from {100 * min(accuracies):.1f} % to {100 * max(accuracies):.1f} %"
    )
    kinds: dict[tuple[str, str], list[float]] = {}
    for entry in made.trained:
        kinds.setdefault((entry.data_set, entry.architecture), []).append(entry.accuracy)
    if len(kinds) > 1:
        rows = [["data set", "architecture", "APIs", "held-out accuracy, %"]]
        for (data_set, architecture), its in sorted(kinds.items()):
            rows.append([data_set, architecture, str(len(its)), f"{100 * sum(its) / len(its):.1f}"])
        print(f"\n{text_table(rows)}\n")
    print(after_pool(made.folder))


def train(options: Any) -> None:
    """Meta-learn from a pool of APIs, with the no-recovery control beside it; the same --out goes on after a kill."""
    from bidfmkd_fast.cli_next import SOURCE, after_run, source_of, write_source
    from bidfmkd_fast.cli_plan import tell_plan
    from bidfmkd_fast.files import check_writable
    from bidfmkd_fast.folder_lock import check_free
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.scenarios.pool import read_pool
    from bidfmkd_fast.training import TrainConfig, fit_with_control
    from bidfmkd_fast.training.checkpoint import RunFolder
    from bidfmkd_fast.training.grids import write_grids
    from bidfmkd_fast.training.report import REPORT, outcome_rows, text_table, write_report
    from bidfmkd_fast.training.spending import read_spending

    config = TrainConfig.from_dict(_plain_values(options.config.as_dict()))
    if options.seed is not None:
        config = replace(config, seed=options.seed)
    out, budget = _out(options, "train"), _budget(options)
    if options.dry_run:
        if not tell_plan(load_pool(options.pool), config, budget):
            sys.exit(1)
        return
    check_free(out)
    apis = load_pool(options.pool)
    if out.exists():
        check_writable(out / SOURCE, out / REPORT, out / "grids" / "api_000.png")
    known = dict.fromkeys((entry.data_set, entry.inverted) for entry in read_pool(options.pool).entries)
    run, _ = fit_with_control(apis, out, config, device=options.device, budget=budget)
    folder = RunFolder.open(out)
    files = source_of(Path(options.pool)).get("files", {})
    data_sets = [
        {"name": name, "inverted": inverted} | ({"file": files[name]} if name in files else {})
        for name, inverted in known
        if name
    ]
    write_source(folder.path, {"pool": str(Path(options.pool).resolve()), "data_sets": data_sets})
    write_grids(run, folder)
    report = write_report(folder, control=RunFolder(out / "control"))
    if run.budget_ended:
        print("a budget ended before every API was recovered in full; what there is was used\n")
    if run.skipped:
        print(f"left out: {', '.join(run.skipped)}; the report says why\n")
    print(f"{text_table(read_spending(out).rows())}\n\n{text_table(outcome_rows(folder.summary()))}\n")
    print(f"report with pictures: {report}\n{after_run(out)}")


def status(options: Any) -> None:
    """Tell how far a run is and what it has spent, while it works or afterwards; also for a comparison or a sweep."""
    from bidfmkd_fast.training.status import status_text

    print(status_text(options.run))


def evaluate(options: Any) -> None:
    """Meta-test a run on unseen classes, beside its random initialisation and its control, on the same episodes."""
    from bidfmkd_fast.cli_next import datasets_of, source_of
    from bidfmkd_fast.files import check_writable
    from bidfmkd_fast.meta import MetaModel
    from bidfmkd_fast.training.checkpoint import META_MODEL, RunFolder
    from bidfmkd_fast.training.report import CONTROL, LEARNED, RANDOM, REPORT, compare, write_report

    folder = RunFolder.open(options.run)
    check_writable(folder.path / REPORT)
    if options.dataset:
        datasets = _datasets(options.dataset, options.invert or [False])
    elif options.invert:
        raise InputError(
            "--invert goes with --dataset; without both, the run's own data sets are taken as its pool did"
        )
    else:
        datasets = datasets_of(source_of(folder.path))
    if not datasets:
        raise InputError(f"{folder.path} does not tell its data set; give --dataset")
    models = {RANDOM: folder.initial_model()}
    control = RunFolder(folder.path / "control") if (folder.path / "control" / META_MODEL).is_file() else None
    if control is not None:
        models[CONTROL] = control.meta_model()
    models[LEARNED] = folder.meta_model()
    if options.adapt_lr is not None:
        models = {
            name: MetaModel(one.module, adapt_steps=one.adapt_steps, adapt_learning_rate=options.adapt_lr)
            for name, one in models.items()
        }
    comparisons = [
        compare(
            models,
            dataset,
            n_shots=options.n_shot,
            n_way=options.n_way,
            n_query=options.n_query,
            n_episodes=options.n_episodes,
            split=options.split,
            seed=options.seed,
            progress=True,
        )
        for dataset in datasets
    ]
    told = "\n\n".join(map(str, comparisons))
    print(f"{told}\n\nreport: {write_report(folder, comparisons, control=control)}")


def compare(options: Any) -> None:
    """Train the chosen methods on one pool, and judge them on the same episodes: BiDf-MKD, baselines, ceilings."""
    from bidfmkd_fast.scenarios.compare import run_comparison
    from bidfmkd_fast.scenarios.experiment import ExperimentConfig
    from bidfmkd_fast.training.settings import settings_from_values

    config = settings_from_values(ExperimentConfig, _plain_values(options.config.as_dict()))
    out = _out(options, "compare")
    print(run_comparison(config, out, methods=options.methods, seeds=options.seeds, device=options.device))
    print(f"\nreport: {out / 'comparison.md'}")


def sweep(options: Any) -> None:
    """Run BiDf-MKD over a grid of settings; a sweep that was cut off goes on, cell by cell, in the same --out."""
    from bidfmkd_fast.scenarios.sweep import run_sweep

    print(run_sweep(options.file, _out(options, "sweep"), seeds=options.seeds, device=options.device))


def recover(options: Any) -> None:
    """Recover one set of images from one API of a pool; the same --out goes on after a kill."""
    from bidfmkd_fast.files import check_writable, reserved
    from bidfmkd_fast.folder_lock import FolderLock
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.recovery import recover as recover_images
    from bidfmkd_fast.recovery.cost import measuring_cost
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.training.grids import save_grid
    from bidfmkd_fast.training.kept_set import kept_set
    from bidfmkd_fast.training.recovered_set import bytes_of_set, save_recovered
    from bidfmkd_fast.training.run import RecoveredSet

    apis = load_pool(options.pool)
    if not 0 <= options.api < len(apis):
        raise InputError(f"--api must be in 0..{len(apis) - 1}, the APIs of {options.pool}; got {options.api}")
    out = _out(options, "recover")
    file = out / f"api_{options.api:03d}_support.safetensors"
    if file.exists():
        raise InputError(f"{file} is there already; give another --out")
    api, config = apis[options.api], RecoveryConfig(**_plain_values(options.config.as_dict()))
    api.budget = _budget(options)
    size = bytes_of_set(api.spec, options.n_per_class, config.steps)
    measuring = measuring_cost(api, config, options.n_per_class * api.spec.n_classes).queries
    with FolderLock(out), reserved(file, size), kept_set(file, options.api, api, measuring) as (journal, ledger):
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
        images = api.spec.to_unit(recovered.images)
        one = RecoveredSet(options.api, api.name, api.spec.names, "support", images, recovered)
        save_recovered(one, file)
        save_grid([one], file.with_suffix(".png"))
        queries = sum(row.queries for row in ledger.rows())
    state = "" if recovered.complete else " (the budget ended before the last step)"
    print(
        f"{len(images)} images from {api.name}, {100 * one.matched.float().mean():.0f} % as wanted, "
        f"{queries:,} queries{state}: {file} and .png"
    )


def probe(options: Any) -> None:
    """Ask an API a few questions: what it can give, the step it resolves, and what a run would cost."""
    from bidfmkd_fast.black_box import RemoteBlackBox
    from bidfmkd_fast.cli_plan import tell_probe
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.training import TrainConfig

    if (options.pool is None) == (options.url is None) or (options.url is None) != (options.model is None):
        raise InputError("give either --pool with --api, or --url with --model")
    config = TrainConfig.from_dict(_plain_values(options.config.as_dict()))
    apis = [RemoteBlackBox(options.url, options.model)] if options.pool is None else load_pool(options.pool)
    if not 0 <= options.api < len(apis):
        raise InputError(f"--api must be in 0..{len(apis) - 1}; got {options.api}")
    if not tell_probe(apis[options.api], config, _budget(options)):
        sys.exit(1)


def bench(options: Any) -> None:
    """Time kernels and whole steps against plain torch; run it from the root of the source tree."""
    import importlib

    from bidfmkd_fast.files import check_writable

    if not Path("benchmarks/bench.py").is_file():
        raise InputError("the benchmarks are in the source tree, not in the package; run this from the tree's root")
    sys.path.append(str(Path.cwd()))
    suite = importlib.import_module("benchmarks.bench")
    against = None if options.compare is None else Path(options.compare)
    options.out = options.out or "runs/bench"
    out = Path(options.out)
    check_writable(out / "any")
    if suite.bench(options.cases, options.threads, options.runs, out, against, options.seed):
        sys.exit(1)


def serve(options: Any) -> None:
    """Serve every API of a pool over the Open Inference Protocol v2 on 127.0.0.1, with faults on demand."""
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.serving import Behaviour, behaviours_of
    from bidfmkd_fast.serving.server import Service, serve_until_interrupted
    from bidfmkd_fast.training.report import text_table

    apis = load_pool(options.pool)
    common = Behaviour(**_plain_values(options.config.as_dict()))
    service = Service(apis, behaviours_of([api.name for api in apis], common, options.per_model), options.seed)
    try:
        serve_until_interrupted(service, options.port, announce=lambda line: print(line, flush=True))
    except KeyboardInterrupt as stop:
        print(text_table(service.rows()))
        if isinstance(stop, Terminated):
            raise  # whereas Ctrl-C is how a server is ended


def convert(options: Any) -> None:
    """Make an .npz data set of class folders, listed images, or the archive of CIFAR-100, Omniglot or CUB-200-2011."""
    from bidfmkd_fast.cli_next import after_convert
    from bidfmkd_fast.data.convert import convert_dataset

    made = convert_dataset(
        options.source,
        options.out,
        layout=options.layout,
        split=options.split,
        size=options.size,
        seed=options.seed,
        upright=options.upright,
        progress=True,
    )
    left_out = f"; {made.left_out} classes of no split left out" if made.left_out else ""
    print(f"{made.dataset}\nread as {made.layout}, split: {made.split}{left_out}")
    for line in made.passed_over:
        print(f"left out: {line}")
    print(after_convert(made.dataset, made.path))


COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "demo": (demo, "bidfmkd demo --seed 1"),
    "pool": (pool, "bidfmkd pool --dataset omniglot --invert true --n-apis 20"),
    "train": (train, "bidfmkd train --pool runs/pool --config.recovery.steps 40"),
    "status": (status, "bidfmkd status runs/train"),
    "evaluate": (evaluate, "bidfmkd evaluate --run runs/train --n-shot 1 5"),
    "recover": (recover, "bidfmkd recover --pool runs/pool --api 0 --config.num_directions 20"),
    "probe": (probe, "bidfmkd probe --url http://127.0.0.1:8000 --model api_000"),
    "bench": (bench, "bidfmkd bench --cases 'perturb/*' --threads 1"),
    "serve": (serve, "bidfmkd serve runs/pool --port 8000 --config.failed 0.1"),
    "convert": (convert, "bidfmkd convert CUB_200_2011.tgz --out cub.npz"),
    "compare": (compare, "bidfmkd compare --config configs/omniglot_ss_small.yaml"),
    "sweep": (sweep, "bidfmkd sweep --file configs/sweeps/ablation.yaml --out runs/ablation"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: 0; 2 after one line on stderr for bad input; 141 or 1 where its output could not be written.

    Without `arguments` those of the process are taken, and the process is the command's: Ctrl-C ends it with one line
    and exit code 130, SIGTERM with 143 (`interruption.ended_by_signals`).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in given if argument in COMMANDS), "")
    name = f"bidfmkd {command}".strip()
    parsed: dict[str, Any] = {}  # filled by the command, read by the last line when a signal ends it

    def ended(number: int) -> str:
        return last_line(command, given, parsed.get("options"), number)

    if arguments is None:
        open_missing()
    with guarded_stdout() as output:
        try:
            with ended_by_signals(ended) if arguments is None else contextlib.nullcontext():
                code = _run(given, command, name, parsed)
        except SystemExit as stop:  # of --help, and of commands that found something wrong
            unread = _unread(output, name)
            raise SystemExit(stop.code or unread) from None
        return code or _unread(output, name)


def _unread(output: Output, name: str) -> int:
    """Say it if something that was printed could not be written, and return the exit code for that; else 0."""
    failure = output.failure()
    if failure is None:
        return 0
    code, reason = failure
    say(f"{name}: cannot write to standard output ({reason}); what it was to show is lost, files are kept")
    return code


def _run(arguments: Sequence[str], command: str, name: str, parsed: dict[str, Any]) -> int:
    try:
        from jsonargparse import ArgumentError, dict_to_namespace
    except ImportError:
        say(f"{name}: the command line needs jsonargparse; `pip install jsonargparse`")
        return 2
    try:
        arguments, settings = take_settings(arguments, command)
        given = build_parser(arguments, COMMANDS).parse_args(arguments)
        options = parsed["options"] = given[given.subcommand]
        check_seeds(options)
        if settings:
            merge(values := options.config.as_dict(), settings)
            options.config = dict_to_namespace(values)
        with _one_line_warnings(name), _log_lines(name):
            COMMANDS[given.subcommand][0](options)
    except ArgumentError as error:
        say(f"{name}: {plain_error(str(error), command)}")
        return 2
    except (InputError, BudgetExhausted, BadAnswer, APIUnavailable) as error:
        say(f"{name}: {' '.join(str(error).split())}")
        return 2
    return 0


@contextlib.contextmanager
def _one_line_warnings(name: str) -> Iterator[None]:
    """Warnings as a line like an error's; urllib3 keeps quiet of requests that it repeats, which the ledger counts."""
    before, urllib3 = warnings.formatwarning, logging.getLogger("urllib3")
    level = urllib3.level
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {message}\n"
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = before
        urllib3.setLevel(level)


@contextlib.contextmanager
def _log_lines(name: str) -> Iterator[None]:
    """Show what the library logs, from the level on that the environment variable BIDFMKD_LOG names; else nothing."""
    wanted = os.environ.get("BIDFMKD_LOG", "").upper()
    if not wanted:
        yield
        return
    if not isinstance(logging.getLevelName(wanted), int):
        raise InputError(f"the environment variable BIDFMKD_LOG must be a level such as info; got {wanted.lower()!r}")
    logger, handler = logging.getLogger("bidfmkd_fast"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}: %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(wanted)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _plain_values(values: Any) -> Any:
    """The settings under `--config` as nested dicts, without jsonargparse's notes such as the file they came from."""
    if not isinstance(values, dict):
        return values
    return {key: _plain_values(value) for key, value in values.items() if not key.startswith("__")}


def _datasets(names: Sequence[str], inverted: Sequence[bool]) -> list[Dataset]:
    """The data sets of `--dataset`, inverted as `--invert` says: once for all, or once for each."""
    from bidfmkd_fast.data import load_dataset

    if len(inverted) not in (1, len(names)):
        raise InputError(f"--invert wants one value, or {len(names)}, one per data set; got {len(inverted)}")
    every = list(inverted) * (len(names) if len(inverted) == 1 else 1)
    return [load_dataset(name, invert=invert) for name, invert in zip(names, every)]


def _out(options: Any, command: str) -> Path:
    """`--out`, or `runs/<command>`, or the first of `runs/<command>-2`, `-3`, ... that is not there yet.

    It is kept as `options.out`, where the last line of a command that is interrupted finds it.
    """
    if options.out is None:
        names = itertools.chain([command], (f"{command}-{number}" for number in itertools.count(2)))
        options.out = str(next(path for path in (Path("runs") / name for name in names) if not path.exists()))
    return Path(options.out)


def _budget(options: Any) -> Any:
    from bidfmkd_fast.black_box import Budget

    caps = (options.max_queries, options.max_requests, options.max_cost)
    return None if caps == (None, None, None) else Budget(*caps)
