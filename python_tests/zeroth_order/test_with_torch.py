"""Test the estimators with what loops of other people use: compile, DDP, AMP, vmap, formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError, InputTypeError


class Generator(nn.Module):
    """Latents [B, 6] -> images [B, 1, 4, 4]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Sigmoid())

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents).view(-1, 1, 4, 4)


def api(seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function of images [N, 1, 4, 4] in float32 that gives scores [N, 3]."""
    weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))

    def answer(images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return (images.flatten(1) @ weight).sin()

    return answer


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def losses_of(query: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: F.cross_entropy(
        query(images), torch.zeros(len(images), dtype=torch.int64), reduction="none"
    )


def loss_of(form: str, query: Callable[[Tensor], Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """Return a loss of images by `estimate` or through `as_differentiable`."""
    if form == "estimate":
        zo = bf.ZerothOrder(8, 0.1, seed=seed)
        return lambda images: zo.estimate(losses_of(query), images)
    teacher = bf.as_differentiable(query, 8, 0.1, seed=seed)
    labels = torch.zeros(100, dtype=torch.int64)
    return lambda images: F.cross_entropy(teacher(images).float(), labels[: len(images)])


FORMS = pytest.mark.parametrize("form", ["estimate", "as_differentiable"])


@FORMS
def test_compile(form: str, seed: int) -> None:
    """Check that a compiled step gives what the plain step gives; graph breaks are allowed."""
    latents = torch.randn(5, 6)

    def run(wrap: Callable[[Any], Any]) -> Tensor:
        generator, loss = Generator(seed), loss_of(form, api(seed), seed)
        step = wrap(lambda: loss(generator(latents)))
        for _ in range(2):
            step().backward()
        return gradients(generator)

    torch.compiler.reset()
    compiled = run(lambda step: torch.compile(step, backend="aot_eager"))
    torch.testing.assert_close(compiled, run(lambda step: step))


@FORMS
def test_autocast(form: str, seed: int) -> None:
    """Check a generator in bfloat16: the API is asked in float32, and the estimate points along."""
    latents = torch.randn(5, 6)

    def run(enabled: bool) -> Tensor:
        generator, loss = Generator(seed), loss_of(form, api(seed), seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images = generator(latents)
            assert images.dtype == (torch.bfloat16 if enabled else torch.float32)
            value = loss(images)
        value.backward()
        return gradients(generator)

    assert F.cosine_similarity(run(True), run(False), dim=0) > 0.99


@FORMS
def test_gradient_accumulation(form: str, seed: int) -> None:
    """Check that the gradients of two half batches add up, each with directions of its own."""
    latents, query = torch.randn(6, 6), api(seed)
    generator, loss = Generator(seed), loss_of(form, query, seed)
    for part in latents.split(3):
        (loss(generator(part)) / 2).backward()
    accumulated = gradients(generator)
    loss, alone = loss_of(form, query, seed), []
    for part in latents.split(3):
        generator = Generator(seed)
        loss(generator(part)).backward()
        alone.append(gradients(generator))
    assert not torch.equal(*alone)
    torch.testing.assert_close(accumulated, sum(alone) / 2)


@FORMS
def test_channels_last(form: str, seed: int) -> None:
    x = torch.rand(3, 2, 4, 4)
    weight = torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))

    def gradient(images: Tensor) -> Tensor:
        images = images.requires_grad_()
        loss = loss_of(form, lambda points: points.flatten(1) @ weight, seed)
        (grad,) = torch.autograd.grad(loss(images), images)
        return grad

    wanted = gradient(x.clone())
    torch.testing.assert_close(gradient(x.clone(memory_format=torch.channels_last)), wanted)


def test_vmap(seed: int) -> None:
    """Check vmap over a wrapped API, also of gradients, against a loop."""
    x = torch.rand(4, 3, 1, 4, 4)
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    scores = torch.func.vmap(teacher)(x)
    torch.testing.assert_close(scores, torch.stack([teacher(images) for images in x]))
    scores = torch.func.vmap(teacher, in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(scores, torch.stack([teacher(images) for images in x]))
    images = x.clone().requires_grad_()
    torch.func.vmap(teacher)(images).sin().sum().backward()
    zo = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    flat = x.flatten(0, 1).clone().requires_grad_()
    zo(flat).sin().sum().backward()
    torch.testing.assert_close(images.grad.flatten(0, 1), flat.grad)


def test_one_image_under_vmap(seed: int) -> None:
    x = torch.rand(4, 1, 4, 4)
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    scores = torch.func.vmap(lambda image: teacher(image[None])[0])(x)
    torch.testing.assert_close(scores, teacher(x))


@FORMS
def test_ddp(form: str, seed: int) -> None:
    """Check a generator in DistributedDataParallel (a group of one process)."""
    import torch.distributed as dist

    latents = torch.randn(5, 6)
    generator, loss = Generator(seed), loss_of(form, api(seed), seed)
    loss(generator(latents)).backward()
    wanted = gradients(generator)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        generator, loss = Generator(seed), loss_of(form, api(seed), seed)
        loss(nn.parallel.DistributedDataParallel(generator)(latents)).backward()
        torch.testing.assert_close(gradients(generator), wanted)
    finally:
        dist.destroy_process_group()


def test_integers_are_refused() -> None:
    with pytest.raises(InputTypeError, match="x must be float32 or float64; got int64"):
        bf.ZerothOrder(4, 0.1).estimate(lambda x: x.sum(1), torch.zeros(2, 4, dtype=torch.int64))


def test_gradients_under_vmap_are_refused(seed: int) -> None:
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    with pytest.raises(InputError, match="vmap cannot map over gradients.*take the gradient outs"):
        torch.func.vmap(torch.func.grad(lambda x: teacher(x[None]).sum()))(torch.rand(4, 1, 4, 4))
    x = torch.rand(4, 1, 1, 4, 4)
    gradient = torch.func.grad(lambda x: torch.func.vmap(teacher)(x).sum())(x)
    assert gradient.shape == x.shape and gradient.any()


def test_estimate_under_transforms(seed: int) -> None:
    """Check torch.func.grad of an estimate, and the errors of what has no meaning for it."""
    x = torch.rand(3, 1, 4, 4)
    zo, wanted = (bf.ZerothOrder(8, 0.1, seed=seed) for _ in range(2))
    gradient = torch.func.grad(lambda x: zo.estimate(losses_of(api(seed)), x))(x)
    images = x.clone().requires_grad_()
    wanted.estimate(losses_of(api(seed)), images).backward()
    torch.testing.assert_close(gradient, images.grad)
    assert zo.gradient is not None and not torch._C._functorch.is_functorch_wrapped_tensor(
        zo.gradient
    )
    torch.testing.assert_close(zo.gradient, wanted.gradient)
    with pytest.raises(InputError, match="estimate: torch.func.vmap cannot map .*the whole batch"):
        torch.func.vmap(lambda x: zo.estimate(len, x[None]))(x)
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    with pytest.raises(InputError, match="as_differentiable: .* no forward-mode derivative"):
        torch.func.jvp(teacher, (x,), (x,))


def test_compiled_code_keeps_what_the_estimator_keeps(seed: int) -> None:
    """Check ask and tell, `gradient` and the position in compiled code against eager code."""
    x = torch.rand(3, 1, 4, 4)
    compiled, eager = (bf.ZerothOrder(8, 0.1, seed=seed) for _ in range(2))
    loss = losses_of(api(seed))

    def step(zo: bf.ZerothOrder, x: Tensor) -> Tensor:
        points = zo.ask(x * 2)
        told = zo.tell(points.square().flatten(2).sum(2))
        return told + zo.estimate(loss, x)

    value = torch.compile(lambda x: step(compiled, x), backend="eager")(x)
    torch.testing.assert_close(value, step(eager, x))
    torch.testing.assert_close(compiled.gradient, eager.gradient)
    torch.testing.assert_close(compiled.last_loss, eager.last_loss)
    assert compiled.state_dict() == eager.state_dict()


def test_a_compiled_transform_is_not_silently_zero(seed: int) -> None:
    x = torch.rand(3, 1, 4, 4)
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    with pytest.raises(AssertionError):  # torch's own: a graph cannot break inside a transform
        torch.compile(torch.func.grad(lambda x: teacher(x).sum()), backend="eager")(x)


def test_second_derivatives_are_refused(seed: int) -> None:
    x = torch.rand(3, 1, 4, 4)
    teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
    zo = bf.ZerothOrder(8, 0.1, seed=seed)
    for function in (
        lambda x: teacher(x).sum(),
        lambda x: teacher(x).square().sum(),
        lambda x: zo.estimate(losses_of(api(seed)), x * x),
    ):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(y), y, create_graph=True)
        with pytest.raises(InputError, match="cannot be differentiated again"):
            gradient.square().sum().backward()
        with pytest.raises(InputError, match="cannot be differentiated again"):
            torch.func.grad(lambda x, f=function: torch.func.grad(f)(x).square().sum())(x)


def test_a_detached_estimate_under_a_transform(seed: int) -> None:
    x, w = torch.rand(3, 1, 4, 4), torch.ones(2)
    zo, wanted = (bf.ZerothOrder(8, 0.1, seed=seed) for _ in range(2))
    loss = losses_of(api(seed))
    gradient = torch.func.grad(lambda w: w.square().sum() + zo.estimate(loss, x))(w)
    torch.testing.assert_close(gradient, 2 * w)
    wanted.estimate(loss, x)
    torch.testing.assert_close(zo.gradient, wanted.gradient)


def test_autocast_of_another_device_is_off() -> None:
    """Check that a function which computes on another device than the images runs in float32."""
    seen = []
    with torch.autocast("cpu", torch.bfloat16):

        def losses(points: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return points.sum(1)

        bf.ZerothOrder(2, 0.1).estimate(losses, torch.zeros(2, 4))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_jacobian(seed: int) -> None:
    """Check that jacrev estimates all rows from the same points, as one gradient after another."""
    images = torch.rand(2, 1, 4, 4)
    jacobian = torch.func.jacrev(bf.as_differentiable(api(seed), 8, 0.1, seed=seed))(images)
    for row in range(3):
        teacher = bf.as_differentiable(api(seed), 8, 0.1, seed=seed)
        gradient = torch.func.grad(lambda x, teacher=teacher, row=row: teacher(x)[1, row])(images)
        torch.testing.assert_close(jacobian[1, row], gradient)
