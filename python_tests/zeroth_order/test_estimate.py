"""Test what `ZerothOrder` gives to other people's loops: estimate, gradient, pairs, no graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError, ServiceWarning

Function = Callable[[Tensor], Tensor]
KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def linear(seed: int) -> tuple[Function, Function]:
    """Return a linear function of images [N, 2, 2, 2] and its gradient."""
    slope = leaf(2, 2, 2, seed=seed).detach()
    return lambda x: (x * slope).flatten(1).sum(1), lambda x: slope.expand_as(x)


def quadratic(seed: int) -> tuple[Function, Function]:
    """Return a quadratic function of images [N, 2, 2, 2] and its gradient."""
    scale = leaf(2, 2, 2, seed=seed).detach().abs() + 0.1
    return lambda x: (scale * x * x).flatten(1).sum(1), lambda x: 2 * scale * x


def assert_true(estimate: Tensor, truth: Tensor) -> None:
    for one, wanted in zip(estimate, truth, strict=True):
        assert F.cosine_similarity(one.flatten(), wanted.flatten(), dim=0) > 0.99
        assert abs(one.norm() / wanted.norm() - 1) < 0.05


@pytest.mark.parametrize(("kind", "grid"), KINDS)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("api", [linear, quadratic])
def test_truth(
    kind: str, grid: int, antithetic: bool, api: Callable[..., object], seed: int
) -> None:
    """Check every form of the estimate against the true gradient (d = 8, q = 20000)."""
    function, gradient = api(seed)
    x = leaf(2, 2, 2, 2, seed=seed + 1)

    def make() -> bf.ZerothOrder:
        return bf.ZerothOrder(20000, 0.01, kind, grid, seed, antithetic)

    exact = gradient(x.detach()).double()
    zo = make()
    loss = zo.estimate(function, x, max_images=5000)
    torch.testing.assert_close(
        loss.double(), function(x.detach().double()).mean(), rtol=1e-5, atol=1e-5
    )
    assert_true(zo.gradient.double(), exact)
    (given,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(given, (zo.gradient / 2).to(given))

    told = make()
    points = told.ask(x)
    losses = function(points.flatten(0, 1)).view(points.shape[:2])
    loss, told_gradient = told.tell(losses, return_gradient=True)
    torch.testing.assert_close(told_gradient, zo.gradient.to(told_gradient))
    torch.testing.assert_close(told.last_loss, zo.last_loss)

    teacher = bf.as_differentiable(
        lambda points: function(points)[:, None],
        20000,
        0.01,
        kind,
        grid,
        seed,
        max_images=5000,
        antithetic=antithetic,
    )
    (through,) = torch.autograd.grad(teacher(x).sum(), x)
    torch.testing.assert_close(through.double(), zo.gradient.double(), rtol=1e-3, atol=1e-3)


def test_pairs_are_symmetric_and_come_in_chunks(seed: int) -> None:
    x = leaf(3, 1, 4, 4, seed=seed)
    points = bf.ZerothOrder(8, 0.1, seed=seed, antithetic=True).ask(x)
    assert points.shape == (9, 3, 1, 4, 4)
    assert torch.equal(points[0], x)
    plain = bf.ZerothOrder(4, 0.1, seed=seed).ask(x)
    assert torch.equal(points[:5], plain)
    torch.testing.assert_close(points[1:5] - x, x - points[5:], rtol=0, atol=1e-6)
    without = bf.ZerothOrder(8, 0.1, seed=seed, antithetic=True).ask(x, base=False)
    assert torch.equal(without, points[1:])
    for base in (False, True):
        for most in (1, 3, 6, 7, 9, 1000):
            chunks = bf.ZerothOrder(8, 0.1, seed=seed, antithetic=True).ask_chunks(x, most, base)
            assert torch.equal(torch.cat([part.clone() for part in chunks]), points[not base :])


def test_pairs_without_the_base(seed: int) -> None:
    """Check that the base is not asked, that the loss is the pairs' mean, the gradient the same."""
    function, _ = quadratic(seed)
    x, asked = leaf(2, 2, 2, 2, seed=seed), list[int]()

    def count(points: Tensor) -> Tensor:
        asked.append(len(points))
        return function(points)

    zo = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    loss = zo.estimate(count, x, base=False)
    assert sum(asked) == 6 * 2
    again = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    points = again.ask(x, base=False)
    losses = function(points.flatten(0, 1)).view(6, 2)
    torch.testing.assert_close(again.tell(losses), loss)
    torch.testing.assert_close(loss, losses.mean())
    whole = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    whole.estimate(function, x)
    torch.testing.assert_close(zo.gradient, whole.gradient)
    with pytest.raises(InputError, match="base=False needs antithetic=True"):
        bf.ZerothOrder(6, 0.1).ask(x, base=False)
    with pytest.raises(InputError, match="must be even with antithetic=True.*got 5"):
        bf.ZerothOrder(5, 0.1, antithetic=True)


