"""The command `bidfmkd`: each function here reads options and calls the library."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SOURCE = "source.yaml"  # in a run folder: the pool it learned from, and what that pool's images were


def demo(options: Any) -> None:
    """The whole thing on the embedded characters: a pool, a run, its control and the table of accuracies."""
    from bidfmkd_fast.scenarios.demo import DemoConfig, run_demo, with_seed
    from bidfmkd_fast.training import TrainConfig

    values = _plain_values(options.config.as_dict())
    config = DemoConfig(**{**values, "train": TrainConfig.from_dict(values["train"])})
    print(run_demo(_out(options, "demo"), config if options.seed is None else with_seed(config, options.seed)))


def pool(options: Any) -> None:
    """Train a pool of APIs of one architecture on random class subsets of a data set (API-SS)."""
    from bidfmkd_fast.data import load_dataset
    from bidfmkd_fast.scenarios import train_pool

    trained = train_pool(
        load_dataset(options.dataset, invert=options.invert),
        _out(options, "pool"),
        n_apis=options.n_apis,
        n_way=options.n_way,
        width=options.width,
        epochs=options.epochs,
        seed=options.seed,
    )
    accuracies = trained.accuracies
    print(
        f"{len(accuracies)} APIs in {trained.folder}; held-out accuracy: mean {100 * trained.accuracy:.1f} %, "
        f"from {100 * min(accuracies):.1f} % to {100 * max(accuracies):.1f} %"
    )


def train(options: Any) -> None:
    """Meta-learn from a pool of APIs, with the no-recovery control beside it; the same --out goes on after a kill."""
    import yaml

    from bidfmkd_fast.scenarios import load_pool
    from bidfmkd_fast.scenarios.pool import read_pool
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
    out, first = _out(options, "train"), read_pool(options.pool).entries[0]
    run, _ = fit_with_control(apis, out, config, device=options.device, budget=budget)
    folder = RunFolder.open(out)
    source = {"pool": str(Path(options.pool).resolve()), "data_set": first.data_set, "inverted": first.inverted}
    (folder.path / SOURCE).write_text(yaml.safe_dump(source, sort_keys=False), encoding="utf-8")
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
    from bidfmkd_fast.training.checkpoint import META_MODEL, RunFolder
    from bidfmkd_fast.training.report import CONTROL, LEARNED, RANDOM, compare, write_report

    folder = RunFolder.open(options.run)
    source_file = folder.path / SOURCE
    source = yaml.safe_load(source_file.read_text(encoding="utf-8")) if source_file.is_file() else {}
    name = options.dataset or source.get("data_set")
    if not name:
        raise InputError(f"{folder.path} does not tell its data set; give --dataset")
    invert = source.get("inverted", False) if options.invert is None else options.invert
    models = {RANDOM: folder.initial_model()}
    control = RunFolder(folder.path / "control") if (folder.path / "control" / META_MODEL).is_file() else None
    if control is not None:
        models[CONTROL] = control.meta_model()
    models[LEARNED] = folder.meta_model()
    comparison = compare(
        models,
        load_dataset(name, invert=invert),
        n_shots=options.n_shot,
        n_way=options.n_way,
        n_query=options.n_query,
        n_episodes=options.n_episodes,
        split=options.split,
        seed=options.seed,
        progress=True,
    )
    print(f"{comparison}\n\nreport: {write_report(folder, comparison, control=control)}")


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
        options = _parser(arguments).parse_args(arguments)
        with _one_line_warnings(name):
            COMMANDS[options.subcommand][0](options[options.subcommand])
    except ArgumentError as error:
        print(f"{name}: {_plain(str(error), command, _settings(command))}", file=sys.stderr)
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


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from bidfmkd_fast import __version__
    from bidfmkd_fast.data import SPLITS
    from bidfmkd_fast.data.convert import LAYOUTS
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.scenarios.demo import DemoConfig, demo_config
    from bidfmkd_fast.serving import Behaviour
    from bidfmkd_fast.training import TrainConfig, paper

    parser = ArgumentParser(
        prog="bidfmkd",
        description="Learn one small meta-model from black-box image-classification APIs, without data.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    parsers: dict[str, Any] = {}
    for name, (function, example) in COMMANDS.items():
        one = parsers[name] = ArgumentParser(
            exit_on_error=False, allow_abbrev=False, description=function.__doc__, epilog=f"example: {example}"
        )
        if name == "bench":
            one.add_argument("--out", type=str, help="folder of the results; default: runs/bench")
        elif name == "convert":
            one.add_argument("--out", type=str, help="file to write; default: <data set>.npz here")
        elif name not in ("evaluate", "serve", "probe"):
            one.add_argument("--out", type=str, help=f"new folder; default: runs/{name}, or runs/{name}-2 and so on")
        if name in ("demo", "train"):
            one.add_argument("--seed", type=int, help="of every random draw; default: the one in the configuration")
        else:
            one.add_argument("--seed", type=int, default=0, help="of every random draw")

    one = parsers["demo"]
    one.add_class_arguments(DemoConfig, "config", help="settings of the demo")
    settings = demo_config()
    one.set_defaults({"config": vars(settings) | {"train": settings.train.to_dict()}})

    one = parsers["pool"]
    one.add_argument(
        "--dataset", type=str, default="glyphs", help="glyphs, a name in $BIDFMKD_DATA, or a path to an .npz"
    )
    one.add_argument("--invert", type=bool, default=False, help="use 255 minus the pixels (for black on white)")
    one.add_argument("--n-apis", type=int, default=20, help="APIs to train")
    one.add_argument("--n-way", type=int, default=5, help="classes per API")
    one.add_argument("--width", type=int, default=32, help="filters of the Conv4")
    one.add_argument("--epochs", type=int, default=30, help="passes over an API's images")

    one = parsers["train"]
    one.add_argument(
        "--preset", type=str, choices=("default", "paper"), default="default", help="settings to start from"
    )
    one.add_class_arguments(TrainConfig, "config", help="settings of the run")
    if "--preset=paper" in arguments or ("--preset", "paper") in itertools.pairwise(arguments):
        one.set_defaults({"config": paper().to_dict()})

    one = parsers["recover"]
    one.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    one.add_argument("--n-per-class", type=int, default=10, help="images per class")
    one.add_class_arguments(RecoveryConfig, "config", help="settings of the recovery")

    parsers["train"].add_argument("--dry-run", action="store_true", help="probe the APIs and tell what it would cost")

    one = parsers["probe"]
    one.add_argument("--pool", type=str, help="folder of a pool")
    one.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    one.add_argument("--url", type=str, help="of a server of the Open Inference Protocol v2, instead of a pool")
    one.add_argument("--model", type=str, help="name of the model on that server")
    one.add_class_arguments(TrainConfig, "config", help="settings of the run that is planned")

    for name in ("train", "recover", "probe"):
        parsers[name].add_argument("--max-queries", type=int, help="budget for all APIs together; default: none")
        parsers[name].add_argument("--max-requests", type=int, help="the same in requests")
        parsers[name].add_argument("--max-cost", type=float, help="the same in money, by the APIs' price_per_1000")
        if name == "probe":
            continue
        parsers[name].add_argument("--pool", type=str, required=True, help="folder of a pool")
        parsers[name].add_argument("--device", type=str, default="cpu", help="of generator and meta-model")

    one = parsers["serve"]
    one.add_argument("pool", type=str, help="folder of a trained pool")
    one.add_argument("--port", type=int, default=8000, help="of 127.0.0.1; no other address is served")
    one.add_argument("--per-model", type=str, help="YAML file of what differs: `api_003: {nan: 1.0}`")
    one.add_class_arguments(Behaviour, "config", help="what every model tells, and what goes wrong with it")

    one = parsers["evaluate"]
    one.add_argument("--run", type=str, required=True, help="folder of a finished run")
    one.add_argument("--dataset", type=str, help="as for pool; default: what the run's pool was trained on")
    one.add_argument("--invert", type=bool, help="as for pool; default: as the run's pool")
    one.add_argument("--n-way", type=int, default=5, help="classes per episode")
    one.add_argument("--n-shot", type=int, nargs="+", default=[1, 5], help="support images per class; one column each")
    one.add_argument("--n-query", type=int, default=15, help="query images per class")
    one.add_argument("--n-episodes", type=int, default=600, help="episodes")
    one.add_argument("--split", type=str, choices=SPLITS, default="meta_test", help="classes to draw from")

    one = parsers["bench"]
    one.add_argument("--cases", type=str, nargs="+", default=["*"], help="name patterns; default: all")
    one.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    one.add_argument("--runs", type=int, default=9, help="timed runs of each contender")
    one.add_argument("--compare", type=str, help="a results file; exit code 1 if anything became slower")

    one = parsers["convert"]
    one.add_argument("source", type=str, help="folder, zip or tar archive of images")
    one.add_argument(
        "--layout", type=str, choices=LAYOUTS, default="auto", help="what the source is; auto tells by names"
    )
    one.add_argument(
        "--split",
        type=str,
        help="folder of split lists, one CSV or JSON, or 'random'; default: the source's or published",
    )
    one.add_argument("--size", type=int, help="height and width; default: the papers', or the images' own")

    for name, one in parsers.items():
        commands.add_subcommand(name, one, help=COMMANDS[name][0].__doc__)
    return parser


def _plain_values(values: Any) -> Any:
    """The settings under `--config` as nested dicts, without jsonargparse's notes such as the file they came from."""
    if not isinstance(values, dict):
        return values
    return {key: _plain_values(value) for key, value in values.items() if not key.startswith("__")}


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


