"""Run every command end to end at the smallest size; bad input is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bidfmkd_fast.black_box import BlackBox, TorchBlackBox
from bidfmkd_fast.black_box.probe import PROBE_QUERIES, sample_images
from bidfmkd_fast.cli.main import COMMANDS, _one_line_warnings, main
from bidfmkd_fast.cli.settings import take_settings
from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.errors import ServiceWarning
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.pools import load_pool
from bidfmkd_fast.recovery import RecoveryConfig, recover
from bidfmkd_fast.settings import to_yaml
from bidfmkd_fast.training import TrainConfig, pseudo_tasks
from bidfmkd_fast.training.pseudo_tasks import learn_from_pictures
from bidfmkd_fast.training.run_folder import RunFolder

RECOVERY = ["steps=1", "num_directions=1", "generator_width=4", "latent_dim=8"]
RUN = [
    "--config.survey.n_images=0",
    "--config.n_per_class=3",
    "--config.meta_model_width=4",
    "--config.distillation.inner_steps=1",
    "--config.replay.final_steps=1",
    "--config.replay.n_query=2",
    *(f"--config.recovery.{setting}" for setting in RECOVERY),
]
# 2 APIs, 2 sets, 1 step of (1 + 1 direction) on 3 classes of 3 images; the control asks for each
# image once.
QUERIES, CONTROL = 2 * 2 * 2 * 9, 2 * 2 * 9


def run(line: str, *more: str) -> int:
    """Run the command line `line`, whose arguments have no blanks, with `more` arguments."""
    return main([*line.split(), *more])


def spending_in(output: str) -> dict[str, int]:
    """Return the queries in the spending table of an output, by the part of the run."""
    found = re.findall(r"^((?:control|run|planned)(?:, planned)?) {2,}(\d+) ", output, re.MULTILINE)
    return {name: int(queries) for name, queries in found}


def dotted(prefix: str, options: list[str]) -> list[str]:
    return [option.replace("--config.", prefix) for option in options]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pools") / "pool"
    assert run("pool --n-apis 2 --n-way 3 --width 2 --epochs 1 --out", str(folder)) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_evaluate_and_the_run_folder(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--pool", str(pool), "--seed", "5", *RUN]) == 0
    output = capsys.readouterr().out
    assert "next: bidfmkd evaluate --run runs/train --n-way 3\n" in output
    assert "report: runs/train/report.md" in output
    folder = Path("runs/train")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seed"] == 5
    assert config["recovery"]["num_directions"] == 1
    assert config["n_per_class"] == 3
    assert json.loads((folder / "summary.json").read_text())["queries"] == QUERIES
    assert not (folder / "control").exists() and not (folder / "zero_query").exists()
    assert spending_in(output) == {"run": QUERIES, "planned": QUERIES}
    assert {file.name for file in (folder / "grids").iterdir()} == {"api_000.png", "api_001.png"}
    source = yaml.safe_load((folder / "source.yaml").read_text())
    assert source["data_sets"] == [{"name": "glyphs", "inverted": False}]

    arguments = "evaluate --run runs/train --n-way 3 --n-episodes 2 --n-shot 1 2 --n-query 3"
    assert run(arguments) == 0
    output = capsys.readouterr().out
    for wanted in (
        "3-way accuracy on 2 episodes",
        "glyphs meta_test",
        "1-shot",
        "2-shot",
        "BiDf-MKD less random initialisation",
    ):
        assert wanted in output
    report = (folder / "report.md").read_text()
    assert "BiDf-MKD less random initialisation" in report
    assert "control" not in output + report and "zero_query" not in output + report

    assert main(["train", "--pool", str(pool), *RUN]) == 0  # the next free name
    assert Path("runs/train-2/meta_model.safetensors").is_file()


def test_train_with_controls(
    pool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make both controls; a repeated command only makes up for a zero_query that was cut off."""
    arguments = ["train", "--controls", "--pool", str(pool), "--out", "out", *RUN]

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pseudo_tasks, "outer_replay_step", cut_off)
        main(arguments)
    assert Path("out/meta_model.safetensors").is_file() and not Path("out/zero_query").exists()
    with monkeypatch.context() as patched:
        patched.setattr(TorchBlackBox, "score", cut_off)  # nothing is asked again
        assert main([*arguments, "--config.adapt_steps", "3"]) == 2
        assert "holds a run of other settings" in capsys.readouterr().err
        assert main(arguments) == 0
    assert spending_in(capsys.readouterr().out) == {
        "control": CONTROL,
        "run": QUERIES,
        "planned": CONTROL + QUERIES,
    }
    wanted = learn_from_pictures(
        [api.spec for api in load_pool(pool)],
        TrainConfig.from_yaml("out/config.yaml"),
        n_steps=1,
    ).state_dict()
    learned = RunFolder(Path("out/zero_query")).meta_model().module.state_dict()
    assert all(torch.equal(learned[name], value) for name, value in wanted.items())
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err

    def models() -> list[str]:
        assert run("evaluate --run out --n-way 3 --n-episodes 2 --n-shot 1 --n-query 3") == 0
        table = capsys.readouterr().out.split("\n\n")[1]
        return [line.split("  ")[0] for line in table.splitlines()[2:]]

    names = ["random initialisation", "zero_query: pictures alone", "no-recovery control"]
    assert models() == [*names, "BiDf-MKD"]
    assert "[zero_query](zero_query), [control](control)" in Path("out/report.md").read_text()
    shutil.rmtree("out/control")
    assert models() == [*names[:2], "BiDf-MKD"]
    assert "[zero_query](zero_query)\n" in Path("out/report.md").read_text()


