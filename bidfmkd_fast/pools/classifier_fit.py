"""Train one classifier of a pool, and measure it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_BATCH_SIZE = 32
_LEARNING_RATE = 1e-3


class Stopped(Exception):
    """The training of the whole pool has ended while this classifier was being trained."""


def fit_classifier(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    stop: threading.Event,
) -> None:
    """Train `module` on images `[N, C, H, W]` and labels `[N]`, and leave it in `eval()`.

    The batches are near-equal parts of about 32 images, because a last batch of one image would
    break batch norm. Raises `Stopped` before the next batch once `stop` is set.
    """
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE)
    n_batches = max(1, round(len(images) / _BATCH_SIZE))
    module.train()
    # Channels last takes a third less time on a CPU.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=torch.channels_last)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in order.tensor_split(n_batches):
            if stop.is_set():
                raise Stopped
            optimizer.zero_grad()
            cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
    module.eval()


@torch.no_grad()
def settle_batch_norm(module: nn.Module, images: Tensor) -> None:
    """Measure the running statistics of batch norm anew, with the finished weights.

    The new statistics are plain averages over all images that the weights were learned from. The
    exponential averages of a short training lag behind the weights of a deep network: a ResNet-18
    of width 8 on Omniglot after 20 epochs was 32 % accurate on held-out images with the averages of
    its training, and 79 % with the new statistics.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # makes PyTorch average plainly over the batches
    module.train()
    for part in images.tensor_split(-(-len(images) // 256)):
        module(part)
    module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.inference_mode()
def held_out_accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` that `module` gives their label, in [0, 1]."""
    predicted = torch.cat([module(part).argmax(1) for part in images.split(256)])
    return (predicted == labels).double().mean().item()
