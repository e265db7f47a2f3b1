"""Compare `estimate_gradient` and `zo_kd_gradient` with float64; check the estimate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops import native, reference

KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]
SHAPES = [(0, 3, 8, 8), (1, 1, 2, 2), (2, 3, 7, 5), (3, 1, 28, 28), (1, 3, 51, 67), (9, 2, 8, 9)]
SCORES_KINDS = ["logits", "probabilities", "log_probabilities"]
DIVERGENCES = ["l1", "l1_prob", "kl"]
RTOL, ATOL = TOLERANCES["kernel"]


def close(actual: torch.Tensor, expected: torch.Tensor, name: str = "kernel") -> None:
    """Assert that two tensors agree within the tolerances of `name`.

    The absolute tolerance is in units of the largest value, since the rounding error of a sum grows
    with its terms.
    """
    rtol, atol = TOLERANCES[name]
    largest = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * max(largest, 1e-30)
    )


@pytest.mark.parametrize(("kind", "grid"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [0, 1, 33, 97])
def test_estimate(
    cpu_level: str, kind: str, grid: int, shape: tuple[int, ...], q: int, seed: int
) -> None:
    state = torch.tensor([seed, 1])
    differences = torch.randn(q, shape[0], generator=torch.Generator().manual_seed(seed))
    gradient = ops.estimate_gradient(
        differences, state, shape, 0.2, kind, grid, first_direction=3, first_image=1
    )
    with ops.use_backend("reference"):
        expected = ops.estimate_gradient(
            differences.double(), state, shape, 0.2, kind, grid, first_direction=3, first_image=1
        )
    close(gradient, expected)


def test_lengths_kept_by_perturb_change_nothing(cpu_level: str, seed: int) -> None:
    """Check that the gradient has the same bits wherever the lengths of directions come from.

    `perturb` keeps the lengths for the gradient, of all images or of some. Those that are not kept
    are computed again.
    """
    seed += len(cpu_level)  # lengths kept by another instruction set would serve here too
    shape, q, generator = (4, 3, 9, 11), 40, torch.Generator().manual_seed(seed)
    x, differences = torch.rand(shape, generator=generator), torch.randn(q, 4, generator=generator)

    def gradient(step: int) -> torch.Tensor:
        return ops.estimate_gradient(
            differences, torch.tensor([seed, step]), shape, 0.2, "sphere", first_direction=3
        )

    for step in range(3):
        state = torch.tensor([seed, step])
        drawn_again = gradient(step)
        ops.perturb(
            x[1:], state, q, 0.2, "sphere", first_direction=3, first_image=1
        )  # not of every image
        assert torch.equal(gradient(step), drawn_again)
        for first, n in ((3, 7), (10, 33 if step else 3)):  # step 0: not of every direction
            ops.perturb(x, state, n, 0.2, "sphere", first_direction=first)
        ops.perturb(
            x, torch.tensor([seed, step + 1]), q, 0.2, "sphere", first_direction=3
        )  # of another step
        ops.perturb(x.flatten(1)[:, :50], state, q + 3, 0.2, "sphere")  # of another size
        ops.perturb(x, state, q + 3, 0.2, "gaussian")
        assert torch.equal(gradient(step), drawn_again)


def test_threads_change_nothing_of_the_losses(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.SUMMED_PER_THREAD, "rademacher", 1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(
        41, 50, 100, generator=generator
    )  # 205,000 of them: enough for three threads
    labels, state = torch.randint(0, 100, (50,), generator=generator), torch.tensor([seed, 0])
    single = ops.zo_kd_gradient(scores, labels, state, (50, 1, 4, 4), 0.1)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            again = ops.zo_kd_gradient(scores, labels, state, (50, 1, 4, 4), 0.1)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(again, single, strict=True))


def test_estimate_is_the_formula(seed: int) -> None:
    """Compare the reference with its formula, written with the directions that `perturb` used."""
    shape, q, mu = (2, 3, 6, 6), 12, 0.2
    state, generator = torch.tensor([seed, 0]), torch.Generator().manual_seed(seed)
    differences = torch.randn(q, 2, generator=generator, dtype=torch.float64)
    for kind, grid, span in (
        ("rademacher", 0, 108),
        ("sphere", 0, 108),
        ("gaussian", 0, 108),
        ("lowres", 3, 27),
    ):
        points = ops.perturb(torch.zeros(shape, dtype=torch.float64), state, q, mu, kind, grid)
        expected = span / (q * mu) * torch.einsum("kb,kbchw->bchw", differences, points[1:] / mu)
        close(ops.estimate_gradient(differences, state, shape, mu, kind, grid), expected, "float64")


@pytest.mark.parametrize(("kind", "grid"), [*KINDS[:3], ("lowres", 2)])
def test_truth_on_a_linear_function(cpu_level: str, kind: str, grid: int, seed: int) -> None:
    """Check that with d = 8 and q = 20000 the cosine is above 0.99 and the length within 5 %."""
    shape = (1, 2, 2, 2)
    slope = torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed))
    state = torch.tensor([seed, 0])
    points = ops.perturb(torch.zeros(shape), state, 20000, 0.1, kind, grid)
    losses = (points.double() * slope).flatten(2).sum(-1).float()
    gradient = ops.estimate_gradient(losses[1:] - losses[:1], state, shape, 0.1, kind, grid)[0]
    assert F.cosine_similarity(gradient.flatten(), slope.flatten(), dim=0) > 0.99
    assert abs(gradient.norm() / slope.norm() - 1) < 0.05


def make_scores(kind: str, *shape: int, seed: int) -> torch.Tensor:
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {
        "logits": logits,
        "probabilities": logits.softmax(-1),
        "log_probabilities": logits.log_softmax(-1),
    }[kind]


def hand_objective(scores, labels, student, weight, kind, divergence) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Return the objective of every point in float64, image by image, from its definition."""
    rows = torch.empty(scores.shape[:2], dtype=torch.float64)
    for r in range(scores.shape[0]):
        for b in range(scores.shape[1]):
            a, f = scores[r, b].double(), student[b].double()
            pa = {"logits": a.softmax(0), "probabilities": a, "log_probabilities": a.exp()}[kind]
            pf = {"logits": f.softmax(0), "probabilities": f, "log_probabilities": f.exp()}[kind]
            loss = -torch.log(pa[labels[b]])
            if pa.argmax() == pf.argmax():
                distance = {
                    "l1": (a - f).abs().sum(),
                    "l1_prob": (pa - pf).abs().sum(),
                    "kl": (pa * (pa / pf).log()).sum(),
                }
                loss = loss - weight * distance[divergence]
            rows[r, b] = loss
    return rows


