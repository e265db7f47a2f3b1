"""Prepare a local black box against a plain call of its module."""

from __future__ import annotations

from functools import partial

import torch

import bidfmkd_fast as bf
from benchmarks.harness import OURS, Prepared, case
from bidfmkd_fast.models import build_model

N_IMAGES = 2000


def prepare_torch_black_box(width: int) -> Prepared:
    module = build_model(
        "conv4", in_channels=1, n_classes=5, image_size=(28, 28), width=width
    ).eval()
    api = bf.TorchBlackBox(module, bf.APISpec(n_classes=5, image_shape=(1, 28, 28)))
    images = torch.rand(N_IMAGES, 1, 28, 28)

    def plain() -> torch.Tensor:
        with torch.inference_mode():
            return module(images)

    return Prepared(
        contenders={OURS: lambda: api(images), "plain module": plain},
        check=lambda: torch.testing.assert_close(api(images), plain(), rtol=1e-4, atol=1e-5),
    )


for _width in (8, 16, 32):
    case(f"black_box/conv4_{_width}/2000x28x28")(partial(prepare_torch_black_box, _width))
