"""Check our client against our service: equal counts on both sides, every kind of score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec, BlackBox, FunctionBlackBox
from bidfmkd_fast.serving import Behaviour
from bidfmkd_fast.serving.server import Service, running

remote = pytest.importorskip(
    "bidfmkd_fast.black_box.remote.v2_http", reason="there is no remote black box yet"
)

SHAPE = (1, 4, 4)
N_CALLS, N_IMAGES, N_BATCH = 6, 50, 10


def api(seed: int) -> BlackBox:
    weights = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    return FunctionBlackBox(lambda images: images.flatten(1) @ weights, APISpec(5, SHAPE, name="a"))


def images_for(n: int, seed: int) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dropped", [0.0, 0.05])
def test_the_ledger_agrees_with_the_server(dropped: float, seed: int) -> None:
    faults = Behaviour(
        max_batch=N_BATCH,
        failed=0.1,
        dropped=dropped,
        lost=dropped,
        storm_every=20,
        storm_length=3,
        retry_after=0,
    )
    service = Service([api(seed)], {"a": faults}, seed)
    images = images_for(N_IMAGES, seed)
    with running(service) as url:
        # 2/5 of the requests fail at most; 40 attempts in a row would be a broken client, not bad
        # luck
        box = remote.RemoteBlackBox(url, "a", retries=40, backoff=0.0)
        for _ in range(N_CALLS):
            torch.testing.assert_close(box(images), api(seed)(images))
    ledger, counted = box.ledger, service.statistics("a")["model_stats"][0]
    answered = counted["inference_stats"]["success"]["count"]
    assert ledger.answered_requests == answered == N_CALLS * N_IMAGES // N_BATCH
    assert ledger.answered_queries == N_CALLS * N_IMAGES
    assert ledger.requests == counted["received"]["requests"]
    assert ledger.queries == counted["received"]["images"]
    assert ledger.requests > counted["execution_count"] >= answered
    assert ledger.queries > counted["inference_count"] >= ledger.answered_queries
    if not dropped:
        assert counted["execution_count"] == answered
        assert counted["inference_count"] == ledger.answered_queries


def test_without_faults_all_counts_are_equal(seed: int) -> None:
    service = Service([api(seed)], {"a": Behaviour(max_batch=N_BATCH)}, seed)
    with running(service) as url:
        box = remote.RemoteBlackBox(url, "a")
        box(images_for(N_IMAGES, seed))
    counted = service.statistics("a")["model_stats"][0]
    assert (
        box.ledger.queries == counted["inference_count"] == box.ledger.answered_queries == N_IMAGES
    )
    assert (
        box.ledger.requests
        == counted["execution_count"]
        == box.ledger.answered_requests
        == N_IMAGES // N_BATCH
    )


def test_rounded_top_k_of_8_bit_images(seed: int) -> None:
    behaviour = Behaviour(top_k=3, decimals=2, dtype="uint8")
    spec = APISpec(5, SHAPE, name="a", scores_kind="top_k", top_k=3, decimals=2, dtype="uint8")
    images = images_for(N_IMAGES, seed)
    with running(Service([api(seed)], {"a": behaviour}, seed)) as url:
        scores = remote.RemoteBlackBox(url, "a", spec)(images).double().numpy()
    exact = api(seed)(images.mul(255).round().div(255)).double().softmax(1).numpy()
    best = np.argsort(-exact, axis=1)[:, :3]
    difference = np.abs(np.take_along_axis(scores, best, 1) - np.take_along_axis(exact, best, 1))
    assert difference.max() <= 0.005 + 1e-5  # half a unit of the last place
    assert (scores > 0).all()
    assert np.abs(scores.sum(1) - 1).max() < 0.05
