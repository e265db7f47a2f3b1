"""Prepare perturb and gradient without a black box: its scores are given."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import BestEager, functional, keyed_points, paper_order
from benchmarks.harness import OURS, Function, Prepared, case
from bidfmkd_fast import ops
from bidfmkd_fast.ops import backend

MU = 0.05
N_CLASSES = 5
# (B, image shape, q): the paper's, our default at 32 x 32 x 3, miniImageNet, Omniglot, ImageNet.
SIZES = {
    "150x3072x100": (150, (3, 32, 32), 100),
    "150x3072x10": (150, (3, 32, 32), 10),
    "30x21168x50": (30, (3, 84, 84), 50),
    "25x784x100": (25, (1, 28, 28), 100),
    "1x150528x50": (1, (3, 224, 224), 50),
}


def _stream(out: Tensor) -> None:
    assert backend._C is not None
    backend._C.stream_fill(1.0, out.numel(), out.data_ptr(), torch.get_num_threads())


def _linear(points: Tensor, slope: Tensor) -> Tensor:
    """Stand in for a black box: the gradient is `slope`, which each baseline must estimate."""
    return points.flatten(2) @ slope


def prepare_perturb(kind: str, size: str) -> Prepared:
    """Prepare `perturb` alone, against plain stores of the same bytes."""
    b, shape, q = SIZES[size]
    x, state = torch.randn(b, *shape), torch.tensor([1, 2])
    out = torch.zeros(1 + q, b, *shape)  # writing the zeros makes its pages exist

    def check() -> None:
        small = x[:2]
        with ops.use_backend("reference"):
            wanted = ops.perturb(small.double(), state, 3, MU, kind)
        torch.testing.assert_close(
            ops.perturb(small, state, 3, MU, kind).double(), wanted, rtol=1e-5, atol=2e-6
        )

    contenders: dict[str, Function] = {
        OURS: lambda: ops.perturb(x, state, q, MU, kind, out=out),
        "store limit": lambda: _stream(out),
    }
    if kind == "gaussian":
        deviation = MU / math.sqrt(x[0].numel())
        contenders["torch's normal_, add_"] = lambda: out[1:].normal_(std=deviation).add_(x)
        if keyed := keyed_points(x, q, MU):
            contenders["torch.func._random, add_"] = keyed
    return Prepared(
        contenders=contenders,
        check=check,
        n_bytes=out.numel() * 4,
        limit="store limit",
    )


def prepare_estimate(kind: str, size: str) -> Prepared:
    """Prepare `perturb` and `zo_kd_gradient` against the same estimate in torch.

    The estimate in torch is: draw, perturb, loss of given scores, weighted sum.
    """
    b, shape, q = SIZES[size]
    x, state = torch.randn(b, *shape), torch.tensor([1, 2])
    scores, labels = torch.randn(1 + q, b, N_CLASSES), torch.randint(0, N_CLASSES, (b,))
    out = torch.zeros(1 + q, b, *shape)  # writing the zeros makes its pages exist
    best = BestEager(x, q, kind)
    torch.compiler.reset()  # torch.compile gives up after eight sizes otherwise
    compiled = torch.compile(functional)

    def ours() -> Tensor:
        ops.perturb(x, state, q, MU, kind, out=out)
        return ops.zo_kd_gradient(scores, labels, state, x.shape, MU, directions=kind)[0]

    def cross_entropy(points: Tensor) -> Tensor:
        answers = scores[: points.shape[0]]
        return F.cross_entropy(
            answers.flatten(0, 1), labels.repeat(len(answers)), reduction="none"
        ).view(-1, b)

    def check() -> None:
        some, their_labels, small = scores[:4, :2], labels[:2], (min(b, 2), *shape)
        with ops.use_backend("reference"):
            wanted = ops.zo_kd_gradient(
                some.double(), their_labels, state, small, MU, directions=kind
            )[0]
        gradient = ops.zo_kd_gradient(some, their_labels, state, small, MU, directions=kind)[0]
        torch.testing.assert_close(
            gradient.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )
        slope = torch.randn(math.prod(shape))
        # The cosine between the gradient and its estimate from q directions in d dimensions.
        expected = 1 / math.sqrt(1 + slope.numel() / q)
        for estimate in (
            paper_order(x, q, MU, kind, partial(_linear, slope=slope)),
            best(x, MU, partial(_linear, slope=slope)),
        ):
            cosine = F.cosine_similarity(estimate.flatten(1), slope[None]).mean()
            assert abs(cosine / expected - 1) < 0.5, (
                f"a baseline is wrong: cosine {cosine}, expected {expected}"
            )

    return Prepared(
        contenders={
            OURS: ours,
            "store limit": lambda: _stream(out),
            "paper order (a)": lambda: paper_order(x, q, MU, kind, cross_entropy),
            "best eager (b)": lambda: best(x, MU, cross_entropy),
            "torch.compile (c)": lambda: compiled(x, q, MU, kind, cross_entropy),
        },
        check=check,
        n_bytes=out.numel() * 4,
        limit="store limit",
    )


def prepare_kd_loss() -> Prepared:
    """Prepare `kd_loss` with first and second derivative, as the inner loop uses it."""
    student, teacher = torch.randn(150, N_CLASSES, requires_grad=True), torch.randn(150, N_CLASSES)

    def run(loss_of) -> Tensor:  # type: ignore[no-untyped-def]
        (first,) = torch.autograd.grad(loss_of(student), student, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), student)
        return second

    def plain(logits: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    def ours() -> Tensor:
        return run(lambda logits: ops.kd_loss(logits, teacher))

    return Prepared(
        contenders={OURS: ours, "eager": lambda: run(plain)},
        check=lambda: torch.testing.assert_close(ours(), run(plain)),
    )


for _size in SIZES:
    for _kind in ("rademacher", "sphere"):
        case(f"perturb/{_kind}/{_size}")(partial(prepare_perturb, _kind, _size))
        case(f"estimate/{_kind}/{_size}")(partial(prepare_estimate, _kind, _size))
case("perturb/gaussian/150x3072x100")(partial(prepare_perturb, "gaussian", "150x3072x100"))
case("kd_loss/150x5")(prepare_kd_loss)
