"""Render the three estimators of `bidfmkd_fast.compat` in plain torch, one direction at a time.

Everything is in float64. The renderings are given the directions, and share no code with the
package but the op that draws them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops


def directions(seed: int, x: Tensor, count: int, kind: str) -> Tensor:
    """Return the unit directions `[count, *x.shape]` of the first ask with this seed."""
    zeros = torch.zeros(x.shape, dtype=torch.float64)
    return ops.perturb(zeros, torch.tensor([seed, 0]), count, 1.0, kind)[1:]


def images(seed: int, *shape: int) -> Tensor:
    """Return normal images in float64, a leaf that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def network(seed: int, shape: tuple[int, ...], n_classes: int, scale: float = 2.0) -> nn.Module:
    """Return a small smooth network in float64 from images `[N, *shape]` to `[N, n_classes]`."""
    d, generator = torch.Size(shape).numel(), torch.Generator().manual_seed(seed)
    first, last = nn.Linear(d, 6).double(), nn.Linear(6, n_classes).double()
    with torch.no_grad():
        for layer in (first, last):
            for parameter in layer.parameters():
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * values / layer.in_features**0.5)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)


def with_batch_norm(seed: int, shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Return such a network with a batch norm behind the first layer."""
    flatten, first, activation, last = network(seed, shape, n_classes)
    return nn.Sequential(flatten, first, nn.BatchNorm1d(6).double(), activation, last)


class Box:
    """A black box of this package as far as compat knows it: a spec and a call."""

    def __init__(self, model: nn.Module, returned_kind: str, labels_only: bool = False) -> None:
        self.spec = SimpleNamespace(
            name="shop", returned_kind=returned_kind, labels_only=labels_only
        )
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.model(images)
        if self.spec.returned_kind == "probabilities":
            return logits.softmax(1)
        return logits.log_softmax(1) if self.spec.returned_kind != "logits" else logits


def divergence(target_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target || other) per image, from both models' logits."""
    p, q = target_logits.softmax(1), logits.softmax(1)
    return (p * (p / q).log()).sum(1)


def forward(losses_of: Any, x: Tensor, u: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Return the mean over directions of `(L(x + mu u) - L(x)) / mu * u`, and L(x)."""
    with torch.no_grad():
        base = losses_of(x)
        total = torch.zeros_like(x)
        for along in u:
            slope = (losses_of(x + mu * along) - base) / mu
            total += slope.view(-1, *[1] * (x.dim() - 1)) * along
    return total / len(u), base


def central(losses_of: Any, x: Tensor, u: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Return the same of `(L(x + mu u) - L(x - mu u)) / (2 mu) * u`."""
    with torch.no_grad():
        base = losses_of(x)
        total = torch.zeros_like(x)
        for along in u:
            slope = (losses_of(x + mu * along) - losses_of(x - mu * along)) / (2 * mu)
            total += slope.view(-1, *[1] * (x.dim() - 1)) * along
    return total / len(u), base


def dfme_losses(args: Any, victim: Any, clone: Any, points: Tensor, pre_x: bool) -> Tensor:
    """Return DFME's losses `[N]` of points, for a victim that returns logits."""
    at = args.G_activation(points) if pre_x else points
    theirs, ours = victim(at), clone(at)
    if args.loss == "kl":
        return -divergence(theirs, ours)
    if args.no_logits:
        theirs = theirs - theirs.exp().sum(1, keepdim=True).log()
        if args.logit_correction == "min":
            theirs = theirs - theirs.min(1, keepdim=True).values
        if args.logit_correction == "mean":
            theirs = theirs - theirs.mean(1, keepdim=True)
    return -(ours - theirs).abs().sum(1) / ours.shape[1]


def dfme_scale(args: Any, x: Tensor, num_classes: int, parity: bool) -> float:
    """Return what the mean over directions is multiplied by."""
    n, d = len(x), x[0].numel()
    if not parity:
        return d / n
    factor = d if args.forward_differences else 1
    return factor if args.loss == "kl" else factor / (num_classes * n)


def maze_losses(target: Any, clone: Any, points: Tensor) -> Tensor:
    """Return MAZE's losses `[N]` of points before the tanh."""
    at = points.tanh()
    ours = clone(at)
    return -divergence(target(at), ours)


def mkd_losses(
    teacher: Any, points: Tensor, labels: Tensor, student: Tensor | None, oh: float, adv: float
) -> Tensor:
    """Return the recovery objective `[N]` of points, with the student's constant scores."""
    scores = teacher(points)
    losses = []
    for n, row in enumerate(scores):
        loss = oh * (row.exp().sum().log() - row[labels[n]])
        if student is not None and int(row.argmax()) == int(student[n].argmax()):
            loss = loss - adv * (row - student[n]).abs().sum()
        losses.append(loss)
    return torch.stack(losses)


def mkd_white_box(
    teacher: Any, student: Any, x: Tensor, labels: Tensor, oh: float, adv: float, parity: bool
) -> Tensor:
    """Return the loss of a differentiable teacher."""
    t, s = teacher(x).softmax(1), student(x.detach()).softmax(1).detach()
    distance = s * (s.log() - t) if parity else t * (t.log() - s.log())
    agree = (t.argmax(1) == s.argmax(1)).double()
    entropy = -torch.stack([t[n, label].log() for n, label in enumerate(labels)])
    return oh * entropy.mean() - adv * (distance.sum(1) * agree).mean()
