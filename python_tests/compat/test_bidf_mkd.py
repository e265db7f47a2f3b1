"""Test `compat.zero_order_loss` against a rendering of BiDf-MKD's authors in plain torch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat import plain
from tolerances import TOLERANCES
from torch import Tensor, nn

from bidfmkd_fast import compat
from bidfmkd_fast.errors import InputError

N, SHAPE, CLASSES, MU = 5, (2, 3, 5), 4, 0.01
RTOL, ATOL = TOLERANCES["float64"]
# float64 losses, each rounded, whose differences are divided by a step of 0.01.
SLOPES = {"rtol": 1e-8, "atol": 1e-10}


def arguments(**fields: Any) -> SimpleNamespace:
    """Return arguments with 2 directions that 4 parts leave out."""
    return SimpleNamespace(**{"q": 14, "mu": MU, "numsplit": 4, "ZO": True, **fields})


def task(seed: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return teacher, student, images and labels; the models agree on most images."""
    teacher = plain.network(seed + 1, SHAPE, CLASSES)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        student[3].weight += 0.3 * torch.randn(
            student[3].weight.shape, generator=generator, dtype=torch.float64
        )
    x = plain.images(seed, N, *SHAPE)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    return teacher, student, x, labels


@pytest.mark.parametrize("n_parts", [1, 4, 14])
@pytest.mark.parametrize("with_student", [False, True])
@pytest.mark.parametrize("parity", [False, True])
def test_equals_plain_torch(parity: bool, with_student: bool, n_parts: int, seed: int) -> None:
    teacher, student, x, labels = task(seed)
    loss = compat.zero_order_loss(
        arguments(numsplit=n_parts),
        teacher,
        x,
        labels,
        student if with_student else None,
        0.7,
        0.4,
        parity=parity,
        seed=seed,
    )
    (gradient,) = torch.autograd.grad(loss, x)
    n_drawn = 14 // n_parts * n_parts if parity else 14
    u = plain.directions(seed, x, n_drawn, "sphere" if parity else "rademacher")
    constant = student(x).detach() if with_student else None
    oh = 1.0 if parity else 0.7
    mean, losses = plain.forward(
        lambda points: plain.mkd_losses(teacher, points, labels, constant, oh, 0.4),
        x.detach(),
        u,
        MU,
    )
    estimate = mean * x[0].numel() * n_drawn / 14
    torch.testing.assert_close(gradient, estimate / N, **SLOPES)
    surrogate = torch.stack([(a * b).sum() for a, b in zip(x.detach(), estimate)]).mean()
    wanted = surrogate if parity else losses.mean()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-8, atol=1e-9)


def test_the_mask_is_found_anew_at_every_point(seed: int) -> None:
    """Check a step so long that the teacher changes its mind on the way."""
    teacher, _, x, labels = task(seed)
    student = plain.network(seed + 9, SHAPE, CLASSES)
    args = arguments(mu=5.0, q=40)
    loss = compat.zero_order_loss(args, teacher, x, labels, student, seed=seed)
    (gradient,) = torch.autograd.grad(loss, x)
    u, scores = plain.directions(seed, x, 40, "rademacher"), student(x).detach()
    with torch.no_grad():
        agree = [teacher(x + 5.0 * k).argmax(1) == scores.argmax(1) for k in u]
    assert torch.stack(agree).any()
    assert not torch.stack(agree).all()
    mean, _ = plain.forward(
        lambda points: plain.mkd_losses(teacher, points, labels, scores, 1.0, 1.0),
        x.detach(),
        u,
        5.0,
    )
    torch.testing.assert_close(gradient, mean * x[0].numel() / N, **SLOPES)


def test_pairs_equal_plain_torch(seed: int) -> None:
    teacher, student, x, labels = task(seed)
    keywords: dict[str, Any] = {"directions": "gaussian", "antithetic": True, "seed": seed}
    args = {"q": 6, "mu": MU, "ZO": 1}  # without parity no numsplit is read
    loss = compat.zero_order_loss(args, teacher, x, labels, student, **keywords)
    (gradient,) = torch.autograd.grad(loss, x)
    scores = student(x).detach()
    mean, _ = plain.central(
        lambda points: plain.mkd_losses(teacher, points, labels, scores, 1.0, 1.0),
        x.detach(),
        plain.directions(seed, x, 3, "gaussian"),
        MU,
    )
    torch.testing.assert_close(gradient, mean * x[0].numel() / N, **SLOPES)
    with pytest.raises(InputError, match="antithetic=True goes with parity=False only"):
        compat.zero_order_loss(
            arguments(), teacher, x, labels, parity=True, antithetic=True, seed=seed
        )