def test_pairs_help_at_the_ties_of_max_pooling(seed: int) -> None:
    """Check that pairs point closer to the gradient where forward differences meet kinks."""
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    nn.init.normal_(conv.weight, generator=generator)
    # The background is constant, so that all four inputs of a pool are equal.
    x = torch.full((8, 1, 16, 16), 0.5)
    weight = torch.rand(8, 8, 8, generator=generator)  # so that no kink cancels another

    def loss(images: Tensor) -> Tensor:
        return (F.max_pool2d(conv(images), 2) * weight).flatten(1).sum(1)

    # The gradient of the smoothed loss, from very many pairs.
    def estimate(q: int, antithetic: bool, seed: int) -> Tensor:
        zo = bf.ZerothOrder(q, 0.05, seed=seed, antithetic=antithetic)
        zo.estimate(loss, x, 4096)
        return zo.gradient.flatten(1)

    truth = estimate(8192, True, seed + 1).mean(0)

    def cosine(estimates: Tensor) -> float:
        return F.cosine_similarity(estimates, truth[None]).mean().item()

    assert cosine(estimate(64, True, seed)) > 1.2 * cosine(estimate(64, False, seed))


def test_tell_scores_with_pairs(seed: int) -> None:
    """Check the objective with pairs, boundary term included, against losses told one by one."""
    weight, x = leaf(16, 5, seed=seed).detach(), leaf(3, 1, 4, 4, seed=seed + 1)
    labels, student = torch.tensor([0, 3, 4]), leaf(3, 5, seed=seed + 2).detach()
    zo = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    scores = zo.ask(x).flatten(2) @ weight
    loss = zo.tell_scores(scores, labels, student, 0.5)
    double = scores.double()
    wanted = torch.stack([F.cross_entropy(row, labels, reduction="none") for row in double])
    agree = double.argmax(-1) == student.argmax(-1)
    wanted -= 0.5 * agree * (double - student.double()).abs().sum(-1)
    other = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    other.ask(x)
    torch.testing.assert_close(loss, other.tell(wanted).float())
    torch.testing.assert_close(zo.gradient, other.gradient)


def test_arguments_and_rows(seed: int) -> None:
    """Check that labels follow their images, and that by_row gives one row of B images per call."""
    x, labels = leaf(3, 4, seed=seed), torch.tensor([2, 0, 1])
    weight, seen = leaf(4, 3, seed=seed).detach(), list[int]()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(images))
        return F.cross_entropy(images @ weight, labels, reduction="none")

    zo, wanted = (bf.ZerothOrder(5, 0.1, seed=seed) for _ in range(2))
    value = zo.estimate(loss, x, max_images=7, arguments=[labels])
    assert seen == [6, 6, 6]
    points = wanted.ask(x)
    expected = wanted.tell(torch.stack([loss(row, labels) for row in points]))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(zo.gradient, wanted.gradient)
    for most, by_row, calls in [(2, False, [2, 1] * 6), (2, True, [3] * 6), (100, True, [3] * 6)]:
        seen.clear()
        zo = bf.ZerothOrder(5, 0.1, seed=seed)
        zo.estimate(loss, x, most, arguments=[labels], by_row=by_row)
        assert seen == calls
        torch.testing.assert_close(zo.gradient, wanted.gradient)
    with pytest.raises(InputError, match=r"an entry for each of the 3 images; got \[2\]"):
        zo.estimate(loss, x, arguments=[labels[:2]])
    with pytest.raises(InputError, match=r"arguments must be tensors \[B, ...\]; got list"):
        zo.estimate(loss, x, arguments=[[1, 2, 3]])


