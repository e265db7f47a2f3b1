"""Recover labelled images as BiDf-MKD does, with the estimator written out or this package's.

Usage: `python examples/drop_in/bidf_mkd_style.py --backend ours`. Generator and latents learn to
make images that the API assigns to their labels, on the boundary to where a student differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import N_CLASSES, N_LATENT, Generator, conv_net, run
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.compat import zero_order_loss

SETTINGS = SimpleNamespace(ZO=True, q=20, mu=0.05, numsplit=5)
BOUNDARY = 0.1


# swap: these lines go
def plain_loss(
    api: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, student: nn.Module
) -> Tensor:
    """Return the surrogate loss of an estimate in `numsplit` parts; add the value to look at it."""
    d, n_parts = math.prod(x.shape[1:]), SETTINGS.numsplit
    count = SETTINGS.q // n_parts
    with torch.no_grad():
        student_scores = student(x)

        def losses(points: Tensor, repeats: int) -> Tensor:
            scores, other = api(points), student_scores.repeat(repeats, 1)
            agree = scores.argmax(1) == other.argmax(1)
            distance = agree * (scores - other).abs().sum(1)
            entropy = functional.cross_entropy(scores, labels.repeat(repeats), reduction="none")
            return entropy - BOUNDARY * distance

        base = losses(x, 1)
        gradient = torch.zeros(len(x), d)
        for _ in range(n_parts):
            u = torch.randn(count * len(x), d)
            u = u / u.norm(dim=1, keepdim=True)
            points = (x.flatten(1).repeat(count, 1) + SETTINGS.mu * u).view(-1, *x.shape[1:])
            difference = (losses(points, count) - base.repeat(count)) / SETTINGS.mu
            gradient += (d / SETTINGS.q * difference[:, None] * u).view(count, len(x), d).sum(0)
    surrogate = (x.flatten(1) * gradient).sum(1).mean()
    return surrogate - surrogate.detach() + base.mean()


# swap: until here


def make(backend: str, seed: int, api: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Return a recovery step that returns the objective of the images."""
    torch.manual_seed(seed)
    generator, student = Generator(), conv_net(16).eval()
    labels = torch.arange(N_CLASSES).repeat_interleave(10)
    latents = torch.randn(len(labels), N_LATENT, requires_grad=True)
    optimizer = torch.optim.Adam([*generator.parameters(), latents], 5e-3, (0.5, 0.999))

    def step() -> float:
        images, _ = generator(latents)
        if backend == "plain":
            loss = plain_loss(api, images, labels, student)
        else:
            loss = zero_order_loss(SETTINGS, api, images, labels, student, adv=BOUNDARY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    run(make)
