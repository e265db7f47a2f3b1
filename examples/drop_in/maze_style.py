"""Train a student as MAZE does, with the estimator written out or with this package's.

Usage: `python examples/drop_in/maze_style.py --backend ours`. The generator looks for images on
which API and student differ, by steps before its tanh; the student learns from the API's scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import N_LATENT, Generator, conv_net, run
from torch import Tensor, nn

from bidfmkd_fast.compat import zoge_backward

SETTINGS = SimpleNamespace(ndirs=10, mu=0.05, batch_size=64)


def divergence(scores: Tensor, logits: Tensor) -> Tensor:
    """Return KL(API || student) for each image."""
    log_p, log_q = scores.log_softmax(1), logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


# swap: these lines go
def plain_backward(
    x_pre: Tensor, x: Tensor, student: nn.Module, api: Callable[[Tensor], Tensor]
) -> None:
    """Send the estimated gradient of minus the divergence into `x_pre`, direction by direction."""
    d = math.prod(x.shape[1:])
    gradient = torch.zeros_like(x_pre)
    with torch.no_grad():
        base = -divergence(api(x), student(x))
        for _ in range(SETTINGS.ndirs):
            u = torch.randn_like(x_pre)
            u = u / u.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = (x_pre + SETTINGS.mu * u).tanh()
            difference = -divergence(api(moved), student(moved)) - base
            gradient += (d / SETTINGS.ndirs * difference / SETTINGS.mu).view(-1, 1, 1, 1) * u
    x_pre.backward(gradient / len(x), retain_graph=True)


# swap: until here


def make(backend: str, seed: int, api: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Return a training step that returns the student's loss on new images."""
    torch.manual_seed(seed)
    generator, student = Generator(), conv_net(16)
    g_optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    s_optimizer = torch.optim.Adam(student.parameters(), 2e-3)

    def step() -> float:
        x, x_pre = generator(torch.randn(64, N_LATENT))
        g_optimizer.zero_grad()
        if backend == "plain":
            plain_backward(x_pre, x, student, api)
        else:
            zoge_backward(SETTINGS, x_pre, x, student, api)
        g_optimizer.step()
        loss = torch.zeros(())
        for _ in range(3):
            images = generator(torch.randn(64, N_LATENT))[0].detach()
            with torch.no_grad():
                scores = api(images)
            loss = divergence(scores, student(images)).mean()
            s_optimizer.zero_grad()
            loss.backward()
            s_optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    run(make)
