"""Define the command `init-config`, which writes a file of settings to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.cli.annotated import annotated_yaml
from bidfmkd_fast.cli.options import Command, new_file
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.shipped import shipped_folder
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.settings import settings_from_yaml
from bidfmkd_fast.training import TrainConfig, paper

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PRESETS = ("default", "paper", "v01", "small")
# The experiments behind the presets; the others of `configs/` are on other data.
_EXPERIMENTS = {
    "paper": "omniglot_ss",
    "v01": "omniglot_ss_small_v01",
    "small": "omniglot_ss_small",
}
_USES = {"train": "bidfmkd train --pool POOL --config", "experiment": "bidfmkd compare --config"}


def init_config(options: Any) -> None:
    """Write a YAML file with every setting and what it means, to be changed and given to --config
    of train or compare.
    """
    out = new_file("init-config", options.out)
    title = f"{options.kind}, preset {options.preset}: {_USES[options.kind]} {out.name}"
    write_exact(out, annotated_yaml(preset(options.kind, options.preset), title))
    print(f"settings: {out}")


def preset(kind: str, name: str) -> TrainConfig | ExperimentConfig:
    """Return the settings of a preset: of a run, or of an experiment."""
    if kind == "train":
        if name == "small":
            return _experiment(name).train
        return {"default": TrainConfig(), "paper": paper(), "v01": TrainConfig.v01()}[name]
    return _experiment(name)


def _experiment(name: str) -> ExperimentConfig:
    if name == "default":
        return ExperimentConfig()
    return settings_from_yaml(ExperimentConfig, shipped_folder() / f"{_EXPERIMENTS[name]}.yaml")


def _add_init_config_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="settings to write: the defaults, those of the paper or of version 0.1, or those of "
        "configs/omniglot_ss_small.yaml; an experiment other than the default is on Omniglot",
    )
    parser.add_argument(
        "--kind",
        choices=tuple(_USES),
        default="train",
        help="train: the settings of a run; experiment: those of compare, with pool and meta-test",
    )
    parser.add_argument("--out", type=str, required=True, help="new file")


INIT_CONFIG = Command(
    init_config, _add_init_config_options, "bidfmkd init-config --preset paper --out my.yaml"
)
