"""Count the memory that a recovery takes at least, so that an absurd one is refused early."""

from __future__ import annotations

import math

import torch

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.cost import takes_directions
from bidfmkd_fast.runtime.memory import check_memory


def check_set_memory(
    operation: str,
    api: BlackBox,
    config: RecoveryConfig,
    n_per_class: int,
    device: torch.device | str | None,
    *,
    own_generator: bool = False,
) -> None:
    """Raise InputError if a step of a recovery cannot fit into the memory of the device.

    `operation` opens the message. `own_generator`: the generator is a module of the user's, of
    whose memory nothing is known.
    """
    check_memory(
        operation,
        f"a step on n_per_class={n_per_class} images of {api.spec.n_classes} classes of "
        f"{api.name} with num_directions={config.num_directions}",
        step_bytes(api, config, n_per_class * api.spec.n_classes, own_generator),
        "lower n_per_class, num_directions, max_images, latent_dim or generator_width",
        device,
    )


def step_bytes(
    api: BlackBox, config: RecoveryConfig, n_images: int, own_generator: bool = False
) -> int:
    """Return the bytes that one step on `n_images` images holds at the same time, or fewer.

    These are the images and the best ones so far, one chunk of points, the scores of all points,
    the latents, the generator's first layer, and two layers of its features at the size of the
    image. Adam holds four numbers for each that it trains: value, gradient and two moments.
    """
    _, height, width = api.spec.image_shape
    numbers, held = math.prod(api.spec.image_shape), 4 if config.steps else 1
    per_image = 4 * (2 * numbers + held * config.latent_dim)
    weights = 0
    if takes_directions(api, config):
        n_rows = 1 + config.num_directions
        rows_at_once = min(n_rows, max(1, config.max_images // n_images))
        per_image += 4 * (rows_at_once * numbers + n_rows * api.spec.n_classes)
    if not own_generator:
        bytes_each = 2 if config.generator_precision == "bfloat16" else 4
        per_image += 2 * bytes_each * config.generator_width * height * width
        features = 2 * config.generator_width * (height // 4) * (width // 4)
        weights = 4 * held * config.latent_dim * features
    return n_images * per_image + weights
