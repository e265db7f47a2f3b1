"""Prepare procedural pictures against a loop that draws one after the other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import bidfmkd_fast as bf
from benchmarks import plain_pictures
from benchmarks.harness import OURS, Prepared, case
from bidfmkd_fast.priors import KINDS, library, numbers

N_PICTURES, N_COMPARED = 1000, 200


def plainly_drawn(scene: Tensor, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Draw one scene of the library, `[1]`, in numpy from the library's random numbers."""

    def numbers_of(kind: str) -> plain_pictures.Numbers:
        values = numbers.uniforms(seed, kind, scene, plain_pictures.N_NUMBERS[kind])
        return plain_pictures.Numbers(values[0].numpy())

    kind = list(KINDS)[int(library.kinds_of(scene, seed))]
    return torch.from_numpy(plain_pictures.picture(kind, shape, numbers_of))


def prepare_pictures(shape: tuple[int, int, int]) -> Prepared:
    """Prepare 1000 pictures of the library; the loop draws as many of the same kinds."""

    def check() -> None:
        got = bf.procedural_images(N_COMPARED, shape)
        wanted = [plainly_drawn(scene, shape) for scene in torch.arange(N_COMPARED).split(1)]
        assert (got - torch.stack(wanted)).abs().max() < 1.01 / 255

    return Prepared(
        contenders={
            OURS: lambda: bf.procedural_images(N_PICTURES, shape),
            "loop over pictures": lambda: plain_pictures.pictures(N_PICTURES, shape),
        },
        check=check,
        output_bytes=4 * N_PICTURES * shape[0] * shape[1] * shape[2],
    )


for _shape in ((3, 32, 32), (1, 28, 28)):
    _name = "x".join(map(str, _shape))
    case(f"priors/{N_PICTURES}x{_name}")(partial(prepare_pictures, _shape))
