"""Measure the shortest step length (mu) whose effect an API's input and scores can resolve.

`mu="auto"` and the probe use it. What a recovery does with the result is in `recovery/mu.py`.
"""

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

# Lengths tried, as the root mean square change of a pixel in 255ths of the input range.
STEPS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
# The shortest mu suggested, in widths of the input range. Shorter steps gain nothing, even where an
# API answers with all digits.
USUAL = 0.025
# A step is usable if its agreement with a longer step reaches this value; below it, noise
# dominates. Twice the shortest usable step is suggested.
USABLE = 0.3
N_IMAGES, N_DIRECTIONS = 4, 2
QUERIES = 2 * N_IMAGES * N_DIRECTIONS * len(STEPS)  # of one measurement


@dataclass(frozen=True)
class StepChoice:
    """The step length to use, and the measurement behind it.

    Attributes:
        agreement: per step length (mu), how well the slopes that it finds agree with those of a
            step about four times as long, along the same directions. 1 if they are equal, 0 or less
            if they are noise or nothing changes.
        smallest: the shortest usable mu; None if no step is usable.
        suggested: the mu to use; the longest one tried if no step is usable.
    """

    agreement: dict[float, float]
    smallest: float | None
    suggested: float


def measure_steps(api: BlackBox, images: Tensor, *, seed: int = 0) -> StepChoice:
    """Try steps of several lengths at `images` `[N, C, H, W]` in the API's input range.

    With N = 4 images this costs `QUERIES` queries.

    For every image x, direction u and class, the slope of the log-probability l is measured as
    `(l(x + mu u) - l(x - mu u)) / mu`. Rounded scores, 8-bit inputs and answers that vary disturb
    the slope of a short step more than that of a long step: they make it 0 or too large. So the
    slopes a of a step are compared with the slopes b of a longer step; the agreement of the two is
    `1 - |a - b|^2 / |b|^2`.
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
    """Choose the smallest usable and the suggested step by their agreement with longer steps."""
    usable = [mu for mu, value in agreement.items() if value >= USABLE]
    if not usable:
        return StepChoice(agreement, None, longest)
    return StepChoice(agreement, min(usable), min(longest, max(2 * min(usable), usual)))


def _explained(a: Tensor, b: Tensor) -> float:
    """Return the agreement `1 - |a - b|^2 / |b|^2` of slopes; 0 if all slopes b are 0."""
    size = b.square().sum().item()
    return 1 - (a - b).square().sum().item() / size if size > 0 else 0.0


def too_short(spec: APISpec, mu: float) -> str | None:
    """Return why 8-bit images lose a step of length `mu` before it reaches the API, or None."""
    low, high = spec.input_range
    per_pixel = mu / math.sqrt(math.prod(spec.image_shape)) * 255 / (high - low)
    if not spec.is_8_bit or per_pixel >= 0.5:
        return None
    return (
        f"a step of mu={mu:g} moves a pixel by {per_pixel:.2g} of a level, and {spec.name} takes "
        "images of 8 bits"
    )


def unmoved(scores: Tensor, labels: Tensor, spec: APISpec) -> float:
    """Return the share of images whose score of the wanted class no step changes.

    `scores` `[1+q, B, n_classes]` are those of the images and of the q points around each. A root
    mean square change of up to half a unit of the last decimal counts as no change, since rounding
    alone can cause it.
    """
    wanted = scores.gather(2, labels.expand(scores.shape[:2])[..., None])[..., 0]  # [1+q, B]
    change = (wanted[1:] - wanted[:1]).square().mean(0).sqrt()  # [B]
    place = 0.0 if spec.decimals is None else 10.0**-spec.decimals
    return (change <= 0.5 * place).float().mean().item()
