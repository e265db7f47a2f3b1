"""The command `bidfmkd`: each function here reads options and calls the library."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli_options import build_parser, plain_error
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError

if TYPE_CHECKING:
    from bidfmkd_fast.data import Dataset

SOURCE = "source.yaml"  # in a run folder: the pool it learned from, and what that pool's images were


def demo(options: Any) -> None:
    """The whole thing on the embedded characters: a pool, a run, its control and the table of accuracies."""
    from bidfmkd_fast.scenarios.demo import DemoConfig, run_demo, with_seed
    from bidfmkd_fast.training import TrainConfig

    values = _plain_values(options.config.as_dict())
    config = DemoConfig(**{**values, "train": TrainConfig.from_dict(values["train"])})
    print(run_demo(_out(options, "demo"), config if options.seed is None else with_seed(config, options.seed)))


def pool(options: Any) -> None:
    """Train a pool of APIs on random class subsets: one data set and architecture (ss), mixed (sh), both mixed (mh)."""
    from bidfmkd_fast.scenarios import train_pool
    from bidfmkd_fast.training.report import text_table

    made = train_pool(
        _datasets(options.dataset, options.invert),
        _out(options, "pool"),
        scenario=options.scenario,
        n_apis=options.n_apis,
        n_way=options.n_way,
        width=options.width,
        resnet_width=options.resnet_width,
        epochs=options.epochs,
        seed=options.seed,
    )
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
        print(f"\n{text_table(rows)}")


def train(options: Any) -> None:
    """Meta-learn from a pool of APIs, with the no-recovery control beside it; the same --out goes on after a kill."""
    import yaml

    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.scenarios.pool import read_pool
    from bidfmkd_fast.secrets import scrubbed, write_text
    from bidfmkd_fast.training import TrainConfig, fit_with_control
    from bidfmkd_fast.training.checkpoint import RunFolder
    from bidfmkd_fast.training.grids import write_grids
    from bidfmkd_fast.training.report import cost_rows, text_table, write_report

    config = TrainConfig.from_dict(_plain_values(options.config.as_dict()))
    if options.seed is not None:
        config = replace(config, seed=options.seed)
    apis, budget = load_pool(options.pool), _budget(options)
    if options.dry_run:
        _tell_plan(apis, config, budget)
        return
    out = _out(options, "train")
    known = dict.fromkeys((entry.data_set, entry.inverted) for entry in read_pool(options.pool).entries)
    run, _ = fit_with_control(apis, out, config, device=options.device, budget=budget)
    folder = RunFolder.open(out)
    data_sets = [{"name": name, "inverted": inverted} for name, inverted in known if name]
    source = {"pool": str(Path(options.pool).resolve()), "data_sets": data_sets}
    write_text(folder.path / SOURCE, yaml.safe_dump(scrubbed(source), sort_keys=False))
    write_grids(run, folder)
    report = write_report(folder, control=RunFolder(out / "control"))
    if run.budget_ended:
        print("a budget ended before every API was recovered in full; what there is was used\n")
    if run.skipped:
        print(f"left out: {', '.join(run.skipped)}; the report says why\n")
    print(f"{text_table(cost_rows(folder.summary()))}\n\nreport with pictures: {report}")
    print(f"next: bidfmkd evaluate --run {out}")


def evaluate(options: Any) -> None:
    """Meta-test a run on unseen classes, beside its random initialisation and its control, on the same episodes."""
    import yaml

    from bidfmkd_fast.data import load_dataset
    from bidfmkd_fast.meta import MetaModel
    from bidfmkd_fast.training.checkpoint import META_MODEL, RunFolder
    from bidfmkd_fast.training.report import CONTROL, LEARNED, RANDOM, compare, write_report

    folder = RunFolder.open(options.run)
    source_file = folder.path / SOURCE
    source = yaml.safe_load(source_file.read_text(encoding="utf-8")) if source_file.is_file() else {}
    if options.dataset:
        datasets = _datasets(options.dataset, options.invert or [False])
    elif options.invert:
        raise InputError(
            "--invert goes with --dataset; without both, the run's own data sets are taken as its pool did"
        )
    else:
        datasets = [load_dataset(one["name"], invert=one["inverted"]) for one in source.get("data_sets", ())]
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
    """Recover one set of images from one API of a pool."""
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.recovery import recover as recover_images
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.training.checkpoint import save_recovered
    from bidfmkd_fast.training.grids import save_grid
    from bidfmkd_fast.training.run import RecoveredSet

    apis = load_pool(options.pool)
    if not 0 <= options.api < len(apis):
        raise InputError(f"--api must be in 0..{len(apis) - 1}, the APIs of {options.pool}; got {options.api}")
    out = _out(options, "recover")
    file = out / f"api_{options.api:03d}_support.safetensors"
    if file.exists():
        raise InputError(f"{file} is there already; give another --out")
    api = apis[options.api]
    api.budget = _budget(options)
    recovered = recover_images(
        api,
        options.n_per_class,
        config=RecoveryConfig(**_plain_values(options.config.as_dict())),
        seed=options.seed,
        device=options.device,
        progress=True,
    )
    images = api.spec.to_unit(recovered.images)
    one = RecoveredSet(options.api, api.name, api.spec.names, "support", images, recovered)
    out.mkdir(parents=True, exist_ok=True)
    save_recovered(one, file)
    save_grid([one], file.with_suffix(".png"))
    state = "" if recovered.complete else " (the budget ended before the last step)"
    print(
        f"{len(images)} images from {api.name}, {100 * one.matched.float().mean():.0f} % as wanted, "
        f"{api.ledger.queries:,} queries{state}: {file} and .png"
    )


def probe(options: Any) -> None:
    """Ask an API a few questions: what it can give, the step it resolves, and what a run would cost."""
    from bidfmkd_fast.black_box import RemoteBlackBox
    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.training import TrainConfig
    from bidfmkd_fast.training.report import text_table

    if (options.pool is None) == (options.url is None) or (options.url is None) != (options.model is None):
        raise InputError("give either --pool with --api, or --url with --model")
    config = TrainConfig.from_dict(_plain_values(options.config.as_dict()))
    apis = [RemoteBlackBox(options.url, options.model)] if options.pool is None else load_pool(options.pool)
    if not 0 <= options.api < len(apis):
        raise InputError(f"--api must be in 0..{len(apis) - 1}; got {options.api}")
    made = _plan(apis[options.api : options.api + 1], config, _budget(options))
    print(f"{text_table(made.apis[0].report.rows())}\n\na run with its control, as --config says:")
    print(text_table([["queries", "time", "cost"], made.rows()[-1][-3:]]))
    if made.problems:
        sys.exit(1)


def _tell_plan(apis: Any, config: Any, budget: Any) -> None:
    from bidfmkd_fast.training.plan import too_short
    from bidfmkd_fast.training.report import text_table

    made = _plan(apis, config, budget)
    print(f"{text_table(made.rows())}\n\ntime: until the last answer; queries: run and control, without repetitions")
    for line in [*made.problems, *too_short(made, config)]:
        print(line)
    if made.problems:
        sys.exit(1)


def _plan(apis: Any, config: Any, budget: Any) -> Any:
    from bidfmkd_fast.training.plan import plan

    for api in apis:
        api.budget = budget
    return plan(apis, config, seed=config.seed)


def bench(options: Any) -> None:
    """Time kernels and whole steps against plain torch; run it from the root of the source tree."""
    import importlib

    if not Path("benchmarks/bench.py").is_file():
        raise InputError("the benchmarks are in the source tree, not in the package; run this from the tree's root")
    sys.path.append(str(Path.cwd()))
    suite = importlib.import_module("benchmarks.bench")
    against = None if options.compare is None else Path(options.compare)
    out = Path(options.out or "runs/bench")
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
    with contextlib.suppress(KeyboardInterrupt):
        serve_until_interrupted(service, options.port, announce=lambda line: print(line, flush=True))
    print(text_table(service.rows()))


def convert(options: Any) -> None:
    """Make an .npz data set of class folders, listed images, or the archive of CIFAR-100, Omniglot or CUB-200-2011."""
    from bidfmkd_fast.data.convert import convert_dataset

    made = convert_dataset(
        options.source,
        options.out,
        layout=options.layout,
        split=options.split,
        size=options.size,
        seed=options.seed,
        progress=True,
    )
    left_out = f"; {made.left_out} classes of no split left out" if made.left_out else ""
    print(f"{made.dataset}\nread as {made.layout}, split: {made.split}{left_out}")
    print(f"next: bidfmkd pool --dataset {made.path}")


COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "demo": (demo, "bidfmkd demo --seed 1"),
    "pool": (pool, "bidfmkd pool --dataset omniglot --invert true --n-apis 20"),
    "train": (train, "bidfmkd train --pool runs/pool --config.recovery.steps 40"),
    "evaluate": (evaluate, "bidfmkd evaluate --run runs/train --n-shot 1 5"),
    "recover": (recover, "bidfmkd recover --pool runs/pool --api 0 --config.num_directions 20"),
    "probe": (probe, "bidfmkd probe --url http://127.0.0.1:8000 --model api_000"),
    "bench": (bench, "bidfmkd bench --cases perturb/* --threads 1"),
    "serve": (serve, "bidfmkd serve runs/pool --port 8000 --config.failed 0.1"),
    "convert": (convert, "bidfmkd convert CUB_200_2011.tgz --out cub.npz"),
    "compare": (compare, "bidfmkd compare --config configs/omniglot_ss_small.yaml"),
    "sweep": (sweep, "bidfmkd sweep --file configs/sweeps/ablation.yaml --out runs/ablation"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on stderr when the input is bad."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    name = f"bidfmkd {command}".strip()
    try:
        from jsonargparse import ArgumentError
    except ImportError:
        print(f"{name}: the command line needs jsonargparse; `pip install jsonargparse`", file=sys.stderr)
        return 2
    try:
        options = build_parser(arguments, COMMANDS).parse_args(arguments)
        with _one_line_warnings(name):
            COMMANDS[options.subcommand][0](options[options.subcommand])
    except ArgumentError as error:
        print(f"{name}: {plain_error(str(error), command)}", file=sys.stderr)
        return 2
    except (InputError, BudgetExhausted, BadAnswer, APIUnavailable) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
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
    """`--out`, or `runs/<command>`, or the first of `runs/<command>-2`, `-3`, ... that is not there yet."""
    if options.out is not None:
        return Path(options.out)
    names = itertools.chain([command], (f"{command}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _budget(options: Any) -> Any:
    from bidfmkd_fast.black_box import Budget

    caps = (options.max_queries, options.max_requests, options.max_cost)
    return None if caps == (None, None, None) else Budget(*caps)