def test_controls_of_images_that_no_picture_has_are_refused_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = {"n_classes": 3, "image_shape": [2, 16, 16]}
    two = {"kind": "remote", "url": "http://127.0.0.1:9", "model": "two", "spec": spec}
    Path("two.yaml").write_text(yaml.safe_dump({"format": 1, "apis": [two]}))
    assert main(["train", "--controls", "--pool", "two.yaml", *RUN]) == 2
    error = capsys.readouterr().err
    assert "zero_query: two takes images [2, 16, 16]" in error and "leave --controls out" in error


def test_a_run_goes_on_without_its_control_and_with_one(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--pool", str(pool), "--out", "out", *RUN]
    assert main([*arguments, "--controls"]) == 0

    def cut_off(run: str) -> None:
        """Leave the folder as a command does that is ended in the second API."""
        for file in ("meta_model.safetensors", "summary.json"):
            Path(run, file).unlink()
        for file in Path(run, "recovered").glob("api_001*"):
            file.unlink()

    cut_off("out")
    cut_off("out/control")  # what it has asked counts, but it is not made
    capsys.readouterr()
    # A set more, if the control's queries did not count.
    assert main([*arguments, "--max-queries", str(QUERIES + 18)]) == 0
    output = capsys.readouterr().out
    assert "a budget ended" in output
    assert spending_in(output) == {"control": CONTROL, "run": QUERIES, "planned": CONTROL + QUERIES}
    assert not Path("out/control/meta_model.safetensors").exists()
    assert "[control]" not in Path("out/report.md").read_text()

    shutil.rmtree("out/control")
    cut_off("out")
    assert main([*arguments, "--controls"]) == 0
    assert json.loads(Path("out/control/summary.json").read_text())["queries"] == CONTROL
    assert "[control](control)" in Path("out/report.md").read_text()


def test_settings_come_from_a_file_and_the_command_line_wins(pool: Path) -> None:
    overrides = {
        option.split("=")[0][len("--config.") :]: int(option.split("=")[1]) for option in RUN
    }
    values: dict = {"recovery": {"mu": "1e-2"}}
    for key, value in overrides.items():
        *where, last = key.split(".")
        (values.setdefault(where[0], {}) if where else values)[last] = value
    Path("run.yaml").write_text(yaml.safe_dump(values).replace("'", ""))
    line = "train --out out --config run.yaml --config.replay.n_query=1 --pool"
    assert run(line, str(pool)) == 0
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert config["recovery"]["mu"] == 0.01
    assert config["recovery"]["latent_dim"] == 8
    assert config["replay"]["n_query"] == 1
    assert config["replay"]["final_steps"] == 1


def test_the_preset_of_the_paper(pool: Path) -> None:
    for option in (["--preset", "paper"], ["--preset=paper"]):
        out = f"out{len(option)}"
        assert main(["train", *option, "--pool", str(pool), "--out", out, *RUN]) == 0
        config = yaml.safe_load(Path(out, "config.yaml").read_text())
        assert config["recovery"]["mu"] == 0.005
        assert config["recovery"]["directions"] == "sphere"
        assert config["recovery"]["num_directions"] == 1  # given on the command line


def test_the_preset_with_the_slips_of_the_authors(pool: Path) -> None:
    five = [option.replace("num_directions=1", "num_directions=5") for option in RUN]
    arguments = ["--preset", "paper_compat", "--pool", str(pool), "--out", "out"]
    assert main(["train", *arguments, *five]) == 0
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert config["paper_compat"] is True
    assert config["distillation"]["inner_lr"] == 0.01


def test_recover_writes_images_and_a_picture(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"--config.{setting}" for setting in RECOVERY]
    line = "recover --api 1 --n-per-class 2 --seed 4 --pool"
    assert run(line, str(pool), *settings) == 0
    assert "6 images from api_001" in capsys.readouterr().out
    stored = load_file("runs/recover/api_001_support.safetensors")
    config = RecoveryConfig(steps=1, num_directions=1, generator_width=4, latent_dim=8)
    wanted = recover(load_pool(pool)[1], 2, config=config, seed=4)
    assert torch.equal(stored["images"], wanted.images)
    assert torch.equal(stored["scores"], wanted.scores)
    assert Image.open("runs/recover/api_001_support.png").size[0] > 100


def test_what_the_library_logs_is_shown_when_wanted(
    pool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIDFMKD_LOG", "info")
    assert main(["train", "--pool", str(pool), *RUN]) == 0
    assert "bidfmkd train: api_000: recovering the support set" in capsys.readouterr().err
    monkeypatch.setenv("BIDFMKD_LOG", "much")
    assert main(["train", "--pool", str(pool), *RUN]) == 2
    assert "BIDFMKD_LOG must be a level such as info; got 'much'" in capsys.readouterr().err


def test_a_budget_that_ends_midway_is_said(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # one set of 18 and a half
    assert main(["train", "--pool", str(pool), "--max-queries", "27", *RUN]) == 0
    assert "a budget ended" in capsys.readouterr().out
    assert "budget ended" in Path("runs/train/report.md").read_text()


def test_probe_and_dry_run(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--pool", str(pool), "--api", "1", *RUN]) == 0
    output = capsys.readouterr().out
    for wanted in (
        "api_001",
        "usable",
        "images/s, 32 a call",
        "smallest usable mu",
        "suggested mu",
        "queries",
    ):
        assert wanted in output
    assert spending_in(output) == {"run, planned": QUERIES // 2}
    dry_run = ["train", "--dry-run", "--pool", str(pool), *RUN]
    total = 2 * PROBE_QUERIES + CONTROL + QUERIES
    assert main([*dry_run, "--controls", "--max-queries", str(total - 1)]) == 0
    output = capsys.readouterr().out
    planned = {"control, planned": CONTROL, "run, planned": QUERIES}
    assert spending_in(output) == planned
    assert f"queries are {total}, the cap is {total - 1}" in output
    assert main([*dry_run, "--max-queries", str(total - CONTROL)]) == 0
    output = capsys.readouterr().out
    assert spending_in(output) == {"run, planned": QUERIES}
    assert "over the budget" not in output
    assert [line.split()[0] for line in output.splitlines()[2:5]] == ["api_000", "api_001", "all"]
    assert (
        "api_001: its scores hardly change" in output
    )  # learned for one epoch, in which it learns nothing
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("error::DeprecationWarning")  # of the parser, about its own functions
def test_probe_takes_its_seed(
    pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = []

    def noted(api: BlackBox, n_images: int, seed: int) -> Tensor:
        seeds.append(seed)
        return sample_images(api, n_images, seed)

    # By its module, since `bidfmkd_fast.black_box.probe` is the function.
    monkeypatch.setattr(sys.modules[sample_images.__module__], "sample_images", noted)
    for given in (
        ["--seed", "5"],
        ["--config.seed", "6"],
        ["--config.seed", "6", "--seed", "7"],
    ):
        assert main(["probe", "--pool", str(pool), *RUN, *given]) == 0
    assert seeds == [5, 6, 7]
    capsys.readouterr()


def test_a_pool_with_a_dead_service_is_probed_trained_and_told(
    pool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = Path("mixed")
    mixed.mkdir()
    for file in pool.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    listed = yaml.safe_load((mixed / "pool.yaml").read_text())
    spec = {"n_classes": 3, "image_shape": [1, 28, 28], "price_per_1000": 1.5}
    dead = {
        "kind": "remote",
        "url": "http://127.0.0.1:9",
        "model": "dead",
        "spec": spec,
        "retries": 0,
    }
    (mixed / "pool.yaml").write_text(yaml.safe_dump({**listed, "apis": [*listed["apis"], dead]}))
    assert code_of(["train", "--dry-run", "--pool", "mixed", *RUN]) == 1
    assert "\ndead: no answer" in capsys.readouterr().out
    assert code_of(["probe", "--pool", "mixed", "--api", "2", *RUN]) == 1
    assert "no: dead: no answer" in capsys.readouterr().out
    monkeypatch.setenv("BIDFMKD_LOG", "info")
    with pytest.warns(
        ServiceWarning, match="dead: it is skipped and asked again at the end: dead: no answer"
    ):
        assert main(["train", "--pool", "mixed", "--out", "out", *RUN]) == 0
    shown = capsys.readouterr()
    assert "left out: dead; the report says why" in shown.out
    # The warning is shown as such (pytest has taken it here), so the log leaves it out.
    assert " bidfmkd train: run: finished with 4 sets" in shown.err
    assert "it is skipped" not in shown.err and "it is left out" not in shown.err
    report = Path("out/report.md").read_text()
    assert "**dead was left out: dead: no answer" in report


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *parts: print(warnings.formatwarning(*parts[:4]), end="")
        with _one_line_warnings("bidfmkd train"):
            warnings.warn("dead: it is left out", ServiceWarning, stacklevel=1)
    assert capsys.readouterr().out == "bidfmkd train: warning: dead: it is left out\n"
    assert warnings.formatwarning is before


def code_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_train_goes_on_in_the_folder_of_a_run_that_was_cut_off(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--pool", str(pool), "--out", "out", *RUN]) == 0
    Path("out/meta_model.safetensors").unlink()  # what a run writes last
    before = json.loads(Path("out/summary.json").read_text())["queries"]
    assert main(["train", "--pool", str(pool), "--out", "out", *RUN]) == 0
    assert json.loads(Path("out/summary.json").read_text())["queries"] == before
    assert main(["train", "--pool", str(pool), "--out", "out", *RUN]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_second_command_on_a_folder_is_refused_before_it_asks(
    pool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(TorchBlackBox, "score", never)
    Path("sweep.yaml").write_text("experiment: experiment.yaml\n")
    Path("experiment.yaml").write_text("pool: {n_apis: 2}\n")
    commands = (
        ["train", "--pool", str(pool), *RUN],
        ["recover", "--pool", str(pool)],
        ["pool"],
        ["compare"],
    )
    with FolderLock("busy"):
        for command in (*commands, ["sweep", "--file", "sweep.yaml"]):
            started = time.monotonic()
            assert main([*command, "--out", "busy"]) == 2
            # pool draws the glyphs before it opens the folder
            assert time.monotonic() - started < 10 or command[0] == "pool"
            captured = capsys.readouterr()
            assert (
                f"bidfmkd {command[0]}: busy is in use by process {os.getpid()} on " in captured.err
            )
            assert captured.err.count("\n") == 1 and captured.out == ""
        assert [file.name for file in Path("busy").iterdir()] == ["run.lock"]


@pytest.mark.parametrize(
    ("command", "obstacle"),
    [
        ("recover --pool POOL --out file/out", "file"),
        ("recover --pool POOL --out out", "out/api_000_support.png"),
        ("train --pool POOL --out file/out", "file"),
        ("train --pool POOL --out out", "out/report.md"),
        ("train --pool POOL --out out", "out/source.yaml"),
        ("train --pool POOL --controls --out out", "out/control/summary.json"),
        ("train --pool POOL --controls --out out", "out/zero_query/meta_model.safetensors"),
        ("train --pool POOL --out out", "out/summary.json"),
        ("compare --out out", "out/comparison.md"),
        ("evaluate --run out", "out/report.md"),
        ("pool --out file/out", "file"),
        ("demo --out file/out", "file"),
        ("bench --out file/out", "file"),
        ("convert images --out file/out.npz", "file"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_asked_or_computed(
    command: str,
    obstacle: str,
    pool: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("red", "blue"):
        Path("images", name).mkdir(parents=True)
        Image.new("RGB", (4, 4), name).save(f"images/{name}/one.png")
    Path("benchmarks").mkdir()
    Path("benchmarks/bench.py").touch()
    if command.startswith("evaluate"):
        assert main(["train", "--pool", str(pool), "--out", "out", *RUN]) == 0
        Path(obstacle).unlink()
    elif "comparison" in obstacle:
        Path("out").mkdir()
        config = ExperimentConfig().with_seed(0)
        Path("out/experiment.yaml").write_text(to_yaml(config))
    if obstacle == "file":
        Path("file").touch()
    else:
        Path(obstacle).mkdir(parents=True)
    capsys.readouterr()

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(TorchBlackBox, "score", never)
    monkeypatch.setattr("bidfmkd_fast.data.convert.decode_all", never)
    monkeypatch.setattr("bidfmkd_fast.pools.api_training._train_api", never)
    monkeypatch.setattr("bidfmkd_fast.training.comparison.evaluate", never)
    arguments = command.replace("POOL", str(pool)).split()
    assert main([*arguments, *(RUN if "train" in command else [])]) == 2
    captured = capsys.readouterr()
    assert (
        "cannot write to " in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    )


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["n_apis=2", "n_way=3", "api_width=2", "api_epochs=1", "n_episodes=2"]
    options = [f"--config.{setting}" for setting in small] + dotted("--config.train.", RUN)
    assert main(["demo", "--seed", "3", *options]) == 0
    output = capsys.readouterr().out
    for wanted in (
        "3-way accuracy on 2 episodes",
        "1-shot",
        "5-shot",
        "zero_query: pictures alone",
        "BiDf-MKD less zero_query",
        "BiDf-MKD less random initialisation",
        "queries",
        "seconds, recovery",
        "runs/demo/report.md",
    ):
        assert wanted in output
    assert yaml.safe_load(Path("runs/demo/config.yaml").read_text())["seed"] == 3
    assert list(Path("runs/demo/grids").glob("*.png"))
    # The run of the demo knows its images, as every run of `train` does.
    assert run("evaluate --run runs/demo --n-way 3 --n-shot 1 --n-episodes 2") == 0


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["train/ox", "train/cat", "test/dog"]):
        Path("animals", name).mkdir(parents=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(Path("animals", name, "1.png"))
    assert main(["convert", "animals", "--size", "8"]) == 0
    output = capsys.readouterr().out
    assert "3 images 3x8x8, 3 classes: meta_train 2, meta_val 0, meta_test 1" in output
    assert "read as class_folders, split: the folders of animals" in output
    assert (
        "no pool can be trained on images of 8 x 8: convert again with --size" in output
        and "next:" not in output
    )
    assert load_dataset("animals.npz").class_names == ("cat", "dog", "ox")
    Path("split.json").write_text('{"meta_train": ["ox"], "meta_test": ["dog"]}')
    assert run("convert animals --split=split.json --out=two.npz --layout=class_folders") == 0
    assert "split: split.json; 1 classes of no split left out" in capsys.readouterr().out


EXPERIMENT = [
    "--config.pool.n_apis=2",
    "--config.pool.n_way=3",
    "--config.pool.width=2",
    "--config.pool.epochs=1",
    "--config.evaluation.n_episodes=2",
    "--config.evaluation.adapt_lrs=[]",
    "--config.evaluation.n_query=2",
    *dotted("--config.train.", RUN),
]


def test_compare_goes_on_in_the_same_folder(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "--out", "out", *EXPERIMENT, "--seeds", "3"]
    assert main([*arguments, "--methods", "random"]) == 0
    first = capsys.readouterr().out
    assert "random initialisation" in first and "report: out/comparison.md" in first
    assert Path("out/seed_3/random/meta_model.safetensors").is_file()
    assert main([*arguments, "--methods", "bidf_mkd"]) == 0
    assert "BiDf-MKD" in capsys.readouterr().out
    assert main(["compare", "--out", "out", *EXPERIMENT, "--config.pool.epochs=2"]) == 2
    assert "holds an experiment with other settings" in capsys.readouterr().err


def test_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict = {}
    for option in EXPERIMENT:
        key, value = option[len("--config.") :].split("=")
        *where, last = key.split(".")
        inside = values
        for name in where:
            inside = inside.setdefault(name, {})
        inside[last] = yaml.safe_load(value)
    Path("base.yaml").write_text(yaml.safe_dump(values))
    Path("sweep.yaml").write_text(
        yaml.safe_dump(
            {"experiment": "base.yaml", "grid": {"train.boundary_recovery": [True, False]}}
        )
    )
    assert main(["sweep", "--file", "sweep.yaml", "--out", "out"]) == 0
    output = capsys.readouterr().out
    assert "cell 2 of 2: boundary_recovery=False, seed 0" in output
    assert "1-shot less the first" in output and "plot: out/sweep.png" in output


def test_a_pool_of_several_data_sets_is_meta_tested_on_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import numpy as np

    from bidfmkd_fast.data import make_glyphs

    glyphs = make_glyphs()
    np.savez(
        "ink.npz",
        images=255 - glyphs.images[:, 0, :24, :24].numpy(),
        labels=glyphs.labels.numpy(),
        class_names=np.array(glyphs.class_names),
        split_of_class=np.array(glyphs.split_of_class),
    )
    sizes = "--n-apis 4 --n-way 3 --width 2 --resnet-width 1 --epochs 1"
    data = "--dataset glyphs ink.npz --invert false true"
    assert run(f"pool --scenario mh {data} {sizes} --out mixed") == 0
    output = capsys.readouterr().out
    assert "4 APIs in mixed" in output and "resnet10" in output
    assert main(["train", "--pool", "mixed", "--out", "run", *RUN]) == 0
    source = yaml.safe_load(Path("run/source.yaml").read_text())
    ink = {"name": "ink", "inverted": True, "file": str(Path("ink.npz").resolve())}
    assert source["data_sets"] == [{"name": "glyphs", "inverted": False}, ink]
    capsys.readouterr()
    evaluate = "evaluate --run run --n-way 3 --n-episodes 2 --n-shot 1 --n-query 2"
    assert run(f"{evaluate} {data} --adapt-lr 0.2") == 0
    output = capsys.readouterr().out
    assert "(glyphs meta_test)" in output and "(ink meta_test)" in output
    assert "(ink meta_test)" in Path("run/report.md").read_text()
    assert run(f"{evaluate} --invert true") == 2
    assert "--invert goes with --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --pool nowhere", "bidfmkd train: load_pool: there is no pool list"),
        (
            "train --pool POOL --config.recovery.stepz 3",
            "config.recovery.stepz'; did you mean 'config.recovery.steps'",
        ),
        (
            "train --pool POOL --config unknown.yaml",
            "--config unknown.yaml: unknown key 'sed'; did you mean 'seed'?",
        ),
        (
            "train --pool POOL --config nowhere.yaml",
            "--config: cannot read nowhere.yaml: No such file",
        ),
        ("train --pool POOL --config.recovery.steps many", "config.recovery.steps"),
        ("train --pool POOL --config.recovery.mu 0", "mu must be finite and above 0; got 0"),
        (
            "train --pool POOL --config.n_per_class 3",
            "replay.n_shot + replay.n_query must be at most",
        ),
        (
            "train --pool POOL --config.recovery.steps 9 --config.n_per_class 1000000000",
            "BiDfMKD: a step on n_per_class=1000000000 images of",
        ),
        (
            "train --dry-run --pool POOL --config.recovery.steps 9 "
            "--config.recovery.latent_dim 1000000000000",
            "plan: a step on",
        ),
        ("pool --width 1000000", "train_pool: width must be at most 4096; got 1000000"),
        (
            "train --pool POOL --controls --max-queries 40",
            "control, survey and one recovery step ask",
        ),
        ("train --pool POOL --device nowhere", "device must be one that torch can use"),
        ("train", "give either --pool FOLDER or --url URL [URL ...]"),
        ("train --pool POOL --url http://127.0.0.1:9", "give either --pool FOLDER or --url URL"),
        ("train --pool POOL --model cats", "--model goes with --url"),
        ("train --url 127.0.0.1:9", "services: url must be http://host:port or https://host"),
        ("train --url http://127.0.0.1:9 --device nowhere", "train: device must be one that torch"),
        ("train --url http://127.0.0.1:9 --scores-kind top_k", "--scores-kind: invalid choice"),
        ("pool --scores-kind logits", "--scores-kind goes with --from-services"),
        ("pool --from-services http://127.0.0.1:9 --n-apis 3", "--n-apis is about training APIs"),
        ("pool --from-services http://127.0.0.1:9 --out POOL", "exists already; give another"),
        (
            "pool --from-services http://127.0.0.1:9 --token-variable NO_SUCH",
            "the environment variable NO_SUCH must hold the token",
        ),
        ("recover --pool POOL --api 2", "--api must be in 0..1"),
        ("recover --pool POOL --device nowhere", "recover: device must be one that torch can use"),
        ("recover --pool POOL --device meta", "recover: device must be one that torch can use"),
        ("compare --device nowhere", "compare: device must be one that torch can use"),
        ("recover --pool POOL --max-queries 5", "one step asks api_000"),
        ("recover --pool POOL --max-queries -5", "max_queries must not be negative"),
        ("recover --pool POOL --max-cost -5", "max_cost must be finite and not negative"),
        ("recover --pool POOL --config.mu long", "mu must be a number or 'auto'; got 'long'"),
        ("probe --api 0", "give either --pool with --api, or --url with --model"),
        ("probe --pool POOL --api 2", "--api must be in 0..1"),
        (
            "probe --url http://127.0.0.1:9 --model m --config.recovery.step 3",
            "did you mean 'config.recovery.steps'",
        ),
        ("probe --pool POOL --max-queries 5", "probe: api_000 would be asked"),
        ("recover --pool POOL --config.step 5", "did you mean 'config.steps'"),
        ("evaluate --run nowhere", "bidfmkd evaluate: run folder: nowhere holds no run"),
        ("evaluate --run . --n-shot", "expected at least one argument"),
        ("pool --scenario xy", "scenario"),
        ("pool --scenario mh", "mixes data sets, 2 or more; got 1"),
        ("pool --invert true false", "--invert wants one value, or 1, one per data set; got 2"),
        ("compare --methods best", "methods must be among random"),
        ("compare --config.pool.n_api 3", "did you mean 'config.pool.n_apis'"),
        ("compare --config.evaluation.split test", "split must be one of"),
        ("compare --config.pool.data_sets [nothing.npz]", "there is no file nothing.npz"),
        ("compare --out POOL", "is not an experiment"),
        ("sweep --file nowhere.yaml", "bidfmkd sweep: sweep: cannot read nowhere.yaml"),
        ("sweep", "the following arguments are required: --file"),
        ("pool --dataset nothing.npz", "bidfmkd pool: load_dataset: there is no file nothing.npz"),
        ("pool --n-way 99", "meta_train of data set 'glyphs' has 40 classes; n_way=99 needs more"),
        ("pool --out POOL", "holds a trained pool already"),
        ("pool --sizes 3", "unrecognized arguments: --sizes 3"),
        ("demo --out POOL", "exists already"),
        ("convert nowhere", "bidfmkd convert: convert_dataset: there is no file or folder nowhere"),
        ("convert POOL --layout folders", "--layout"),
        ("convert POOL", "holds no images"),
        ("convert", "the following arguments are required: SOURCE"),
        ("demo --config.n_episodes 0", "n_episodes must be at least 1"),
        ("demo --config.train.recovery.step 3", "did you mean 'config.train.recovery.steps'"),
        ("serve nowhere", "bidfmkd serve: load_pool: there is no pool list"),
        ("serve POOL --config.nam 1", "unknown key 'config.nam'; did you mean 'config.nan'"),
        ("serve POOL --config.nan 2", "must sum to at most 1"),
        ("serve POOL --port 99999", "port 99999 of 127.0.0.1 is not available"),
        ("serve POOL --per-model nowhere.yaml", "serve: cannot read nowhere.yaml: No such file"),
        ("serve", "the following arguments are required: POOL"),
        ("status", "the following arguments are required: RUN"),
        ("status nowhere", "status: there is no folder nowhere"),
        ("evaluate --run x --n-shot y", "--n-shot must be of type int; got 'y'"),
        ("bench --threads 1 0", "bench: threads must be at least 1; got 0"),
        ("bench --threads 1000000000", "bench: threads must be at most 1024; got 1000000000"),
        ("bench --runs 0", "bench: runs must be at least 1; got 0"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("", "expected"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    command: str, message: str, pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("unknown.yaml").write_text("sed: 3\n")
    before = sorted(pool.rglob("*"))
    assert main(command.replace("POOL", str(pool)).split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(pool.rglob("*")) == before
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_the_parser_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bidfmkd_fast.cli.options import build_parser

    monkeypatch.setenv("COLUMNS", "80")  # the example must stay on one line
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--seed" in output or command in ("status", "report", "init-config")  # draw nothing
    example = COMMANDS[command].example
    assert f"example: {example}" in output
    arguments, _ = take_settings(shlex.split(example)[1:], COMMANDS[command].settings)
    assert build_parser(arguments, COMMANDS).parse_args(arguments).subcommand == command


def test_without_jsonargparse_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["demo"]) == 2
    assert "needs jsonargparse" in capsys.readouterr().err
