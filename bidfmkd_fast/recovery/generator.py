"""Define the image generator: latents in, images in unit range out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.runtime.memory import check_memory

PRECISIONS = ("tf32", "float32", "bfloat16")


class UpsampledConv2d(nn.Conv2d):
    """Nearest upsampling by 2 and a 3x3 convolution without bias, computed as one operation.

    `[B, in_channels, H, W]` -> `[B, out_channels, 2 H, 2 W]`. After upsampling only 4 of the 9
    pixels under the kernel differ. So the result equals a transposed convolution of stride 2 whose
    4x4 kernel sums the 3x3 kernel over 2x2 windows: 4/9 of the arithmetic, with the same parameters
    and gradients. A bias would have no effect, since the batch norm that follows removes it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # [in, out, 3, 3], turned by 180 degrees as a transposed convolution expects it.
        kernel = self.weight.transpose(0, 1).flip(2, 3)
        rows = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
        summed = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))  # [in, out, 4, 4]
        return F.conv_transpose2d(input, summed, stride=2, padding=1)


class Generator(nn.Module):
    """The generator: latents `[B, latent_dim]` float32 -> images `[B, C, H, W]` float32 in [0, 1].

    A linear layer to `[2 width, H/4, W/4]`, then two rounds of upsampling and convolution, as in
    the paper's generator (Hu et al., ICML 2023, arXiv 2305.18413), which has `width=64`. In
    training mode its batch norms use batch statistics, so the image of a latent depends on the
    other latents of the batch.

    Raises:
        InputError: `image_shape` is not `(1 or 3, multiple of 4, multiple of 4)`, a size is below
            1, or no memory here holds the weights.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], latent_dim: int = 256, width: int = 64
    ) -> None:
        super().__init__()
        if (
            len(image_shape) != 3
            or image_shape[0] not in (1, 3)
            or any(s < 4 or s % 4 for s in image_shape[1:])
        ):
            raise InputError(
                "Generator: image_shape must be (C, H, W) with C 1 or 3 and H and W multiples of "
                f"4; got {tuple(image_shape)}; give `recover` a generator module of your own for "
                "other shapes"
            )
        if latent_dim < 1 or width < 1:
            raise InputError(
                f"Generator: latent_dim and width must be at least 1; got {latent_dim} and {width}"
            )
        channels, height, image_width = image_shape
        features = 2 * width * (height // 4) * (image_width // 4)
        check_memory(
            "Generator",
            f"a network of latent_dim={latent_dim} and width={width} for images of {height} x "
            f"{image_width}",
            4 * (latent_dim * features + 9 * (2 * width) ** 2),
            "lower latent_dim or the width",
        )
        self.latent_dim = latent_dim
        self.project = nn.Linear(latent_dim, features)
        self.first_shape = (height // 4, image_width // 4, 2 * width)
        self.draw = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            UpsampledConv2d(2 * width, 2 * width),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            UpsampledConv2d(2 * width, width),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        # The features lie channels-last: convolutions on the CPU then take a third less time, and
        # the permutation is a view.
        features = self.project(latents).unflatten(1, self.first_shape).permute(0, 3, 1, 2)
        images: torch.Tensor = self.draw(features).contiguous()  # [B, C, H, W]
        return images


@contextmanager
def generator_precision(name: str, device: torch.device) -> Iterator[None]:
    """Set the arithmetic of a generator inside the block to one of `PRECISIONS`.

    "tf32" leaves torch's settings as they are.
    """
    with ExitStack() as stack:
        if name == "float32":
            stack.enter_context(full_float32())
        if name == "bfloat16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        yield


def renewed(generator: nn.Module) -> nn.Module:
    """Copy a user's generator and initialise every submodule with `reset_parameters` anew.

    Draws from torch's global random generator.
    """
    if not isinstance(generator, nn.Module):
        raise InputTypeError(
            f"recover: generator must be a torch.nn.Module; got {type(generator).__name__}"
        )
    copied = copy.deepcopy(generator)
    for module in copied.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return copied


def check_images(images: object, shape: list[int]) -> None:
    """Raise InputError unless `images` are float32 of this shape, in [0, 1], with a graph."""
    if (
        not isinstance(images, torch.Tensor)
        or images.dtype != torch.float32
        or list(images.shape) != shape
    ):
        came = (
            f"{images.dtype} {list(images.shape)}"
            if isinstance(images, torch.Tensor)
            else type(images).__name__
        )
        raise InputError(
            f"recover: generator must make float32 images {shape} of latents; got {came}"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # NaN is refused too
        raise InputError(
            f"recover: generator must make images in [0, 1]; got {low:.4g} to {high:.4g}; end it "
            "in a sigmoid"
        )
    if not images.requires_grad:
        raise InputError(
            "recover: generator must be differentiable; its images carry no graph to the latents"
        )
