"""Fix the statistics of batch norm, so that a module classifies every image by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fix_statistics(module: nn.Module, images: Tensor) -> None:
    """Put `module` into `eval()` with the batch-norm statistics of `images` `[N, C, H, W]`."""
    module.eval()
    for layer in keep_statistics(module):
        layer.momentum = 1.0
        layer.train()
    with torch.no_grad():
        module(images)
    module.eval()


def keep_statistics(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Give each batch norm of `module` running statistics; return these layers."""
    layers = [
        layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    like = next(module.parameters())
    for layer in layers:
        layer.running_mean = like.new_zeros(layer.num_features)
        layer.running_var = like.new_ones(layer.num_features)
        layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=like.device)
        layer.track_running_stats = True
    return layers
