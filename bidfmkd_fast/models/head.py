"""Find the last linear layer of a module, and give a module a head for any number of classes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import seeded


def last_linear(module: nn.Module, images: Tensor | None = None) -> nn.Linear | None:
    """Return the last layer with parameters if it is an `nn.Linear`; else None.

    With `images` `[N, C, H, W]`, the last layer is the one that runs last, and it must make as many
    values as the module has outputs. Without, it is the one that was registered last, which holds
    for the modules of this package.
    """
    if images is not None:
        return _run(module, images)[1]
    layers = [layer for layer in module.modules() if _has_parameters(layer)]
    return layers[-1] if layers and isinstance(layers[-1], nn.Linear) else None


def zero_head(module: nn.Module, images: Tensor | None = None) -> None:
    """Set the last linear layer, if there is one, to zero; `images` are as for `last_linear`.

    Parameters that are frozen, or that another layer shares, stay: zeros would end the learning of
    this module.
    """
    linear = last_linear(module, images)
    if linear is None:
        return
    elsewhere = {
        id(parameter)
        for layer in module.modules()
        if layer is not linear
        for parameter in layer.parameters(recurse=False)
    }
    with torch.no_grad():
        for parameter in linear.parameters():
            if parameter.requires_grad and id(parameter) not in elsewhere:
                parameter.zero_()


def with_classes(
    operation: str, module: nn.Module, n_classes: int, images: Tensor | None = None
) -> nn.Module:
    """Return a copy of `module` whose last linear layer has at least `n_classes` outputs.

    A module that has as many is returned as it is. Else each row of the new layer is the mean of
    the old rows, one vector for all classes as in UNICORN-MAML (Ye and Chao, ICLR 2022, arXiv
    2106.16245): which class comes first cannot matter. For a head of zeros it is zero.

    Args:
        operation: opens the message of an error.
        module: maps images to logits, one per class.
        n_classes: classes of the task.
        images: two images or more that the module takes, as for `last_linear`.

    Raises:
        InputError: the module's last layer is no `nn.Linear`, so its number of classes is fixed.
    """
    if images is None:
        linear = last_linear(module)
        n_outputs = 0 if linear is None else linear.out_features
    else:
        n_outputs, linear = _run(module, images)
    if n_outputs >= n_classes:
        return module
    if linear is None:
        raise InputError(
            f"{operation}: the last layer of {type(module).__name__} is no nn.Linear, so its "
            f"number of classes cannot be changed to {n_classes}; use fewer classes, or a module "
            "that ends in nn.Linear"
        )
    grown = copy.deepcopy(module)
    name_of = {id(layer): name for name, layer in module.named_modules()}
    old = grown.get_submodule(name_of[id(linear)])
    with torch.no_grad():
        for name, parameter in list(old.named_parameters()):
            rows = parameter.mean(0, keepdim=True).expand(n_classes, *parameter.shape[1:]).clone()
            setattr(old, name, nn.Parameter(rows, parameter.requires_grad))
    setattr(old, "out_features", n_classes)  # noqa: B010  mypy does not know that it is linear
    if isinstance(getattr(grown, "n_classes", None), int):
        setattr(grown, "n_classes", n_classes)  # noqa: B010  mypy knows nothing of the attribute
    return grown


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(recurse=False), None) is not None


def _run(module: nn.Module, images: Tensor) -> tuple[int, nn.Linear | None]:
    """Return the number of outputs of `module`, and the linear layer that makes them, or None.

    The module stays as it was: it gets copies of its buffers.
    """
    ran: list[nn.Module] = []
    hooks = [
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
        for layer in module.modules()
        if _has_parameters(layer)
    ]
    tensors = dict(module.named_parameters()) | {
        name: buffer.clone() for name, buffer in module.named_buffers()
    }
    try:
        with torch.no_grad(), seeded(0, "head"):  # dropout draws from the global generator
            logits = functional_call(module, tensors, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    last = ran[-1] if ran else None
    if isinstance(last, nn.Linear) and last.out_features == logits.shape[1]:
        return logits.shape[1], last
    return logits.shape[1], None
