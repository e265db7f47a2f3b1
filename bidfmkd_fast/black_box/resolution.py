"""The shortest step that an API's input and scores resolve: what `mu="auto"` goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast import ops
from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.seeds import derive_seed

# Lengths tried, in 255ths of the input range per pixel; the last, a visible grain, is what the others are held against.
STEPS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
USUAL = 0.025  # mu, in widths of the input range: below it nothing is gained even where every digit counts
USABLE = 0.4  # agreement from which a step tells more than noise
GOOD = 0.85  # of the best agreement: twice the shortest such step is suggested
N_IMAGES, N_DIRECTIONS = 4, 2
QUERIES = 2 * N_IMAGES * N_DIRECTIONS * len(STEPS)  # of one measurement
_PROBABILITY_FLOOR = 1e-7  # as in the losses


@dataclass(frozen=True)
class StepChoice:
    """What steps of several lengths tell.

    Attributes:
        agreement: length of a step `mu` -> cosine between the changes it makes and those that a long step makes along
            the same directions: near 1 where the answers resolve it, near 0 where they are noise.
        smallest: the shortest usable `mu`; None where no step tells anything.
        suggested: the `mu` to take; the longest tried where none is usable.
    """

    agreement: dict[float, float]
    smallest: float | None
    suggested: float


def measure_steps(api: BlackBox, images: Tensor, *, seed: int = 0) -> StepChoice:
    """Try steps of several lengths at `images` `[N, C, H, W]` in the API's input range; N = 4 costs `QUERIES` queries.

    For every image, direction u and class, `l(x + mu u) - l(x - mu u)` is taken, l the log-probability. Rounding, 8-bit
    inputs and answers that vary, whatever hides a short step, hide it from no long one; and the difference of two steps
    leaves out the curvature.
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
    *moved, reference = [forth - back for forth, back in zip(parts[::2], parts[1::2], strict=True)]
    agreement = {mu: _cosine(changes, reference) for mu, changes in zip(lengths, moved)}
    return choose(agreement, lengths[-1], USUAL * (high - low))


def choose(agreement: dict[float, float], longest: float, usual: float) -> StepChoice:
    """The smallest usable and the suggested step, by their agreement with the longest."""
    usable = [mu for mu, value in agreement.items() if value >= USABLE]
    if not usable:
        return StepChoice(agreement, None, longest)
    best = max(agreement.values())
    good = min(mu for mu, value in agreement.items() if value >= GOOD * best)
    return StepChoice(agreement, min(usable), min(longest, max(2 * good, usual)))


def _cosine(a: Tensor, b: Tensor) -> float:
    size = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a * b).sum().item() / size if size > 0 else 0.0


def log_probabilities(scores: Tensor, spec: APISpec) -> Tensor:
    """An API's scores `[..., n_classes]` as log-probabilities, floored as in the losses."""
    if spec.returned_kind == "probabilities":
        return scores.clamp(min=_PROBABILITY_FLOOR).log()
    return scores.log_softmax(-1) if spec.returned_kind == "logits" else scores


def too_short(spec: APISpec, mu: float) -> str | None:
    """Why a step of length `mu` is lost in 8-bit images before it reaches the API, or None."""
    low, high = spec.input_range
    per_pixel = mu / math.sqrt(math.prod(spec.image_shape)) * 255 / (high - low)
    if not spec.is_8_bit or per_pixel >= 0.5:
        return None
    return f"a step of mu={mu:g} moves a pixel by {per_pixel:.2g} of a level, and {spec.name} takes images of 8 bits"


def unmoved(scores: Tensor, labels: Tensor, spec: APISpec) -> float:
    """Share of the answers `[1+q, B, n_classes]` in which the wanted class moved by no more than the last place."""
    wanted = scores.gather(2, labels.expand(scores.shape[:2])[..., None])[..., 0]  # [1+q, B]
    place = 0.0 if spec.decimals is None else 10.0**-spec.decimals
    return ((wanted[1:] - wanted[:1]).abs() <= 1.01 * place).float().mean().item()
