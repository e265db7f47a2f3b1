"""Build small classifiers by name: the meta-model and the models behind local APIs."""

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
    """Build a model from images `[N, in_channels, *image_size]` to logits `[N, n_classes]`.

    Weights come from torch's global generator; wrap the call in `seeds.seeded` for a fixed start.

    Args:
        name: "conv4", "resnet10", "resnet18", or "conv4_any_size", which takes any image size.
        in_channels: channels of an image.
        n_classes: number of logits.
        image_size: (H, W).
        width: filters of the first layer.
        batch_statistics: as for `Conv4`.

    Raises:
        InputError: an unknown name, or sizes that the model refuses.
    """
    if name not in _MODELS:
        raise InputError(f"build_model: name must be one of {sorted(_MODELS)}; got {name!r}")
    return _MODELS[name](
        in_channels, n_classes, image_size, width, batch_statistics=batch_statistics
    )


def model_arguments(module: nn.Module) -> dict[str, Any] | None:
    """Return the arguments with which `build_model` makes a module like `module`.

    Returns None for a module that `build_model` does not make.
    """
    for name, kind in _MODELS.items():
        if type(module) is kind:
            keys = ("in_channels", "n_classes", "image_size", "width", "batch_statistics")
            return {"name": name} | {key: getattr(module, key) for key in keys}
    return None


def model_summary(module: nn.Module) -> str:
    """Return the module's class and size in a few words, with input and output where known."""
    n_parameters = sum(parameter.numel() for parameter in module.parameters())
    summary = f"{type(module).__name__}, {n_parameters:,} parameters"
    if (known := model_arguments(module)) is None:
        return summary
    shape = "x".join(map(str, (known["in_channels"], *known["image_size"])))
    return f"{summary}, {shape} -> {known['n_classes']} classes"