@pytest.mark.parametrize("kind", SCORES_KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("n_classes", [1, 5, 64])
def test_scores_to_gradient(
    cpu_level: str, kind: str, divergence: str, n_classes: int, seed: int
) -> None:
    shape, q, mu, weight = (7, 1, 5, 6), 9, 0.2, 0.7
    state = torch.tensor([seed, 2])
    scores = make_scores(kind, 1 + q, 7, n_classes, seed=seed)
    student = make_scores(kind, 7, n_classes, seed=seed + 1)
    student[:3] = scores[0, :3] + (
        0 if kind == "probabilities" else 0.1
    )  # some must agree with the API
    labels = torch.randint(0, n_classes, (7,), generator=torch.Generator().manual_seed(seed))
    losses = hand_objective(scores, labels, student, weight, kind, divergence)
    gradient, loss = ops.zo_kd_gradient(
        scores, labels, state, shape, mu, student, weight, scores_kind=kind, divergence=divergence
    )
    close(loss, losses[0])
    close(
        gradient,
        reference.estimate_gradient(
            losses[1:] - losses[:1], state, shape, mu, "rademacher", 0, 0, 0
        ),
    )


def test_without_student(cpu_level: str, seed: int) -> None:
    shape, state = (4, 1, 5, 6), torch.tensor([seed, 2])
    scores = make_scores("logits", 8, 4, 5, seed=seed)
    labels = torch.tensor([0, 4, 2, 2])
    gradient, loss = ops.zo_kd_gradient(scores, labels, state, shape, 0.1)
    losses = F.cross_entropy(
        scores.double().flatten(0, 1), labels.repeat(8), reduction="none"
    ).view(8, 4)
    close(loss, losses[0])
    close(
        gradient,
        reference.estimate_gradient(
            losses[1:] - losses[:1], state, shape, 0.1, "rademacher", 0, 0, 0
        ),
    )


def test_rounded_probabilities_stay_finite(cpu_level: str) -> None:
    scores = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    gradient, loss = ops.zo_kd_gradient(
        scores,
        torch.tensor([1]),
        torch.tensor([0, 0]),
        (1, 4),
        0.1,
        scores[0],
        1.0,
        "probabilities",
        "kl",
    )
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss, torch.tensor([16.118096]))  # -log(1e-7)


