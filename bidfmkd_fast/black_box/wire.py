"""Convert images to what a service wants on the wire: size, channels, numbers or image files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bidfmkd_fast.black_box.spec import APISpec

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's conversion to grey


def wire_array(images: Tensor, spec: APISpec) -> np.ndarray[Any, Any]:
    """Convert images `[N, *image_shape]` in `input_range` to the array that the API wants.

    The array is `[N, *wire_shape]` in the API's layout, uint8 or float32. 8-bit values are
    `round(255 (x - low) / (high - low))`, clamped to 0..255; float32 values are `(x - mean) / std`.
    """
    images = _fitted(images.detach().cpu(), spec)
    if spec.is_8_bit:
        images = _bytes(images, spec)
    elif spec.mean:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        images = (images - mean) / std
    return (
        images.permute(0, 2, 3, 1).contiguous().numpy()
        if spec.layout == "NHWC"
        else images.contiguous().numpy()
    )


def wire_tensor(images: Tensor, spec: APISpec) -> Tensor:
    """Convert images `[N, *image_shape]` in `input_range` to the float32 tensor that the API wants.

    The tensor is `[N, *wire_shape]` in the API's layout, on the same device. 8-bit images stay in
    `input_range` and lose what 8 bits or JPEG lose; others are `(x - mean) / std`. It may share
    memory with the images.
    """
    images = through_wire(_fitted(images, spec), spec)
    if spec.mean:
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
        images = (images - mean) / std
    return images.permute(0, 2, 3, 1).contiguous() if spec.layout == "NHWC" else images


def wire_files(images: Tensor, spec: APISpec) -> list[bytes]:
    """Convert each image to a PNG or JPEG file, as `wire_array` does to an array."""
    return [_file(image, spec.encoding) for image in wire_array(images, spec)]


def through_wire(images: Tensor, spec: APISpec) -> Tensor:
    """Return images `[N, *image_shape]` with the loss that 8 bits or JPEG on the wire cause.

    Values stay in `input_range`.
    """
    if not spec.is_8_bit:
        return images
    pixels = _bytes(images, spec)
    if spec.encoding == "jpeg":
        from PIL import Image

        files = [_file(image, "jpeg") for image in pixels.cpu().numpy()]
        # Each array is [H, W] or [H, W, C].
        arrays = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        decoded = torch.from_numpy(
            np.stack([array.reshape(*array.shape[:2], -1) for array in arrays])
        )
        pixels = decoded.permute(0, 3, 1, 2).to(images.device)
    low, high = spec.input_range
    return pixels.to(images.dtype) * ((high - low) / 255) + low


def _fitted(images: Tensor, spec: APISpec) -> Tensor:
    """Return the images with the size and the number of channels of `wire_shape`."""
    channels, *size = spec.wire_shape
    if images.shape[1] == 3 and channels == 1:
        images = (images * images.new_tensor(_LUMA).view(-1, 1, 1)).sum(1, keepdim=True)
    if list(images.shape[2:]) != size:
        images = interpolate(
            images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True
        )
    return images.expand(-1, channels, -1, -1)


def _bytes(images: Tensor, spec: APISpec) -> Tensor:
    """Map `input_range` onto 0..255, rounded and clamped."""
    low, high = spec.input_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def _file(pixels: np.ndarray[Any, Any], encoding: str) -> bytes:
    """Encode pixels uint8 `[C, H, W]` as an image file."""
    from PIL import Image

    image = Image.fromarray(
        pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
    file = io.BytesIO()
    # Full chroma and high quality: a step of a recovery is small, and a JPEG should lose as little
    # of it as the format allows.
    options = {"compress_level": 1} if encoding == "png" else {"quality": 95, "subsampling": 0}
    image.save(file, encoding, **options)
    return file.getvalue()
