"""Train a student as DFME does, with the estimator written out or with this package's.

Usage: `python examples/drop_in/dfme_style.py --backend ours`. The generator looks for images on
which API and student differ; the student learns the API's scores of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import N_LATENT, Generator, conv_net, run
from torch import Tensor, nn

from bidfmkd_fast.compat import estimate_gradient_objective

SETTINGS = SimpleNamespace(loss="l1", no_logits=False, forward_differences=True)


# swap: these lines go
def plain_gradient(
    api: Callable[[Tensor], Tensor], student: nn.Module, x: Tensor, epsilon: float, m: int
) -> Tensor:
    """Estimate the gradient of minus the distance by forward differences along m directions."""
    d = math.prod(x.shape[1:])
    student.eval()
    with torch.no_grad():
        u = torch.randn(len(x), m, d)
        u = torch.cat([u / u.norm(dim=2, keepdim=True), torch.zeros(len(x), 1, d)], 1)
        points = (x.flatten(1)[:, None] + epsilon * u).view(-1, *x.shape[1:])
        losses = -(student(points) - api(points)).abs().mean(1).view(-1, m + 1)
        differences = (losses[:, :-1] - losses[:, -1:]) / epsilon
        gradient = (d * differences[:, :, None] * u[:, :-1]).mean(1).view_as(x)
    student.train()
    return gradient / len(x)


# swap: until here


def make(backend: str, seed: int, api: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Return a training step that returns the student's loss on new images."""
    torch.manual_seed(seed)
    generator, student = Generator(), conv_net(16)
    g_optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    s_optimizer = torch.optim.Adam(student.parameters(), 2e-3)

    def step() -> float:
        fake, _ = generator(torch.randn(64, N_LATENT))
        if backend == "plain":
            gradient = plain_gradient(api, student, fake.detach(), 0.05, 10)
        else:
            gradient, _ = estimate_gradient_objective(SETTINGS, api, student, fake, 0.05, 10)
        g_optimizer.zero_grad()
        fake.backward(gradient)
        g_optimizer.step()
        loss = torch.zeros(())
        for _ in range(3):
            images = generator(torch.randn(64, N_LATENT))[0].detach()
            with torch.no_grad():
                scores = api(images)
            loss = (student(images) - scores).abs().mean()
            s_optimizer.zero_grad()
            loss.backward()
            s_optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    run(make)
