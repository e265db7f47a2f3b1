"""Bring pictures of any kind to the images that a module takes.

Files, Pillow images and uint8 arrays follow the rule of `bidfmkd convert`
(`data.readers.images.to_pixels`). Floats follow it too, except for the rounding to 8 bits. Pillow
is imported where it is used, so that `import bidfmkd_fast` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.meta.checks import check_images, check_range
from bidfmkd_fast.models import AnySizeConv4, fit_images, model_arguments

Shape = tuple[int, int, int]  # channels, height, width
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights with which Pillow makes grey of RGB


def images_of(
    operation: str,
    pictures: object,
    module: nn.Module,
    image_shape: Shape | None = None,
    *,
    invert: bool = False,
) -> Tensor:
    """Return pictures as images `[N, C, H, W]` in unit range, of the module's type and device.

    Args:
        operation: opens the message of an error.
        pictures: a tensor `[N, C, H, W]`, float in unit range or uint8; an array `[N, H, W, C]` or
            grey `[N, H, W]` of the same ranges; a list of Pillow images, of paths or of arrays; a
            picture file, or a folder of pictures.
        module: the module. One that `models.build_model` makes decides the shape of the images.
        image_shape: (C, H, W) to which pictures are brought for any other module; None keeps
            theirs. Float tensors for such a module are always passed on as they are.
        invert: whether the images are inverted at the end (`inverted`).

    Raises:
        InputError: pictures of another form or range; `InputTypeError` if they are of another type.
    """
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise InputError(f"{operation}: the module has no parameters")
    known = module_shape(module)
    images = pictures
    if isinstance(pictures, Tensor) and pictures.is_floating_point():
        images = pictures.to(parameter.dtype)
        if known is not None and not _fits_itself(module, pictures):
            images = _fitted(operation, images, known)
    elif isinstance(pictures, Tensor) and pictures.dtype == torch.uint8 and pictures.ndim == 4:
        images = pictures.to(parameter.dtype)
        if pictures.numel():  # `check_images` refuses none
            pixels = list(pictures.permute(0, 2, 3, 1).cpu().numpy())
            images = _unit(operation, _resized(operation, pixels, known or image_shape), parameter)
    elif not isinstance(pictures, Tensor):
        images = _of_others(operation, pictures, known or image_shape, parameter)
    check_images(operation, "images", images, module)
    assert isinstance(images, Tensor)
    return inverted(images) if invert else images


def inverted(images: Tensor) -> Tensor:
    """Return images in unit range with black and white exchanged, as `load_dataset` inverts."""
    return 1 - images


def module_shape(module: nn.Module) -> Shape | None:
    """Return the (C, H, W) that a module of `models.build_model` takes; None for any other."""
    known = model_arguments(module)
    return None if known is None else (known["in_channels"], *known["image_size"])


def _fits_itself(module: nn.Module, images: Tensor) -> bool:
    """Return True if the module brings these images to its size by itself."""
    return (
        isinstance(module, AnySizeConv4)
        and images.ndim == 4
        and images.shape[1] in (1, module.in_channels)
    )


def _of_others(operation: str, pictures: Any, shape: Shape | None, like: Tensor) -> Tensor:
    """Return images from what is no tensor, in unit range, with type and device of `like`."""
    from PIL import Image

    from bidfmkd_fast.data.picture_files import picture_files, read_pictures, wanted_form
    from bidfmkd_fast.data.readers.images import to_pixels, warnings_with_files

    if isinstance(pictures, (str, Path)):
        files = picture_files(operation, Path(pictures).expanduser())
        return _unit(operation, read_pictures(operation, files, shape), like)
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, np.ndarray):
        return _of_array(operation, pictures, shape, like)
    if not isinstance(pictures, Sequence):
        raise InputTypeError(
            f"{operation}: images must be a torch tensor, a NumPy array, a list of Pillow images "
            f"or of paths, or a folder; got {type(pictures).__name__}"
        )
    if not pictures:
        raise InputError(f"{operation}: images must be at least one; got an empty list")
    if all(isinstance(item, (str, Path)) for item in pictures):
        files = [Path(item).expanduser() for item in pictures]
        return _unit(operation, read_pictures(operation, files, shape), like)
    if all(isinstance(item, Image.Image) for item in pictures):
        wanted = wanted_form(operation, shape)
        with warnings_with_files(operation):
            pixels = [
                to_pixels(item, f"picture {number}", wanted) for number, item in enumerate(pictures)
            ]
        return _unit(operation, pixels, like)
    if all(isinstance(item, np.ndarray) for item in pictures):
        images = [_of_array(operation, item[None], shape, like) for item in pictures]
        if len({image.shape for image in images}) > 1:
            raise _differ(operation)
        return torch.cat(images)
    kinds = ", ".join(sorted({type(item).__name__ for item in pictures})[:4])
    raise InputTypeError(
        f"{operation}: images must be a list of Pillow images, of paths or of NumPy arrays, all of "
        f"one kind; got a list of {kinds}"
    )


def _of_array(operation: str, array: np.ndarray, shape: Shape | None, like: Tensor) -> Tensor:
    """Return the images of an array `[N, H, W, 1 or 3]` or `[N, H, W]`."""
    channels_last = array[..., None] if array.ndim == 3 and array.shape[2] != 3 else array
    if channels_last.ndim != 4 or 0 in array.shape or channels_last.shape[3] not in (1, 3):
        raise InputError(
            f"{operation}: a NumPy array of images must be [N, H, W, 1 or 3] or [N, H, W]; got "
            f"{list(array.shape)}; give a single picture as picture[None], and channels first "
            "([N, C, H, W]) as torch.from_numpy(images)"
        )
    if array.dtype == np.uint8:
        return _unit(operation, _resized(operation, list(channels_last), shape), like)
    if array.dtype.kind != "f":
        raise InputTypeError(
            f"{operation}: a NumPy array of images must be uint8, 0 to 255, or float, 0 to 1; got "
            f"{array.dtype}; use .astype(numpy.uint8) if its values are 0 to 255"
        )
    channels_first = np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2), dtype=np.float64)
    images = torch.from_numpy(channels_first).to(like.device, like.dtype)
    return images if shape is None else _fitted(operation, images, shape)


def _resized(
    operation: str, pixels: Sequence[np.ndarray], shape: Shape | None
) -> Sequence[np.ndarray]:
    """Bring arrays uint8 `[H, W, C]` to a shape (C, H, W) as files are; keep those that have it."""
    if shape is None or pixels[0].shape == (*shape[1:], shape[0]):
        return pixels
    from PIL import Image

    from bidfmkd_fast.data.picture_files import wanted_form
    from bidfmkd_fast.data.readers.images import to_pixels

    wanted = wanted_form(operation, shape)
    if pixels[0].shape[2] not in (1, 3) or 0 in pixels[0].shape:
        raise InputError(
            f"{operation}: images must have 1 or 3 channels; got {list(pixels[0].shape)} "
            "(height, width, channels)"
        )
    return [
        to_pixels(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), "", wanted)
        for image in pixels
    ]


def _unit(operation: str, pixels: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Stack arrays uint8 `[H, W]` or `[H, W, C]` to images in unit range."""
    deep = [image[..., None] if image.ndim == 2 else image for image in pixels]
    channels = max((image.shape[2] for image in deep), default=1)
    if len({image.shape[:2] for image in deep}) > 1:
        raise _differ(operation)
    # Grey pictures beside colour ones become RGB, as in `convert`.
    stacked = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in deep])
    images = torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
    return images.float().div_(255).to(like.device, like.dtype)


def _differ(operation: str) -> InputError:
    return InputError(
        f"{operation}: the images differ in size, and the module is not one of this package, whose "
        "image size is known; bring them to one size first"
    )


def _fitted(operation: str, images: Tensor, shape: Shape) -> Tensor:
    """Bring float images `[N, C, H, W]` in unit range to a shape (C, H, W).

    Images of another rank, or without a pixel, are left for `check_images` to refuse.
    """
    if images.ndim != 4 or 0 in images.shape or images.shape[1:] == torch.Size(shape):
        return images
    check_range(operation, "images", images)
    if images.shape[1] == 3 and shape[0] == 1:
        weights = images.new_tensor(_LUMA).view(3, 1, 1)
        images = (images * weights).sum(1, keepdim=True)
    if images.shape[1] not in (1, shape[0]):
        raise InputError(
            f"{operation}: images must be [N, {shape[0]}, H, W], or have 1 or 3 channels; got "
            f"{list(images.shape)}"
        )
    return fit_images(images, shape)
