"""Ask real servers on loopback: the same scores as locally, and a whole run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import urllib3
from tolerances import TOLERANCES
from urllib3.exceptions import HTTPError

import bidfmkd_fast as bf
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import DistillationConfig, ReplayConfig, TrainConfig

remote = pytest.importorskip(
    "bidfmkd_fast.black_box.remote.v2_http", reason="there is no remote black box yet"
)

ROOT = Path(__file__).parents[2]
SERVERS = ("triton", "mlserver")
RTOL, ATOL = TOLERANCES["float32"]
HTTP = urllib3.PoolManager(retries=False, timeout=60)


@dataclass(frozen=True)
class RealServer:
    kind: str
    url: str
    grpc_url: str

    def apis(self, pool: Path) -> list[bf.BlackBox]:
        """Return the served models as black boxes, with the specs of the pool's APIs."""
        return [remote.RemoteBlackBox(self.url, api.name, api.spec) for api in bf.load_pool(pool)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pools") / "pool"
    bf.train_pool(bf.load_dataset("glyphs"), folder, n_apis=2, n_way=3, width=4, epochs=1)
    return folder


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    kind = request.param
    python = ROOT / f".venv-{kind}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"there is no {kind} here; examples/servers/{kind}/setup.sh installs it")
    port, grpc_port = free_ports(2)
    log = tmp_path_factory.mktemp(kind) / "log.txt"
    command = [
        python,
        ROOT / f"examples/servers/{kind}/serve.py",
        pool,
        "--port",
        port,
        "--grpc-port",
        grpc_port,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not ready(f"{url}/v2/models/api_001/ready"):  # the last one that is loaded
            assert process.poll() is None, f"{kind} ended by itself:\n{log.read_text()[-4000:]}"
            time.sleep(0.2)
        yield RealServer(kind, url, f"grpc://127.0.0.1:{grpc_port}")
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def free_ports(n: int) -> list[int]:
    """Return ports that are free now; all are held at once, so that they differ."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def ready(url: str) -> bool:
    try:
        return HTTP.request("GET", url).status == 200
    except HTTPError:
        return False


def images_for(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transport", ["json", "binary", "grpc"])
def test_scores_are_the_local_ones(
    server: RealServer, pool: Path, transport: str, seed: int
) -> None:
    if server.kind == "mlserver" and transport == "binary":
        pytest.skip("MLServer has no binary tensors over HTTP")
    images = images_for(40, seed)
    for local in bf.load_pool(pool):
        if transport == "grpc":
            pytest.importorskip("tritonclient.grpc", reason="the extra grpc is not installed")
            from bidfmkd_fast.black_box.remote.v2_grpc import GrpcBlackBox

            api: bf.BlackBox = GrpcBlackBox(server.grpc_url, local.name, local.spec)
        else:
            api = remote.RemoteBlackBox(server.url, local.name, local.spec, transport=transport)
        np.testing.assert_allclose(api(images).numpy(), local(images).numpy(), RTOL, ATOL)
        assert api.ledger.queries == 40


def test_the_spec_is_read_from_the_server(server: RealServer, pool: Path) -> None:
    api = remote.RemoteBlackBox(server.url, "api_000")
    assert api.spec.image_shape == (1, 28, 28)
    assert api.spec.n_classes == 3
    assert api.spec.max_batch == (256 if server.kind == "triton" else None)


def test_more_images_than_one_request_holds(server: RealServer, pool: Path, seed: int) -> None:
    images = images_for(600, seed)
    api = remote.RemoteBlackBox(server.url, "api_001", bf.load_pool(pool)[1].spec, transport="json")
    before = scored(server, "api_001")
    np.testing.assert_allclose(
        api(images).numpy(), bf.load_pool(pool)[1](images).numpy(), RTOL, ATOL
    )
    assert api.ledger.queries == 600
    assert api.ledger.requests == 3
    if before is not None:
        assert scored(server, "api_001") == before + 600


def test_a_run_through_real_servers(
    server: RealServer, pool: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = TrainConfig(
        survey=SurveyConfig(n_images=0),
        n_per_class=3,
        meta_batch_size=2,
        meta_model_width=4,
        recovery=RecoveryConfig(steps=5, num_directions=4, generator_width=4, latent_dim=8),
        distillation=DistillationConfig(inner_steps=2),
        replay=ReplayConfig(final_steps=2, n_query=2, inner_steps=1),
    )
    apis = server.apis(pool)
    before = [scored(server, api.name) for api in apis]
    run = bf.BiDfMKD(apis, config=config).fit(tmp_path / "remote")
    assert run.complete
    queries = 2 * 2 * 5 * 5 * 9  # APIs, sets, steps, points, images
    for api, count in zip(apis, before):
        sent = api.ledger.queries
        assert sent == api.ledger.answered_queries == queries // 2
        if count is not None:
            assert scored(server, api.name) == count + sent
    assert any("JSON" in str(warning.message) for warning in recwarn) == (server.kind == "mlserver")

    local = bf.BiDfMKD(bf.load_pool(pool), config=config).fit(tmp_path / "local")
    for name, value in local.meta_model.module.state_dict().items():
        torch.testing.assert_close(
            run.meta_model.module.state_dict()[name], value, rtol=1e-2, atol=1e-3
        )


def scored(server: RealServer, model: str) -> int | None:
    """Return how many images the server says it has scored; None if it does not say."""
    response = HTTP.request("GET", f"{server.url}/v2/models/{model}/stats")
    return response.json()["model_stats"][0]["inference_count"] if response.status == 200 else None
