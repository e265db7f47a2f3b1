"""Check that OnnxBlackBox gives the exported module's scores, whatever the file states."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidfmkd_fast.black_box import APISpec, Budget, OnnxBlackBox
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError, ServiceWarning

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def save(
    path: Path, shape: list[Any], *, elements: int | None = None, outputs: int = 1, inputs: int = 1
) -> Path:
    """Write a file that multiplies the means of the channels by WEIGHT."""
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
        [
            helper.make_tensor_value_info(f"scores{i}", TensorProto.FLOAT, [shape[0], 4])
            for i in range(outputs)
        ],
        [
            numpy_helper.from_array(WEIGHT, "weight"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def images_of(n: int, seed: int, size: int = 8) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wanted(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(
        images.double().mean((2, 3)).numpy() @ WEIGHT.astype(np.float64)
    ).float()


def test_a_file_tells_its_spec(tmp_path: Path, seed: int) -> None:
    api = OnnxBlackBox(
        save(tmp_path / "means.onnx", ["N", 3, 8, 8]),
        {"class_names": list("abcd")},
        budget=Budget(700),
    )
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
    means = (
        grey.double().mean((2, 3)).expand(-1, 3)
    )  # doubling the size moves the mean a little at the border only
    normal = (means - torch.tensor(mean).double()) / torch.tensor(std).double()
    torch.testing.assert_close(
        api(grey), torch.from_numpy(normal.numpy() @ WEIGHT).float(), rtol=0.1, atol=0.1
    )


def test_bytes(tmp_path: Path, seed: int) -> None:
    api = OnnxBlackBox(
        save(tmp_path / "bytes.onnx", ["N", 3, 8, 8], elements=onnx.TensorProto.UINT8)
    )
    assert api.spec.dtype == "uint8"
    images = images_of(2, seed)
    torch.testing.assert_close(api(images), wanted((images * 255).round()), rtol=1e-4, atol=1e-2)


def test_an_exported_module(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("onnxscript", reason="torch exports through onnxscript")
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )
    torch.onnx.export(
        module.eval(), (torch.rand(2, 1, 8, 8),), tmp_path / "m.onnx", dynamic_shapes=({0: "N"},)
    )
    images = images_of(5, seed)[:, :1]
    torch.testing.assert_close(
        OnnxBlackBox(tmp_path / "m.onnx")(images), module(images).detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({"shape": ["N", 3, "H", "W"]}, None, "the file does not state image_shape"),
        ({}, APISpec(4, (1, 8, 8)), r"takes images \[3, 8, 8\], the spec sends \[1, 8, 8\]"),
        (
            {},
            APISpec(4, (3, 8, 8), dtype="uint8"),
            "takes FP32, the spec sends UINT8; use dtype='float32'",
        ),
        ({}, APISpec(4, (3, 8, 8), encoding="png"), "takes raw arrays; got encoding 'png'"),
        ({"outputs": 2}, APISpec(4, (3, 8, 8)), "must have one output of scores; it has scores0"),
        ({"inputs": 2}, None, "must take one input, the images; it takes 2"),
        ({}, {"colour": 1}, "no field colour"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], spec: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        OnnxBlackBox(save(tmp_path / "file.onnx", **{"shape": ["N", 3, 8, 8], **changes}), spec)
    assert "\n" not in str(raised.value)


def test_a_model_of_something_else_than_images(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["N", 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 8])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["rows"], ["out"])], "rows", [rows], [out]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "rows.onnx")
    with pytest.raises(
        InputError, match=r"must take images of four dimensions; it takes \[-1, 8\]"
    ):
        OnnxBlackBox(tmp_path / "rows.onnx")


def test_no_file_a_damaged_one_and_no_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there is no file"):
        OnnxBlackBox(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("nothing of the kind")
    with pytest.raises(InputError, match="cannot be loaded"):
        OnnxBlackBox(tmp_path / "text.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"`pip install 'onnxruntime>=1.17'`"):
        OnnxBlackBox(tmp_path / "text.onnx")


def save_baked(path: Path, target: list[int], *, data_file: str | None = None) -> Path:
    """Write a file that states a free number of images, with a Reshape to `target` inside."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.repeat(WEIGHT, 64, axis=0) / 64  # [192, 4]: what the channel means times WEIGHT are
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["images", "target"], ["rows"]),
            helper.make_node("MatMul", ["rows", "weight"], ["scores"]),
        ],
        "baked",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array(target), "target"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = (
        {}
        if data_file is None
        else {"save_as_external_data": True, "location": data_file, "size_threshold": 100}
    )
    onnx.save(model, path, **options)
    return path


