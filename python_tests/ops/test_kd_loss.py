"""Compare `kd_loss` and its derivatives with float64, on each of its derivative routes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError

RTOL, ATOL = TOLERANCES["kernel"]
KINDS = ["logits", "probabilities", "log_probabilities"]
CASES = (
    [("kl", kind) for kind in KINDS] + [("l1_prob", kind) for kind in KINDS] + [("l1", "logits")]
)


def make(
    *shape: int, seed: int, kind: str = "logits", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    logits = 2 * torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores = {
        "logits": logits,
        "probabilities": logits.softmax(-1),
        "log_probabilities": logits.log_softmax(-1),
    }[kind]
    return scores.to(dtype)


def expected_loss(student, teacher, temperature, divergence, kind) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Return the loss from torch's own softmax and kl_div, which autograd differentiates."""
    student, teacher = student.double(), teacher.double()
    logits = teacher if kind == "logits" else teacher.log() if kind == "probabilities" else teacher
    if divergence == "l1":
        return temperature**2 * ((student / temperature) - (teacher / temperature)).abs().sum(
            -1
        ).mean(-1)
    p = (logits / temperature).softmax(-1)
    if divergence == "l1_prob":
        return temperature**2 * ((student / temperature).softmax(-1) - p).abs().sum(-1).mean(-1)
    log_student = (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_student, p, reduction="none").sum(-1).mean(-1)


