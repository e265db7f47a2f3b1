"""Run comparisons: every method, nothing twice, and again after a break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments import methods as baselines
from bidfmkd_fast.experiments.compare import run_comparison
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.runtime.machine import machine_text
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_folder import META_MODEL, RunFolder


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the methods and seeds that are trained from now on."""
    trained: list[str] = []
    for name, (label, plain) in list(baselines.METHODS.items()):

        def method(
            experiment: Any, folder: Path, name: str = name, plain: Callable = plain
        ) -> None:
            trained.append(f"{name} {experiment.train.seed}")
            plain(experiment, folder)

        monkeypatch.setitem(baselines.METHODS, name, (label, method))
    return trained


def test_every_method_in_one_table_and_nothing_twice(
    tiny: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = counted(monkeypatch)
    tables = run_comparison(tiny, tmp_path / "out", progress=False)
    for name, (label, _) in baselines.METHODS.items():
        assert (label in tables) == (name != "control")  # that must be asked for
    assert trained[-1] == "average 0" and len(trained) == 8  # after the run whose sets it uses
    report = (tmp_path / "out" / "comparison.md").read_text()
    for text in (
        "BiDf-MKD less Distill-Avg",
        "knowledge: BiDf-MKD less what asks no API",
        "gain share of BiDf-MKD",
        "One training seed proves nothing",
        f"seeds 0; {machine_text('cpu')}",
        "| method | 1-shot | 2-shot | 1-shot less zero_query",
    ):
        assert text in report
    assert run_comparison(tiny, tmp_path / "out", progress=False) == tables
    assert len(trained) == 8
    # The same folder grows with other methods and seeds.
    trained.clear()
    more = run_comparison(
        tiny, tmp_path / "out", methods=["control", "maml"], seeds=[0, 1], progress=False
    )
    assert trained == ["control 0", "control 1", "maml 1"]
    assert "by seed, glyphs" in more and "random" not in more
    assert "the same under each of 2 seeds" in more and "proves nothing" not in more


def test_a_method_that_was_cut_off_is_made_anew(
    tiny: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, plain = baselines.METHODS["random"]

    def cut_off(experiment: Any, folder: Path) -> None:
        plain(experiment, folder)
        raise KeyboardInterrupt

    monkeypatch.setitem(baselines.METHODS, "random", (label, cut_off))
    with pytest.raises(KeyboardInterrupt):
        run_comparison(tiny, tmp_path / "out", methods=["random"], progress=False)
    assert not (tmp_path / "out" / "seed_0" / "random").exists()
    monkeypatch.setitem(baselines.METHODS, "random", (label, plain))
    assert label in run_comparison(tiny, tmp_path / "out", methods=["random"], progress=False)


def test_a_run_that_was_cut_off_keeps_its_sets(
    tiny: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, kept = RunFolder.save_recovered, []

    def cut_off(self: RunFolder, recovered: RecoveredSet) -> RecoveredSet:
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append((self.path, recovered.api_index, recovered.part))
        return save(self, recovered)

    def note(self: RunFolder, recovered: RecoveredSet) -> RecoveredSet:
        kept.append(recovered.part)
        return save(self, recovered)

    monkeypatch.setattr(RunFolder, "save_recovered", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(tiny, tmp_path / "out", methods=["bidf_mkd"], progress=False)
    monkeypatch.setattr(RunFolder, "save_recovered", note)
    run_comparison(tiny, tmp_path / "out", methods=["bidf_mkd"], progress=False)
    assert len(kept) == 6
    assert not list((tmp_path / "out").rglob("run.lock"))
    # The result is the same, bit for bit, as without a break.
    monkeypatch.undo()
    run_comparison(tiny, tmp_path / "whole", methods=["bidf_mkd"], progress=False)
    ours, theirs = (
        load_file(tmp_path / folder / "seed_0" / "bidf_mkd" / META_MODEL)
        for folder in ("out", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_several_data_sets(tiny: ExperimentConfig, tmp_path: Path) -> None:
    """Check that each data set has a table. The second data set is the glyphs in colour, larger."""
    import numpy as np

    from bidfmkd_fast.data import make_glyphs

    glyphs = make_glyphs()
    large = (
        glyphs.images.repeat_interleave(2, 2)
        .repeat_interleave(2, 3)[:, 0, :, :, None]
        .expand(-1, -1, -1, 3)
    )
    np.savez(
        tmp_path / "colours.npz",
        images=large.numpy(),
        labels=glyphs.labels.numpy(),
        class_names=np.array(glyphs.class_names),
        split_of_class=np.array(glyphs.split_of_class),
    )
    names = ("glyphs", str(tmp_path / "colours.npz"))
    pool = replace(tiny.pool, scenario="mh", data_sets=names, n_apis=4, resnet_width=1)
    train = replace(tiny.train, meta_model_side=16)
    config = replace(
        tiny,
        pool=pool,
        train=train,
        evaluation=replace(tiny.evaluation, n_shots=(1,), n_episodes=2),
    )
    methods = ["control", "bidf_mkd", "average", "white_box", "maml"]
    tables = run_comparison(config, tmp_path / "out", methods=methods, progress=False)
    assert "(glyphs meta_test)" in tables and "(colours meta_test)" in tables
    assert tables.count("no-recovery control") == 6  # in three tables of each data set


def test_a_survey_alone_has_no_sets_that_other_methods_could_use(
    tiny: ExperimentConfig, tmp_path: Path
) -> None:
    train = replace(tiny.train, recovery=replace(tiny.train.recovery, steps=0))
    methods = baselines.default_methods(train)
    assert methods == ["random", "zero_query", "random_teachers", "bidf_mkd", "maml"]
    assert set(baselines.default_methods(tiny.train)) == {*methods, *baselines.NEED_RECOVERY}
    with pytest.raises(InputError, match=r"sets are needed by single, white_box, and train\.recov"):
        run_comparison(
            replace(tiny, train=train), tmp_path / "out", methods=["white_box", "single"]
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["best"]}, "methods must be among random, control, .*; got 'best'"),
        ({"methods": []}, "methods must be one or more of random, .*; got none"),
        ({"methods": ["average"]}, "add bidf_mkd"),
        ({"seeds": []}, "one or more different numbers"),
        ({"seeds": [1, 1]}, "one or more different numbers"),
    ],
)
def test_bad_arguments_leave_nothing(
    tiny: ExperimentConfig, tmp_path: Path, change: dict, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        run_comparison(tiny, tmp_path / "out", progress=False, **change)
    assert not (tmp_path / "out").exists()
