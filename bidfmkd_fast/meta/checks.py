"""Check the images of a meta-model and its classifiers: their form, range and device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.models import AnySizeConv4, model_arguments

MOST_CLASSES = 1000  # of a task
_OUTSIDE = 0.5  # how far values may lie outside of the unit range


@contextmanager
def failures_explained(operation: str, images: Tensor) -> Iterator[None]:
    """Turn torch's error for images that the module cannot take into an InputError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{operation}: the module fails on images {list(images.shape)}: {reason}"
        ) from error


def check_images(operation: str, name: str, images: object, module: nn.Module) -> None:
    """Raise an InputError unless `module` can take `images`: `[N, C, H, W]` in unit range."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise InputError(f"{operation}: the module has no parameters")
    if not isinstance(images, Tensor) or images.dtype != parameter.dtype:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(
            f"{operation}: {name} must be a {parameter.dtype} tensor in unit range, or uint8; got "
            f"{got}"
        )
    if images.ndim != 4 or len(images) == 0:
        raise InputError(
            f"{operation}: {name} must be [N, C, H, W] with N >= 1; got {list(images.shape)}"
        )
    known = None if isinstance(module, AnySizeConv4) else model_arguments(module)
    if known is not None and images.shape[1:] != (known["in_channels"], *known["image_size"]):
        wanted = f"[N, {known['in_channels']}, {known['image_size'][0]}, {known['image_size'][1]}]"
        raise InputError(
            f"{operation}: {name} must be {wanted}, as the module takes; got {list(images.shape)}"
        )
    if images.device != parameter.device:
        raise InputError(
            f"{operation}: {name} must be on the module's device, {parameter.device}; got "
            f"{images.device}"
        )
    check_range(operation, name, images)


def check_range(operation: str, name: str, images: Tensor) -> None:
    """Raise an InputError unless `images` are finite and in unit range, or a little outside."""
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax returns NaN if there is any
        raise InputError(f"{operation}: {name} must be finite; got NaN or infinity")
    if low < -_OUTSIDE or high > 1 + _OUTSIDE:
        raise InputError(
            f"{operation}: {name} must be in unit range, 0 to 1; got {low:.4g} to {high:.4g}; "
            "divide by 255 if they are 0 to 255, and undo the normalisation if they are normalised"
        )


def check_device(labels: Tensor, module: nn.Module) -> None:
    """Raise an InputError unless `labels` are on the device of `module`."""
    device = next((parameter.device for parameter in module.parameters()), labels.device)
    if labels.device != device:
        raise InputError(
            f"adapt: labels must be on the images' device, {device}; got {labels.device}"
        )