@pytest.mark.parametrize("with_student", [False, True])
@pytest.mark.parametrize("parity", [False, True])
def test_white_box_equals_plain_torch(parity: bool, with_student: bool, seed: int) -> None:
    """Check `ZO` off: value and gradient, through both models."""
    teacher, student, x, labels = task(seed)
    args = {"ZO": False}  # nothing else is read
    loss = compat.zero_order_loss(
        args, teacher, x, labels, student if with_student else None, 0.7, 0.4, parity=parity
    )
    wanted = plain.mkd_white_box(
        teacher, student, x, labels, 0.7, 0.4 if with_student else 0.0, parity
    )
    torch.testing.assert_close(loss, wanted, rtol=RTOL, atol=ATOL)
    (gradient,) = torch.autograd.grad(loss, x)
    (truth,) = torch.autograd.grad(wanted, x)
    torch.testing.assert_close(gradient, truth, rtol=RTOL, atol=ATOL)
    if with_student:
        other = compat.zero_order_loss(args, teacher, x, labels, student, 0.7, 0.4)
        assert torch.equal(other, loss) == (not parity)


@pytest.mark.parametrize("curved", [False, True])
def test_truth(curved: bool, seed: int) -> None:
    """Check that the gradient is the true one of the returned loss (d = 8, q = 20000).

    The cosine is above 0.99 and the length within 5 %, for a linear and a quadratic teacher.
    """
    weights = plain.images(seed + 1, 8, CLASSES).detach()

    def teacher(at: Tensor) -> Tensor:
        return (at.square() if curved else at).flatten(1) @ weights

    x, labels = plain.images(seed, 2, 2, 2, 2), torch.tensor([0, 3])
    # The student agrees with the teacher, and no difference of scores changes sign on the way.
    scores = teacher(x).detach()
    apart = torch.tensor([-1.0, -2.0, -3.0, -4.0]).double().expand(2, CLASSES).clone()
    apart[torch.arange(2), scores.argmax(1)] = 5.0
    loss = compat.zero_order_loss(
        arguments(q=20000, mu=1e-4), teacher, x, labels, lambda at: scores + apart, 0.7, seed=seed
    )
    (estimate,) = torch.autograd.grad(loss, x)
    true_loss = plain.mkd_losses(teacher, x, labels, scores + apart, 0.7, 1.0).mean()
    (truth,) = torch.autograd.grad(true_loss, x)
    torch.testing.assert_close(loss.detach(), true_loss.detach(), rtol=RTOL, atol=ATOL)
    assert F.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0) > 0.99
    assert abs(estimate.norm() / truth.norm() - 1) < 0.05


@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_a_box_says_what_it_returns(kind: str, seed: int) -> None:
    """Check that scores are taken as the spec says, and the student's are converted to them."""
    teacher, student, x, labels = task(seed)
    box = plain.Box(teacher, kind)
    loss = compat.zero_order_loss(arguments(), box, x, labels, student, 0.7, 0.4, seed=seed)
    (gradient,) = torch.autograd.grad(loss, x)

    def converted(logits: Tensor) -> Tensor:
        return logits.log_softmax(1) if kind == "log_probabilities" else logits.softmax(1)

    constant = student(x).detach()

    def losses_of(points: Tensor) -> Tensor:
        entropy = plain.mkd_losses(teacher, points, labels, None, 0.7, 0.0)
        agree = teacher(points).argmax(1) == constant.argmax(1)
        distance = (converted(teacher(points)) - converted(constant)).abs().sum(1)
        return entropy - 0.4 * distance * agree

    u = plain.directions(seed, x, 14, "rademacher")
    mean, losses = plain.forward(losses_of, x.detach(), u, MU)
    torch.testing.assert_close(gradient, mean * x[0].numel() / N, **SLOPES)
    torch.testing.assert_close(loss.detach(), losses.mean(), rtol=RTOL, atol=ATOL)