def _plain(message: str, command: str, settings: Sequence[str]) -> str:
    """jsonargparse's message in one line, options as they are typed, with the closest known key for an unknown one."""
    message = re.sub(rf"\b{command}\.(\w+)", lambda match: "--" + match[1].replace("_", "-"), " ".join(message.split()))
    if unread := re.search(r"Unable to load config '([^']*)'", message):
        return f"cannot read the settings {unread[1]!r}; wanted a YAML file of settings"
    unknown = re.search(r"(?:unrecognized arguments|does not accept).*?config\.([\w.]+)", message)
    if unknown is None:
        return message
    close = difflib.get_close_matches(unknown[1], settings, n=1, cutoff=0.0)
    return f"unknown key 'config.{unknown[1]}'" + (f"; did you mean 'config.{close[0]}'?" if close else "")


def _settings(command: str) -> list[str]:
    """The dotted keys under `--config` of a command."""
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.scenarios.demo import DemoConfig
    from bidfmkd_fast.serving import Behaviour
    from bidfmkd_fast.training import TrainConfig

    kinds = {
        "demo": DemoConfig,
        "train": TrainConfig,
        "recover": RecoveryConfig,
        "probe": TrainConfig,
        "serve": Behaviour,
    }
    return _keys(asdict(kinds[command]())) if command in kinds else []


def _keys(values: dict[str, Any], where: str = "") -> list[str]:
    nested = [_keys(value, f"{where}{key}.") for key, value in values.items() if isinstance(value, dict)]
    return [where + key for key in values] + [key for keys in nested for key in keys]
