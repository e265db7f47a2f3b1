"""Prepare whole estimates of a loss, as other people's loops make them, with a small API inside.

The API is a linear map, so that a case times the estimator rather than the API.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bidfmkd_fast as bf
from benchmarks.baselines import paper_order
from benchmarks.harness import OURS, Prepared, case

MU = 0.05
N_CLASSES = 10
# (B, image shape, q): DFME's batch at 32 x 32 x 3, a larger q, and the loops of examples/drop_in.
SIZES = {
    "256x3072x10": (256, (3, 32, 32), 10),
    "150x3072x100": (150, (3, 32, 32), 100),
    "64x784x10": (64, (1, 28, 28), 10),
}


def prepare_estimate(size: str, device: str = "cpu") -> Prepared:
    """Prepare `ZerothOrder.estimate` against an estimate in the order of the authors' code."""
    b, shape, q = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(b, *shape, generator=generator).to(device)
    weight = torch.randn(math.prod(shape), N_CLASSES, generator=generator).to(device) / 10

    def losses_of(images: Tensor) -> Tensor:
        return (images.flatten(1) @ weight).logsumexp(1)

    def of_points(points: Tensor) -> Tensor:
        return losses_of(points.flatten(0, 1)).view(points.shape[:2])

    def estimate(kind: str, antithetic: bool, base: bool = True) -> Tensor:
        zo = bf.ZerothOrder(q, MU, kind, seed=0, antithetic=antithetic)
        zo.estimate(losses_of, x, base=base)
        assert zo.gradient is not None
        return zo.gradient

    contenders = {
        OURS: partial(estimate, "rademacher", False),
        "ours, sphere": partial(estimate, "sphere", False),
        "ours, pairs": partial(estimate, "rademacher", True, base=False),
        "paper order (a)": partial(paper_order, x, q, MU, "sphere", of_points),
        "paper order, signs": partial(paper_order, x, q, MU, "rademacher", of_points),
    }

    def check() -> None:
        truth = (x.flatten(1) @ weight).softmax(1) @ weight.T
        for name, contender in contenders.items():
            n = q // 2 if name == "ours, pairs" else q
            expected = 1 / math.sqrt(1 + (truth.shape[1] - 1) / n)
            cosine = F.cosine_similarity(contender().flatten(1), truth).mean().item()
            assert abs(cosine / expected - 1) < 0.3, f"{name}: {cosine} instead of {expected}"

    return Prepared(contenders, check)


for _size in SIZES:
    case(f"drop_in/{_size}")(partial(prepare_estimate, _size))
