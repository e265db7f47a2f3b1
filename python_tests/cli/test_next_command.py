"""Check that every command's last line names a command that runs as it is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bidfmkd_fast.cli.main import main

RECOVERY = ["steps=1", "num_directions=1", "generator_width=4", "latent_dim=8"]
RUN = [
    *(
        "--config.n_per_class=3",
        "--config.meta_model_width=1",
        "--config.distillation.inner_steps=1",
    ),
    *("--config.replay.final_steps=1", "--config.replay.n_query=2", "--config.adapt_steps=1"),
    *(f"--config.recovery.{setting}" for setting in RECOVERY),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIDFMKD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str] | None]:
    """Return what a command prints, and the command after "next:", if it names one."""
    assert main(arguments) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "next:" in line]
    assert len(lines) <= 1
    if not lines:
        return output, None
    assert lines[0].startswith("next: ") and output.rstrip().endswith(lines[0])
    command = shlex.split(lines[0].removeprefix("next: "))
    assert command[0] == "bidfmkd"
    return output, command[1:]


def pictures(folder: Path, classes: dict[str, int], side: int = 16) -> None:
    """Write a folder for each class, with as many pictures of noise as `classes` says."""
    draws = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = draws.integers(0, 255, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_from_pictures_to_an_evaluation_by_what_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures(
        Path("my animals"),
        {f"train/{name}": 4 for name in "abc"} | {f"test/{name}": 5 for name in "de"},
    )
    _, command = run(["convert", "my animals"], capsys)
    assert command == ["pool", "--dataset", "my animals.npz", "--n-way", "3"]
    output, command = run(
        [*command, "--n-apis", "2", "--width", "2", "--epochs", "1", "--out", "a pool"], capsys
    )
    assert command == ["train", "--pool", "a pool", "--dry-run"]
    output, nothing = run(command, capsys)
    assert nothing is None and "run, planned" in output and "control" not in output
    output, command = run(["train", "--pool", "a pool", "--out", "a run", *RUN], capsys)
    assert command == [
        "evaluate",
        "--run",
        "a run",
        "--n-way",
        "2",
        "--n-shot",
        "1",
        "--n-query",
        "4",
    ]
    output, nothing = run(command, capsys)
    assert (
        nothing is None
        and "2-way accuracy on 600 episodes" in output
        and "my animals meta_test" in output
    )
    shown = re.search(r"BiDf-MKD +(\S+ ± \S+)", output)
    assert shown is not None
    output, nothing = run(["report", "a run"], capsys)
    assert nothing is None and output.startswith("page: a run/report.html\n")
    page = Path("a run/report.html").read_text(encoding="utf-8")
    assert f"<td>{shown[1]}</td>" in page  # what `evaluate` has kept


@pytest.mark.parametrize("data_set", ["", "withdrawn"])
def test_after_training_on_services_that_name_no_data_set(
    data_set: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a name does not help either if there are no images of that name."""
    small = ["--n-apis", "2", "--n-way", "3", "--width", "2", "--epochs", "1"]
    run(["pool", *small, "--out", "pool"], capsys)
    listed = yaml.safe_load(Path("pool/pool.yaml").read_text())
    for entry in listed["apis"]:
        entry["data_set"] = data_set
    Path("pool/pool.yaml").write_text(yaml.safe_dump(listed))
    output, command = run(["train", "--pool", "pool", "--out", "out", *RUN], capsys)
    assert re.search(
        r"to meta-test the run, .*: bidfmkd evaluate --run out --dataset FILE\.npz", output
    )
    assert command == ["status", "out"]
    output, _ = run(command, capsys)
    assert output.startswith("out: finished\n") and "cap" in output


def test_images_that_the_run_cannot_take_are_not_proposed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train on services that take another size than the images of their data set have."""
    run(
        ["pool", "--n-apis", "2", "--n-way", "3", "--width", "2", "--epochs", "1", "--out", "pool"],
        capsys,
    )
    pictures(
        Path("glyphs_16"),
        {f"train/{name}": 3 for name in "abc"} | {f"test/{name}": 9 for name in "de"},
    )
    run(["convert", "glyphs_16"], capsys)
    Path("pool/source.yaml").write_text(
        yaml.safe_dump({"files": {"glyphs": str(Path("glyphs_16.npz").resolve())}})
    )
    output, command = run(["train", "--pool", "pool", "--out", "out", *RUN], capsys)
    assert command == ["status", "out"]
    assert "(those of glyphs_16 have another size or colour than the model takes)" in output


def test_why_the_images_of_a_run_cannot_judge_it(capsys: pytest.CaptureFixture[str]) -> None:
    pictures(Path("one"), {f"train/{name}": 4 for name in "abc"} | {"test/d": 5})
    _, command = run(["convert", "one"], capsys)
    assert command is not None
    run(
        [*command, "--n-apis", "2", "--width", "2", "--epochs", "1", "--out", "pool"],
        capsys,
    )
    output, command = run(["train", "--pool", "pool", "--out", "out", *RUN], capsys)
    assert command == ["status", "out"]
    assert "(meta_test of one lacks two classes of two images each)" in output


@pytest.mark.parametrize(
    ("classes", "side", "says"),
    [
        (
            {"train/a": 3, "train/b": 3, "test/c": 3},
            18,
            "images of 18 x 18: convert again with --size, a multiple of 4",
        ),
        (
            {"train/a": 3, "train/b": 3, "test/c": 3},
            12,
            "images of 12 x 12: convert again with --size",
        ),
        ({"train/a": 3, "test/c": 3}, 16, "meta_train has 1 class"),
        ({"train/a": 3, "train/b": 1, "test/c": 3}, 16, "'b' has one image"),
    ],
)
def test_a_data_set_that_no_pool_can_be_trained_on(
    classes: dict[str, int], side: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(Path("few"), classes, side)
    output, command = run(["convert", "few"], capsys)
    assert command is None and "no pool can be trained on" in output and says in output


def test_no_other_command_names_a_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--n-apis", "2", "--n-way", "3", "--width", "2", "--epochs", "1"]
    run(["pool", *small, "--out", "pool"], capsys)
    settings = [f"--config.{setting}" for setting in RECOVERY]
    demo = [
        "--config.n_apis=2",
        "--config.n_way=3",
        "--config.api_width=2",
        "--config.api_epochs=1",
    ]
    demo += [
        "--config.n_episodes=2",
        *(option.replace("--config.", "--config.train.") for option in RUN),
    ]
    for arguments in (
        ["recover", "--pool", "pool", "--n-per-class", "2", *settings],
        ["probe", "--pool", "pool", *RUN],
        ["demo", *demo],
    ):
        _, command = run(arguments, capsys)
        assert command is None
