"""Folds batch norms into the convolutions before them: gamma (conv(x) - mean) / sqrt(var + eps) + beta is one."""

from __future__ import annotations

import copy
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, each 2-d batch norm of a module in evaluation mode into the convolution that alone feeds it.

    A trace tells which feeds which; where a part cannot be traced, its children are tried one by one. The module's own
    `forward` keeps running, with an identity where the batch norm was, so whatever else it does it still does. A layer
    that is shared, called more than once, hooked, parametrised or without running statistics stays as it is.
    """
    paths = Counter(id(layer) for _, layer in module.named_modules(remove_duplicate=False))
    _fold_part(module, paths)


def _fold_part(part: nn.Module, paths: Counter[int]) -> None:
    try:
        graph = fx.symbolic_trace(part).graph
    except Exception:  # whatever the module's own code raises when it meets a traced value
        for child in part.children():
            _fold_part(child, paths)
        return
    layers = dict(part.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reached = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def alone(name: str) -> bool:
        layer = layers[name]
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return paths[id(layer)] == 1 and calls[name] == 1 and name not in reached and not hooked

    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        source_name, name = str(source.target), str(node.target)
        convolution, batch_norm = layers[source_name], layers[name]
        if type(convolution) is not nn.Conv2d or type(batch_norm) is not nn.BatchNorm2d or len(source.users) != 1:
            continue
        if batch_norm.training or batch_norm.running_mean is None or not (alone(source_name) and alone(name)):
            continue
        folded = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(batch_norm).double())
        _replace(part, source_name, folded.to(convolution.weight.dtype))
        _replace(part, name, nn.Identity())


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, layer)
