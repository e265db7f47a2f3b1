"""The command `bidfmkd`: each function here reads options and calls the library."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

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

    trained = train_pool(
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
    accuracies = [entry.accuracy for entry in trained.entries]
    print(
        f"{len(accuracies)} APIs in {trained.folder}; held-out accuracy: mean {100 * trained.accuracy:.1f} %, "
        f"from {100 * min(accuracies):.1f} % to {100 * max(accuracies):.1f} %"
    )
    kinds: dict[tuple[str, str], list[float]] = {}
    for entry in trained.entries:
        kinds.setdefault((entry.data_set, entry.architecture), []).append(entry.accuracy)
    if len(kinds) > 1:
        rows = [["data set", "architecture", "APIs", "held-out accuracy, %"]]
        for (data_set, architecture), its in sorted(kinds.items()):
            rows.append([data_set, architecture, str(len(its)), f"{100 * sum(its) / len(its):.1f}"])
        print(f"\n{text_table(rows)}")


def train(options: Any) -> None:
    """Meta-learn from a pool of APIs, and train the no-recovery control beside it."""
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
    out = _out(options, "train")
    known = dict.fromkeys((entry.data_set, entry.inverted) for entry in read_pool(options.pool).entries)
    run, _ = fit_with_control(load_pool(options.pool), out, config, device=options.device, budget=_budget(options))
    folder = RunFolder.open(out)
    data_sets = [{"name": name, "inverted": inverted} for name, inverted in known if name]
    source = {"pool": str(Path(options.pool).resolve()), "data_sets": data_sets}
    (folder.path / SOURCE).write_text(yaml.safe_dump(source, sort_keys=False), encoding="utf-8")
    write_grids(run, folder)
    report = write_report(folder, control=RunFolder(out / "control"))
    if not run.complete:
        print("a budget ended before every API was recovered in full; what there is was used\n")
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
    "bench": (bench, "bidfmkd bench --cases perturb/* --threads 1"),
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
        options = _parser(arguments).parse_args(arguments)
        COMMANDS[options.subcommand][0](options[options.subcommand])
    except ArgumentError as error:
        print(f"{name}: {_plain(str(error), command, _settings(command))}", file=sys.stderr)
        return 2
    except (InputError, BudgetExhausted, BadAnswer) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from bidfmkd_fast import __version__
    from bidfmkd_fast.data import SPLITS
    from bidfmkd_fast.data.convert import LAYOUTS
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.scenarios.api_training import ARCHITECTURES
    from bidfmkd_fast.scenarios.baselines import METHODS
    from bidfmkd_fast.scenarios.demo import DemoConfig, demo_config
    from bidfmkd_fast.scenarios.experiment import ExperimentConfig
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
        elif name != "evaluate":
            one.add_argument("--out", type=str, help=f"new folder; default: runs/{name}, or runs/{name}-2 and so on")
        if name in ("compare", "sweep"):
            one.add_argument("--seeds", type=int, nargs="+", default=[0], help="of every random draw; all are averaged")
            one.add_argument("--device", type=str, default="cpu", help="of generators and meta-models")
        elif name in ("demo", "train"):
            one.add_argument("--seed", type=int, help="of every random draw; default: the one in the configuration")
        else:
            one.add_argument("--seed", type=int, default=0, help="of every random draw")

    one = parsers["demo"]
    one.add_class_arguments(DemoConfig, "config", help="settings of the demo")
    settings = demo_config()
    one.set_defaults({"config": vars(settings) | {"train": settings.train.to_dict()}})

    one = parsers["pool"]
    one.add_argument("--scenario", type=str, choices=tuple(ARCHITECTURES), default="ss", help="what is mixed")
    one.add_argument(
        "--dataset",
        type=str,
        nargs="+",
        default=["glyphs"],
        help="glyphs, a name in $BIDFMKD_DATA, or a path to an .npz; several for mh",
    )
    invert_help = "use 255 minus the pixels (for black on white); one for all data sets, or one each"
    one.add_argument("--invert", type=bool, nargs="+", default=[False], help=invert_help)
    one.add_argument("--n-apis", type=int, default=20, help="APIs to train")
    one.add_argument("--n-way", type=int, default=5, help="classes per API")
    one.add_argument("--width", type=int, default=32, help="filters of the Conv4")
    one.add_argument("--resnet-width", type=int, default=64, help="channels of a ResNet's first stage")
    one.add_argument("--epochs", type=int, default=30, help="passes over an API's images")

    one = parsers["compare"]
    one.add_class_arguments(ExperimentConfig, "config", help="settings of the experiment; see configs/")
    methods_help = f"of {', '.join(METHODS)}; the control is always one"
    one.add_argument("--methods", type=str, nargs="+", default=list(METHODS), help=methods_help)
    parsers["sweep"].add_argument("--file", type=str, required=True, help="YAML file: experiment, variants, grid")

    one = parsers["train"]
    presets = {"default": TrainConfig(), "paper": paper(), "paper_compat": paper(compat=True)}
    one.add_argument("--preset", type=str, choices=tuple(presets), default="default", help="settings to start from")
    one.add_class_arguments(TrainConfig, "config", help="settings of the run")
    for name, settings_of_preset in presets.items():
        if f"--preset={name}" in arguments or ("--preset", name) in itertools.pairwise(arguments):
            one.set_defaults({"config": settings_of_preset.to_dict()})

    one = parsers["recover"]
    one.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    one.add_argument("--n-per-class", type=int, default=10, help="images per class")
    one.add_class_arguments(RecoveryConfig, "config", help="settings of the recovery")

    for name in ("train", "recover"):
        parsers[name].add_argument("--pool", type=str, required=True, help="folder of a trained pool")
        parsers[name].add_argument("--max-queries", type=int, help="budget for all APIs together; default: none")
        parsers[name].add_argument("--device", type=str, default="cpu", help="of generator and meta-model")

    one = parsers["evaluate"]
    one.add_argument("--run", type=str, required=True, help="folder of a finished run")
    one.add_argument("--dataset", type=str, nargs="+", help="as for pool; default: what the run's pool learned from")
    one.add_argument("--invert", type=bool, nargs="+", help="as for pool, with --dataset")
    one.add_argument("--adapt-lr", type=float, help="learning rate of the adaptation; default: the run's")
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

    return None if options.max_queries is None else Budget(max_queries=options.max_queries)


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
    from bidfmkd_fast.scenarios.experiment import ExperimentConfig
    from bidfmkd_fast.training import TrainConfig

    kinds = {"demo": DemoConfig, "train": TrainConfig, "recover": RecoveryConfig, "compare": ExperimentConfig}
    return _keys(asdict(kinds[command]())) if command in kinds else []


def _keys(values: dict[str, Any], where: str = "") -> list[str]:
    nested = [_keys(value, f"{where}{key}.") for key, value in values.items() if isinstance(value, dict)]
    return [where + key for key in values] + [key for keys in nested for key in keys]
