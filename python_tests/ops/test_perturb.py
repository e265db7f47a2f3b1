"""Compare `perturb` with the reference in float64.

The cases are odd sizes, pieces, threads, and torch's own machinery (autograd, compile, graphs).
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops import backend, native
from bidfmkd_fast.runtime import allocator as workspace

KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]
SHAPES = [
    (0, 3, 8, 8),
    (1, 1, 2, 2),
    (2, 3, 7, 5),
    (3, 1, 28, 28),
    (1, 3, 31, 67),
    (2, 3, 32, 32),
    (1, 1, 100, 131),
]
RTOL, ATOL = TOLERANCES["kernel"]


def images(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "grid"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [0, 1, 33, 97])
def test_against_float64(
    cpu_level: str, kind: str, grid: int, shape: tuple[int, ...], q: int, seed: int
) -> None:
    x, state = images(shape, seed), torch.tensor([seed, 5])
    points = ops.perturb(x, state, q, 0.3, kind, grid)
    assert points.shape == (1 + q, *shape)
    with ops.use_backend("reference"):
        expected = ops.perturb(x.double(), state, q, 0.3, kind, grid)
        same_precision = ops.perturb(x, state, q, 0.3, kind, grid)
    torch.testing.assert_close(points.double(), expected, rtol=RTOL, atol=ATOL)
    assert torch.equal(points[0], x)
    if kind == "rademacher":
        assert torch.equal(points, same_precision)


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_pieces_are_the_whole(cpu_level: str, kind: str, grid: int, seed: int) -> None:
    x, state = images((5, 3, 9, 11), seed), torch.tensor([seed, 0])
    whole = ops.perturb(x, state, 70, 0.1, kind, grid)
    for first in (1, 31, 32, 45):
        part = ops.perturb(x, state, 70 - first, 0.1, kind, grid, first_direction=first)
        assert torch.equal(part[1:], whole[1 + first :])
    part = ops.perturb(x[2:], state, 70, 0.1, kind, grid, first_image=2)
    assert torch.equal(part, whole[:, 2:])


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_threads_change_nothing(
    cpu_level: str, kind: str, grid: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native.WRITTEN_PER_THREAD, kind, 1 << 20)
    monkeypatch.setitem(native.SUMMED_PER_THREAD, kind, 1 << 20)
    x, state = (
        images((3, 3, 64, 64), seed),
        torch.tensor([seed, 0]),
    )  # 3.7 M elements: enough for three threads
    single = ops.perturb(x, state, 100, 0.1, kind, grid)
    gradient = ops.estimate_gradient(
        x.flatten()[:300].view(100, 3), state, x.shape, 0.1, kind, grid
    )
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert (
                native.place(single, single.numel(), native.SUMMED_PER_THREAD[kind])[0] == threads
            )
            assert torch.equal(ops.perturb(x, state, 100, 0.1, kind, grid), single)
            again = ops.estimate_gradient(
                x.flatten()[:300].view(100, 3), state, x.shape, 0.1, kind, grid
            )
        finally:
            torch.set_num_threads(1)
        assert torch.equal(again, gradient)


@pytest.mark.parametrize("kind", ["sphere", "gaussian"])
def test_normals_are_the_same_everywhere(kind: str, seed: int) -> None:
    """Check that directions made of normals have the same bits on every instruction set.

    The bits are those of the reference, rounded to float32.
    """
    x, state = torch.zeros(2, 3, 25, 27), torch.tensor([seed, 0])
    assert backend._C is not None
    info = backend.build_info()
    assert info is not None
    with ops.use_backend("reference"):
        expected = ops.perturb(x.double(), state, 40, 1.0, kind)
    rtol, atol = TOLERANCES["rounding"]
    for level in info["cpu_levels"]:
        backend._C.select_cpu_level(level)
        try:
            points = ops.perturb(x, state, 40, 1.0, kind)
        finally:
            backend._C.select_cpu_level(info["cpu_level"])
        torch.testing.assert_close(points.double(), expected, rtol=rtol, atol=atol)
        if level == info["cpu_levels"][0]:
            first = points
        assert torch.equal(points, first)


@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
@pytest.mark.parametrize(
    "shape", [(7, 3, 99, 101), (8, 3, 96, 96), (120, 1, 45, 45), (1000, 1, 9, 19)]
)
def test_streaming_output(cpu_level: str, kind: str, shape: tuple[int, ...], seed: int) -> None:
    """Check that outputs beyond 16 MB, which are written past the cache, hold the same values.

    The cases have rows that start on a cache line and rows that do not, in any `out`.
    """
    x, state = images(shape, seed), torch.tensor([seed, 0])
    points = ops.perturb(x, state, 34, 0.1, kind)
    assert points.numel() * 4 > 16 << 20
    with ops.use_backend("reference"):
        expected = ops.perturb(x, state, 34, 0.1, kind)
    if kind == "rademacher":
        assert torch.equal(points, expected)
    else:
        torch.testing.assert_close(points, expected, rtol=RTOL, atol=ATOL)
    for shift in (1, 7):
        memory = torch.full((points.numel() + 16,), float("nan"))
        out = memory[shift : shift + points.numel()].view_as(points)
        ops.perturb(x, state, 34, 0.1, kind, out=out)
        assert memory[:shift].isnan().all() and memory[shift + points.numel() :].isnan().all()
        torch.testing.assert_close(out, points, rtol=RTOL, atol=ATOL)
        assert kind != "rademacher" or torch.equal(out, points)


def test_more_than_2_to_31_elements(seed: int) -> None:
    """Use offsets beyond 32 bits, in the output and in the gradient's input.

    The test takes 9 GB of memory, so only one instruction set is tested.
    """
    workspace.release()
    page = os.sysconf("SC_PAGE_SIZE")
    if os.sysconf("SC_AVPHYS_PAGES") * page < 11e9:
        pytest.skip("needs 11 GB of free memory")
    q, shape = 2100, (1, 1, 1024, 1024)
    x, state = images(shape, seed), torch.tensor([seed, 0])
    points = ops.perturb(x, state, q, 0.3)
    assert points.numel() > 2**31
    last = ops.perturb(x, state, 1, 0.3, first_direction=q - 1)
    assert torch.equal(points[-1], last[1])
    assert torch.equal(points[0], x)
    with ops.use_backend("reference"):
        assert torch.equal(last, ops.perturb(x, state, 1, 0.3, first_direction=q - 1))
    del points
    assert not workspace._free  # too large to be kept


def test_out_and_strides(cpu_level: str, seed: int) -> None:
    x, state = images((4, 3, 8, 8), seed), torch.tensor([seed, 0])
    expected = ops.perturb(x, state, 5, 0.1)
    out = torch.full((6, 4, 3, 8, 8), float("nan"))
    assert ops.perturb(x, state, 5, 0.1, out=out) is out
    assert torch.equal(out, expected)
    strided = torch.full((6, 4, 3, 8, 16), float("nan"))[..., ::2]
    ops.perturb(x, state, 5, 0.1, out=strided)
    assert torch.equal(strided, expected)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(ops.perturb(transposed, state, 5, 0.1), expected)
    column = torch.tensor([[seed, 7], [0, 8]])[:, 0]  # the state as well may lie anywhere
    assert torch.equal(ops.perturb(x, column, 5, 0.1), expected)
    differences = images((5, 4), seed)
    gradient = ops.estimate_gradient(differences, state, x.shape, 0.1)
    assert torch.equal(ops.estimate_gradient(differences, column, x.shape, 0.1), gradient)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_out_over_the_images_is_refused(backend: str, seed: int) -> None:
    """Refuse images inside `out`, since they would be overwritten while they are read.

    Nothing is written before the refusal.
    """
    state = torch.tensor([seed, 0])
    buffer = images((6, 2, 3, 8, 8), seed)
    before, flat = buffer.clone(), buffer.flatten()
    shape = (2, 3, 8, 8)
    n = math.prod(shape)
    inside = {
        "row 2": buffer[2],
        "half a row off": flat[n // 2 : n // 2 + n].view(shape),
        "the end": flat[-n:].view(shape),
        "one image for all": buffer[0, :1].expand(shape),
        "row 0 in another order": buffer[0].transpose(2, 3),
    }
    with ops.use_backend(backend):
        for name, x in inside.items():
            with pytest.raises(
                InputError, match=r"perturb: x must not share memory with out, .* x\.clone\(\)"
            ):
                ops.perturb(x, state, 5, 0.1, out=buffer)
            assert torch.equal(buffer, before), name
        with pytest.raises(InputError, match="the elements of out must not share memory"):
            ops.perturb(images(shape, seed), state, 5, 0.1, out=buffer[:1].expand(6, *shape))
        with pytest.raises(InputError, match="perturb: state must not share memory with out"):
            ops.perturb(
                images(shape, seed), buffer.flatten()[:4].view(torch.int64), 5, 0.1, out=buffer
            )


@pytest.mark.parametrize("row", [0, 6])
def test_out_may_hold_the_images_in_row_0_or_beside_it(cpu_level: str, row: int, seed: int) -> None:
    state, block = torch.tensor([seed, 0]), images((7, 2, 3, 8, 8), seed)
    x = block[row]  # in out, or right behind it in the same block
    wanted = ops.perturb(x.clone(), state, 5, 0.1)
    assert torch.equal(ops.perturb(x, state, 5, 0.1, out=block[:6]), wanted)
    assert torch.equal(block[:6], wanted)


def test_memory_is_kept_warm_and_never_shared() -> None:
    workspace.release()
    x, state = torch.zeros(8, 3, 64, 64), torch.tensor([0, 0])
    first = ops.perturb(x, state, 9, 0.1)
    address, copy = first.data_ptr(), first.clone()
    second = ops.perturb(x, state + 1, 9, 0.1)
    assert second.data_ptr() != address
    assert torch.equal(first, copy)
    view = first[3:]
    del first
    third = ops.perturb(x, state, 9, 0.1)
    assert third.data_ptr() != address  # the view still lives there
    del view
    assert ops.perturb(x, state, 9, 0.1).data_ptr() == address


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    q=st.integers(0, 70),
    mu=st.floats(1e-4, 10),
    state=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1)),
    first=st.tuples(st.integers(0, 100), st.integers(0, 100)),
)
def test_any_rademacher_is_bit_identical(shape, q, mu, state, first) -> None:  # type: ignore[no-untyped-def]
    x = torch.linspace(-2, 2, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].view(
        shape
    )
    arguments = (x, torch.tensor(state), q, mu)
    keywords = {"first_direction": first[0], "first_image": first[1]}
    with ops.use_backend("native"):
        points = ops.perturb(*arguments, **keywords)
    with ops.use_backend("reference"):
        assert torch.equal(points, ops.perturb(*arguments, **keywords))


def test_derivative_and_compile(seed: int) -> None:
    x = images((2, 1, 4, 4), seed).requires_grad_()
    state = torch.tensor([seed, 0])
    weights = images((4, 2, 1, 4, 4), seed + 1)
    (ops.perturb(x, state, 3, 0.1) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0))
    compiled = torch.compile(lambda x, state: ops.perturb(x, state, 3, 0.1) * 2, fullgraph=True)
    assert torch.equal(compiled(x.detach(), state), ops.perturb(x.detach(), state, 3, 0.1) * 2)
    assert torch.equal(
        compiled(x.detach(), state + 1), ops.perturb(x.detach(), state + 1, 3, 0.1) * 2
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str, seed: int) -> None:
    x, state = images((2, 3, 4, 4), seed), torch.tensor([seed, 0])
    drawing = (3, 0.1, "rademacher", 0, 0, 0)
    with ops.use_backend(backend):
        torch.library.opcheck(torch.ops.bidfmkd.perturb, (x, state, *drawing))
        torch.library.opcheck(
            torch.ops.bidfmkd.perturb, (x.clone().requires_grad_(), state, *drawing)
        )
        torch.library.opcheck(
            torch.ops.bidfmkd.perturb_out, (x, state, *drawing, torch.empty(4, 2, 3, 4, 4))
        )


GOOD = {"x": torch.zeros(2, 3, 4, 4), "state": torch.tensor([0, 0]), "num_directions": 3, "mu": 0.1}
BAD = [
    (
        {"x": torch.zeros(2, 3, 4, 4, dtype=torch.float16)},
        "x must be float32 or float64; got float16",
    ),
    ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "x must be float32 or float64; got uint8"),
    (
        {"x": torch.zeros(4)},
        r"images must have a batch dimension and more, \[B, \*S\]; got shape \[4\]",
    ),
    (
        {"state": torch.tensor([0, 0], dtype=torch.int32)},
        r"state must be an int64 tensor \[seed, step\]; got int32",
    ),
    ({"state": torch.tensor([0])}, r"got int64 \[1\]"),
    ({"num_directions": -1}, "num_directions must not be negative; got -1"),
    ({"mu": 0.0}, r"the step length \(mu\) must be a positive number; got 0.0"),
    ({"mu": float("nan")}, "must be a positive number; got nan"),
    ({"mu": 1e300}, "must be from 1e-30 to 1e[+]30, which float32 holds; got 1e[+]300"),
    ({"mu": 1e-300}, "must be from 1e-30 to 1e[+]30, which float32 holds; got 1e-300"),
    (
        {"directions": "normal"},
        "directions must be one of rademacher, sphere, gaussian, lowres; got 'normal'",
    ),
    ({"directions": "lowres"}, "grid must be from 1 to the image's smaller side, 4; got 0"),
    (
        {"directions": "lowres", "grid": 5},
        "grid must be from 1 to the image's smaller side, 4; got 5",
    ),
    ({"grid": 2}, "grid must be 0 with directions 'rademacher', .*; got 2"),
    (
        {"x": torch.zeros(2, 3), "directions": "lowres", "grid": 1},
        r"need images \[B, C, H, W\]; got shape \[2, 3\]",
    ),
    ({"first_direction": -1}, "must not be negative; got -1"),
    (
        {"out": torch.zeros(3, 2, 3, 4, 4)},
        r"out must be \[1 \+ q, B, \*S\] = \[4, 2, 3, 4, 4\]; got \[3, 2, 3, 4, 4\]",
    ),
    ({"out": torch.zeros(4, 2, 3, 4, 4, dtype=torch.float64)}, "out must be float32; got float64"),
    (
        {"x": torch.zeros(2, 3, 4, 4, requires_grad=True), "out": torch.zeros(4, 2, 3, 4, 4)},
        "pass x.detach()",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        ops.perturb(**{**GOOD, **change})


def test_dtype_errors_are_type_errors() -> None:
    with pytest.raises(InputTypeError):
        ops.perturb(torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([0, 0]), 1, 0.1)


def test_an_explicit_backend_never_falls_back() -> None:
    x = torch.zeros(1, 4, dtype=torch.float64)
    with (
        ops.use_backend("native"),
        pytest.raises(InputError, match="the kernels compute in float32"),
    ):
        ops.perturb(x, torch.tensor([0, 0]), 1, 0.1)
    with (
        pytest.raises(InputError, match="name must be one of auto, native, reference; got 'cuda'"),
        ops.use_backend("cuda"),
    ):
        pass
