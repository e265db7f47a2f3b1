"""Check that every field of APISpec has an effect on every box, or is refused by the box."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import (
    APISpec,
    BlackBox,
    FunctionBlackBox,
    JSONBlackBox,
    OnnxBlackBox,
    OpenBox,
    RemoteBlackBox,
    TorchBlackBox,
)
from bidfmkd_fast.errors import BadAnswer, InputError

Array = np.ndarray[Any, Any]
WEIGHT = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * 3
KINDS = ("function", "torch", "open", "onnx", "remote", "json")
SPEC: dict[str, Any] = {"n_classes": 4, "image_shape": (3, 8, 8), "name": "kept"}


def scores_of(numbers: Array, spec: APISpec, kind: str | None = None) -> Array:
    """Compute the scores of the API behind every box: a linear map of the channel means."""
    axes = (1, 2) if spec.layout == "NHWC" else (2, 3)
    unit = numbers.astype(np.float64) / 255 if numbers.dtype == np.uint8 else numbers
    logits = torch.from_numpy(unit.mean(axes) @ WEIGHT)
    kind = spec.returned_kind if kind is None else kind
    give = {
        "logits": lambda x: x,
        "probabilities": lambda x: x.softmax(1),
        "log_probabilities": lambda x: x.log_softmax(1),
    }
    return np.asarray(give[kind](logits).float().numpy())


def as_a_service_answers(scores: Array, spec: APISpec) -> Array:
    """Round scores and cut them to the top k, as a service does."""
    answered = scores if spec.decimals is None else np.round(scores, spec.decimals)
    if spec.top_k is not None:
        answered = np.where(scores >= np.sort(scores, axis=1)[:, [-spec.top_k]], answered, 0)
    return answered


class Means(nn.Module):
    def __init__(self, spec: APISpec, kind: str | None, batches: list[int]) -> None:
        super().__init__()
        self.inside = lambda images: (
            batches.append(len(images))
            or torch.from_numpy(  # type: ignore[func-returns-value]
                scores_of(images.numpy(), spec, kind)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.inside(images)


class Made:
    """A maker of boxes of one kind, which notes the size of each batch that their API gets."""

    def __init__(
        self, kind: str, tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.kind, self.folder, self.server, self.monkeypatch = kind, tmp_path, server, monkeypatch
        self.batches: list[int] = []

    def __call__(self, api_kind: str | None = None, **changes: Any) -> BlackBox:
        spec = APISpec(**{**SPEC, **changes})

        def answer(numbers: Array) -> Array:
            self.batches.append(len(numbers))
            assert list(numbers.shape[1:]) == wire_shape(spec)
            assert numbers.dtype == (np.uint8 if spec.is_8_bit else np.float32)
            return as_a_service_answers(scores_of(numbers, spec, api_kind), spec)

        if self.kind == "function":
            module = Means(spec, api_kind, self.batches)
            return FunctionBlackBox(module.inside, spec)
        if self.kind in ("torch", "open"):
            module = Means(spec, api_kind, self.batches)
            box = TorchBlackBox(module, spec) if self.kind == "torch" else OpenBox(module, spec)
            self.batches.clear()  # of the trials
            return box
        if self.kind == "onnx":
            return self._onnx(spec, api_kind)
        if self.kind == "remote":
            datatype = (
                "BYTES" if spec.encoding != "raw" else "UINT8" if spec.dtype == "uint8" else "FP32"
            )
            self.server.serve_v2(answer, wire_shape(spec), 4, datatype=datatype)
            if datatype == "BYTES":
                self.server.post = lambda sent: self._answer_files(sent, answer)
            return RemoteBlackBox(self.server.url, "m", spec, retries=0, backoff=0.0)
        self.server.post = lambda sent: (
            200,
            {},
            json.dumps(answer(read_json(sent, spec)).tolist()).encode(),
        )
        return JSONBlackBox(
            self.server.url, spec, {"body": "$images", "scores": ""}, retries=0, backoff=0.0
        )

    def _onnx(self, spec: APISpec, api_kind: str | None) -> OnnxBlackBox:
        onnx = pytest.importorskip("onnx")
        runtime = pytest.importorskip("onnxruntime")
        from onnx import TensorProto, helper, numpy_helper

        axes = [1, 2] if spec.layout == "NHWC" else [2, 3]
        kind = spec.returned_kind if api_kind is None else api_kind
        last = {
            "logits": "Identity",
            "probabilities": "Softmax",
            "log_probabilities": "LogSoftmax",
        }[kind]
        nodes = [
            helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["numbers", "unit"], ["scaled"]),
            helper.make_node("ReduceMean", ["scaled", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weight"], ["logits"]),
            helper.make_node(last, ["logits"], ["scores"]),
        ]
        elements = TensorProto.UINT8 if spec.dtype == "uint8" else TensorProto.FLOAT
        unit = np.float32(255 if spec.dtype == "uint8" else 1)
        graph = helper.make_graph(
            nodes,
            "means",
            [helper.make_tensor_value_info("images", elements, ["N", *wire_shape(spec)])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
            [numpy_helper.from_array(np.array(value), name) for name, value in
             {"weight": WEIGHT, "axes": axes, "unit": unit}.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, self.folder / "means.onnx")
        box, run = OnnxBlackBox(self.folder / "means.onnx", spec), runtime.InferenceSession.run

        def noting(session: Any, names: Any, feed: Any, *more: Any) -> Any:
            self.batches.extend(len(array) for array in feed.values())
            return run(session, names, feed, *more)

        self.monkeypatch.setattr(runtime.InferenceSession, "run", noting)
        return box

    def _answer_files(self, sent: Any, answer: Callable[[Array], Array]) -> Any:
        length = int(sent.headers["Inference-Header-Content-Length"])
        header, raw, files = json.loads(sent.body[:length]), sent.body[length:], []
        while raw:
            size = int.from_bytes(raw[:4], "little")
            files.append(raw[4 : 4 + size])
            raw = raw[4 + size :]
        scores = answer(decoded(files)).astype(np.float32)
        output = {
            "name": "y",
            "datatype": "FP32",
            "shape": list(scores.shape),
            "data": scores.ravel().tolist(),
        }
        return (
            200,
            {},
            json.dumps({"model_name": "m", "id": header["id"], "outputs": [output]}).encode(),
        )


def wire_shape(spec: APISpec) -> list[int]:
    channels, height, width = spec.image_shape if spec.server_shape is None else spec.server_shape
    return [height, width, channels] if spec.layout == "NHWC" else [channels, height, width]


def decoded(files: list[bytes]) -> Array:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).transpose(
        0, 3, 1, 2
    )


def read_json(sent: Any, spec: APISpec) -> Array:
    content = json.loads(sent.body)
    if spec.encoding != "raw":
        return decoded([base64.b64decode(text) for text in content])
    return np.array(content, np.uint8 if spec.dtype == "uint8" else np.float32)


def images_of(n: int, spec: APISpec | None = None) -> Tensor:
    """Make images of one colour each, in unit range, which resampling does not change."""
    shape = (3, 8, 8) if spec is None else spec.image_shape
    colours = torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(n)) * 0.9 + 0.05
    return colours.expand(n, *shape).contiguous()


@pytest.fixture(params=KINDS)
def made(
    request: pytest.FixtureRequest, tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> Made:
    return Made(request.param, tmp_path, server, monkeypatch)


def close(scores: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(
        scores, torch.as_tensor(wanted, dtype=torch.float32), rtol=2e-4, atol=2e-5
    )


def logits(images: Tensor) -> Tensor:
    return torch.from_numpy(images.mean((2, 3)).numpy() @ WEIGHT)


def bytes_of(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


# --- what each field does
# ---------------------------------------------------------------------------------------------


def n_classes(made: Made) -> None:
    assert made()(images_of(5)).shape == (5, 4)
    with pytest.raises((BadAnswer, InputError), match="5"):
        made(n_classes=5)(images_of(5))


def image_shape(made: Made) -> None:
    box = made(image_shape=(3, 16, 16))
    close(box(images_of(5, box.spec)), logits(images_of(5)))
    with pytest.raises(InputError, match=r"images must be \[N, 3, 16, 16\]"):
        box(images_of(5))


def input_range(made: Made) -> None:
    """Check that bytes follow from the range, and that floats are sent as they are."""
    images = images_of(5)
    close(made(input_range=(-1.0, 1.0))(images), logits(images))
    if made.kind in ("function", "torch"):  # they get the range's own values back
        close(
            made(input_range=(-1.0, 1.0), dtype="uint8")(images * 2 - 1),
            logits(bytes_of(images) * 2 - 1),
        )
    elif made.kind != "open":
        close(
            made(input_range=(-1.0, 1.0), dtype="uint8")(images * 2 - 1), logits(bytes_of(images))
        )


def scores_kind(made: Made) -> None:
    images = images_of(5)
    close(made(scores_kind="log_probabilities")(images), logits(images).log_softmax(1))
    with pytest.raises(BadAnswer, match="scores_kind is 'probabilities'"):
        made("logits", scores_kind="probabilities")(images)
    if made.kind == "open":
        with pytest.raises(InputError, match="an open box gives gradients, and a label has none"):
            made(scores_kind="labels")
        return
    for kind in ("logits", "probabilities"):  # of labels only the class comes out
        labels = made(kind, scores_kind="labels")(images)
        assert torch.equal(labels, nn.functional.one_hot(logits(images).argmax(1), 4).float())


def class_names(made: Made) -> None:
    box = made(class_names=tuple("abcd"))
    assert box.spec.names == tuple("abcd")
    if made.kind == "json":  # there they say which score is whose
        labels = [["c", "a", "d", "b"]] * 2
        made.server.post = lambda sent: (
            200,
            {},
            json.dumps({"l": labels, "s": [[3, 1, 4, 2]] * 2}).encode(),
        )
        mapping = {"body": "$images", "scores": "s", "labels": "l"}
        box = JSONBlackBox(made.server.url, box.spec, mapping)
        close(box(images_of(2)), [[1, 2, 3, 4]] * 2)


def data_set(made: Made) -> None:
    assert made(data_set="birds").spec.data_set == "birds"


def name(made: Made) -> None:
    box = made(name="crow")
    with pytest.raises(InputError, match="^crow: images must be"):
        box(torch.rand(2, 1, 8, 8))


def server_shape(made: Made) -> None:
    images = images_of(5)
    close(made(server_shape=(3, 16, 12))(images), logits(images))


def layout(made: Made) -> None:
    images = images_of(5)
    close(made(layout="NHWC")(images), logits(images))


def dtype(made: Made) -> None:
    images = images_of(5)
    wanted = images if made.kind == "open" else bytes_of(images)  # an open box answers in full
    close(made(dtype="uint8")(images), logits(wanted))


def encoding(made: Made) -> None:
    images = images_of(5)
    wanted = images if made.kind == "open" else bytes_of(images)
    close(made(encoding="png")(images), logits(wanted))


def mean(made: Made) -> None:
    images, shift, scale = images_of(5), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    normal = (images - torch.tensor(shift).view(-1, 1, 1)) / torch.tensor(scale).view(-1, 1, 1)
    close(made(mean=shift, std=scale)(images), logits(normal))


def decimals(made: Made) -> None:
    images = images_of(5)
    full = logits(images).softmax(1)
    wanted = full if made.kind == "open" else full.double().round(decimals=2).clamp(min=0.005)
    close(made(scores_kind="probabilities", decimals=2)(images), wanted)


def top_k(made: Made) -> None:
    images = images_of(5)
    full = logits(images).softmax(1)
    best = full.topk(2).values
    spread = torch.where(full >= best[:, 1:], full, (1 - best.sum(1, keepdim=True)) / 2)
    close(made(scores_kind="top_k", top_k=2)(images), full if made.kind == "open" else spread)


def max_batch(made: Made) -> None:
    box = made(max_batch=32)
    close(box(images_of(100)), logits(images_of(100)))
    assert sum(made.batches) == 100 and max(made.batches) <= 32
    assert box.ledger.requests == 4
    assert box.ledger.answered_requests == 4


def price_per_1000(made: Made) -> None:
    box = made(price_per_1000=2.0)
    box(images_of(50))
    assert box.ledger.cost == pytest.approx(0.1)


ACTS: dict[str, Callable[[Made], None]] = {
    function.__name__: function
    for function in (
        n_classes, image_shape, input_range, scores_kind, class_names, data_set, name,
        server_shape, layout, dtype, encoding, mean, decimals, top_k, max_batch, price_per_1000,
    )
} | {"std": mean}  # fmt: skip
REFUSED = {
    (kind, field): "are for services"
    for kind in ("torch", "open")
    for field in ("server_shape", "layout", "mean", "std")
}
REFUSED[("onnx", "encoding")] = "takes raw arrays"


@pytest.mark.parametrize("field", [field.name for field in fields(APISpec)])
def test_every_field_acts_or_is_refused(made: Made, field: str) -> None:
    if (made.kind, field) not in REFUSED:
        ACTS[field](made)
        return
    with pytest.raises(InputError, match=REFUSED[made.kind, field]):
        ACTS[field](made)
    assert made.batches == []


def test_a_batch_limit_that_would_change_the_scores_is_refused() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False), nn.Linear(192, 4)
    )
    spec = APISpec(**SPEC, max_batch=8)
    for box in (TorchBlackBox, OpenBox):
        with pytest.raises(InputError, match="kept: max_batch=8 would change the scores"):
            box(module, spec)


def test_a_batch_limit_is_paid_for_request_by_request_and_bad_pieces_are_told() -> None:
    box = FunctionBlackBox(
        lambda images: images.mean((2, 3)), APISpec(3, (3, 8, 8), max_batch=32, name="pieces")
    )
    assert box(images_of(64)).shape == (64, 3) and box.ledger.requests == 2
    box = FunctionBlackBox(lambda images: list(images), box.spec)  # type: ignore[arg-type, return-value]
    with pytest.raises(BadAnswer, match=r"finite scores \[32, 3\]; it answered a list"):
        box(images_of(64))