@pytest.mark.parametrize(
    ("target", "batch"), [([1, 192], 1), ([2, 192], 2), ([4, 192], 4), ([4, -1], 4)]
)
def test_an_axis_that_claims_to_be_dynamic(
    tmp_path: Path, seed: int, target: list[int], batch: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save_baked(tmp_path / "baked.onnx", target)
    with pytest.warns(ServiceWarning, match=f"takes exactly {batch} at once"):
        api = OnnxBlackBox(path)
    images = images_of(7, seed)
    torch.testing.assert_close(api(images), wanted(images), rtol=1e-4, atol=1e-5)
    assert (api.ledger.queries, api.ledger.requests) == (7, 1)
    assert capfd.readouterr() == ("", "")  # onnxruntime's own lines
    if batch == 4:
        with pytest.raises(InputError, match="takes exactly 4 images at once; got max_batch=2"):
            OnnxBlackBox(path, {"max_batch": 2})


def test_an_axis_that_is_dynamic_is_not_warned_of(tmp_path: Path, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api = OnnxBlackBox(save_baked(tmp_path / "free.onnx", [-1, 192]))
    images = images_of(7, seed)
    torch.testing.assert_close(api(images), wanted(images), rtol=1e-4, atol=1e-5)


def save_reading_a_table(path: Path, length: int) -> Path:
    """Write a file that reads a table at `10 * brightest pixel`, which fails beyond its end."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("ReduceMax", ["images"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "ten"], ["number"]),
        helper.make_node("Cast", ["number"], ["place"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "place"], ["found"]),
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["products"]),
        helper.make_node("Add", ["products", "found"], ["scores"]),
    ]
    constants = {
        "ten": np.float32(10),
        "table": np.zeros(length, np.float32),
        "axes": [2, 3],
        "weight": WEIGHT,
    }
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    return path


def test_a_file_that_does_not_run_is_refused_when_it_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        InputError, match="broken.onnx does not run: broken: onnxruntime failed on 1 images"
    ) as caught:
        OnnxBlackBox(save_reading_a_table(tmp_path / "broken.onnx", 3))
    assert not any(
        part in str(caught.value)
        for part in ("\n", "\x1b", "onnxruntime_src", "[ONNXRuntimeError]")
    )
    with pytest.raises(InputError, match=r"must answer scores \[1, 5\]; it answered \[1, 4\]"):
        OnnxBlackBox(save_baked(tmp_path / "free.onnx", [-1, 192]), APISpec(5, (3, 8, 8)))
    assert capfd.readouterr() == ("", "")


def test_an_error_of_onnxruntime_is_ours(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    api = OnnxBlackBox(save_reading_a_table(tmp_path / "fails.onnx", 8))
    dark = images_of(3, seed) * 0.7
    torch.testing.assert_close(api(dark), wanted(dark), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadAnswer, match="^fails: onnxruntime failed on 3 images: ") as caught:
        api(torch.full((3, 3, 8, 8), 0.95))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert (api.ledger.queries, api.ledger.answered_queries) == (6, 3)
    assert capfd.readouterr() == ("", "")


def test_weights_in_a_file_of_their_own(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    save_baked(tmp_path / "a" / "m.onnx", [-1, 192], data_file="m.weights")
    images = images_of(3, seed)
    torch.testing.assert_close(
        OnnxBlackBox(tmp_path / "a" / "m.onnx")(images), wanted(images), rtol=1e-4, atol=1e-5
    )
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for path in ("b/m.onnx", tmp_path / "b" / "m.onnx"):
        torch.testing.assert_close(OnnxBlackBox(path)(images), wanted(images), rtol=1e-4, atol=1e-5)
    (tmp_path / "b" / "m.weights").rename(tmp_path / "m.weights")
    with pytest.raises(
        InputError, match=r"b/m.onnx keeps its weights in .*b/m\.weights, which is not there"
    ):
        OnnxBlackBox("b/m.onnx")


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("batch", ["N", 4])
def test_a_file_of_labels(tmp_path: Path, seed: int, keep: int, batch: str | int) -> None:
    from onnx import TensorProto, helper

    model = onnx.load(save(tmp_path / "scores.onnx", [batch, 3, 8, 8]))
    del model.graph.output[:]
    model.graph.node.append(
        helper.make_node("ArgMax", ["scores0"], ["label"], axis=1, keepdims=keep)
    )
    model.graph.output.append(
        helper.make_tensor_value_info("label", TensorProto.INT64, [batch, 1] if keep else [batch])
    )
    onnx.save(model, tmp_path / "labels.onnx")
    images = images_of(9, seed)
    n_classes = wanted(images).shape[1]
    box = OnnxBlackBox(tmp_path / "labels.onnx", {"n_classes": n_classes, "scores_kind": "labels"})
    labels = torch.nn.functional.one_hot(wanted(images).argmax(1), n_classes).float()
    assert torch.equal(box(images), labels)
    # Of scores, too, only the class comes out.
    box = OnnxBlackBox(tmp_path / "scores.onnx", {"scores_kind": "labels"})
    assert torch.equal(box(images), labels)
