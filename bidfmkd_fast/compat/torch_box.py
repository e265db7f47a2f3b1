"""Make a black box of a torch module that wants normalised images, such as those of timm."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, Budget, TorchBlackBox
from bidfmkd_fast.black_box.local.fastest_form import advice_on_dtype
from bidfmkd_fast.compat.box_spec import shape_of, spec_of
from bidfmkd_fast.errors import InputError, InputTypeError

_OP = "from_torch"


class _Normalised(nn.Module):
    """A module behind `(x - mean) / std`, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.module((images - self.mean) / self.std)


def from_torch(
    module: nn.Module,
    image_shape: Sequence[int] | None = None,
    *,
    n_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    budget: Budget | None = None,
    **spec: Any,
) -> TorchBlackBox:
    """Return a box that serves a torch module, which gets `(x - mean) / std`.

    `pretrained_cfg` or `default_cfg` of a timm model states `input_size`, `mean` and `std`. The
    normalisation becomes a part of the served module, so the box has all the speed of a
    `TorchBlackBox`.

    Args:
        module: images `[N, C, H, W]` float32, normalised -> logits `[N, n_classes]`, or scores of
            the `scores_kind` that is given.
        image_shape: `(C, H, W)` of the images; None for the `input_size` of a timm model.
        n_classes: number of the module's scores; None to find it with one image of zeros.
        mean, std: per channel, in units of `input_range` (0 to 1 unless given). None for those of a
            timm model, and for no normalisation with any other module. Give both or neither.
        device: where the module runs; None for where its parameters are.
        budget: cap on what the box may cost.
        **spec: fields of `APISpec`.

    Raises:
        InputError: no image shape is known, the module does not map `[1, *image_shape]` to scores,
            or a field is wrong (InputTypeError: `module` is no torch module).
    """
    if not isinstance(module, nn.Module):
        raise InputTypeError(
            f"{_OP}: module must be a torch.nn.Module; got {type(module).__name__}"
        )
    config: Any = next(
        (
            found
            for name in ("pretrained_cfg", "default_cfg")
            if (found := getattr(module, name, None)) is not None
        ),
        {},
    )
    shape = _read(config, "input_size") if image_shape is None else image_shape
    if shape is None:
        raise InputError(
            f"{_OP}: image_shape is not known, since the module has no pretrained_cfg or "
            "default_cfg with input_size, as timm models have; give image_shape=(C, H, W)"
        )
    if mean is None and std is None:
        low, high = spec.get("input_range", (0.0, 1.0))
        # timm states them for images of 0 to 1.
        mean = [low + value * (high - low) for value in _read(config, "mean") or ()]
        std = [value * (high - low) for value in _read(config, "std") or ()]
    # A spec with two classes checks everything else before the module is run.
    derived = {"n_classes": 2, "image_shape": shape_of(_OP, shape)}
    fields = {key: value for key, value in spec.items() if key in ("input_range", "name")}
    normal = {"mean": _floats(mean), "std": _floats(std)}
    checked = spec_of(_OP, module, {**derived, **normal}, fields)
    if checked.mean:
        module = _Normalised(module, checked.mean, checked.std)
    if n_classes is None:
        n_classes = _count_classes(module, checked)
    derived = {"n_classes": n_classes, "image_shape": checked.image_shape, "name": checked.name}
    whole = spec_of(_OP, module, derived, spec)
    return TorchBlackBox(module, whole, budget=budget, device=device)


def _read(config: Any, name: str) -> Any:
    """Return a field of timm's configuration, a mapping or an object; None if it has none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _count_classes(module: nn.Module, spec: APISpec) -> int:
    """Return how many scores a copy of the module gives for an image of zeros."""
    tensor = next(iter((*module.parameters(), *module.buffers())), torch.empty(0))
    images = torch.zeros(1, *spec.image_shape, device=tensor.device)
    try:
        with torch.no_grad():
            scores = copy.deepcopy(module).eval()(images)
    except Exception as error:
        raise InputError(
            f"{_OP}: the module fails on images [1, {', '.join(map(str, spec.image_shape))}]: "
            f"{type(error).__name__}: {error}{advice_on_dtype(module) or '; check image_shape'}"
        ) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != 1:
        came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{_OP}: the module must answer scores [1, n_classes]; it answered {came}")
    return scores.shape[1]


def _floats(values: Any) -> tuple[float, ...]:
    """Return the numbers of a sequence, array or tensor; none for None."""
    return () if values is None else tuple(float(value) for value in values)
