"""OnnxBlackBox: the exported module's own scores, whatever the file says of batch, size and numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidfmkd_fast.black_box import APISpec, Budget, OnnxBlackBox
from bidfmkd_fast.errors import BudgetExhausted, InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def save(path: Path, shape: list[Any], *, elements: int | None = None, outputs: int = 1, inputs: int = 1) -> Path:
    """A file that averages over the image and multiplies the channel means with WEIGHT."""
    from onnx import TensorProto, helper, numpy_helper

    elements = TensorProto.FLOAT if elements is None else elements
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["scores0"]),
    ]
    nodes += [helper.make_node("Identity", ["scores0"], [f"scores{i}"]) for i in range(1, outputs)]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("images", elements, shape)]
        + [helper.make_tensor_value_info(f"more{i}", elements, shape) for i in range(1, inputs)],
        [helper.make_tensor_value_info(f"scores{i}", TensorProto.FLOAT, [shape[0], 4]) for i in range(outputs)],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def images_of(n: int, seed: int, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wanted(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(images.double().mean((2, 3)).numpy() @ WEIGHT.astype(np.float64)).float()


def test_a_file_tells_its_spec(tmp_path: Path, seed: int) -> None:
    api = OnnxBlackBox(save(tmp_path / "means.onnx", ["N", 3, 8, 8]), {"class_names": list("abcd")}, budget=Budget(700))
    assert api.spec == APISpec(4, (3, 8, 8), class_names=tuple("abcd"), name="means")
    images = images_of(600, seed)
    torch.testing.assert_close(api(images), wanted(images), rtol=1e-4, atol=1e-5)
    assert (api.ledger.queries, api.ledger.requests, api.ledger.answered_queries) == (600, 1, 600)
    with pytest.raises(BudgetExhausted):
        api(images)


def test_a_fixed_batch_is_filled_up(tmp_path: Path, seed: int) -> None:
    api = OnnxBlackBox(save(tmp_path / "four.onnx", [4, 3, 8, 8]))
    images = images_of(7, seed)
    torch.testing.assert_close(api(images), wanted(images), rtol=1e-4, atol=1e-5)


def test_another_size_normalised_and_channels_of_grey(tmp_path: Path, seed: int) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    spec = APISpec(4, (1, 8, 8), server_shape=(3, 16, 16), mean=mean, std=std, name="big")
    api = OnnxBlackBox(save(tmp_path / "big.onnx", ["N", 3, 16, 16]), spec)
    grey = images_of(3, seed)[:, :1]
    means = grey.double().mean((2, 3)).expand(-1, 3)  # doubling the size moves the mean a little at the border only
    normal = (means - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(api(grey), torch.from_numpy(normal.numpy() @ WEIGHT).float(), rtol=0.1, atol=0.1)


def test_bytes(tmp_path: Path, seed: int) -> None:
    api = OnnxBlackBox(save(tmp_path / "bytes.onnx", ["N", 3, 8, 8], elements=onnx.TensorProto.UINT8))
    assert api.spec.dtype == "uint8"
    images = images_of(2, seed)
    torch.testing.assert_close(api(images), wanted((images * 255).round()), rtol=1e-4, atol=1e-2)


def test_an_exported_module(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("onnxscript", reason="torch exports through onnxscript")
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    torch.onnx.export(module.eval(), (torch.rand(2, 1, 8, 8),), tmp_path / "m.onnx", dynamic_shapes=({0: "N"},))
    images = images_of(5, seed)[:, :1]
    torch.testing.assert_close(OnnxBlackBox(tmp_path / "m.onnx")(images), module(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({"shape": ["N", 3, "H", "W"]}, None, "the file does not tell image_shape"),
        ({}, APISpec(4, (1, 8, 8)), r"takes images \[3, 8, 8\], the spec sends \[1, 8, 8\]"),
        ({}, APISpec(4, (3, 8, 8), dtype="uint8"), "takes FP32, the spec sends UINT8; use dtype='float32'"),
        ({}, APISpec(4, (3, 8, 8), encoding="png"), "takes raw arrays; got encoding 'png'"),
        ({"outputs": 2}, APISpec(4, (3, 8, 8)), "must have one output of scores; it has scores0"),
        ({"inputs": 2}, None, "must take one input, the images; it takes 2"),
        ({}, {"colour": 1}, "no field colour"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        OnnxBlackBox(save(tmp_path / "file.onnx", **{"shape": ["N", 3, 8, 8], **changes}), spec)
    assert "\n" not in str(raised.value)


def test_a_model_of_something_else_than_images(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["N", 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph([helper.make_node("Identity", ["rows"], ["out"])], "rows", [rows], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "rows.onnx")
    with pytest.raises(InputError, match=r"must take images of four dimensions; it takes \[-1, 8\]"):
        OnnxBlackBox(tmp_path / "rows.onnx")


def test_no_file_a_damaged_one_and_no_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no file"):
        OnnxBlackBox(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("nothing of the kind")
    with pytest.raises(InputError, match="cannot be loaded"):
        OnnxBlackBox(tmp_path / "text.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"`pip install 'onnxruntime>=1.17'`"):
        OnnxBlackBox(tmp_path / "text.onnx")