def _with_holes(scores: torch.Tensor, kind: str, hole: float) -> torch.Tensor:
    """Return scores `[..., 5]` with `hole` for class 2 in half of the rows.

    Probabilities have no -inf; the hole is 0 in its place.
    """
    scores = scores.clone()
    scores[::2, ..., 2] = 0.0 if kind == "probabilities" and hole == -math.inf else hole
    return scores


@pytest.mark.parametrize("hole", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("kind", SCORES_KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_that_are_not_finite(
    cpu_level: str, kind: str, divergence: str, hole: float, seed: int
) -> None:
    """Check that both backends give the same numbers, NaN and infinities.

    The cases are with and without agreement of API and student on the class.
    """
    labels, state, shape = torch.arange(6) % 2, torch.tensor([seed, 0]), (6, 1, 3, 3)
    scores = _with_holes(make_scores(kind, 4, 6, 5, seed=seed), kind, hole)
    for student in (
        make_scores(kind, 6, 5, seed=seed + 1),
        _with_holes(make_scores(kind, 6, 5, seed=seed + 1), kind, hole),
        scores[0],
    ):
        arguments = (scores, labels, state, shape, 0.1, student, 0.5, kind, divergence)
        gradient, loss = ops.zo_kd_gradient(*arguments)
        with ops.use_backend("reference"):
            wanted_gradient, wanted_loss = ops.zo_kd_gradient(*arguments)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_shut_gate_keeps_masked_classes_out(backend: str, divergence: str) -> None:
    """Mask a class with logits of -inf, and check the objective where API and student disagree.

    The boundary term is off there, so the objective is the cross entropy alone.
    """
    api = torch.tensor([[3.0, 1.0, -math.inf]]).expand(3, 1, 3)
    student = torch.tensor([[0.0, 1.0, 0.5]])
    with ops.use_backend(backend):
        gradient, loss = ops.zo_kd_gradient(
            api,
            torch.tensor([0]),
            torch.tensor([0, 0]),
            (1, 4),
            0.1,
            student,
            1.0,
            "logits",
            divergence,
        )
    torch.testing.assert_close(loss, F.cross_entropy(api[0], torch.tensor([0]), reduction="none"))
    assert torch.equal(gradient, torch.zeros(1, 4))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_class_without_probability_adds_nothing_to_kl(backend: str) -> None:
    """Check that a class that both sides mask adds nothing to the divergence: 0 log 0 is 0."""
    api = torch.tensor([[3.0, 1.0, -math.inf]]).expand(3, 1, 3)
    student = torch.tensor([[2.0, 1.0, -math.inf]])
    arguments = (torch.tensor([0]), torch.tensor([0, 0]), (1, 4), 0.1)
    with ops.use_backend(backend):
        _, masked = ops.zo_kd_gradient(api, *arguments, student, 1.0, "logits", "kl")
        _, without = ops.zo_kd_gradient(
            api[..., :2], *arguments, student[:, :2], 1.0, "logits", "kl"
        )
    torch.testing.assert_close(masked, without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_scores(cpu_level: str, dtype: torch.dtype, seed: int) -> None:
    """Check that scores in 16 bits give exactly what the same numbers in float32 give."""
    scores = make_scores("logits", 5, 3, 4, seed=seed).to(dtype)
    arguments = (torch.tensor([0, 1, 2]), torch.tensor([seed, 0]), (3, 10), 0.1)
    for half, full in zip(
        ops.zo_kd_gradient(scores, *arguments), ops.zo_kd_gradient(scores.float(), *arguments)
    ):
        assert torch.equal(half, full)


def test_pieces_add_up(cpu_level: str, seed: int) -> None:
    """Check that the estimate over q directions is the mean of the estimates over parts of them."""
    shape, q, state = (3, 1, 6, 6), 50, torch.tensor([seed, 0])
    differences = torch.randn(q, 3, generator=torch.Generator().manual_seed(seed))
    whole = ops.estimate_gradient(differences, state, shape, 0.1)
    parts = [
        ops.estimate_gradient(
            differences[first : first + 10], state, shape, 0.1, first_direction=first
        )
        for first in range(0, q, 10)
    ]
    close(torch.stack(parts).mean(0), whole.double())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str, seed: int) -> None:
    state, drawing = torch.tensor([seed, 0]), ("sphere", 0, 0, 0)
    scores, labels = make_scores("logits", 4, 2, 5, seed=seed), torch.tensor([0, 4])
    with ops.use_backend(backend):
        torch.library.opcheck(
            torch.ops.bidfmkd.estimate_gradient,
            (torch.randn(3, 2), state, (2, 3, 4, 4), 0.1, *drawing),
        )
        for student, weight in ((None, 0.0), (scores[0], 0.3)):
            torch.library.opcheck(
                torch.ops.bidfmkd.zo_kd_gradient,
                (
                    scores,
                    labels,
                    state,
                    (2, 3, 4, 4),
                    0.1,
                    student,
                    weight,
                    "logits",
                    "kl",
                    *drawing,
                ),
            )


def test_compile(seed: int) -> None:
    scores, labels = make_scores("logits", 4, 2, 5, seed=seed), torch.tensor([0, 4])
    state = torch.tensor([seed, 0])

    def step(scores: torch.Tensor) -> torch.Tensor:
        gradient, loss = ops.zo_kd_gradient(scores, labels, state, (2, 3, 4, 4), 0.1)
        return gradient.sum() + loss.sum()

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(scores), step(scores))


GOOD = {
    "scores": torch.zeros(4, 2, 5),
    "labels": torch.tensor([0, 4]),
    "state": torch.tensor([0, 0]),
    "shape": (2, 1, 3, 3),
    "mu": 0.1,
}
BAD = [
    (
        {"scores": torch.zeros(9, 8)},
        r"scores must be \[1 \+ q, B, n_classes\] with B = 2; got \[9, 8\]",
    ),
    ({"scores": torch.zeros(4, 3, 5)}, r"got \[4, 3, 5\]"),
    ({"scores": torch.zeros(0, 2, 5)}, r"got \[0, 2, 5\]"),
    (
        {"scores": torch.zeros(4, 2, 5, dtype=torch.int64)},
        "scores must be float32 or float64 or float16 or bfloat16",
    ),
    ({"labels": torch.tensor([0, 5])}, "labels must be from 0 to 4; got 5"),
    ({"labels": torch.tensor([-1, 0])}, "labels must be from 0 to 4; got -1"),
    ({"labels": torch.tensor([0, 1, 2])}, r"labels must be \[B\] = \[2\]; got \[3\]"),
    ({"labels": torch.tensor([0.0, 1.0])}, "labels must be int64; got float32"),
    (
        {"student_scores": torch.zeros(2, 4)},
        r"student_scores must be \[B, n_classes\] = \[2, 5\]; got \[2, 4\]",
    ),
    ({"boundary_weight": 0.5}, "boundary_weight 0.5 needs student_scores"),
    (
        {"boundary_weight": float("nan"), "student_scores": torch.zeros(2, 5)},
        "boundary_weight must be a finite number",
    ),
    (
        {"scores_kind": "top_k"},
        "scores_kind must be one of logits, probabilities, log_probabilities; got 'top_k'",
    ),
    ({"divergence": "l2"}, "divergence must be one of l1, l1_prob, kl; got 'l2'"),
    ({"mu": -1.0}, r"the step length \(mu\) must be a positive number; got -1.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_input(change: dict, message: str, backend: str) -> None:  # type: ignore[type-arg]
    with ops.use_backend(backend), pytest.raises(InputError, match="zo_kd_gradient: .*" + message):
        ops.zo_kd_gradient(**{**GOOD, **change})


def test_bad_differences() -> None:
    with pytest.raises(InputError, match=r"differences must be \[q, B\] with B = 2; got \[3, 4\]"):
        ops.estimate_gradient(torch.zeros(3, 4), torch.tensor([0, 0]), (2, 5), 0.1)
