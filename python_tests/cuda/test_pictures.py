"""Compare procedural pictures drawn on a CUDA device with those drawn on the CPU."""

from __future__ import annotations

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.priors import KINDS, draw_pictures, library

STEP = 1.001 / 255


@pytest.mark.parametrize("shape", [(1, 7, 9), (1, 28, 28), (3, 32, 32), (3, 84, 84), (3, 224, 224)])
def test_they_are_those_of_the_cpu(
    device: torch.device, shape: tuple[int, int, int], seed: int
) -> None:
    scenes = torch.arange(2000 if shape[1] < 50 else 400)
    assert set(library.kinds_of(scenes, seed).tolist()) == set(range(len(KINDS)))
    wanted = draw_pictures(scenes, scenes % 3, shape, seed)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32, which must not get into a picture
    try:
        got = draw_pictures(scenes.to(device), scenes.to(device) % 3, shape, seed)
    finally:
        torch.set_float32_matmul_precision(before)
    assert got.device == device
    assert (got.cpu() - wanted).abs().max() <= STEP


def test_device_is_where_they_are_drawn(device: torch.device, seed: int) -> None:
    got = bf.procedural_images(50, (3, 32, 32), seed, 7, device)
    assert got.device == device
    wanted = bf.procedural_images(50, (3, 32, 32), seed, 7)
    assert (got.cpu() - wanted).abs().max() <= STEP
