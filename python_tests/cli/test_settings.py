"""Read what stands behind `--config` as YAML 1.2, in order; errors name the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.cli.settings import take_settings
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.training import TrainConfig


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_files_parts_and_single_settings_in_the_order_given() -> None:
    Path("run.yaml").write_text(
        "seed: 010\nadapt_lr: 1e-3\nrecovery: {steps: 3, mu: auto}\n", encoding="utf-16"
    )
    Path("part.yaml").write_text("steps: 4\nbetas: [0.1, 0.2]\n")
    arguments = (
        "train --config.seed 1 --config run.yaml --pool x --config.recovery=part.yaml "
        "--config.task_replay false"
    )
    rest, values = take_settings(
        [*arguments.split(), "--config", "{recovery: {grid: 2}}"], TrainConfig
    )
    assert rest == ["train", "--pool", "x"]
    recovery = {"steps": 4, "mu": "auto", "betas": (0.1, 0.2), "grid": 2}
    assert values == {"seed": 10, "adapt_lr": 0.001, "recovery": recovery, "task_replay": False}
    rest, values = take_settings(
        ["compare", "--config.pool.data_sets", "[a.npz]"], ExperimentConfig
    )
    assert values == {"pool": {"data_sets": ("a.npz",)}}
    assert take_settings(["pool", "--config", "x"], None) == (["pool", "--config", "x"], {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("n_per_class: 5.5", "run.yaml: n_per_class must be of type int (a whole number); got 5.5"),
        (
            "recovery:",
            "run.yaml: wanted settings under 'recovery' (steps, num_directions, mu, ...); "
            "got nothing",
        ),
        (
            "recovery:\n\tmu: 1",
            "run.yaml is not readable YAML: line 2, column 1: a tab where YAML wants spaces",
        ),
        (
            "seed: 1\nseed: 2",
            "run.yaml is not readable YAML: line 2, column 1: the key 'seed' comes twice",
        ),
        (
            "task_replay: yes",
            "run.yaml: task_replay must be of type bool (true or false); got 'yes'",
        ),
        ("adapt_lr: 1:30", "run.yaml: adapt_lr must be of type float; got '1:30'"),
        (
            "recovery: {step: 3}",
            "run.yaml: unknown key 'recovery.step'; did you mean 'recovery.steps'?",
        ),
        ("mu: 3", "run.yaml: unknown key 'mu'; did you mean 'recovery.mu'?"),
        ("inner_lr: 3", "did you mean 'distillation.inner_lr' or 'replay.inner_lr'?"),
        ("- 1", "run.yaml must hold settings by name; got [1]"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_and_code_2(
    content: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(content)
    assert main(["train", "--pool", "x", "--config", "run.yaml"]) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--config", "--config needs a value"),
        ("--config .", "cannot read .: Is a directory"),
        ('--config {"seed":1,"seed":2}', "the key 'seed' comes twice"),
        (
            "--config.recovery.steps 5.5",
            "config.recovery.steps must be of type int (a whole number); got 5.5",
        ),
        (
            "--config.recovery.steps yes",
            "config.recovery.steps must be of type int (a whole number); got 'yes'",
        ),
        (
            "--config.task_replay on",
            "config.task_replay must be of type bool (true or false); got 'on'",
        ),
        (
            "--config.recovery.betas 3",
            "config.recovery.betas must be of type list of 2 float; got 3",
        ),
        (
            "--config.nothing 3",
            "unknown key 'config.nothing'; known: config.seed, config.n_per_class",
        ),
        ("--config.seed.deep 3", "config.seed must be of type int"),
    ],
)
def test_an_option_that_does_not_fit_is_named(option: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        take_settings(option.split(" "), TrainConfig)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        "demo --seed",
        "train --pool x --seed",
        "pool --seed",
        "recover --pool x --seed",
        "serve x --seed",
        "probe --url http://127.0.0.1:9 --model m --seed",
        "evaluate --run x --seed",
        "convert x --seed",
        "bench --seed",
        "compare --seeds",
        "sweep --file x --seeds 1",
    ],
)
def test_every_command_refuses_a_negative_seed_alike(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "-1"]) == 2
    name = "seeds" if "seeds" in command else "seed"
    assert (
        capsys.readouterr().err
        == f"bidfmkd {command.split()[0]}: --{name} must be at least 0; got -1\n"
    )
