"""Compare `norm_pool` and its two derivatives with the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops import backend, native_norm_pool, reference, use_backend
from bidfmkd_fast.ops.norm_pool import norm_pool
from bidfmkd_fast.seeds import torch_generator

SHAPES = [(3, 5, 6, 6), (2, 33, 7, 9), (1, 16, 2, 2), (5, 40, 8, 8)]
EPS = 1e-3


@pytest.fixture(params=backend.build_info()["cpu_levels"] if backend.build_info() else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    assert backend._C is not None
    best = backend._C.build_info()["cpu_level"]
    assert backend._C.select_cpu_level(request.param)
    yield request.param
    backend._C.select_cpu_level(best)


def written_out(images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute norm_pool from its definition, with elementary operations only."""
    mean = images.mean((0, 2, 3), keepdim=True)
    variance = (images - mean).square().mean((0, 2, 3), keepdim=True)
    normed = (images - mean) / (variance + eps).sqrt() * weight[:, None, None]
    normed = normed + bias[:, None, None]
    cells = normed.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    return cells.clamp_min(0)


def is_clear(images: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return True if no cell is nearly a tie and no maximum is nearly 0.

    At either, a rounding error would change which pixel the derivative goes to.
    """
    normed = F.batch_norm(images, None, None, weight, bias, training=True, eps=EPS)
    cells = F.unfold(normed.flatten(0, 1)[:, None], 2, stride=2)  # [N * C, 4, cells]
    best, second = cells.topk(2, dim=1).values.unbind(1)
    return float((best - second).min()) > 2e-5 and float(best.abs().min()) > 2e-5


def drawn(seed: int, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch_generator(seed, "norm_pool")
    return [torch.randn(size, generator=generator) for size in sizes]


def derivatives(
    function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Return the output, and its first and second derivatives along random vectors."""
    for attempt in itertools.count(seed):
        images, means, weight, bias = drawn(
            attempt, shape, (1, shape[1], 1, 1), shape[1:2], shape[1:2]
        )
        images += 10 * means
        if is_clear(images.double(), weight.double(), bias.double()):
            break
    images, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (images, weight, bias))
    output = function(images, weight, bias, EPS)
    upstream, *along = (
        t.to(dtype) for t in drawn(seed, output.shape, images.shape, weight.shape, bias.shape)
    )
    upstream.requires_grad_()
    first = torch.autograd.grad(output, (images, weight, bias), upstream, create_graph=True)
    second = torch.autograd.grad(first, (upstream, images, weight), along)
    return [value.detach() for value in (output, *first, *second)]


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_against_float64(shape: tuple[int, ...], level: str, seed: int) -> None:
    with use_backend("native"):
        ours = derivatives(norm_pool, shape, torch.float32, seed)
    rtol, atol = TOLERANCES["float32"]
    for value, wanted in zip(ours, derivatives(reference.norm_pool, shape, torch.float64, seed)):
        torch.testing.assert_close(
            value.double(), wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max()))
        )


def test_threads_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_norm_pool, "ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(derivatives(norm_pool, SHAPES[-1], torch.float32, seed))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: tuple[int, ...], seed: int) -> None:
    rtol, atol = TOLERANCES["float64"]
    ours = derivatives(reference.norm_pool, shape, torch.float64, seed)
    for value, wanted in zip(ours, derivatives(written_out, shape, torch.float64, seed)):
        torch.testing.assert_close(
            value, wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max()))
        )


def test_float64_takes_the_reference(seed: int) -> None:
    ours = derivatives(norm_pool, (2, 3, 4, 6), torch.float64, seed)
    wanted = derivatives(reference.norm_pool, (2, 3, 4, 6), torch.float64, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted))
    with (
        use_backend("native"),
        pytest.raises(InputError, match="norm_pool: backend 'native' was asked for"),
    ):
        derivatives(norm_pool, (2, 3, 4, 6), torch.float64, seed)


def test_nan_stays() -> None:
    images = torch.ones(1, 2, 2, 2)
    images[0, 0, 0, 0] = torch.nan
    output = norm_pool(images, torch.ones(2), torch.ones(2))
    assert output[0, 0].isnan().all()
    assert output[0, 1].isfinite().all()


BAD = [
    ((torch.zeros(3, 4), torch.zeros(4), torch.zeros(4)), r"images must be \[N, C, H, W\]"),
    ((torch.zeros(2, 4, 1, 8), torch.zeros(4), torch.zeros(4)), r"got \[2, 4, 1, 8\]"),
    ((torch.zeros(2, 4, 8, 8), torch.zeros(3), torch.zeros(4)), r"weight must be \[C\] = \[4\]"),
    ((torch.zeros(2, 4, 8, 8), torch.zeros(4), torch.zeros(1)), r"bias must be \[C\] = \[4\]"),
    (
        (torch.zeros(2, 4, 8, 8), torch.zeros(4, device="meta"), torch.zeros(4)),
        "weight must be on cpu like the other tensors; got meta",
    ),
    (
        (torch.zeros(2, 4, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.float16)),
        "bias must be float32; got float16, and images are float32",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_bad_input(tensors: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(InputError, match="norm_pool: .*" + message):
        norm_pool(*tensors)