@pytest.mark.parametrize(("divergence", "kind"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 5), (33, 101), (3, 4, 5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_derivatives(
    divergence: str, kind: str, shape: tuple[int, ...], temperature: float, seed: int
) -> None:
    student, teacher = make(*shape, seed=seed), make(*shape, seed=seed + 1, kind=kind)
    wide = student.double().requires_grad_()
    student.requires_grad_()
    direction = make(*shape, seed=seed + 2)
    results = []
    for inputs, function in ((student, ops.kd_loss), (wide, expected_loss)):
        with ops.use_backend("native" if inputs is student else "auto"):
            loss = function(inputs, teacher, temperature, divergence, kind)
            # An upstream gradient that is not 1, and not the same for all tasks.
            upstream = torch.linspace(0.5, 2.0, max(1, loss.numel()), dtype=loss.dtype).view(
                loss.shape
            )
            (first,) = torch.autograd.grad((loss * upstream).sum(), inputs, create_graph=True)
            product = (first * direction.to(first.dtype)).sum()
            linear = divergence == "l1" or not product.requires_grad
            second = torch.zeros_like(first) if linear else torch.autograd.grad(product, inputs)[0]
            results.append((loss.detach(), first.detach(), second.detach()))
    for ours, wanted in zip(*results):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(ours.double(), wanted, rtol=RTOL, atol=ATOL * scale)


@pytest.mark.parametrize(("divergence", "kind"), CASES)
def test_reference_derivatives(divergence: str, kind: str, seed: int) -> None:
    student = make(3, 4, seed=seed, dtype=torch.float64).requires_grad_()
    teacher = make(3, 4, seed=seed + 1, kind=kind, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: ops.kd_loss(s, teacher, 2.0, divergence, kind), student
    )
    assert torch.autograd.gradgradcheck(
        lambda s: ops.kd_loss(s, teacher, 2.0, divergence, kind), student
    )


@pytest.mark.parametrize("divergence", ["kl", "l1_prob"])
def test_torch_func(divergence: str, seed: int) -> None:
    student, teacher = make(6, 3, 4, seed=seed), make(6, 3, 4, seed=seed + 1)

    def ours(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ops.kd_loss(s, t, 2.0, divergence)

    def wanted(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return expected_loss(s, t, 2.0, divergence, "logits").float()

    for transform in (
        torch.func.vmap,
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(f, in_dims=(1, 1)),
        lambda f: torch.func.vmap(torch.func.jacrev(torch.func.grad(f))),
        lambda f: torch.func.vmap(torch.func.hessian(f)),
        lambda f: lambda s, t: torch.func.vmap(f, in_dims=(0, None))(s, t[0]),
        lambda f: lambda s, t: torch.func.jvp(lambda a: f(a[0], t[0]), (s,), (t,)),
    ):
        torch.testing.assert_close(
            transform(ours)(student, teacher),
            transform(wanted)(student, teacher),
            rtol=1e-4,
            atol=1e-5,
        )


def test_forward_mode_and_no_third_derivative(seed: int) -> None:
    student, teacher, tangent = (make(6, 4, seed=seed + i) for i in range(3))
    student.requires_grad_()
    (first,) = torch.autograd.grad(ops.kd_loss(student, teacher), student, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student.detach(), tangent)
        forward = torch.autograd.forward_ad.unpack_dual(ops.kd_loss(dual, teacher)).tangent
    torch.testing.assert_close(forward, (first * tangent).sum().detach(), rtol=RTOL, atol=ATOL)
    (second,) = torch.autograd.grad((first * tangent).sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        second.sum().backward()


def test_compile(seed: int) -> None:
    student, teacher = make(6, 4, seed=seed).requires_grad_(), make(6, 4, seed=seed + 1)
    compiled = torch.compile(lambda s: ops.kd_loss(s * 2, teacher), fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(student), student)
    (eager,) = torch.autograd.grad(ops.kd_loss(student * 2, teacher), student)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str, seed: int) -> None:
    student, teacher = make(6, 4, seed=seed), make(6, 4, seed=seed + 1)
    kd = (2.0, "kl", "logits")
    with ops.use_backend(backend):
        for s in (student, student.clone().requires_grad_()):
            torch.library.opcheck(torch.ops.bidfmkd.kd_loss, (s, teacher, *kd))
            torch.library.opcheck(
                torch.ops.bidfmkd.kd_loss_backward, (torch.tensor(1.5), s, teacher, *kd)
            )
        arguments = (make(6, 4, seed=seed + 2), torch.tensor(1.5), student, teacher, *kd)
        torch.library.opcheck(torch.ops.bidfmkd.kd_loss_double_backward, arguments)


def test_identical_is_zero_and_certain_teacher_is_finite(seed: int) -> None:
    scores = make(5, 7, seed=seed)
    assert abs(float(ops.kd_loss(scores, scores, 3.0))) < ATOL
    certain = torch.eye(7)[:5]
    loss = ops.kd_loss(scores, certain, scores_kind="probabilities")
    torch.testing.assert_close(
        loss, F.cross_entropy(scores, torch.arange(5)), rtol=1e-4, atol=1e-4
    )  # the floor's part


BAD = [
    ((torch.zeros(3), torch.zeros(3)), {}, r"must both be \[N, n_classes\]; got \[3\] and \[3\]"),
    ((torch.zeros(3, 4), torch.zeros(3, 5)), {}, r"got \[3, 4\] and \[3, 5\]"),
    (
        (torch.zeros(0, 4), torch.zeros(0, 4)),
        {},
        r"must hold at least one image and one class; got \[0, 4\]",
    ),
    (
        (torch.zeros(3, 4), torch.zeros(3, 4)),
        {"temperature": 0.0},
        "temperature must be a positive number; got 0.0",
    ),
    ((torch.zeros(3, 4), torch.zeros(3, 4)), {"divergence": "mse"}, "divergence must be one of"),
    ((torch.zeros(3, 4), torch.zeros(3, 4)), {"scores_kind": "hard"}, "scores_kind must be one of"),
    (
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 4)),
        {},
        "student_logits must be float32 or",
    ),
    (
        (torch.zeros(3, 4), torch.full((3, 4), 0.25)),
        {"divergence": "l1", "scores_kind": "probabilities"},
        "'l1' compares logits with logits; for probabilities use",
    ),
]


@pytest.mark.parametrize(("tensors", "keywords", "message"), BAD)
def test_bad_input(tensors: tuple, keywords: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match="kd_loss: .*" + message):
        ops.kd_loss(*tensors, **keywords)


@pytest.mark.parametrize("hole", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize(("divergence", "kind"), CASES)
def test_scores_that_are_not_finite(divergence: str, kind: str, hole: float, seed: int) -> None:
    """Check that both backends give the same numbers, NaN and infinities.

    A score that is not finite stands in the student's scores, the teacher's, or both.
    """
    for place in ("student", "teacher", "both"):
        student, teacher = make(4, 5, seed=seed), make(4, 5, seed=seed + 1, kind=kind)
        if place != "teacher":
            student[1, 2] = hole
        if place != "student":
            teacher[1, 2] = 0.0 if kind == "probabilities" and hole == -math.inf else hole
        results = []
        for backend in ("native", "reference"):
            with ops.use_backend(backend):
                inputs = student.clone().requires_grad_()
                loss = ops.kd_loss(inputs, teacher, 2.0, divergence, kind)
                (grad,) = torch.autograd.grad(loss, inputs)
                results.append((loss.detach(), grad))
        for ours, wanted in zip(*results):
            torch.testing.assert_close(ours, wanted, rtol=RTOL, atol=ATOL, equal_nan=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_class_that_both_mask_adds_nothing(backend: str) -> None:
    student, teacher = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[2.0, 0.0, -math.inf]])
    with ops.use_backend(backend):
        torch.testing.assert_close(
            ops.kd_loss(student, teacher), ops.kd_loss(student[:, :2], teacher[:, :2])
        )
