"""Define a Conv4 for images of any size.

It learns from APIs whose images differ in size, the paper's setting API-MH.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.models.conv4 import Conv4


class AnySizeConv4(Conv4):
    """A `Conv4` that first brings every image to `[in_channels, *image_size]` with `fit_images`.

    Images `[N, 1 or in_channels, any H, any W]` float32 -> logits `[N, n_classes]`. The paper's
    network for API-MH keeps the image's size and ends in a global maximum instead, which leaves
    `width` features however large the image is. This module keeps every feature of the resized
    image and costs the same for all data sets.

    Raises:
        InputError: as for `Conv4`.
    """

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(fit_images(images, (self.in_channels, *self.image_size)))


def fit_images(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Bring images `[*, C, H, W]` in any range to `[*, *image_shape]`.

    A single channel is repeated. The size is interpolated bilinearly, with smoothing where the
    image shrinks, so values stay within the range of the image. Images that have the shape already
    are returned as they are.

    Raises:
        InputError: C is neither 1 nor `image_shape[0]`.
    """
    if images.shape[-3:] == torch.Size(image_shape):
        return images
    channels, *size = image_shape
    if images.shape[-3] not in (1, channels):
        wanted = f"1 or {channels} channels" if channels > 1 else "1 channel"
        raise InputError(f"fit_images: images must have {wanted}; got {list(images.shape)}")
    flat = images.reshape(-1, *images.shape[-3:])
    if list(flat.shape[-2:]) != size:
        flat = functional.interpolate(
            flat, size, mode="bilinear", align_corners=False, antialias=True
        )
    return flat.expand(-1, channels, -1, -1).reshape(*images.shape[:-3], *image_shape)
