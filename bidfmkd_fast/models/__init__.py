"""Small classifiers: the meta-model and the models behind local APIs, built by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models.any_size import AnySizeConv4, fit_images
from bidfmkd_fast.models.conv4 import Conv4
from bidfmkd_fast.models.resnet import ResNet10, ResNet18

__all__ = [
    "AnySizeConv4",
    "Conv4",
    "ResNet10",
    "ResNet18",
    "build_model",
    "fit_images",
    "model_arguments",
    "model_summary",
]

_MODELS = {
    "conv4": Conv4,
    "conv4_any_size": AnySizeConv4,
    "resnet10": ResNet10,
    "resnet18": ResNet18,
}


def build_model(
    name: str,
    *,
    in_channels: int,
    n_classes: int,
    image_size: tuple[int, int],
    width: int = 32,
    batch_statistics: bool = False,
) -> nn.Module:
    """The model called `name`: images `[N, in_channels, *image_size]` -> logits `[N, n_classes]`.

    Names: "conv4", "resnet10", "resnet18", and "conv4_any_size", which takes any size.

    Weights come from torch's global generator; wrap the call in `seeds.seeded` for a fixed start.
    Raises `InputError` for an unknown name or sizes the model refuses.
    """
    if name not in _MODELS:
        raise InputError(f"build_model: name must be one of {sorted(_MODELS)}; got {name!r}")
    return _MODELS[name](
        in_channels, n_classes, image_size, width, batch_statistics=batch_statistics
    )


def model_arguments(module: nn.Module) -> dict[str, Any] | None:
    """What to pass to `build_model` to get a module like `module`; None for a module that it does
    not make.
    """
    for name, kind in _MODELS.items():
        if type(module) is kind:
            keys = ("in_channels", "n_classes", "image_size", "width", "batch_statistics")
            return {"name": name} | {key: getattr(module, key) for key in keys}
    return None


def model_summary(module: nn.Module) -> str:
    """Return the module's class and size in a few words; what it takes and gives where that is
    known.
    """
    told = f"{type(module).__name__}, {sum(parameter.numel() for parameter in module.parameters()):,} parameters"
    if (known := model_arguments(module)) is None:
        return told
    shape = "x".join(map(str, (known["in_channels"], *known["image_size"])))
    return f"{told}, {shape} -> {known['n_classes']} classes"
