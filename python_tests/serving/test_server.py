"""Check the whole service over HTTP on loopback: scores, faults and counts."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import urllib3
from tolerances import TOLERANCES
from torch import Tensor
from urllib3.exceptions import ProtocolError

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.serving import Behaviour
from bidfmkd_fast.serving.protocol import HEADER_LENGTH
from bidfmkd_fast.serving.server import Service, running

SHAPE = (1, 4, 4)
HTTP = urllib3.PoolManager(retries=False)


def api(name: str, seed: int, input_range: tuple[float, float] = (0.0, 1.0)) -> FunctionBlackBox:
    weights = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    return FunctionBlackBox(
        lambda images: images.flatten(1) @ weights, APISpec(5, SHAPE, input_range, name=name)
    )


@pytest.fixture
def images(seed: int) -> Tensor:
    return torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))


@contextmanager
def served(seed: int, behaviour: Behaviour | None = None) -> Iterator[tuple[str, Service]]:
    """Serve the model `a` with the given behaviour, and `b`, which behaves well."""
    service = Service(
        [api("a", seed), api("b", seed + 9)], {} if behaviour is None else {"a": behaviour}, seed
    )
    with running(service) as url:
        yield url, service


def ask(
    url: str, images: np.ndarray, *, model: str = "a", binary: bool = True
) -> urllib3.BaseHTTPResponse:
    datatype = "UINT8" if images.dtype == np.uint8 else "FP32"
    tensor: dict = {"name": "images", "datatype": datatype, "shape": list(images.shape)}
    message = {"id": "x1", "inputs": [tensor], "parameters": {"binary_data_output": binary}}
    if not binary:
        tensor["data"] = images.ravel().tolist()
        return HTTP.request("POST", f"{url}/v2/models/{model}/infer", json=message)
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    text = json.dumps(message).encode()
    headers = {HEADER_LENGTH: str(len(text))}
    return HTTP.request(
        "POST", f"{url}/v2/models/{model}/infer", body=text + images.tobytes(), headers=headers
    )


def scores_of(response: urllib3.BaseHTTPResponse) -> np.ndarray:
    assert response.status == 200, response.data
    length = int(response.headers.get(HEADER_LENGTH, len(response.data)))
    answer = json.loads(response.data[:length])
    assert answer["id"] == "x1"
    output = answer["outputs"][0]
    assert output["name"] == "scores"
    flat = output["data"] if "data" in output else np.frombuffer(response.data[length:], np.float32)
    return np.asarray(flat, np.float32).reshape(output["shape"])


def error_of(response: urllib3.BaseHTTPResponse) -> str:
    return response.json()["error"]


def test_a_top_k_api_is_served_as_the_probabilities_it_is_completed_to(
    images: Tensor, seed: int
) -> None:
    inside = api("a", seed)
    spec = APISpec(5, SHAPE, scores_kind="top_k", top_k=2, name="a")
    box = FunctionBlackBox(lambda asked: inside(asked).softmax(1), spec)
    with running(Service([box], {"a": Behaviour(scores_kind="logits")}, seed)) as url:
        scores = torch.tensor(scores_of(ask(url, images.numpy())))
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(scores.softmax(1), box(images), rtol=rtol, atol=atol)


@pytest.mark.parametrize("binary", [True, False])
def test_scores_are_the_local_ones(binary: bool, images: Tensor, seed: int) -> None:
    with served(seed) as (url, service):
        for model, number in (("a", seed), ("b", seed + 9)):
            scores = scores_of(ask(url, images.numpy(), model=model, binary=binary))
            assert np.array_equal(scores, api("local", number)(images).numpy())
    stats = service.statistics("a")["model_stats"][0]
    assert stats["inference_count"] == 6
    assert stats["execution_count"] == 1
    assert stats["inference_stats"] == {"success": {"count": 1}, "fail": {"count": 0}}


def test_uint8_images_span_the_input_range(seed: int) -> None:
    pixels = torch.randint(
        0, 256, (3, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    box = api("a", seed, (-1.0, 1.0))
    with running(Service([box], {"a": Behaviour(dtype="uint8")})) as url:
        scores = scores_of(ask(url, pixels.numpy()))
        assert "datatype must be 'UINT8'" in error_of(ask(url, pixels.float().numpy()))
    wanted = api("local", seed, (-1.0, 1.0))(pixels.double().div(255).mul(2).sub(1).float())
    np.testing.assert_allclose(scores, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_all_models_are_listed_in_the_form_of_triton(seed: int) -> None:
    with served(seed, Behaviour(failed=1.0)) as (url, service):
        answer = HTTP.request("POST", f"{url}/v2/repository/index", json={"ready": True})
        assert (
            answer.status == 200 and HTTP.request("GET", f"{url}/v2/repository/index").status == 405
        )
        assert [(model["name"], model["state"]) for model in answer.json()] == [
            ("a", "READY"),
            ("b", "READY"),
        ]
        assert not any(
            model["received"]["requests"] for model in service.statistics()["model_stats"]
        )


def test_health_metadata_and_configuration(seed: int) -> None:
    def get(path: str) -> dict:
        response = HTTP.request("GET", url + path)
        assert response.status == 200, path
        return response.json() if response.data else {}

    with served(seed, Behaviour(max_batch=32, top_k=2)) as (url, _):
        for path in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/a/ready",
            "/v2/models/a/versions/1/ready",
        ):
            get(path)
        assert "binary_tensor_data" in get("/v2")["extensions"]
        metadata = get("/v2/models/a")
        assert metadata == get("/v2/models/a/versions/1")
        assert metadata["versions"] == ["1"]
        assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, *SHAPE]}]
        assert metadata["outputs"] == [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "labels", "datatype": "INT64", "shape": [-1, 2]},
        ]
        config = get("/v2/models/a/config")
        assert config["max_batch_size"] == 32
        assert config["input"] == [
            {"name": "images", "data_type": "TYPE_FP32", "dims": list(SHAPE)}
        ]
        assert config["parameters"] == {}  # top_k names no kind
        config = get("/v2/models/b/config")
        assert config["parameters"] == {"scores_kind": {"string_value": "logits"}}
        assert (
            get("/v2/models/b/config")["max_batch_size"] == 0
        )  # Triton's word for no batch dimension of its own
        assert get("/v2/models/b/config")["input"][0]["dims"] == [-1, *SHAPE]
        assert [stats["name"] for stats in get("/v2/models/stats")["model_stats"]] == ["a", "b"]
        for path in (
            "/v2/models/c",
            "/v2/models/c/ready",
            "/v2/models/c/config",
            "/v2/models/c/stats",
        ):
            response = HTTP.request("GET", url + path)
            assert response.status == 404
            assert "there is no model 'c'; there are a, b" in error_of(response)
        assert ask(url, np.zeros((1, *SHAPE), np.float32), model="c").status == 404


def test_what_is_refused_is_said_and_not_scored(images: Tensor, seed: int) -> None:
    with served(seed, Behaviour(max_batch=5)) as (url, service):
        response = ask(url, images.numpy())
        assert response.status == 400
        assert error_of(response) == "a takes at most 5 images a request; got 6"
        response = ask(url, np.full((1, *SHAPE), np.nan, np.float32))
        assert response.status == 400
        assert "must be finite" in error_of(response)
        assert ask(url, images[:5].numpy()).status == 200
        stats = service.statistics("a")["model_stats"][0]
    assert stats["fates"] == {"refused": 2, "served": 1}
    assert stats["inference_count"] == 5
    assert stats["received"] == {"requests": 3, "images": 6}


def test_too_many_requests(images: Tensor, seed: int) -> None:
    with served(seed, Behaviour(storm_every=3, storm_length=1, retry_after=4)) as (url, service):
        responses = [ask(url, images.numpy()) for _ in range(6)]
        assert [response.status for response in responses] == [200, 200, 429] * 2
        assert responses[2].headers["Retry-After"] == "4"
        assert ask(url, images.numpy(), model="b").status == 200
        assert service.statistics("a")["model_stats"][0]["inference_count"] == 4 * 6
        assert service.statistics("a")["model_stats"][0]["received"] == {
            "requests": 6,
            "images": 36,
        }


def test_failures_have_several_statuses(images: Tensor, seed: int) -> None:
    with served(seed, Behaviour(failed=1.0)) as (url, service):
        statuses = {ask(url, images.numpy()).status for _ in range(40)}
        assert statuses == {500, 502, 503, 504}
        assert service.statistics("a")["model_stats"][0]["inference_count"] == 0


@pytest.mark.parametrize(("fate", "scored"), [("dropped", 0), ("lost", 6)])
def test_dropped_connections(fate: str, scored: int, images: Tensor, seed: int) -> None:
    with served(seed, Behaviour(**{fate: 1.0})) as (url, service):
        for _ in range(2):
            with pytest.raises(ProtocolError):
                ask(url, images.numpy())
        assert ask(url, images.numpy(), model="b").status == 200
        stats = service.statistics("a")["model_stats"][0]
    assert stats["inference_count"] == 2 * scored
    assert stats["received"] == {"requests": 2, "images": 12}
    assert stats["inference_stats"] == {"success": {"count": 0}, "fail": {"count": 2}}


@pytest.mark.parametrize("binary", [True, False])
def test_bad_answers(binary: bool, images: Tensor, seed: int) -> None:
    with served(seed, Behaviour(nan=1.0)) as (url, _):
        scores = scores_of(ask(url, images.numpy(), binary=binary))
        assert np.argwhere(np.isnan(scores)).tolist() == [[0, 0]]
    with served(seed, Behaviour(wrong_shape=1.0)) as (url, _):
        assert scores_of(ask(url, images.numpy(), binary=binary)).shape == (6, 4)


def test_an_api_that_breaks_is_answered_with_500(images: Tensor, seed: int) -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("its inside is gone")

    with running(Service([FunctionBlackBox(broken, APISpec(5, SHAPE, name="a"))])) as url:
        response = ask(url, images.numpy())
    assert response.status == 500
    assert error_of(response) == "its inside is gone"


def test_bad_services(seed: int) -> None:
    with pytest.raises(InputError, match="must have different names"):
        Service([api("a", seed), api("a", seed)])
    with pytest.raises(InputError, match="no API is called 'c'; there are a"):
        Service([api("a", seed)], {"c": Behaviour()})
    with pytest.raises(InputError, match="a has 5 classes; got top_k=6"):
        Service([api("a", seed)], {"a": Behaviour(top_k=6)})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is not available"),
            running(Service([]), port),
        ):
            pass


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "bidfmkd_fast.serving.server")
    with pytest.raises(
        InputError,
        match=r"uvicorn is not installed; `pip install 'starlette>=0.40' 'uvicorn>=0.30'`",
    ):
        importlib.import_module("bidfmkd_fast.serving.server")


def test_the_command_serves_a_pool_until_interrupted(tmp_path: Path) -> None:
    from bidfmkd_fast.cli.main import main
    from bidfmkd_fast.pools import load_pool

    pool, faults = str(tmp_path / "pool"), tmp_path / "faults.yaml"
    assert (
        main(
            [
                "pool",
                "--n-apis",
                "2",
                "--n-way",
                "3",
                "--width",
                "2",
                "--epochs",
                "1",
                "--out",
                pool,
            ]
        )
        == 0
    )
    faults.write_text("api_001: {failed: 1.0}\n")
    options = ["serve", pool, "--port", "0", "--config.decimals", "3", "--per-model", str(faults)]
    command = "import sys; from bidfmkd_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        announced = process.stdout.readline()
        assert announced.startswith("2 models at http://127.0.0.1:")
        url = announced.split()[3].removesuffix("/v2:")
        images = torch.rand(2, 1, 28, 28)
        scores = scores_of(ask(url, images.numpy(), model="api_000"))
        np.testing.assert_allclose(scores, load_pool(pool)[0](images).numpy(), rtol=0, atol=6e-4)
        assert ask(url, images.numpy(), model="api_001").status >= 500
        process.send_signal(signal.SIGINT)
        table = process.stdout.read()
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
    assert [line.split() for line in table.splitlines()] == [
        ["model", "requests", "images", "scored", "failed", "served"],
        ["-------", "--------", "-------------", "------", "------"],
        ["api_000", "1", "2", "0", "1"],
        ["api_001", "1", "0", "1", "0"],
    ]
