"""Check GrpcBlackBox against a server of the protocol's gRPC service in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from bidfmkd_fast.black_box import APISpec, GrpcBlackBox
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError

grpc = pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402

SPEC = APISpec(3, (1, 4, 4), name="cats")
QUICK: dict[str, Any] = {"backoff": 0.0, "retries": 2}


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    max_batch = 4
    faults: list[Any]
    metadata: list[Any]
    datatype: str
    axes: tuple[int, ...]
    odd: Any  # shape and bytes of an answer

    def __init__(self) -> None:
        self.faults, self.metadata, self.spoil = [], [], False
        self.datatype, self.axes = "FP32", ()
        self.odd = None

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=request.name,
            inputs=[tensor(name="x", datatype="FP32", shape=[-1, 1, 4, 4])],
            outputs=[tensor(name="y", datatype=self.datatype, shape=[-1, 3, *self.axes])],
        )

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if not self.max_batch:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such call")
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = self.max_batch
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            context.abort(fault, "told to")
        images = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(
            list(request.inputs[0].shape)
        )
        if len(images) > 4:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too large")
        scores = images.reshape(len(images), -1)[:, :3].copy()
        if self.spoil:
            scores[0, 0] = np.nan
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        shape, raw = (*scores.shape, *self.axes), scores.tobytes()
        if self.datatype == "BF16":
            raw = torch.from_numpy(scores).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        shape, raw = self.odd or (shape, raw)
        output = service_pb2.ModelInferResponse.InferOutputTensor(
            name="y", datatype=self.datatype, shape=shape
        )
        answer.outputs.append(output)
        answer.raw_output_contents.append(raw)
        return answer


@pytest.fixture
def served() -> Iterator[tuple[str, Servicer]]:
    server, servicer = grpc.server(ThreadPoolExecutor(4)), Servicer()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}", servicer
    server.stop(None).wait()


def images_of(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def counts(api: GrpcBlackBox) -> tuple[int, int, int, int]:
    ledger = api.ledger
    return ledger.queries, ledger.requests, ledger.answered_queries, ledger.answered_requests


def test_scores_counts_and_the_spec(served: tuple[str, Servicer], seed: int) -> None:
    url, _ = served
    api = GrpcBlackBox(url, "m", **QUICK)
    assert api.spec == APISpec(3, (1, 4, 4), name="m", max_batch=4)
    images = images_of(10, seed)
    assert torch.equal(api(images), images.flatten(1)[:, :3])
    assert counts(api) == (10, 3, 10, 3)


def test_faults_are_retried_and_counted(served: tuple[str, Servicer], seed: int) -> None:
    url, servicer = served
    servicer.faults = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, None]
    api = GrpcBlackBox(url, "m", SPEC, in_flight=1, **QUICK)
    images = images_of(2, seed)
    assert torch.equal(api(images), images.flatten(1)[:, :3])
    assert counts(api) == (6, 3, 2, 1) and len(servicer.metadata) == 3
    servicer.faults = [grpc.StatusCode.UNAVAILABLE] * 3
    with pytest.raises(
        APIUnavailable,
        match=r"cats: the server answered UNAVAILABLE: told to \(the last of 3 attempts\)",
    ):
        api(images)
    servicer.faults = [grpc.StatusCode.PERMISSION_DENIED]
    with pytest.raises(
        APIUnavailable, match="cats: the server answered PERMISSION_DENIED: told to"
    ):
        api(images)
    assert counts(api) == (14, 7, 2, 1)


def test_a_hidden_limit_is_found_by_halving(served: tuple[str, Servicer], seed: int) -> None:
    url, servicer = served
    servicer.max_batch = 0
    api, images = GrpcBlackBox(url, "m", SPEC, in_flight=1, **QUICK), images_of(8, seed)
    assert torch.equal(api(images), images.flatten(1)[:, :3])
    assert counts(api) == (16, 3, 8, 2)


def test_bad_answers_tokens_and_a_dead_server(
    served: tuple[str, Servicer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, servicer = served
    monkeypatch.setenv("CATS_TOKEN", "s3cret")
    servicer.spoil = True
    api = GrpcBlackBox(url, "m", SPEC, token_variable="CATS_TOKEN", **QUICK)
    with pytest.raises(BadAnswer, match="cats: .*NaN"):
        api(images_of(1, 0))
    assert servicer.metadata[0]["authorization"] == "Bearer s3cret"
    with pytest.raises(APIUnavailable, match="cats: the server answered UNAVAILABLE"):
        GrpcBlackBox("grpc://127.0.0.1:9", "m", SPEC, **QUICK)(images_of(1, 0))


def test_this_machine_is_asked_directly(
    served: tuple[str, Servicer], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    images = images_of(2, seed)
    assert torch.equal(
        GrpcBlackBox(served[0], "m", SPEC, **QUICK)(images), images.flatten(1)[:, :3]
    )


def test_bf16_and_axes_of_one(served: tuple[str, Servicer], seed: int) -> None:
    url, servicer = served
    servicer.datatype, servicer.axes = "BF16", (1, 1)
    api, images = GrpcBlackBox(url, "m", **QUICK), images_of(2, seed)
    assert api.spec.n_classes == 3
    assert torch.equal(api(images), images.flatten(1)[:, :3].to(torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1)])
def test_labels_alone(served: tuple[str, Servicer], shape: tuple[int, ...]) -> None:
    url, servicer = served
    servicer.datatype, servicer.odd = "INT32", (shape, np.array([2, 0], "<i4").tobytes())
    api = GrpcBlackBox(url, "m", APISpec(3, (1, 4, 4), scores_kind="labels", name="cats"), **QUICK)
    assert torch.equal(api(images_of(2, 0)), torch.eye(3)[[2, 0]])


@pytest.mark.parametrize(("shape", "raw"), [((2, 3), b"1234567"), ((2, 5), b"\0" * 24)])
def test_odd_answers(served: tuple[str, Servicer], shape: tuple[int, ...], raw: bytes) -> None:
    url, servicer = served
    servicer.odd = shape, raw
    with pytest.raises(BadAnswer, match="cats: "):
        GrpcBlackBox(url, "m", SPEC, **QUICK)(images_of(2, 0))


def test_urls_and_tokens_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "grpcx://me:PASSWORD@host:1",
        "grpc://me:PASSWORD@host:1",
        "grpc://me:PASSWORD@[::1",
        "grpc://host",
    ):
        with pytest.raises(InputError, match="cats: url must ") as raised:
            GrpcBlackBox(url, "m", SPEC)
        assert "PASSWORD" not in str(raised.value)
    for token in ("s3cret\ns3cret", "s3crét"):
        monkeypatch.setenv("CATS_TOKEN", token)
        with pytest.raises(
            InputError, match="holds a character that no header can carry"
        ) as raised:
            GrpcBlackBox("grpc://127.0.0.1:9", "m", SPEC, token_variable="CATS_TOKEN", **QUICK)(
                images_of(1, 0)
            )
        assert "s3cr" not in str(raised.value)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cats: url must be grpc://host:port"):
        GrpcBlackBox("http://host:1", "m", SPEC)
    monkeypatch.setenv("CATS_TOKEN", "s3cret")
    with pytest.raises(InputError, match="a token is sent encrypted only"):
        GrpcBlackBox("grpc://example.test:1", "m", SPEC, token_variable="CATS_TOKEN")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(InputError, match=r"`pip install 'tritonclient\[grpc\]>=2.40'`"):
        GrpcBlackBox("grpc://host:1", "m", SPEC)