def test_a_row_at_a_time_keeps_directions_apart(seed: int) -> None:
    """Check that batch norm in training mode sees a single direction per call with by_row."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.0))
    x = leaf(6, 1, 2, 2, seed=seed)

    def loss(images: Tensor) -> Tensor:
        return student(images).square().sum(1)

    zo, wanted = (bf.ZerothOrder(4, 0.3, seed=seed) for _ in range(2))
    zo.estimate(loss, x, by_row=True)
    with torch.no_grad():
        wanted.tell(torch.stack([loss(row) for row in wanted.ask(x)]))
    torch.testing.assert_close(zo.gradient, wanted.gradient)
    mixed = bf.ZerothOrder(4, 0.3, seed=seed)
    mixed.estimate(loss, x)
    assert not torch.allclose(mixed.gradient, wanted.gradient)


def test_functions_of_numpy(seed: int) -> None:
    function, _ = quadratic(seed)
    x = leaf(2, 2, 2, 2, seed=seed)
    zo, wanted = (bf.ZerothOrder(5, 0.1, seed=seed) for _ in range(2))
    value = zo.estimate(lambda points: np.asarray(function(points)), x)
    torch.testing.assert_close(value, wanted.estimate(function, x))
    torch.testing.assert_close(zo.gradient, wanted.gradient)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean(), r"a loss for each image, \[12\] .*reduction='none' gives\); got \[\]"),
        (lambda x: x, r"\[12\] .*; got \[12, 4\]"),
        (lambda x: [0.0] * 12, r"\[12\]; got list"),
        (lambda x: x[:, 0].long(), r"floating-point numbers; got torch.int64"),
        (lambda x: np.array([None] * 12), r"\[12\]; got an array of dtype object"),
    ],
)
def test_bad_losses(answer: Callable[[Tensor], object], words: str) -> None:
    """Check the errors, and that a failed estimate leaves the estimator ready for the next."""
    zo = bf.ZerothOrder(5, 0.1)
    with pytest.raises(InputError, match=words):
        zo.estimate(answer, torch.zeros(2, 4))
    zo.estimate(lambda x: x.sum(1), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([0.0] * 12, r"\[1 \+ q, B\] = \[6, 2\], as a tensor; got list"),
        (torch.zeros(6, 2, dtype=torch.int64), "as floating-point numbers; got torch.int64"),
        (np.zeros((6, 2), dtype=object), "got an array of dtype object"),
        (np.zeros((2, 6)), r"= \[6, 2\]; got \[2, 6\]"),
    ],
)
def test_bad_losses_that_are_told(losses: object, words: str) -> None:
    """Check that wrong losses are an error that leaves the ask pending."""
    zo = bf.ZerothOrder(5, 0.1)
    zo.ask(torch.zeros(2, 4))
    with pytest.raises(InputError, match=f"^ZerothOrder.tell: .*{words}"):
        zo.tell(losses)  # type: ignore[arg-type]
    assert zo.tell(np.zeros((6, 2), dtype=">f8")).item() == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [">f4", np.longdouble, np.float16])
def test_arrays_of_any_floats(dtype: Any) -> None:
    """Check losses in a byte order, and in widths, that torch does not take by itself."""
    x = torch.rand(2, 4)
    zo, wanted = (bf.ZerothOrder(4, 0.5, seed=0) for _ in range(2))
    zo.estimate(lambda points: points.numpy().sum(1).astype(dtype), x)
    wanted.estimate(lambda points: points.sum(1), x)
    torch.testing.assert_close(zo.gradient, wanted.gradient, rtol=0.05, atol=0.05)


def test_differences_of_losses_in_half_precision() -> None:
    """Check that losses whose difference half precision cannot hold are subtracted in float32."""
    zo = bf.ZerothOrder(2, 0.1, seed=0)
    zo.ask(torch.zeros(1, 4))
    zo.tell(torch.tensor([[-40000.0], [40000.0], [-40000.0]], dtype=torch.float16))
    assert zo.gradient is not None and zo.gradient.isfinite().all() and zo.gradient.any()


def test_what_is_no_batch_of_images_is_refused() -> None:
    zo = bf.ZerothOrder(4, 0.1)
    for ask in (zo.ask, zo.ask_chunks, lambda x: zo.estimate(len, x)):
        with pytest.raises(InputError, match="x must be .* got a single number"):
            ask(torch.tensor(1.0))
    with pytest.raises(InputError, match="as_differentiable: x must be a tensor .* got ndarray"):
        bf.as_differentiable(lambda x: x)(np.zeros((2, 4)))
    with pytest.raises(InputError, match=r"query must return scores .* got torch.int64"):
        bf.as_differentiable(lambda x: x.long())(torch.zeros(2, 4))


def test_wrong_types_of_labels_and_scores() -> None:
    zo = bf.ZerothOrder(2, 0.1)
    zo.ask(torch.zeros(2, 4))
    scores, labels = torch.rand(3, 2, 5), torch.tensor([0, 1])
    for given, name in (
        ((scores, labels.numpy()), "labels"),
        ((scores, labels, scores[0].numpy()), "student_scores"),
        ((scores.numpy(), labels), "scores"),
    ):
        with pytest.raises(InputError, match=f"tell_scores: {name} must be a tensor; got ndarray"):
            zo.tell_scores(*given)


def test_arguments_may_be_any_iterable() -> None:
    zo = bf.ZerothOrder(2, 0.1)
    loss = zo.estimate(
        lambda points, shift: points.sum(1) + shift,
        torch.zeros(3, 4),
        arguments=(each for each in [torch.ones(3)]),  # type: ignore[arg-type]
    )
    assert loss.item() == 1


def test_antithetic_is_a_bool() -> None:
    with pytest.raises(InputError, match="antithetic must be True or False; got 'no'"):
        bf.ZerothOrder(4, 0.1, antithetic="no")  # type: ignore[arg-type]


def test_images_in_float64_reach_a_black_box(seed: int) -> None:
    """Check that a box, which takes float32, is asked about images in float64 all the same."""
    weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
    box = bf.FunctionBlackBox(lambda x: x.flatten(1) @ weight, bf.APISpec(3, (1, 4, 4)))
    x = torch.rand(2, 1, 4, 4)
    gradients = []
    for images in (x.clone().requires_grad_(), x.double().requires_grad_()):
        bf.as_differentiable(box, 8, 0.1, seed=seed)(images).sin().sum().backward()
        assert images.grad is not None and images.grad.dtype == images.dtype
        gradients.append(images.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_without_a_graph(seed: int) -> None:
    """Check that value and gradient are the same without a graph, and only backward() fails."""
    function, _ = quadratic(seed)
    x = leaf(2, 2, 2, 2, seed=seed)
    wanted = bf.ZerothOrder(5, 0.1, seed=seed)
    value = wanted.estimate(function, x)

    def check(images: Tensor, words: str) -> None:
        zo = bf.ZerothOrder(5, 0.1, seed=seed)
        loss = zo.tell(function(zo.ask(images).flatten(0, 1)).view(6, 2))
        assert loss.item() == pytest.approx(value.item())
        torch.testing.assert_close(zo.gradient, wanted.gradient)
        with torch.inference_mode(False), pytest.raises(InputError, match=words):
            loss.backward()

    check(x.detach(), "got images without a graph.*read the estimate from the attribute gradient")
    with torch.no_grad():
        check(x, r"inside torch.no_grad\(\)")
    with torch.inference_mode():
        check(x, r"inside torch.no_grad\(\)")


def test_probabilities_that_are_said_to_be_logits(seed: int) -> None:
    x, labels = leaf(2, 4, seed=seed), torch.tensor([0, 1])
    weight = leaf(4, 3, seed=seed).detach()
    zo = bf.ZerothOrder(5, 0.1, seed=seed)
    with pytest.warns(ServiceWarning, match="sum to 1.*give scores_kind='probabilities'"):
        zo.tell_scores((zo.ask(x) @ weight).softmax(-1), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zo.tell_scores((zo.ask(x) @ weight).softmax(-1), labels)  # said once
        for kind in ("probabilities", "logits"):
            zo = bf.ZerothOrder(5, 0.1, seed=seed)
            scores = zo.ask(x) @ weight
            scores = scores.softmax(-1) if kind == "probabilities" else scores
            zo.tell_scores(scores, labels, scores_kind=kind)


def test_a_resumed_loop_goes_on(seed: int) -> None:
    function, _ = quadratic(seed)
    x = leaf(2, 2, 2, 2, seed=seed)
    zo = bf.ZerothOrder(6, 0.1, seed=seed, antithetic=True)
    zo.estimate(function, x)
    other = bf.ZerothOrder(6, 0.1, seed=seed + 1, antithetic=True)
    other.load_state_dict(zo.state_dict())
    zo.estimate(function, x)
    other.estimate(function, x)
    assert torch.equal(zo.gradient, other.gradient)


def test_a_batch_of_none_and_wrong_arguments() -> None:
    zo = bf.ZerothOrder(4, 0.1)
    zo.estimate(lambda x: x.sum(1), torch.zeros(0, 3))
    assert zo.gradient.shape == (0, 3)
    with pytest.raises(InputError, match=r"function must map images.*to losses \[N\]; got int"):
        zo.estimate(3, torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"x must be a tensor \[B, \*S\]; got ndarray"):
        zo.estimate(lambda x: x, np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.tensor([0, 7]),), "labels must be from 0 to 2; got 7"),
        ((torch.tensor([0.0, 1.0]),), "labels must be int64"),
        ((torch.tensor([0, 1]), torch.zeros(2, 4)), r"student_scores must be \[B, n_classes\]"),
        ((torch.tensor([0, 1]), None, 1.0), "student_scores"),
        ((torch.tensor([0, 1]), None, 0.0, "scores"), "scores_kind must be one of"),
        ((torch.tensor([0, 1]), torch.zeros(2, 3), 1.0, "logits", "l3"), "divergence must be"),
    ],
)
def test_wrong_scores_with_pairs(arguments: tuple[object, ...], words: str) -> None:
    zo = bf.ZerothOrder(4, 0.1, antithetic=True)
    zo.ask(torch.zeros(2, 3))
    with pytest.raises(InputError, match=words):
        zo.tell_scores(torch.randn(5, 2, 3), *arguments)
    assert zo.tell_scores(torch.randn(5, 2, 3), torch.tensor([0, 1])).dtype == torch.float32


def test_functions_that_reuse_or_change_memory(seed: int) -> None:
    """Check functions that answer in one buffer, and that work in place on what they get."""
    function, _ = quadratic(seed)
    x, buffer = leaf(4, 2, 2, 2, seed=seed), torch.empty(8)

    def into_buffer(points: Tensor) -> Tensor:
        return torch.mul(function(points), 1, out=buffer[: len(points)])

    def in_place(points: Tensor, labels: Tensor) -> Tensor:
        losses = function(points)
        labels += 1
        points.zero_()
        return losses

    labels, before = torch.zeros(4), x.detach().clone()
    wanted = bf.ZerothOrder(5, 0.1, seed=seed)
    loss = wanted.estimate(function, x)
    for given, arguments in ((into_buffer, ()), (in_place, (labels,))):
        zo = bf.ZerothOrder(5, 0.1, seed=seed)
        torch.testing.assert_close(zo.estimate(given, x, 8, arguments=arguments), loss)
        torch.testing.assert_close(zo.gradient, wanted.gradient)
    assert not labels.any() and torch.equal(x, before)
    rows = torch.empty(24, 1)
    through = []
    for query in (
        lambda points: function(points)[:, None],
        lambda points: torch.mul(function(points)[:, None], 1, out=rows[: len(points)]),
        lambda points: function(points.mul_(1))[:, None] + points.zero_().sum(),
    ):
        teacher = bf.as_differentiable(query, 5, 0.1, seed=seed)
        (gradient,) = torch.autograd.grad(teacher(x).sum(), x)
        through.append(gradient)
    torch.testing.assert_close(through[1], through[0])
    torch.testing.assert_close(through[2], through[0])
    assert torch.equal(x, before)


def test_small_gradients_survive_half_precision() -> None:
    """Check that a loss scale acts before the gradient is rounded to float16."""
    x = torch.ones(2, 4, dtype=torch.float16, requires_grad=True)
    loss = bf.ZerothOrder(4, 0.1, seed=0).estimate(lambda points: 1e-8 * points.sum(1), x)
    (loss * 65536).backward()
    assert x.grad.any()
