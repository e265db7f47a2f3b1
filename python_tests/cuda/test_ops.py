"""Compare the CUDA kernels with the reference in float64 and with the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tolerances import TOLERANCES

from bidfmkd_fast import ops
from bidfmkd_fast.ops.directions import span_dimension
from bidfmkd_fast.ops.norm_pool import norm_pool

KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]
SHAPES = [
    *(
        (0, 3, 8, 8),
        (1, 1, 2, 2),
        (2, 3, 7, 5),
        (3, 1, 28, 28),
        (2, 3, 32, 32),
        (1, 1, 100, 131),
        (2, 3, 84, 84),
    ),
    (1, 3, 224, 224),  # rows longer than a block has threads for
]
SCORES_KINDS = ["logits", "probabilities", "log_probabilities"]
DIVERGENCES = ["l1", "l1_prob", "kl"]
RTOL, ATOL = TOLERANCES["kernel"]


def normals(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_scores(kind: str, *shape: int, seed: int) -> torch.Tensor:
    logits = 2 * normals(*shape, seed=seed)
    return {
        "logits": logits,
        "probabilities": logits.softmax(-1),
        "log_probabilities": logits.log_softmax(-1),
    }[kind]


def close(actual: torch.Tensor, expected: torch.Tensor, terms: float = 0.0) -> None:
    """Assert that two tensors agree.

    The absolute tolerance is in units of the largest value, or of the size of the `terms` of a sum,
    with which the error of the sum grows.
    """
    largest = max(terms, float(expected.abs().max())) if expected.numel() else 1.0
    actual, expected = actual.cpu().double(), expected.cpu().double()
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=ATOL * max(largest, 1e-30))


def size_of_terms(
    differences: torch.Tensor, shape: tuple[int, ...], kind: str, grid: int, mu: float
) -> float:
    """Return about how large the elements of an estimate are when the terms do not cancel."""
    d, span = math.prod(shape[1:]), span_dimension(shape, kind, grid)
    return (
        span / (max(len(differences), 1) * mu) * float(differences.square().sum()) ** 0.5 / d**0.5
    )


@pytest.mark.parametrize(("kind", "grid"), [*KINDS, ("lowres", 27)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [0, 1, 33, 70])
def test_perturb_and_estimate(
    device: torch.device, kind: str, grid: int, shape: tuple[int, ...], q: int, seed: int
) -> None:
    if grid > min(shape[2:]):
        pytest.skip("the image is smaller than the field")
    x, state = normals(*shape, seed=seed), torch.tensor([seed, 5])
    differences, drawing = normals(q, shape[0], seed=seed + 1), (0.3, kind, grid)
    pieces = {"first_direction": 3, "first_image": 2}
    points = ops.perturb(x.to(device), state.to(device), q, *drawing, **pieces)
    gradient = ops.estimate_gradient(
        differences.to(device), state.to(device), shape, *drawing, **pieces
    )
    assert torch.equal(points[0].cpu(), x)
    on_cpu = ops.perturb(x, state, q, *drawing, **pieces)
    if kind == "rademacher":
        assert torch.equal(points.cpu(), on_cpu)
    with ops.use_backend("reference"):
        close(points, ops.perturb(x.double(), state, q, *drawing, **pieces))
        expected = ops.estimate_gradient(differences.double(), state, shape, *drawing, **pieces)
        close(gradient, expected, size_of_terms(differences, shape, kind, grid, 0.3))


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_out_of_line_and_strided(device: torch.device, kind: str, grid: int, seed: int) -> None:
    """Use addresses that 16-byte accesses must not touch, and an output that is not contiguous."""
    shape, q, state = (2, 3, 8, 8), 9, torch.tensor([seed, 0], device=device)
    base = normals(1 + 2 * 192, seed=seed).to(device)
    x = base[1:].view(shape)
    expected = ops.perturb(x.clone(), state, q, 0.1, kind, grid)
    assert torch.equal(ops.perturb(x, state, q, 0.1, kind, grid), expected)
    out = torch.full((1 + (1 + q) * x.numel(),), float("nan"), device=device)
    ops.perturb(x, state, q, 0.1, kind, grid, out=out[1:].view(1 + q, *shape))
    assert torch.equal(out[1:].view(1 + q, *shape), expected)
    assert out[0].isnan()
    strided = torch.full((1 + q, *shape[:-1], 16), float("nan"), device=device)[..., ::2]
    ops.perturb(
        x.transpose(2, 3).contiguous().transpose(2, 3), state, q, 0.1, kind, grid, out=strided
    )
    assert torch.equal(strided, expected)


def test_more_than_2_to_31_elements(device: torch.device, seed: int) -> None:
    q, shape = 2100, (1, 1, 1024, 1024)
    if torch.cuda.mem_get_info(device)[0] < 12e9:
        pytest.skip("needs 12 GB of device memory")
    x, state = normals(*shape, seed=seed).to(device), torch.tensor([seed, 0], device=device)
    for kind in ("rademacher", "sphere"):
        points = ops.perturb(x, state, q, 0.3, kind)
        assert points.numel() > 2**31
        assert torch.equal(
            points[-1], ops.perturb(x, state, 1, 0.3, kind, first_direction=q - 1)[1]
        )
        assert torch.equal(points[0], x)
        del points


@pytest.mark.parametrize("kind", SCORES_KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_classes", "q"), [(1, 0), (5, 9), (64, 300)])
def test_scores_to_gradient(
    device: torch.device,
    kind: str,
    divergence: str,
    dtype: torch.dtype,
    n_classes: int,
    q: int,
    seed: int,
) -> None:
    shape = (7, 1, 5, 6)
    scores = make_scores(kind, 1 + q, 7, n_classes, seed=seed).to(dtype)
    student = make_scores(kind, 7, n_classes, seed=seed + 1).to(dtype)
    labels, state = torch.arange(7) % n_classes, torch.tensor([seed, 0])
    for model, weight in ((None, 0.0), (student, 0.7), (student.float(), 0.7)):
        arguments = (shape, 0.2, model, weight, kind, divergence)
        moved = (shape, 0.2, None if model is None else model.to(device), weight, kind, divergence)
        actual = ops.zo_kd_gradient(scores.to(device), labels.to(device), state.to(device), *moved)
        with ops.use_backend("reference"):
            expected = ops.zo_kd_gradient(scores.double(), labels, state, *arguments)
        for tensor, other in zip(actual, expected):
            close(tensor, other)


def test_a_label_out_of_range_is_seen(device: torch.device) -> None:
    """Check that a label out of range gives a NaN loss for its image.

    Labels on a device cannot be checked without waiting for the device.
    """
    labels, state = torch.tensor([0, 5], device=device), torch.tensor([0, 0], device=device)
    _, loss = ops.zo_kd_gradient(torch.zeros(4, 2, 5, device=device), labels, state, (2, 3), 0.1)
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("kind", SCORES_KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tasks", [(), (3,), (2, 2)])
def test_kd_loss_and_both_derivatives(
    device: torch.device, kind: str, divergence: str, tasks: tuple[int, ...], seed: int
) -> None:
    if divergence == "l1" and kind != "logits":
        pytest.skip("l1 compares logits with logits")
    student, teacher = (
        normals(*tasks, 150, 5, seed=seed),
        make_scores(kind, *tasks, 150, 5, seed=seed + 1),
    )
    weights = normals(*tasks, seed=seed + 2)

    def run(
        student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
    ) -> list[torch.Tensor]:
        student = student.clone().requires_grad_()
        loss = ops.kd_loss(student, teacher, 2.5, divergence, kind)
        (first,) = torch.autograd.grad((loss * weights).sum(), student, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), student)
        return [loss, first, second]

    with ops.use_backend("reference"):
        expected = run(student.double(), teacher.double(), weights.double())
    for actual, wanted in zip(
        run(student.to(device), teacher.to(device), weights.to(device)), expected
    ):
        close(actual.detach(), wanted.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_students(device: torch.device, dtype: torch.dtype, seed: int) -> None:
    student, teacher = (
        normals(9, 5, seed=seed).to(device, dtype),
        normals(9, 5, seed=seed + 1).to(device),
    )
    loss = ops.kd_loss(student, teacher)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, ops.kd_loss(student.float(), teacher).to(dtype))


def pooled(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    upstream: torch.Tensor,
    along: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the output of norm_pool, and its first and second derivatives along given vectors."""
    images, weight, bias, upstream = (
        tensor.clone().requires_grad_() for tensor in (images, weight, bias, upstream)
    )
    output = norm_pool(images, weight, bias)
    first = torch.autograd.grad(output, (images, weight, bias), upstream, create_graph=True)
    return [
        tensor.detach()
        for tensor in (
            output,
            *first,
            *torch.autograd.grad(first, (upstream, images, weight), along),
        )
    ]


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 2), (3, 5, 7, 5), (5, 2, 33, 32), (75, 8, 32, 32), (2, 300, 2, 2)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_pool(
    device: torch.device, shape: tuple[int, ...], channels_last: bool, seed: int
) -> None:
    """Compare with torch in float64, on images where no winner is nearly a tie."""
    n, c, h, w = shape
    # Values on a grid of 2^-10, different within a cell: no cell is near a tie.
    images = torch.stack(
        [torch.randperm(4096, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
    )
    images = images.repeat(1, -(-c * h * w // 4096))[:, : c * h * w].reshape(shape) / 1024.0
    weight, bias = 1 + normals(c, seed=seed).abs(), 1e-3 * normals(c, seed=seed + 1)
    upstream = normals(n, c, h // 2, w // 2, seed=seed + 2)
    along = [normals(*shape, seed=seed + 3), normals(c, seed=seed + 4), normals(c, seed=seed + 5)]
    arguments = [tensor.to(device) for tensor in (images, weight, bias, upstream)]
    if channels_last:
        arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)
    actual = pooled(*arguments, [tensor.to(device) for tensor in along])
    with ops.use_backend("reference"):
        expected = pooled(
            *(tensor.double() for tensor in (images, weight, bias, upstream)),
            [tensor.double() for tensor in along],
        )
    for value, wanted in zip(actual, expected):
        close(
            value, wanted, (n * h * w) ** 0.5 if value.ndim == 1 else 0.0
        )  # sums over a channel may cancel


def test_opcheck(device: torch.device, seed: int) -> None:
    x, state = normals(2, 3, 4, 4, seed=seed).to(device), torch.tensor([seed, 0], device=device)
    scores, labels = normals(4, 2, 5, seed=seed).to(device), torch.tensor([0, 4], device=device)
    op, check, drawing = torch.ops.bidfmkd, torch.library.opcheck, (0.1, "sphere", 0, 0, 0)
    check(op.perturb, (x, state, 3, *drawing))
    check(op.perturb, (x.clone().requires_grad_(), state, 3, *drawing))
    check(op.perturb_out, (x, state, 3, *drawing, torch.empty(4, 2, 3, 4, 4, device=device)))
    check(
        op.estimate_gradient, (normals(3, 2, seed=seed).to(device), state, (2, 3, 4, 4), *drawing)
    )
    arguments = ("logits", "kl", "sphere", 0, 0, 0)
    check(op.zo_kd_gradient, (scores, labels, state, (2, 3, 4, 4), 0.1, scores[0], 0.3, *arguments))
    student = normals(3, 5, seed=seed).to(device).requires_grad_()
    check(op.kd_loss, (student, normals(3, 5, seed=seed + 1).to(device), 1.0, "kl", "logits"))


def everything(
    x: torch.Tensor, state: torch.Tensor, labels: torch.Tensor, kind: str
) -> list[torch.Tensor]:
    """Run all ops once: points, scores that depend on them, gradient, distillation, derivative."""
    points = ops.perturb(x, state, 40, 0.1, kind)
    scores = points.flatten(2)[..., :5]
    gradient, loss = ops.zo_kd_gradient(
        scores, labels, state, x.shape, 0.1, scores[0], 0.3, directions=kind
    )
    student = x.flatten(1)[:, 5:10].clone().requires_grad_()
    distilled = ops.kd_loss(student, scores[0])
    return [points, gradient, loss, distilled.detach(), *torch.autograd.grad(distilled, student)]


def captured(
    function: Callable[[], list[torch.Tensor]],
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("kind", ["rademacher", "sphere", "gaussian"])
def test_graph_replay_draws_anew(device: torch.device, kind: str, seed: int) -> None:
    x, labels = normals(6, 3, 8, 8, seed=seed).to(device), torch.arange(6, device=device) % 5
    state = torch.tensor([seed, 0], device=device)

    def step() -> list[torch.Tensor]:
        results = everything(x, state, labels, kind)
        state[1] += 1
        return results

    graph, results = captured(step)
    state.copy_(torch.tensor([seed, 10]))
    seen = []
    for count in range(3):
        graph.replay()
        expected = everything(x, torch.tensor([seed, 10 + count], device=device), labels, kind)
        for actual, wanted in zip(results, expected):
            assert torch.equal(actual, wanted)
        seen.append(results[0][1].clone())
    assert not torch.equal(seen[0], seen[1])


def test_torchs_current_stream(device: torch.device, seed: int) -> None:
    """Check that kernels wait for earlier work of torch on a side stream, and for nothing else."""
    x, labels = normals(6, 3, 8, 8, seed=seed).to(device), torch.arange(6, device=device) % 5
    state = torch.tensor([seed, 0], device=device)
    expected = everything(x, state, labels, "sphere")
    stream, late = torch.cuda.Stream(), torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        late.copy_(x)
        results = everything(late, state, labels, "sphere")
    torch.cuda.synchronize()
    for actual, wanted in zip(results, expected):
        assert torch.equal(actual, wanted)


def test_nothing_waits_for_the_device(device: torch.device, seed: int) -> None:
    x, labels = normals(6, 3, 8, 8, seed=seed).to(device), torch.arange(6, device=device) % 5
    state = torch.tensor([seed, 0]).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in ("rademacher", "sphere", "gaussian"):
            everything(x, state, labels, kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one(device: torch.device, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    x, labels, state = normals(6, 3, 8, 8, seed=seed), torch.arange(6) % 5, torch.tensor([seed, 0])
    expected = everything(x.to(device), state.to(device), labels.to(device), "sphere")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    actual = everything(x.to(other), state.to(other), labels.to(other), "sphere")
    assert torch.cuda.current_device() == device.index
    for tensor, wanted in zip(actual, expected):
        assert torch.equal(tensor.cpu(), wanted.cpu())


def test_compile(device: torch.device, seed: int) -> None:
    x, labels = normals(2, 3, 8, 8, seed=seed).to(device), torch.arange(2, device=device)
    state = torch.tensor([seed, 0], device=device)

    def step(x: torch.Tensor) -> torch.Tensor:
        scores = ops.perturb(x, state, 8, 0.1).flatten(2)[..., :5]
        gradient, loss = ops.zo_kd_gradient(scores, labels, state, (2, 3, 8, 8), 0.1)
        return gradient.sum() + loss.sum()

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


def test_every_kernel_small(device: torch.device, seed: int) -> None:
    """Launch every kernel a few times, at sizes that leave incomplete ends.

    `gpu_check.sh` runs this test under compute-sanitizer.
    """
    for kind, grid, shape in (
        ("rademacher", 0, (2, 3, 7, 5)),
        ("rademacher", 0, (2, 3, 8, 8)),
        ("sphere", 0, (2, 3, 7, 5)),
        ("gaussian", 0, (2, 3, 8, 8)),
        ("sphere", 0, (1, 1, 192, 192)),  # rows longer than a block has threads for
        ("gaussian", 0, (1, 1, 101, 97)),
        ("lowres", 2, (2, 3, 7, 5)),
        ("lowres", 7, (1, 3, 105, 108)),
        ("lowres", 46, (1, 1, 47, 46)),  # fields too large for shared memory
    ):
        x, state, q = normals(*shape, seed=seed), torch.tensor([seed, 0]), 35
        differences = normals(q, shape[0], seed=seed + 1)
        points = ops.perturb(x.to(device), state.to(device), q, 0.1, kind, grid)
        close(points, ops.perturb(x, state, q, 0.1, kind, grid))
        gradient = ops.estimate_gradient(
            differences.to(device), state.to(device), shape, 0.1, kind, grid
        )
        expected = ops.estimate_gradient(differences, state, shape, 0.1, kind, grid)
        close(gradient, expected, size_of_terms(differences, shape, kind, grid, 0.1))
    everything(
        x.to(device),
        state.to(device),
        torch.zeros(1, dtype=torch.int64, device=device),
        "rademacher",
    )
    student, teacher = (normals(2, 9, 5, seed=seed + i).to(device) for i in range(2))
    student.requires_grad_()
    (first,) = torch.autograd.grad(ops.kd_loss(student, teacher).sum(), student, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), student)[0].isfinite().all()
    images, weight, upstream = (
        normals(3, 5, 7, 5, seed=seed),
        normals(5, seed=seed),
        normals(3, 5, 3, 2, seed=seed),
    )
    moved = [tensor.to(device) for tensor in (images, weight, weight, upstream)]
    for value in pooled(*moved, [tensor.to(device) for tensor in (images, weight, weight)]):
        assert value.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        scores = normals(4, 2, 5, seed=seed).to(device, dtype)
        labels, state = torch.tensor([0, 4], device=device), torch.tensor([seed, 0], device=device)
        assert ops.zo_kd_gradient(scores, labels, state, (2, 5), 0.1)[0].isfinite().all()
