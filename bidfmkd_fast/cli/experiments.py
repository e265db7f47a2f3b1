"""Define the commands that run a whole experiment: `demo`, `compare` and `sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli.next_command import write_source
from bidfmkd_fast.cli.options import Command, add_out, add_seed, add_stop_after, out_folder
from bidfmkd_fast.experiments.compare import REPORT, run_comparison
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.demo import DemoConfig, demo_config, run_demo, with_seed
from bidfmkd_fast.experiments.methods import METHODS, REFERENCES
from bidfmkd_fast.experiments.sweep import run_sweep
from bidfmkd_fast.settings import settings_from_values
from bidfmkd_fast.training import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def demo(options: Any) -> None:
    """Run the whole method on the embedded characters: a pool, a run, and the table of
    accuracies beside controls that ask no API.
    """
    train = TrainConfig.from_dict(options.config["train"])
    config = DemoConfig(**{**options.config, "train": train})
    if options.seed is not None:
        config = with_seed(config, options.seed)
    out = out_folder(options, "demo")
    text = run_demo(out, config)
    images = {"name": "glyphs", "inverted": False}
    write_source(out, {"pool": str((out / "pool").resolve()), "data_sets": [images]})
    print(text)


def _add_demo_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_out(parser, "demo")
    add_seed(parser, from_settings=True)
    parser.add_class_arguments(DemoConfig, "config", help="settings of the demo")
    settings = demo_config()
    parser.set_defaults({"config": vars(settings) | {"train": settings.train.to_dict()}})


def compare(options: Any) -> None:
    """Train the chosen methods on one pool, and evaluate them on the same episodes: BiDf-MKD,
    baselines, ceilings.
    """
    config = settings_from_values(ExperimentConfig, options.config)
    out = out_folder(options, "compare")
    table = run_comparison(
        config, out, methods=options.methods, seeds=options.seeds, device=options.device
    )
    print(f"{table}\n\nreport: {out / REPORT}")


def _add_compare_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_out(parser, "compare")
    _add_seeds_and_device(parser)
    parser.add_class_arguments(
        ExperimentConfig,
        "config",
        help="settings of the experiment; a file, or a name of configs/",
    )
    parser.add_argument(
        "--methods",
        type=str,
        nargs="+",
        help=f"methods, out of {', '.join(METHODS)}; default: all but control, and but those that "
        "need recovered sets if train.recovery.steps is 0; differences are to the first of "
        f"{', '.join(REFERENCES)} among them",
    )


def sweep(options: Any) -> None:
    """Run BiDf-MKD over a grid of settings; a second call with the same --out continues a sweep
    that was cut off.
    """
    out = out_folder(options, "sweep")
    print(run_sweep(options.file, out, seeds=options.seeds, device=options.device))


def _add_sweep_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_out(parser, "sweep")
    _add_seeds_and_device(parser)
    parser.add_argument(
        "--file",
        type=str,
        required=True,
        help="YAML file (experiment, variants, grid), or a name of configs/sweeps/",
    )


def _add_seeds_and_device(parser: ArgumentParser) -> None:
    add_stop_after(parser)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds; the results are averaged"
    )
    parser.add_argument(
        "--device", type=str, default="cpu", help="device of generators and meta-models"
    )


DEMO = Command(demo, _add_demo_options, "bidfmkd demo --seed 1", DemoConfig)
COMPARE = Command(
    compare,
    _add_compare_options,
    "bidfmkd compare --config omniglot_ss_small",
    ExperimentConfig,
    shared=True,
)
SWEEP = Command(
    sweep,
    _add_sweep_options,
    "bidfmkd sweep --file ablation --out runs/ablation",
    shared=True,
)
