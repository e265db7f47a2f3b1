"""Test `ZerothOrder`: ask, tell, tell_scores and ask_chunks."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError

KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]
RTOL, ATOL = TOLERANCES["kernel"]


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_truth(kind: str, grid: int, seed: int) -> None:
    """Check that ask and tell give the true gradient of a linear function (d = 8, q = 20000).

    The cosine is above 0.99 and the length within 5 %.
    """
    x, slope = leaf(1, 2, 2, 2, seed=seed), leaf(2, 2, 2, seed=seed + 1).detach()
    zo = bf.ZerothOrder(20000, 0.1, kind, grid, seed)
    loss = zo.tell((zo.ask(x).double() * slope).flatten(2).sum(-1).float())
    loss.backward()
    assert F.cosine_similarity(x.grad.flatten(), slope.flatten(), dim=0) > 0.99
    assert abs(x.grad.norm() / slope.norm() - 1) < 0.05


def test_the_estimate_flows_into_the_graph(seed: int) -> None:
    """Check that the gradient of mean(losses[0]) in x is estimate / B times the upstream one."""
    weight, q, b = leaf(3, 3, seed=seed), 6, 4
    inputs = leaf(b, 3, seed=seed + 1)
    x = inputs @ weight
    zo = bf.ZerothOrder(q, 0.2, seed=seed)
    points = zo.ask(x)
    assert torch.equal(points[0], x)
    assert not points.requires_grad
    losses = points.square().sum(-1)
    loss = zo.tell(losses)
    torch.testing.assert_close(loss, losses[0].mean())
    torch.testing.assert_close(zo.last_loss, losses[0])
    (3 * loss).backward()
    estimate = bf.ops.estimate_gradient(
        losses[1:] - losses[:1], torch.tensor([seed, 0]), (b, 3), 0.2
    )
    torch.testing.assert_close(weight.grad, 3 * inputs.detach().T @ (estimate / b))


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_chunks_are_the_whole(kind: str, grid: int, seed: int) -> None:
    x = leaf(5, 3, 8, 8, seed=seed)
    for max_images in (1, 7, 5 * 13, 10**6):
        whole, parts = (
            bf.ZerothOrder(70, 0.1, kind, grid, seed),
            bf.ZerothOrder(70, 0.1, kind, grid, seed),
        )
        for _ in range(2):
            chunks = list(parts.ask_chunks(x, max_images))  # all kept: none may overwrite another
            assert max(len(chunk) for chunk in chunks) == max(1, min(71, max_images // 5))
            assert torch.equal(torch.cat(chunks), whole.ask(x))
            parts.reset()
            whole.reset()


def draws(zo: bf.ZerothOrder, x: Tensor, n: int) -> list[Tensor]:
    """Return the points of the next `n` asks, each dropped before the next."""
    points = []
    for _ in range(n):
        points.append(zo.ask(x))
        zo.reset()
    return points


def test_every_ask_draws_anew_and_a_seed_repeats(seed: int) -> None:
    x = leaf(2, 3, 8, 8, seed=seed)
    estimator, other = bf.ZerothOrder(4, 0.1, seed=seed), bf.ZerothOrder(4, 0.1, seed=seed)
    first, second = draws(estimator, x, 2)
    assert not torch.equal(first, second)
    for mine, wanted in zip(draws(other, x, 2), (first, second)):
        assert torch.equal(mine, wanted)
    assert torch.equal(estimator.state, torch.tensor([seed, 1]))
    assert torch.equal(first, bf.ops.perturb(x.detach(), torch.tensor([seed, 0]), 4, 0.1))
    assert not torch.equal(first, bf.ZerothOrder(4, 0.1, seed=seed + 1).ask(x))


def test_tell_scores_is_tell_of_the_objective(seed: int) -> None:
    x = leaf(3, 1, 4, 4, seed=seed)
    network = leaf(16, 5, seed=seed + 1).detach()
    labels = torch.tensor([0, 3, 4])
    by_scores, by_losses = bf.ZerothOrder(8, 0.1, seed=seed), bf.ZerothOrder(8, 0.1, seed=seed)
    scores = by_scores.ask(x).flatten(2) @ network
    loss = by_scores.tell_scores(scores, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    by_losses.ask(x)
    losses = F.cross_entropy(
        scores.flatten(0, 1).double(), labels.repeat(9), reduction="none"
    ).view(9, 3)
    expected = by_losses.tell(losses)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=RTOL, atol=ATOL)
    # The losses' own rounding to float32, divided by mu.
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_the_boundary_term_needs_a_weight_and_scores(seed: int) -> None:
    x = leaf(2, 1, 4, 4, seed=seed)
    zo = bf.ZerothOrder(8, 0.1, seed=seed)
    scores = torch.randn(9, 2, 5)
    zo.ask(x)
    plain = zo.tell_scores(scores, torch.tensor([0, 1]))
    zo.ask(x)
    student = scores[0] + 1
    pushed = zo.tell_scores(
        scores, torch.tensor([0, 1]), student, boundary_weight=0.5, divergence="l1"
    )
    torch.testing.assert_close(plain - pushed, torch.tensor(0.5 * 5))  # five classes, each 1 apart


def test_a_second_ask_before_tell_is_refused(seed: int) -> None:
    """Refuse a second ask before tell; `reset` allows it after a query that failed.

    Otherwise the losses of the first ask would be attributed to the directions of the second.
    """
    x = leaf(2, 3, seed=seed)
    zo, wanted = bf.ZerothOrder(4, 0.1, seed=seed), bf.ZerothOrder(4, 0.1, seed=seed)
    losses = zo.ask(x).square().sum(-1)
    for again in (zo.ask, zo.ask_chunks):
        with pytest.raises(InputError, match=r"have not been told yet.*reset\(\) to drop"):
            again(x)
    (gradient,) = torch.autograd.grad(zo.tell(losses), x)  # the refusal left the first as it was
    (expected,) = torch.autograd.grad(wanted.tell(wanted.ask(x).square().sum(-1)), x)
    assert torch.equal(gradient, expected)

    zo.ask(x)
    zo.reset()
    with pytest.raises(InputError, match="there is no pending ask in this thread"):
        zo.tell(losses)
    zo.tell(zo.ask(x).square().sum(-1))
    assert torch.equal(zo.state, torch.tensor([seed, 2]))  # what was dropped is not drawn again
    with pytest.raises(InputError, match="x must be float32 or float64"):
        zo.ask(x.long())
    zo.ask(x)  # an ask that failed is not pending


def test_threads_share_an_estimator(seed: int) -> None:
    """Check that no two asks of any threads share directions, and each thread tells its own ask."""
    n_threads, n_asks = 4, 40
    zo = bf.ZerothOrder(2, 0.1, seed=seed)
    start, seen, wrong = threading.Barrier(n_threads), [], []

    def work(number: int) -> None:
        x = leaf(2, 16, seed=seed + number)
        start.wait()
        for _ in range(n_asks):
            points = zo.ask(x)
            losses = points.square().sum(-1)
            (gradient,) = torch.autograd.grad(zo.tell(losses), x)
            if not torch.equal(zo.last_loss, losses[0]):
                wrong.append(f"thread {number} has the losses of another")
            # The step is the one whose points these are.
            states = [torch.tensor([seed, step]) for step in range(n_threads * n_asks)]
            steps = [
                s for s in states if torch.equal(bf.ops.perturb(x.detach(), s, 2, 0.1), points)
            ]
            seen.extend(int(state[1]) for state in steps)
            estimate = bf.ops.estimate_gradient(losses[1:] - losses[:1], steps[0], x.shape, 0.1)
            if not torch.equal(gradient, estimate / 2):
                wrong.append(f"thread {number} has the gradient of other directions")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(work, range(n_threads)))
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert sorted(seen) == list(range(n_threads * n_asks))


def test_an_ask_belongs_to_its_thread(seed: int) -> None:
    x, zo = leaf(2, 3, seed=seed), bf.ZerothOrder(4, 0.1, seed=seed)
    zo.ask(x)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(InputError, match="no pending ask in this thread"):
            pool.submit(zo.tell, torch.zeros(5, 2)).result()
        pool.submit(zo.ask, x).result()
    zo.tell(torch.zeros(5, 2))


def test_without_a_seed_torch_gives_one() -> None:
    torch.manual_seed(5)
    estimator, other = bf.ZerothOrder(), bf.ZerothOrder()
    behind = torch.rand(())
    assert estimator.seed != other.seed
    torch.manual_seed(5)
    assert [bf.ZerothOrder().seed, bf.ZerothOrder().seed] == [estimator.seed, other.seed]
    assert torch.equal(torch.rand(()), behind)
    before = torch.get_rng_state()
    assert bf.ZerothOrder(seed=7).seed == 7
    assert torch.equal(torch.get_rng_state(), before)  # a fixed seed leaves torch's stream alone


def test_state_dict_keeps_the_position(seed: int) -> None:
    x = leaf(2, 3, seed=seed)
    estimator = bf.ZerothOrder(4, 0.1, seed=seed)
    assert estimator.state_dict() == {"seed": seed, "step": 0}
    draws(estimator, x, 3)
    saved = estimator.state_dict()
    assert saved == {"seed": seed, "step": 3}
    wanted = draws(estimator, x, 2)
    other = bf.ZerothOrder(4, 0.1, seed=seed + 1)
    other.ask(x)
    other.load_state_dict(saved)
    for mine, theirs in zip(draws(other, x, 2), wanted):
        assert torch.equal(mine, theirs)
    other.load_state_dict({"seed": seed, "step": 0})
    assert other.state is None
    for bad in (
        {"seed": 1},
        {"seed": 1, "step": -1},
        {"seed": 2**63, "step": 0},
        {"seed": 1.5, "step": 0},
        None,
    ):
        with pytest.raises(InputError, match=r"ZerothOrder.load_state_dict: "):
            other.load_state_dict(bad)
    assert other.state_dict() == {"seed": seed, "step": 0}


def test_a_copy_goes_on_by_itself(seed: int) -> None:
    x = leaf(2, 3, seed=seed)
    estimator = bf.ZerothOrder(4, 0.1, seed=seed)
    estimator.ask(x)
    for other in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        points = other.ask(x)  # nothing is pending in it
        assert torch.equal(points, bf.ops.perturb(x.detach(), torch.tensor([seed, 1]), 4, 0.1))
    assert estimator.state_dict()["step"] == 1


def test_inference_mode_leaves_it_usable(seed: int) -> None:
    x, zo = leaf(2, 3, seed=seed), bf.ZerothOrder(4, 0.1, seed=seed)
    with torch.inference_mode():
        points = zo.ask(x)
    (gradient,) = torch.autograd.grad(zo.tell(points.square().sum(-1).clone()), x)
    assert gradient.abs().sum() > 0
    zo.tell(zo.ask(x).square().sum(-1)).backward()
    with torch.inference_mode():
        zo.load_state_dict(zo.state_dict())
    zo.ask(x)


def test_bad_input() -> None:
    for keywords, message in (
        ({"num_directions": 0}, "num_directions must be at least 1; got 0"),
        ({"mu": 0.0}, "must be a positive number; got 0.0"),
        ({"mu": float("inf")}, "must be a positive number; got inf"),
        ({"mu": 1e300}, "must be from 1e-30 to 1e[+]30, which float32 holds; got 1e[+]300"),
        ({"mu": True}, "mu must be a number; got True"),
        ({"mu": "0.1"}, "mu must be a number; got '0.1'"),
        ({"num_directions": True}, "num_directions must be an integer; got True"),
        ({"num_directions": 2.0}, "num_directions must be an integer; got 2.0"),
        ({"seed": 1.5}, "seed must be an integer; got 1.5"),
        ({"seed": True}, "seed must be an integer; got True"),
        ({"seed": 2**63}, "seed must be at most 9223372036854775807; got 9223372036854775808"),
        (
            {"seed": -(2**63) - 1},
            "seed must be at least -9223372036854775808; got -9223372036854775809",
        ),
        (
            {"directions": "normal"},
            "directions must be one of rademacher, sphere, gaussian, lowres; got 'normal'",
        ),
        ({"grid": 2}, "grid must be 0 with directions 'rademacher', .*; got 2"),
        (
            {"directions": "lowres"},
            "grid must be from 1 to the image's smaller side with directions 'lowres'; got 0",
        ),
    ):
        with pytest.raises(InputError, match=message):
            bf.ZerothOrder(**keywords)
        with pytest.raises(InputError, match=message):
            bf.as_differentiable(torch.nn.Identity(), **keywords)
    assert (
        bf.ZerothOrder(np.int64(3), np.float32(0.5), seed=np.int64(-(2**63)))
        .ask(torch.zeros(2, 3))
        .shape[0]
        == 4
    )
    zo = bf.ZerothOrder(3, 0.1)
    for max_images in (0, 2.5, True):
        with pytest.raises(InputError, match="ask_chunks: max_images must be a"):
            zo.ask_chunks(torch.zeros(2, 3), max_images)
    with pytest.raises(InputError, match="there is no pending ask in this thread"):
        zo.tell(torch.zeros(4, 2))
    zo.ask(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"losses must be \[1 \+ q, B\] = \[4, 2\]; got \[3, 2\]"):
        zo.tell(torch.zeros(3, 2))
    with pytest.raises(
        InputError, match=r"scores must be \[1 \+ q, B, n_classes\] with q = 3; got \[3, 2, 5\]"
    ):
        zo.tell_scores(torch.zeros(3, 2, 5), torch.zeros(2, dtype=torch.int64))
    zo.tell(torch.zeros(4, 2))
    with pytest.raises(InputError, match="tell once per ask"):
        zo.tell(torch.zeros(4, 2))


def test_a_shallow_copy_goes_its_own_way(seed: int) -> None:
    zo = bf.ZerothOrder(2, 0.1, seed=seed)
    zo.tell(zo.ask(torch.zeros(1, 3)).sum(-1))
    other = copy.copy(zo)
    zo.ask(torch.zeros(1, 3))
    assert int(other.state[1]) == 0 and int(zo.state[1]) == 1


def test_chunks_of_integers_leave_nothing_pending() -> None:
    zo = bf.ZerothOrder(2, 0.1)
    with pytest.raises(InputError, match="ask_chunks: x must be float32 or float64; got int64"):
        zo.ask_chunks(torch.zeros(1, 3, dtype=torch.int64))
    zo.ask(torch.zeros(1, 3))
