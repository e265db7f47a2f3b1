"""Check the inputs of a meta-model and its classifiers: images in unit range, labels from 0."""

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


def check_images(operation: str, name: str, images: Tensor, module: nn.Module) -> None:
    """Raise an InputError unless `module` can take `images`: `[N, C, H, W]` in unit range."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise InputError(f"{operation}: the module has no parameters")
    if not isinstance(images, Tensor) or images.dtype != parameter.dtype:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(
            f"{operation}: {name} must be a {parameter.dtype} tensor in unit range; got {got}"
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
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax returns NaN if there is any
        raise InputError(f"{operation}: {name} must be finite; got NaN or infinity")
    if low < -_OUTSIDE or high > 1 + _OUTSIDE:
        raise InputError(
            f"{operation}: {name} must be in unit range, 0 to 1; got {low:.4g} to {high:.4g}; "
            "divide by 255 if they are 0 to 255, and undo the normalisation if they are normalised"
        )


def check_labels(labels: Tensor, images: Tensor) -> None:
    """Raise an InputError unless `labels` are int64 `[N]` from 0, one per image, on its device."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputTypeError(f"adapt: support_labels must be an int64 tensor; got {got}")
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"adapt: support_labels must be [N] with N = {len(images)}, one per support image; got "
            f"{list(labels.shape)}"
        )
    if labels.device != images.device:
        raise InputError(
            f"adapt: support_labels must be on the images' device, {images.device}; got "
            f"{labels.device}"
        )
    if int(labels.max()) >= MOST_CLASSES:
        raise InputError(
            f"adapt: support_labels must be below {MOST_CLASSES:,}; got {int(labels.max())}; "
            "number the classes of a task from 0"
        )
    if labels.min() < 0:
        raise InputError(f"adapt: support_labels must be 0 or more; got {int(labels.min())}")
