"""Check the image generator: shapes, ranges, gradients, and the merged upsampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery import Generator
from bidfmkd_fast.recovery.generator import UpsampledConv2d
from bidfmkd_fast.seeds import seeded, torch_generator


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 4, 12)])
@pytest.mark.parametrize("n_images", [2, 7])
def test_images_have_the_shape_and_range(
    image_shape: tuple[int, int, int], n_images: int, seed: int
) -> None:
    with seeded(seed, "generator"):
        generator = Generator(image_shape, latent_dim=5, width=3)
    images = generator(torch.randn(n_images, 5, generator=torch_generator(seed, "latents")))
    assert images.shape == (n_images, *image_shape)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert 0 < images.min() < images.max() < 1


def test_the_gradient_reaches_latents_and_every_parameter(seed: int) -> None:
    with seeded(seed, "generator"):
        generator = Generator((1, 8, 8), latent_dim=6, width=4)
    latents = torch.randn(5, 6, generator=torch_generator(seed, "latents"), requires_grad=True)
    weights = torch.randn(5, 1, 8, 8, generator=torch_generator(seed, "weights"))
    (generator(latents) * weights).sum().backward()
    assert latents.grad is not None
    assert (latents.grad.abs().sum(1) > 0).all()
    for name, parameter in generator.named_parameters():
        # The batch norm behind the projection removes only what the bias adds to whole channels, so
        # the bias has a gradient as well.
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_width_scales_the_layers() -> None:
    shapes = [
        tuple(p.shape)
        for p in Generator((3, 32, 32), latent_dim=10, width=64).parameters()
        if p.ndim == 4
    ]
    assert shapes == [(128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]


@pytest.mark.parametrize(
    "image_shape", [(2, 28, 28), (1, 30, 28), (1, 28, 30), (1, 0, 4), (28, 28)]
)
def test_image_shapes_it_cannot_make(image_shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Generator: image_shape must be"):
        Generator(image_shape)  # type: ignore[arg-type]


def test_sizes_below_one() -> None:
    with pytest.raises(InputError, match="at least 1; got 0 and 4"):
        Generator((1, 8, 8), latent_dim=0, width=4)
    with pytest.raises(InputError, match="at least 1; got 4 and 0"):
        Generator((1, 8, 8), latent_dim=4, width=0)


def test_upsampled_convolution_is_upsampling_and_convolution(seed: int) -> None:
    with seeded(seed, "convolution"):
        layer = UpsampledConv2d(3, 5).double()
    x = torch.randn(
        2, 3, 4, 6, dtype=torch.float64, generator=torch_generator(seed, "x"), requires_grad=True
    )
    weights = torch.randn(
        2, 5, 8, 12, dtype=torch.float64, generator=torch_generator(seed, "weights")
    )

    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, padding=1)
    rtol, atol = TOLERANCES["float64"]
    torch.testing.assert_close(layer(x), plain, rtol=rtol, atol=atol)
    inputs = (x, layer.weight)
    ours = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    for gradient, wanted in zip(ours, torch.autograd.grad((plain * weights).sum(), inputs)):
        torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=atol)
