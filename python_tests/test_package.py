"""Test the package as a whole: public names, cost of the import, `python -m bidfmkd_fast`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast import __main__ as diagnostics
from bidfmkd_fast.meta import DistillationTask
from bidfmkd_fast.ops import backend

PUBLIC = {
    *(
        "ZerothOrder",
        "as_differentiable",
        "APISpec",
        "Budget",
        "BlackBox",
        "TorchBlackBox",
        "FunctionBlackBox",
    ),
    *("RecoveryConfig", "recover", "Recovered", "TrainConfig", "BiDfMKD", "MetaModel", "evaluate"),
    *(
        "paired_difference",
        "procedural_images",
        "load_dataset",
        "load_pool",
        "train_pool",
        "ops",
        "errors",
        "__version__",
    ),
    *("OnnxBlackBox", "RemoteBlackBox", "GrpcBlackBox", "JSONBlackBox"),
    *("DistillationConfig", "ReplayConfig", "Episode", "EpisodeSampler"),
    *(
        "Callback",
        "TensorBoardCallback",
        "Classifier",
        "Run",
        "Dataset",
        "Evaluation",
        "SurveyConfig",
    ),
}


def test_public_names() -> None:
    assert set(bf.__all__) == PUBLIC
    assert all(getattr(bf, name) is not None for name in PUBLIC)


def test_dir_shows_public_names_and_rooms_only() -> None:
    code = """
import types, bidfmkd_fast as bf
rooms = {name for name, value in vars(bf).items() if isinstance(value, types.ModuleType)
         and value.__name__ == f"bidfmkd_fast.{name}"}
print(sorted(name for name in dir(bf) if name[0] != "_" and name not in rooms | set(bf.__all__)))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_every_object_tells_itself_in_one_line() -> None:
    spec = bf.APISpec(n_classes=2, image_shape=(1, 16, 16), name="box")
    apis = [bf.FunctionBlackBox(lambda images: images.flatten(1)[:, :2], spec) for _ in range(3)]
    recovery = bf.RecoveryConfig(steps=2, num_directions=2, generator_width=2)
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=0),
        n_per_class=2,
        recovery=recovery,
        replay=bf.ReplayConfig(n_query=1, final_steps=1),
    )
    trainer = bf.BiDfMKD(apis, config=config, budget=bf.Budget(max_queries=10_000))
    run = trainer.fit(progress=False)
    dataset = bf.load_dataset("glyphs")
    sampler = bf.EpisodeSampler(dataset, "meta_test", n_way=2, n_shot=1, n_query=1, seed=0)
    classifier = run.meta_model.adapt(torch.rand(2, 1, 16, 16), torch.tensor([0, 1]))
    own = bf.MetaModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)))
    objects = {
        "Run": run,
        "RecoveredSet": run.recovered[0],
        "Recovered": run.recovered[0].recovered,
        "MetaModel": run.meta_model,
        "MetaModel(Sequential": own,
        "Classifier": classifier,
        "TaskMemory": run.memory,
        "BiDfMKD": trainer,
        "Budget": trainer.budget,
        "Ledger": apis[0].ledger,
        "FunctionBlackBox": apis[0],
        "Dataset": dataset,
        "EpisodeSampler": sampler,
        "Episode": sampler.episode(0),
        "ZerothOrder": bf.ZerothOrder(seed=1),
        "DistillationTask": DistillationTask(*[torch.rand(2, 1, 8, 8), torch.rand(2, 3)] * 2),
        "Evaluation": bf.Evaluation(
            0.5, 0.1, torch.rand(600), "glyphs", "meta_test", 5, 1, 15, 0, 10
        ),
    }
    for kind, value in objects.items():
        text = repr(value)
        assert (
            text.startswith(kind) and "\n" not in text and len(text) < 300 and "0x" not in text
        ), text
        if kind != "Run":  # which holds a MetaModel
            assert len(text) < 200, text
    assert "4 images 1x16x16 of 2 classes: " in repr(run.recovered[0].recovered)
    assert "130 parameters" in repr(own)


def test_importing_it_brings_in_neither_the_command_line_nor_pictures() -> None:
    unwanted = (
        "jsonargparse",
        "PIL",
        "matplotlib",
        "torchvision",
        "bidfmkd_fast.cli.main",
        "bidfmkd_fast.experiments.demo",
    )
    code = f"import sys, bidfmkd_fast; print([name for name in {unwanted} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_diagnostics_tell_versions_and_who_serves_what(capsys: pytest.CaptureFixture[str]) -> None:
    diagnostics.main()
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split("  ")[0]: line for line in lines}
    assert f" {bf.__version__}" in by_name["bidfmkd_fast"]
    assert {"python", "torch", "numpy", "native module", "cpu"} <= set(by_name)
    assert ("native kernels" in by_name["cpu"]) == (
        backend.device_problem(torch.device("cpu")) is None
    )
    info = backend.build_info()
    if info is not None:
        assert [line for line in lines if line.lstrip().startswith("CUDA: ")], (
            "the GPUs that it was built for are not shown"
        )
    value_columns = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}
    assert len(value_columns) == 1, "the values are not aligned"


def test_diagnostics_give_the_reason_when_there_is_no_native_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_C", None)
    monkeypatch.setattr(backend, "load_error", "ImportError: no such file")
    rows = dict(diagnostics.diagnostics())
    assert rows["native module"] == "not available"
    assert rows["load error"] == "ImportError: no such file"
    assert "plain torch" in rows["cpu"]
