"""The shortest step that an API's input and scores resolve: what `mu="auto"` goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast import ops
from bidfmkd_fast.black_box.answers import log_probabilities
from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.seeds import derive_seed

STEPS = (
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    4.0,
)  # lengths tried, in 255ths of the input range per pixel
# mu, in widths of the input range: below it nothing is gained even where every digit counts
USUAL = 0.025
# agreement with a longer step from which a step tells more than noise; twice such a step is
# suggested
USABLE = 0.3
N_IMAGES, N_DIRECTIONS = 4, 2
QUERIES = 2 * N_IMAGES * N_DIRECTIONS * len(STEPS)  # of one measurement


@dataclass(frozen=True)
class StepChoice:
    """What steps of several lengths tell.

    Attributes:
        agreement: length of a step `mu` -> how far the slopes it finds are those that a step about
            four times as long finds along the same directions: 1 where they are equal, 0 or less
                where they are noise or nothing moves.
        smallest: the shortest usable `mu`; None where no step tells anything.
        suggested: the `mu` to take; the longest tried where none is usable.
    """

    agreement: dict[float, float]
    smallest: float | None
    suggested: float


def measure_steps(api: BlackBox, images: Tensor, *, seed: int = 0) -> StepChoice:
    """Try steps of several lengths at `images` `[N, C, H, W]` in the API's input range; N = 4 costs
    `QUERIES` queries.

    For every image, direction u and class the slope `(l(x + mu u) - l(x - mu u)) / mu` is taken, l
    the log-probability. Rounding, 8-bit inputs and answers that vary, whatever hides a short step,
    hide it less from a longer one: they make its slope too large, or 0, and another one. With
    slopes a and b of a step and of the longer one, the agreement is `1 - |a - b|^2 / |b|^2`.
    """
    low, high = api.spec.input_range
    per_pixel = (high - low) / 255 * math.sqrt(math.prod(api.spec.image_shape))
    lengths = [step * per_pixel for step in STEPS]
    images = images.detach().float().cpu()
    state = torch.tensor([derive_seed(seed, "resolution"), 0])
    points = []
    for mu in lengths:
        forth = ops.perturb(images, state, N_DIRECTIONS, mu)[1:]  # [directions, N, C, H, W]
        points += [forth, 2 * images - forth]
    scores = api(torch.cat(points).flatten(0, 1)).unflatten(0, (-1, len(images)))
    parts = log_probabilities(scores, api.spec).double().split(N_DIRECTIONS)
    slopes = [
        (forth - back) / mu
        for forth, back, mu in zip(parts[::2], parts[1::2], lengths, strict=True)
    ]
    longer = [*slopes[2:], slopes[-1]]
    agreement = {mu: _explained(a, b) for mu, a, b in zip(lengths, slopes, longer)}
    return choose(agreement, lengths[-1], USUAL * (high - low))


def choose(agreement: dict[float, float], longest: float, usual: float) -> StepChoice:
    """The smallest usable and the suggested step, by their agreement with longer ones."""
    usable = [mu for mu, value in agreement.items() if value >= USABLE]
    if not usable:
        return StepChoice(agreement, None, longest)
    return StepChoice(agreement, min(usable), min(longest, max(2 * min(usable), usual)))


def _explained(a: Tensor, b: Tensor) -> float:
    size = b.square().sum().item()
    return 1 - (a - b).square().sum().item() / size if size > 0 else 0.0


def too_short(spec: APISpec, mu: float) -> str | None:
    """Why a step of length `mu` is lost in 8-bit images before it reaches the API, or None."""
    low, high = spec.input_range
    per_pixel = mu / math.sqrt(math.prod(spec.image_shape)) * 255 / (high - low)
    if not spec.is_8_bit or per_pixel >= 0.5:
        return None
    return f"a step of mu={mu:g} moves a pixel by {per_pixel:.2g} of a level, and {spec.name} takes images of 8 bits"


def unmoved(scores: Tensor, labels: Tensor, spec: APISpec) -> float:
    """Share of the images whose wanted class is answered the same, or as good as, wherever a step
    leads.

    `scores` `[1+q, B, n_classes]`. As good as: the root mean square change is at most half a unit
    of the last place, which rounding makes of no change at all.
    """
    wanted = scores.gather(2, labels.expand(scores.shape[:2])[..., None])[..., 0]  # [1+q, B]
    change = (wanted[1:] - wanted[:1]).square().mean(0).sqrt()  # [B]
    place = 0.0 if spec.decimals is None else 10.0**-spec.decimals
    return (change <= 0.5 * place).float().mean().item()
