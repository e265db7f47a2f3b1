"""Fold batch norms into the convolutions before them.

A convolution followed by gamma (y - mean) / sqrt(var + eps) + beta is a convolution again, with
other weights and another bias.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Part(NamedTuple):
    """A submodule that could be traced, and its graph.

    `alone(name)` is True if the layer of that name is called once, has no hooks and is not shared.
    """

    module: nn.Module
    graph: fx.Graph
    alone: Callable[[str], bool]


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, each 2-d batch norm into the convolution before it.

    No other layer may use the output of that convolution. The module must be in evaluation mode. A
    trace shows which layer feeds which. The module's own `forward` stays, with an identity in place
    of the batch norm, so anything else that it does is kept. A layer that is shared, called more
    than once, hooked, parametrised or without running statistics stays as it is.
    """
    for part, graph, alone in traced_parts(module):
        layers = dict(part.named_modules())
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            if (
                node.op != "call_module"
                or not isinstance(source, fx.Node)
                or source.op != "call_module"
            ):
                continue
            source_name, name = str(source.target), str(node.target)
            convolution, batch_norm = layers[source_name], layers[name]
            if (
                type(convolution) is not nn.Conv2d
                or type(batch_norm) is not nn.BatchNorm2d
                or len(source.users) != 1
            ):
                continue
            if (
                batch_norm.training
                or batch_norm.running_mean is None
                or not (alone(source_name) and alone(name))
            ):
                continue
            folded = fuse_conv_bn_eval(
                copy.deepcopy(convolution).double(), copy.deepcopy(batch_norm).double()
            )
            replace(part, source_name, folded.to(convolution.weight.dtype))
            replace(part, name, nn.Identity())


def traced_parts(module: nn.Module) -> list[Part]:
    """Trace the module, or its children one by one if the whole cannot be traced."""
    paths = Counter(id(layer) for _, layer in module.named_modules(remove_duplicate=False))
    return list(_traced_parts(module, paths))


def _traced_parts(part: nn.Module, paths: Counter[int]) -> Iterator[Part]:
    try:
        graph = fx.symbolic_trace(part).graph
    except Exception:  # whatever the module's own code raises when it meets a traced value
        for child in part.children():
            yield from _traced_parts(child, paths)
        return
    layers = dict(part.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reached = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def alone(name: str) -> bool:
        layer = layers[name]
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return paths[id(layer)] == 1 and calls[name] == 1 and name not in reached and not hooked

    yield Part(part, graph, alone)


def replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, layer)