def test_calls_modes_and_seeds(seed: int) -> None:
    """Check the sizes of the calls, that the student is asked once, and that nothing changes."""
    teacher, student, x, labels = task(seed)
    student = plain.with_batch_norm(seed + 1, SHAPE, CLASSES).requires_grad_(False).train()
    asked: dict[str, list[int]] = {"teacher": [], "student": []}
    teacher.eval().register_forward_hook(lambda m, i, out: asked["teacher"].append(len(out)))
    student.register_forward_hook(lambda m, i, out: asked["student"].append(len(out)))
    drawn = []
    for again in (True, True, False):
        if again:
            torch.manual_seed(5)
        loss = compat.zero_order_loss(arguments(), teacher, x, labels, student, max_images=12)
        drawn.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert asked["student"] == [N] * 3
    assert max(asked["teacher"]) <= 12
    assert sum(asked["teacher"]) == 3 * 15 * N
    assert student.training
    assert not any(p.requires_grad for p in student.parameters())
    assert not teacher.training
    asked["teacher"].clear()
    compat.zero_order_loss(arguments(), teacher.train(), x, labels, max_images=12)
    assert asked["teacher"] == [N] * 15  # batch norms of a teacher never mix directions


@pytest.mark.parametrize("parity", [False, True])
def test_float32_stays_float32(parity: bool, seed: int) -> None:
    teacher, student, x, labels = task(seed)
    x = x.detach().float().requires_grad_()
    loss = compat.zero_order_loss(
        arguments(), teacher.float(), x, labels, student.float(), parity=parity, seed=seed
    )
    loss.backward()
    assert loss.dtype == x.grad.dtype == torch.float32
    exact = x.detach().double().requires_grad_()
    compat.zero_order_loss(
        arguments(), teacher.double(), exact, labels, student.double(), parity=parity, seed=seed
    ).backward()
    scale = float(exact.grad.abs().max())  # float32 scores, whose differences are divided by 0.01
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=2e-3 * scale)


@pytest.mark.parametrize("parity", [False, True])
def test_without_a_graph_only_backward_fails(parity: bool, seed: int) -> None:
    teacher, student, x, labels = task(seed)
    settings = {"student": student, "parity": parity, "seed": seed}
    wanted = compat.zero_order_loss(arguments(), teacher, x, labels, **settings)
    loss = compat.zero_order_loss(arguments(), teacher, x.detach(), labels, **settings)
    torch.testing.assert_close(loss, wanted)
    with pytest.raises(InputError, match="images without a graph"):
        loss.backward()


def test_bad_input(seed: int) -> None:
    teacher, student, x, labels = task(seed)
    box = plain.Box(teacher, "logits")

    def call(args: Any, teacher: Any = teacher, targets: Any = labels, **more: Any) -> None:
        compat.zero_order_loss(args, teacher, x, targets, **more)

    for args, more, message in (
        ({}, {}, "zero_order_loss: args lacks 'ZO'"),
        ({"ZO": True}, {}, "zero_order_loss: args lacks 'q'"),
        ({"ZO": True, "q": 4}, {}, "zero_order_loss: args lacks 'mu'"),
        ({"ZO": True, "q": 4, "mu": MU}, {"parity": True}, "args lacks 'numsplit'"),
        (arguments(q=3), {"parity": True}, "must be at least args.numsplit = 4, .*; got 3"),
        (arguments(q=0), {}, "args.q must be at least 1; got 0"),
        (arguments(), {"targets": labels + 100}, "labels must be from 0 to .*; got 1"),
        (arguments(), {"targets": labels - 100}, "labels must be from 0 to .*; got -"),
        (arguments(), {"oh": "1"}, "oh must be a number; got '1'"),
        (arguments(), {"teacher": plain.Box(teacher, "probabilities", True)}, "labels only"),
        (arguments(ZO=False), {"teacher": box}, "without args.ZO the teacher must be diff"),
        (arguments(), {"teacher": lambda at: at}, r"teacher must return scores \[N, n_classes\]"),
        (arguments(), {"student": lambda at: student(at)[:, 1:]}, "same classes; got 4 and 3"),
        (arguments(), {"student": 3}, "student must be callable on images; got int"),
        (arguments(), {"targets": labels[1:]}, r"int64 labels \[N\] of the 5 inputs; got \[4\]"),
        (arguments(), {"targets": labels.float()}, "got torch.float32"),
        (arguments(), {"targets": [0] * 5}, "got list"),
    ):
        with pytest.raises(InputError, match=message):
            call(args, **more)
