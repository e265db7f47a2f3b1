"""Fuse convolution, bias and ReLU into one cuDNN call.

On a GPU torch would otherwise add the bias in another pass over the result of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bidfmkd_fast.black_box.local.folding import replace, traced_parts

_RELUS = (functional.relu, torch.relu)


class ConvReLU2d(nn.Module):
    """A convolution and its ReLU: images `[N, C, H, W]` float32 -> `[N, out_channels, H', W']`."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        layer = self.convolution
        if not images.is_cuda:
            return functional.relu(layer(images))
        return torch.cudnn_convolution_relu(
            images,
            layer.weight,
            layer.bias,
            layer.stride,
            layer.padding,  # type: ignore[arg-type]  # `_is_plain` rules strings out
            layer.dilation,
            layer.groups,
        )


def fuse_relus(module: nn.Module) -> None:
    """Replace, in place, each convolution with a bias whose output goes to a ReLU only.

    There may be a max pooling between the two. ReLU is monotone, so it may come before the maximum
    instead of after it, and the values are the same. The module's own ReLU stays and no longer
    changes anything.
    """
    for part, graph, alone in traced_parts(module):
        layers = dict(part.named_modules())
        for node in graph.nodes:
            if (
                node.op != "call_module"
                or not _is_plain(layers[str(node.target)])
                or not alone(str(node.target))
            ):
                continue
            if _ends_in_relu(node, layers):
                replace(part, str(node.target), ConvReLU2d(layers[str(node.target)]))


def _is_plain(layer: nn.Module) -> bool:
    """Return True if `ConvReLU2d` computes what this layer computes."""
    return (
        type(layer) is nn.Conv2d
        and layer.bias is not None
        and layer.weight.dtype == torch.float32
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _ends_in_relu(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Return True if the output of the node is used only by a ReLU, directly or after max pools."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_function" and node.target in _RELUS:
            return True
        layer = layers[str(node.target)] if node.op == "call_module" else None
        if layer is None or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if type(layer) is nn.ReLU:
            return True
        if type(layer) not in (nn.Identity, nn.MaxPool2d) or getattr(
            layer, "return_indices", False
        ):
            return False
    return False
