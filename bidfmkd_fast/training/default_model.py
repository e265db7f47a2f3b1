"""Build the default meta-model, and choose the image shape of its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.models import build_model
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training.config import TrainConfig


def initial_module(specs: Sequence[APISpec], config: TrainConfig) -> nn.Module:
    """Build the default meta-model for APIs of these `specs`, untrained.

    Its parameters depend on the seed and the shapes only, so that a run, its control and the
    baselines start from the same model.
    """
    shape = task_shape(specs, config)
    channels, height, width = shape or specs[0].image_shape
    with seeded(config.seed, "meta_model"):
        return build_model(
            "conv4_any_size" if shape else "conv4",
            in_channels=channels,
            n_classes=max(spec.n_classes for spec in specs),
            image_size=(height, width),
            width=config.meta_model_width,
            batch_statistics=True,
        )


def task_shape(specs: Sequence[APISpec], config: TrainConfig) -> tuple[int, int, int] | None:
    """Return the shape (C, H, W) to which all images of a task are resized; None if none is.

    No image is resized when all APIs take images of one shape and `config.meta_model_side` does
    not ask for another.
    """
    shapes = {spec.image_shape for spec in specs}
    if len(shapes) == 1 and not config.meta_model_side:
        return None
    side = config.meta_model_side or max(max(height, width) for _, height, width in shapes)
    return max(channels for channels, _, _ in shapes), side, side
