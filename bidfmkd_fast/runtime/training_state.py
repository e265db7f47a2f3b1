"""Give the tensors of modules and optimisers names in one mapping, and put them back.

A checkpoint holds such a mapping.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Trained = Mapping[str, nn.Module | torch.optim.Optimizer]


def tensors_of(trained: Trained) -> dict[str, Tensor]:
    """Return all tensors of modules and optimisers, not copied, as `<name>/<their own name>`."""
    return {
        f"{name}/{key}": value.detach()
        for name, part in trained.items()
        for key, value in _tensors(part).items()
    }


def restore_tensors(trained: Trained, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors that `tensors_of` returned back, in place; others are left out."""
    for name, part in trained.items():
        own = under(name, tensors)
        if isinstance(part, nn.Module):
            part.load_state_dict(own)
            continue
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in own.items():
            number, moment = key.split(".", 1)
            state.setdefault(int(number), {})[moment] = value
        groups = part.state_dict()["param_groups"]
        part.load_state_dict({"state": state, "param_groups": groups})


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors below `name`, without it."""
    start = f"{name}/"
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def _tensors(part: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return dict(part.state_dict())
    state = part.state_dict()["state"]
    return {
        f"{number}.{moment}": value
        for number, moments in state.items()
        for moment, value in moments.items()
    }
