"""Find the last linear layer of a module, and give a module a head for any number of classes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bidfmkd_fast.errors import InputError


def last_linear(module: nn.Module) -> nn.Linear | None:
    """Return the last layer with parameters if it is an `nn.Linear`; else None."""
    layers = [
        layer
        for layer in module.modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    return layers[-1] if layers and isinstance(layers[-1], nn.Linear) else None


def zero_head(module: nn.Module) -> None:
    """Set the last linear layer, if there is one, to zero."""
    if (linear := last_linear(module)) is not None:
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()


def with_classes(operation: str, module: nn.Module, n_classes: int) -> nn.Module:
    """Return a copy of `module` whose last linear layer has at least `n_classes` outputs.

    A module that has as many is returned as it is. Else each row of the new layer is the mean of
    the old rows, one vector for all classes as in UNICORN-MAML (Ye and Chao, ICLR 2022, arXiv
    2106.16245): which class comes first cannot matter. For a head of zeros it is zero.

    Raises:
        InputError: the module's last layer is no `nn.Linear`, so its number of classes is fixed.
    """
    linear = last_linear(module)
    if linear is not None and linear.out_features >= n_classes:
        return module
    if linear is None:
        raise InputError(
            f"{operation}: the last layer of {type(module).__name__} is no nn.Linear, so its "
            f"number of classes cannot be changed to {n_classes}; use fewer classes, or a module "
            "that ends in nn.Linear"
        )
    grown = copy.deepcopy(module)
    old = last_linear(grown)
    assert old is not None
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            rows = parameter.mean(0, keepdim=True).expand(n_classes, *parameter.shape[1:]).clone()
            setattr(old, name, nn.Parameter(rows, parameter.requires_grad))
    old.out_features = n_classes
    if isinstance(getattr(grown, "n_classes", None), int):
        setattr(grown, "n_classes", n_classes)  # noqa: B010  mypy knows nothing of the attribute
    return grown
