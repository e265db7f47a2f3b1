"""Every op again in plain torch: the specification the native kernels are tested against.

Element `j` of direction `k` of image `b` at `(seed, step)` is a pure function of those five numbers, through the
counter-based generator Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
SIGN_ROUNDS = 10
NORMAL_ROUNDS = 7  # the fewest rounds that pass BigCrush, in the paper above
LOWEST_PROBABILITY = 1e-7  # an API may round a probability down to 0; -log of it must stay finite
_U32 = 0xFFFFFFFF


def philox4x32(
    counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: 4 words from a counter of 4 and a key of 2, all int64 tensors in [0, 2^32) that
    broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps into the sign bit, but shift-and-mask still finds its halves.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _U32 ^ c1 ^ k0,
            p1 & _U32,
            (p0 >> 32) & _U32 ^ c3 ^ k1,
            p0 & _U32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _U32, (k1 + PHILOX_WEYL[1]) & _U32
    return c0, c1, c2, c3


def random_words(
    state: Tensor, n_images: int, n_counters: int, third: int, rounds: int, first_image: int = 0
) -> Tensor:
    """`[n_images, n_counters, 4]` int64 words in [0, 2^32), of the counters `(0, 1, ..., image,
    third, step)`.
    """
    device = state.device
    seed, step = state[0], state[1]
    counters = torch.arange(n_counters, device=device)[None, :]
    images = torch.arange(first_image, first_image + n_images, device=device)[:, None] & _U32
    counter = (counters, images, torch.tensor(third & _U32, device=device), step & _U32)
    words = torch.broadcast_tensors(
        *philox4x32(counter, (seed & _U32, (seed >> 32) & _U32), rounds)
    )
    return torch.stack(words, dim=-1)


def _sign_words(
    state: Tensor, n_images: int, n_elements: int, group: int, first_image: int
) -> Tensor:
    """`[n_images, n_elements]` words: bit `i` is the sign of direction `32 * group + i`."""
    words = random_words(state, n_images, -(-n_elements // 4), group, SIGN_ROUNDS, first_image)
    return words.flatten(1)[:, :n_elements]


@functools.cache
def _normal_table() -> Tensor:
    """`[2^16]` standard normals, float64: one for every 16 bits.

    The top bit is the sign. The sizes are the quantiles in the middles of 2^15 equal shares, in
    steps of 1/7500, by cubics in integers: see `csrc/random/normal.h`, whose tables these are.
    """

    def quantile(rank: Tensor) -> Tensor:
        return -7500 * torch.special.ndtri((rank.double() + 0.5) / 2**16)

    bits = torch.arange(2**15)
    sizes = quantile(bits).round().long()  # stays so for the 32 outermost
    at = torch.cos(
        (2 * torch.arange(4, dtype=torch.float64) + 1) * torch.pi / 8
    )  # the Chebyshev points
    for n_ranks in (32, 1024):
        first = (
            torch.arange(1, 32)[:, None] * n_ranks
        )  # [31, 1]; segment 0 holds the finer segments or the outermost
        powers = torch.linalg.solve(
            at[:, None] ** torch.arange(4), quantile(first + n_ranks / 2 * (1 + at)).T
        ).T
        # A product with t / 2 doubles what it is made from; rounding down takes half a unit each
        # time.
        powers = powers * torch.tensor([1, 2, 4, 8]) + torch.tensor([0.5, 0.5, 0.5, 0.0])
        constant, linear, square, cube = powers.round().long().T[:, :, None]
        place = torch.arange(n_ranks)
        t = (place - n_ranks * (place >= n_ranks // 2)) * (
            2**16 // n_ranks
        )  # signed, in units of 2^-15
        values = cube * t >> 16
        values = (square + values) * t >> 16
        values = (linear + values) * t >> 16
        sizes[n_ranks : 32 * n_ranks] = (constant + values).flatten()
    sizes = sizes.double() / sizes.double().square().mean().sqrt()
    return torch.cat([sizes, -sizes])


def _normals(
    state: Tensor, n_images: int, n_elements: int, direction: int, first_image: int
) -> Tensor:
    """`[n_images, n_elements]` standard normals in float64, each from 16 bits."""
    words = random_words(
        state, n_images, -(-n_elements // 8), direction, NORMAL_ROUNDS, first_image
    )
    halves = torch.cat([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :n_elements]
    return _normal_table().to(halves.device)[halves]


def span_dimension(shape: Sequence[int], directions: str, grid: int) -> int:
    """`s`, the dimension of the space that the directions span: C * grid^2 for `lowres`, d = C * H
    * W otherwise.
    """
    return shape[1] * grid * grid if directions == "lowres" else math.prod(shape[1:])


def unit_directions(
    shape: Sequence[int],
    state: Tensor,
    num_directions: int,
    directions: str = "rademacher",
    grid: int = 0,
    first_direction: int = 0,
    first_image: int = 0,
) -> Iterator[Tensor]:
    """Yields `u_k` for k = first_direction, ...: float64 `[B, *S]`, of length 1 per image
    (`gaussian`: about 1).
    """
    n_images, d = shape[0], math.prod(shape[1:])
    words, group_of_words = None, -1
    for k in range(first_direction, first_direction + num_directions):
        if directions == "rademacher":
            if words is None or group_of_words != k // 32:
                group_of_words = k // 32
                words = _sign_words(state, n_images, d, group_of_words, first_image)
            flat = (1.0 - 2.0 * ((words >> (k % 32)) & 1)).double() / math.sqrt(max(d, 1))
        elif directions == "gaussian":
            flat = _normals(state, n_images, d, k, first_image) / math.sqrt(max(d, 1))
        elif directions == "sphere":
            flat = _normals(state, n_images, d, k, first_image)
            flat = flat / flat.norm(dim=1, keepdim=True)
        else:
            channels, height, width = shape[1:]
            field = _normals(state, n_images, channels * grid * grid, k, first_image)
            field = field.view(n_images, channels, grid, grid)
            flat = F.interpolate(
                field, (height, width), mode="bilinear", align_corners=False
            ).flatten(1)
            flat = flat / flat.norm(dim=1, keepdim=True)
        yield flat.view(tuple(shape))


def perturb_out(
    x: Tensor,
    state: Tensor,
    num_directions: int,
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
    out: Tensor,
) -> None:
    """`out[0] = x`, `out[1 + k] = x + mu * u_k`; `out` is `[1 + q, B, *S]`."""
    out[0] = x
    drawn = unit_directions(
        x.shape, state, num_directions, directions, grid, first_direction, first_image
    )
    for k, u in enumerate(drawn):
        # The step is rounded before it is added, as the kernels do, so that sign directions agree
        # bit for bit.
        out[1 + k] = x + (mu * u).to(x.dtype)


def estimate_gradient(
    differences: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
) -> Tensor:
    """`g_b = s / (q mu) * sum_k differences[k, b] * u_kb`; `[q, B]` -> `[B, *S]` (paper, equation
    4).
    """
    num_directions = differences.shape[0]
    total = torch.zeros(tuple(shape), dtype=torch.float64, device=differences.device)
    drawn = unit_directions(
        shape, state, num_directions, directions, grid, first_direction, first_image
    )
    for k, u in enumerate(drawn):
        total += differences[k].double().view(-1, *[1] * (len(shape) - 1)) * u
    scale = (
        span_dimension(shape, directions, grid) / (num_directions * mu) if num_directions else 0.0
    )
    return (scale * total).to(
        torch.float64 if differences.dtype == torch.float64 else torch.float32
    )


def log_probabilities_of(scores: Tensor, scores_kind: str) -> Tensor:
    """Log-probabilities along the last dimension. Probabilities are floored at
    `LOWEST_PROBABILITY`.
    """
    if scores_kind == "logits":
        return scores.log_softmax(-1)
    if scores_kind == "probabilities":
        return scores.clamp_min(LOWEST_PROBABILITY).log()
    return scores


def probabilities_of(scores: Tensor, scores_kind: str) -> Tensor:
    """Probabilities along the last dimension."""
    if scores_kind == "logits":
        return scores.softmax(-1)
    return scores if scores_kind == "probabilities" else scores.exp()


def objective(
    scores: Tensor,
    labels: Tensor,
    student_scores: Tensor | None,
    boundary_weight: float,
    scores_kind: str,
    divergence: str,
) -> Tensor:
    """The recovery objective of every point: scores `[R, B, n_classes]` -> float64 `[R, B]`.

    `CE(A(x), y) - lambda * [argmax A(x) == argmax f(x)] * D(A(x), f(x))` (paper, section 3.3), with
    the student `f` asked once per image, `student_scores` `[B, n_classes]`, in the same kind as
    `scores`.
    """
    scores = scores.double()
    log_p = log_probabilities_of(scores, scores_kind)
    loss = -log_p.gather(-1, labels.expand(scores.shape[:-1])[..., None])[..., 0]
    if student_scores is None or boundary_weight == 0.0:
        return loss
    student = student_scores.double()
    if divergence == "l1":
        distance = (scores - student).abs().sum(-1)
    elif divergence == "l1_prob":
        distance = (
            (probabilities_of(scores, scores_kind) - probabilities_of(student, scores_kind))
            .abs()
            .sum(-1)
        )
    else:
        p = probabilities_of(scores, scores_kind)
        terms = p * (log_p - log_probabilities_of(student, scores_kind))
        distance = torch.where(p == 0, 0.0, terms).sum(-1)  # 0 log 0 is 0
    agree = scores.argmax(-1) == student.argmax(-1)
    # Chosen, not multiplied by the gate: 0 times a distance that is not finite would be NaN.
    return loss - boundary_weight * torch.where(agree, distance, 0.0)


def zo_kd_gradient(
    scores: Tensor,
    labels: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    student_scores: Tensor | None,
    boundary_weight: float,
    scores_kind: str,
    divergence: str,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
) -> tuple[Tensor, Tensor]:
    """Scores of all points `[1 + q, B, n_classes]` -> gradient `[B, *S]`, objective at the images
    themselves `[B]`.
    """
    losses = objective(scores, labels, student_scores, boundary_weight, scores_kind, divergence)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    differences = losses[1:] - losses[:1]
    gradient = estimate_gradient(
        differences, state, shape, mu, directions, grid, first_direction, first_image
    )
    return gradient.to(dtype), losses[0].to(dtype)


def _teacher_probabilities(scores: Tensor, scores_kind: str, temperature: float) -> Tensor:
    """softmax(logits / T); for probabilities p, p^(1/T) normalised, which is the same thing."""
    if scores_kind == "logits":
        return (scores / temperature).softmax(-1)
    return (log_probabilities_of(scores, scores_kind) / temperature).softmax(-1)


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str
) -> Tensor:
    """`[*E, N, n_classes]` twice -> `[*E]`: T^2 * mean_n D(teacher, student), both at temperature
    T, in float64.
    """
    dtype, student, teacher = student.dtype, student.double(), teacher.double()
    if divergence == "l1":
        per_image = (student - teacher).abs().sum(-1) / temperature
    else:
        p_teacher = _teacher_probabilities(teacher, scores_kind, temperature)
        if divergence == "l1_prob":
            per_image = ((student / temperature).softmax(-1) - p_teacher).abs().sum(-1)
        else:
            log_student = (student / temperature).log_softmax(-1)
            terms = torch.xlogy(p_teacher, p_teacher) - p_teacher * log_student
            per_image = torch.where(p_teacher == 0, 0.0, terms).sum(-1)  # 0 log 0 is 0
    return (temperature**2 * per_image.mean(-1)).to(dtype)


def kd_loss_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> Tensor:
    """`grad * d kd_loss / d student`: `[*E]`, `[*E, N, n_classes]` twice -> `[*E, N,
    n_classes]`.
    """
    dtype, student, teacher = student.dtype, student.double(), teacher.double()
    if divergence == "l1":
        jacobian = (student - teacher).sign()
    else:
        p = (student / temperature).softmax(-1)
        p_teacher = _teacher_probabilities(teacher, scores_kind, temperature)
        if divergence == "kl":
            jacobian = p - p_teacher
        else:
            sign = (p - p_teacher).sign()
            jacobian = p * (sign - (p * sign).sum(-1, keepdim=True))
    scale = grad.double() * (temperature / max(student.shape[-2], 1))
    return (scale[..., None, None] * jacobian).to(dtype)


def kd_loss_double_backward(
    grad_out: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> tuple[Tensor, Tensor]:
    """The derivatives of `<grad_out, kd_loss_backward>`: with respect to `grad` `[*E]` and
    `student`.
    """
    dtype = student.dtype
    one = torch.ones_like(grad, dtype=torch.float64)
    jacobian = kd_loss_backward(
        one, student.double(), teacher, temperature, divergence, scores_kind
    )
    v = grad_out.double()
    grad_grad = (v * jacobian).sum((-2, -1)).to(dtype)
    if divergence == "l1":
        return grad_grad, torch.zeros_like(student)
    p = (student.double() / temperature).softmax(-1)
    centred = p * (v - (p * v).sum(-1, keepdim=True))
    if divergence == "kl":
        hessian_v = centred
    else:
        sign = (p - _teacher_probabilities(teacher.double(), scores_kind, temperature)).sign()
        offset = sign - (p * sign).sum(-1, keepdim=True)
        hessian_v = centred * offset - p * (p * offset * v).sum(-1, keepdim=True)
    scale = grad.double() / max(student.shape[-2], 1)
    return grad_grad, (scale[..., None, None] * hessian_v).to(dtype)
