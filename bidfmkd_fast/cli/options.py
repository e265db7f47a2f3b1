"""The options of the command `bidfmkd`, and its parser's errors in words of these options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Commands = Mapping[str, tuple[Callable[[Any], None], str]]  # what each does, and an example


def build_parser(arguments: Sequence[str], commands: Commands) -> ArgumentParser:
    """The parser of all `commands`; a `--preset` among `arguments` sets the defaults of the
    settings.
    """
    from jsonargparse import ArgumentParser

    from bidfmkd_fast import __version__
    from bidfmkd_fast.data import SPLITS
    from bidfmkd_fast.data.convert import LAYOUTS
    from bidfmkd_fast.experiments.config import ExperimentConfig
    from bidfmkd_fast.experiments.demo import DemoConfig, demo_config
    from bidfmkd_fast.experiments.methods import METHODS
    from bidfmkd_fast.pools.api_training import ARCHITECTURES
    from bidfmkd_fast.recovery import RecoveryConfig
    from bidfmkd_fast.serving import Behaviour
    from bidfmkd_fast.training import TrainConfig, paper

    parser = ArgumentParser(
        prog="bidfmkd",
        description="Learn one small meta-model from black-box image-classification APIs, without data.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    parsers: dict[str, Any] = {}
    for name, (function, example) in commands.items():
        one = parsers[name] = ArgumentParser(
            exit_on_error=False,
            allow_abbrev=False,
            description=function.__doc__,
            epilog=f"example: {example}",
        )
        if name == "bench":
            one.add_argument("--out", type=str, help="folder of the results; default: runs/bench")
        elif name == "convert":
            one.add_argument("--out", type=str, help="file to write; default: <data set>.npz here")
        elif name not in ("evaluate", "serve", "probe", "status"):
            one.add_argument(
                "--out",
                type=str,
                help=f"new folder; default: runs/{name}, or runs/{name}-2 and so on",
            )
        if name in ("compare", "sweep"):
            one.add_argument(
                "--seeds", type=int, nargs="+", default=[0], help="seeds; the results are averaged"
            )
            one.add_argument(
                "--device", type=str, default="cpu", help="device of generators and meta-models"
            )
        elif name == "status":
            one.add_argument(
                "run", type=str, help="folder of a run, or of several: a comparison or a sweep"
            )
        elif name in ("demo", "train"):
            one.add_argument(
                "--seed", type=int, help="seed of every random draw; default: that of the settings"
            )
        else:
            one.add_argument("--seed", type=int, default=0, help="seed of every random draw")

    one = parsers["demo"]
    one.add_class_arguments(DemoConfig, "config", help="settings of the demo")
    settings = demo_config()
    one.set_defaults({"config": vars(settings) | {"train": settings.train.to_dict()}})

    one = parsers["pool"]
    scenario_help = "ss: one data set and architecture; sh: mixed architectures; mh: both mixed"
    one.add_argument("--scenario", choices=tuple(ARCHITECTURES), default="ss", help=scenario_help)
    one.add_argument(
        "--dataset",
        type=str,
        nargs="+",
        default=["glyphs"],
        help="glyphs, a name in $BIDFMKD_DATA, or a path to an .npz; several for mh",
    )
    invert_help = (
        "use 255 minus the pixels (for black on white); one for all data sets, or one each"
    )
    one.add_argument("--invert", type=bool, nargs="+", default=[False], help=invert_help)
    one.add_argument("--n-apis", type=int, default=20, help="APIs to train")
    one.add_argument("--n-way", type=int, default=5, help="classes per API")
    one.add_argument("--width", type=int, default=32, help="filters of the Conv4")
    one.add_argument(
        "--resnet-width", type=int, default=64, help="channels of a ResNet's first stage"
    )
    one.add_argument("--epochs", type=int, default=30, help="passes over an API's images")

    one = parsers["compare"]
    one.add_class_arguments(
        ExperimentConfig, "config", help="settings of the experiment; see configs/"
    )
    methods_help = f"methods, out of {', '.join(METHODS)}; the control is always one"
    one.add_argument("--methods", type=str, nargs="+", default=list(METHODS), help=methods_help)
    parsers["sweep"].add_argument(
        "--file", type=str, required=True, help="YAML file: experiment, variants, grid"
    )

    one = parsers["train"]
    presets = {"default": TrainConfig(), "paper": paper(), "paper_compat": paper(compat=True)}
    one.add_argument(
        "--preset", choices=tuple(presets), default="default", help="settings to start from"
    )
    one.add_class_arguments(TrainConfig, "config", help="settings of the run")
    for name, settings_of_preset in presets.items():
        if f"--preset={name}" in arguments or ("--preset", name) in itertools.pairwise(arguments):
            one.set_defaults({"config": settings_of_preset.to_dict()})

    one = parsers["recover"]
    one.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    one.add_argument("--n-per-class", type=int, default=10, help="images per class")
    one.add_class_arguments(RecoveryConfig, "config", help="settings of the recovery")

    parsers["train"].add_argument(
        "--dry-run", action="store_true", help="only probe the APIs and tell the cost"
    )

    one = parsers["probe"]
    one.add_argument("--pool", type=str, help="folder of a pool")
    one.add_argument("--api", type=int, default=0, help="number of the API in the pool")
    one.add_argument(
        "--url",
        type=str,
        help="address of a server of the Open Inference Protocol v2, instead of a pool",
    )
    one.add_argument("--model", type=str, help="name of the model on that server")
    one.add_class_arguments(TrainConfig, "config", help="settings of the run that is planned")

    for name in ("train", "recover", "probe"):
        parsers[name].add_argument(
            "--max-queries", type=int, help="cap on the queries, of all APIs together"
        )
        parsers[name].add_argument(
            "--max-requests", type=int, help="cap on the requests, of all APIs together"
        )
        parsers[name].add_argument(
            "--max-cost", type=float, help="cap on the cost, by price_per_1000 of the APIs"
        )
        if name == "probe":
            continue
        parsers[name].add_argument("--pool", type=str, required=True, help="folder of a pool")
        parsers[name].add_argument(
            "--device", type=str, default="cpu", help="device of generator and meta-model"
        )

    one = parsers["serve"]
    one.add_argument("pool", type=str, help="folder of a trained pool")
    one.add_argument(
        "--port", type=int, default=8000, help="port of 127.0.0.1; no other address is served"
    )
    one.add_argument(
        "--per-model", type=str, help="YAML file of what differs: `api_003: {nan: 1.0}`"
    )
    one.add_class_arguments(
        Behaviour, "config", help="what every model answers, and what goes wrong with it"
    )

    one = parsers["evaluate"]
    one.add_argument("--run", type=str, required=True, help="folder of a finished run")
    one.add_argument(
        "--dataset",
        type=str,
        nargs="+",
        help="as for pool; default: what the run's pool learned from",
    )
    one.add_argument("--invert", type=bool, nargs="+", help="as for pool, with --dataset")
    one.add_argument(
        "--adapt-lr", type=float, help="learning rate of the adaptation; default: the run's"
    )
    one.add_argument("--n-way", type=int, default=5, help="classes per episode")
    one.add_argument(
        "--n-shot",
        type=int,
        nargs="+",
        default=[1, 5],
        help="support images per class; one column each",
    )
    one.add_argument("--n-query", type=int, default=15, help="query images per class")
    one.add_argument("--n-episodes", type=int, default=600, help="episodes")
    one.add_argument("--split", choices=SPLITS, default="meta_test", help="classes to draw from")

    one = parsers["bench"]
    one.add_argument(
        "--cases", type=str, nargs="+", default=["*"], help="name patterns; default: all"
    )
    one.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    one.add_argument("--runs", type=int, default=9, help="timed runs of each contender")
    one.add_argument(
        "--compare", type=str, help="a results file; exit code 1 if anything became slower"
    )

    one = parsers["convert"]
    one.add_argument("source", type=str, help="folder, zip or tar archive of images")
    one.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="what the source is; auto tells by names"
    )
    one.add_argument(
        "--split",
        type=str,
        help="folder of split lists, one CSV or JSON, or 'random'; default: the source's or published",
    )
    one.add_argument(
        "--size", type=int, help="height and width; default: the papers', or the images' own"
    )
    upright_help = "turn pictures as the orientation mark of their camera (EXIF) says"
    one.add_argument("--upright", type=bool, default=True, help=upright_help)

    for name, one in parsers.items():
        subcommands.add_subcommand(name, one, help=commands[name][0].__doc__)
    return parser


def check_seeds(options: Any) -> None:
    """Raises InputError for a seed below 0, which every command refuses alike."""
    for name in ("seed", "seeds"):
        seeds = options.get(name)
        for seed in seeds if isinstance(seeds, list) else [seeds]:
            if seed is not None and seed < 0:
                raise InputError(f"--{name} must be at least 0; got {seed}")


def plain_error(message: str, command: str) -> str:
    """jsonargparse's message in one line, with options as they are typed."""
    message = re.sub(
        rf"\b{command}\.(\w+)",
        lambda match: "--" + match[1].replace("_", "-"),
        " ".join(message.split()),
    )
    wrong = re.fullmatch(
        r"Parser key \"(\w+)\": .*?Expected a <class '(\w+)'>\. Got value: ?(.*)", message
    )
    return (
        f"--{wrong[1].replace('_', '-')} must be of type {wrong[2]}; got {wrong[3]!r}"
        if wrong
        else message
    )
