"""Find shipped configurations by name: from any folder, also inside an installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bidfmkd_fast
from bidfmkd_fast.cli.settings import take_settings
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.shipped import config_file, shipped_folder
from bidfmkd_fast.experiments.sweep_file import read_sweep
from bidfmkd_fast.settings import settings_from_values, settings_from_yaml
from bidfmkd_fast.training import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(file: Path, shipped: str) -> bool:
    """Return True if `file` has the content of a file of `configs/`; an installation has copies."""
    return file.read_bytes() == (CONFIGS / shipped).read_bytes()


def test_names_and_files() -> None:
    assert same(config_file("mh_small", "compare"), "mh_small.yaml")
    assert same(config_file("ablation", "sweep", "sweeps"), "sweeps/ablation.yaml")
    Path("mh_small").write_text("pool: {n_apis: 2}")  # a file of the user's comes first
    assert config_file("mh_small", "compare") == Path("mh_small")
    Path("mh").mkdir()  # a folder is no file of settings
    assert same(config_file("mh", "compare"), "mh.yaml")
    assert config_file(".", "compare") == Path(".")  # the reader says that it is a folder


def test_the_commands_take_names() -> None:
    _, values = take_settings(["--config", "omniglot_ss_small"], ExperimentConfig)
    wanted = settings_from_yaml(ExperimentConfig, CONFIGS / "omniglot_ss_small.yaml")
    assert settings_from_values(ExperimentConfig, values) == wanted
    assert read_sweep("ablation") == read_sweep(CONFIGS / "sweeps" / "ablation.yaml")


@pytest.mark.parametrize("name", ["omniglot", "omniglot_ss_small.yaml", "../mh", "", "ablation"])
def test_what_is_neither_lists_the_names(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file, and no .* cub_ss, mh,"):
        config_file(name or "nowhere", "compare")
    with pytest.raises(InputError, match=r"^sweep: cannot read .*; there are ablation, generator_"):
        config_file(f"{name}s", "sweep", "sweeps")


def test_settings_of_a_run_have_no_names() -> None:
    with pytest.raises(InputError, match="cannot read omniglot_ss_small: No such file"):
        take_settings(["--config", "omniglot_ss_small"], TrainConfig)


def test_an_installed_package_has_them_inside(tmp_path: Path) -> None:
    """Lay the package out as the wheel does, and read a sweep and its experiment from there."""
    package = tmp_path / "site ü" / "bidfmkd_fast"
    source = Path(bidfmkd_fast.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(shipped_folder(), package / "configs", dirs_exist_ok=True)
    code = (
        "from bidfmkd_fast.experiments.shipped import shipped_folder\n"
        "from bidfmkd_fast.experiments.sweep_file import read_sweep\n"
        "print(shipped_folder(), len(read_sweep('ablation').cells))"
    )
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ended.stdout == f"{package / 'configs'} 8\n", ended.stderr
