"""Compare runs by the command: tables, paired numbers, and refusals in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.experiments.intervals import mean_and_t95
from bidfmkd_fast.meta import MetaModel, evaluate, paired_difference
from bidfmkd_fast.models import build_model

SETTINGS = ("survey.n_images=40", "survey.epochs=1", "meta_model_width=4")
EPISODES = ["--n-way=3", "--n-shot", "1", "--n-query=3", "--n-episodes=4", "--seed=7"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs a0, a1 and b0, b1, of two settings under two seeds."""
    folder = tmp_path_factory.mktemp("runs ü")
    pool = str(folder / "pool")
    options = ["--n-apis=2", "--n-way=3", "--width=2", "--epochs=1"]
    assert main(["pool", *options, "--out", pool]) == 0
    for side, steps in (("a", 5), ("b", 7)):
        for seed in (0, 1):
            settings = [f"--config.{setting}" for setting in SETTINGS]
            settings += [f"--config.adapt_steps={steps}", f"--seed={seed}"]
            out = str(folder / f"{side}{seed}")
            assert main(["train", "--pool", pool, "--out", out, *settings]) == 0
    return folder


@pytest.fixture(autouse=True)
def _among_the_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def difference_of(seed: int) -> tuple[float, float]:
    """Return the paired difference of the runs of a seed, by the library's public functions."""
    dataset = load_dataset("glyphs")
    a, b = (
        evaluate(
            MetaModel.load(f"{side}{seed}/meta_model.safetensors"),
            dataset,
            n_way=3,
            n_shot=1,
            n_query=3,
            n_episodes=4,
            seed=7,
        )
        for side in "ab"
    )
    difference = paired_difference(a, b)
    return 100 * difference.mean, 100 * difference.ci95


def test_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare-runs", "a0", "b0", *EPISODES]) == 0
    output = capsys.readouterr().out
    mean, ci95 = difference_of(0)
    assert f"A less B, paired  {mean:+.2f} ± {ci95:.2f}\n" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["adapt_steps", "5", "7"] in lines
    assert [line[1] for line in lines if line[:1] in (["A:"], ["B:"])] == ["a0", "b0"]
    assert [line[-2] for line in lines if line[:1] == ["A:"]] == ["80"]  # 2 APIs of 40 pictures
    assert "seed" not in [line[0] for line in lines if line]
    assert "One training seed each proves nothing" in output and "pools" not in output
    assert "4 episodes of unseen classes (glyphs meta_test)" in output


def test_several_runs_a_side_have_an_interval_over_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare-runs", "--a", "a0", "a1", "--b", "b0", "b1", *EPISODES]) == 0
    output = capsys.readouterr().out
    means = torch.tensor([difference_of(seed)[0] for seed in (0, 1)], dtype=torch.float64)
    mean, half = mean_and_t95(means)
    assert "A less B, paired  " in output and f"{mean:+.2f} ± {half:.2f} " in output
    assert "1-shot over seeds" in output and "proves nothing" not in output
    assert "A, mean over 2 runs" in output


def test_other_pools_and_seeds_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("b1", "other")
    source = yaml.safe_load(Path("other/source.yaml").read_text())
    Path("other/source.yaml").write_text(yaml.safe_dump(source | {"pool": "/elsewhere"}))
    assert main(["compare-runs", "a0", "other", *EPISODES, "--adapt-lr", "0.3"]) == 0
    output = capsys.readouterr().out
    assert ["seed", "0", "1"] in [line.split() for line in output.splitlines()]
    assert "The pools differ as well." in output and "B: /elsewhere." in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("a0", "give two runs (A B), or the runs of both sides"),
        ("a0 b0 a1", "give two runs (A B), or the runs of both sides"),
        ("a0 b0 --a a1", "give two runs (A B), or the runs of both sides"),
        ("--a a0 a1", "give two runs (A B), or the runs of both sides"),
        ("--a a0 a1 --b b0", "as many runs on one side as on the other, one or more; got 2 and 1"),
        ("--a a0 a0 --b b0 b1", "different seeds; seed 0 of a0 is there twice"),
        ("--a a0 b1 --b b0 b1", "in the seed alone; a0 and b1 differ in adapt_steps"),
        ("a0 nowhere", "nowhere holds no run"),
        ("a0 pool", "pool holds no run"),
        ("a0 colours", "a0 takes (1, 28, 28) and B: colours (3, 28, 28)"),
        ("a0 inverted", "the same data sets; a0 has glyphs and inverted has glyphs inverted"),
        ("a0 damaged", "source: data_sets must list mappings"),
        ("a0 b0 --n-way 30", "30"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data_sets in (
        ("inverted", [{"name": "glyphs", "inverted": True}]),
        ("damaged", [3]),
        ("colours", [{"name": "glyphs", "inverted": False}]),
    ):
        if not Path(name).exists():
            shutil.copytree("b0", name)
            Path(name, "source.yaml").write_text(yaml.safe_dump({"data_sets": data_sets}))
    module = build_model("conv4", in_channels=3, n_classes=3, image_size=(28, 28), width=2)
    MetaModel(module).save("colours/meta_model.safetensors")
    episodes = EPISODES[1:] if "--n-way" in arguments else EPISODES
    assert main(["compare-runs", *arguments.split(), *episodes]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
