"""Draw procedural pictures: one library for all APIs, since nothing is known of their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import leaves, shapes, strokes, waves
from bidfmkd_fast.priors.canvas import N_JITTER, Jitter
from bidfmkd_fast.priors.numbers import Draws, uniforms
from bidfmkd_fast.runtime.full_float32 import full_float32

Drawing = Callable[[Draws, Draws, Jitter, tuple[int, int, int]], Tensor]

_CHUNK = 256  # pictures drawn at once: their intermediate results stay in the second-level cache
_MOST_MEMBERS = 1 << 20


class Kind(NamedTuple):
    """A kind of drawing: its share of the library, and how many random numbers it takes."""

    share: float
    draw: Drawing
    n_draws: int
    n_member_draws: int = 0


KINDS: dict[str, Kind] = {
    "strokes": Kind(0.3, strokes.draw, strokes.N_DRAWS, strokes.N_MEMBER_DRAWS),
    "leaves": Kind(0.4, leaves.draw, leaves.N_DRAWS, leaves.N_MEMBER_DRAWS),
    "texture": Kind(0.08, waves.draw_texture, waves.N_DRAWS),
    "grating": Kind(0.04, waves.draw_grating, waves.N_GRATING_DRAWS),
    "blobs": Kind(0.04, shapes.draw_blobs, shapes.N_BLOB_DRAWS),
    "fractal": Kind(0.04, shapes.draw_fractal, shapes.N_FRACTAL_DRAWS),
    "mixture": Kind(0.1, None, 0),  # type: ignore[arg-type]  # of two others, see `_mixture`
}
_PLAIN = [name for name in KINDS if name != "mixture"]


def procedural_images(
    n: int,
    image_shape: Sequence[int],
    seed: int = 0,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw pictures `first`, ..., `first + n - 1` of the library.

    Picture i depends on (seed, first + i) and `image_shape` alone: on every machine its values are
    equal to within 1/255. The library uses no real picture and no data set.

    >>> pictures = procedural_images(4, (3, 32, 32))
    >>> pictures.shape, torch.equal(procedural_images(1, (3, 32, 32), first=3), pictures[3:])
    (torch.Size([4, 3, 32, 32]), True)

    Args:
        n: number of pictures, at least 0.
        image_shape: (C, H, W), C 1 or 3, H and W at least 4.
        seed: seed of the whole library, an integer.
        first: number of the first picture, at least 0.
        device: where the pictures are drawn.

    Returns:
        float32 `[n, C, H, W]` in [0, 1], in steps of 1/255 as pictures in files have them.

    Raises:
        InputError: a value out of its range.
    """
    for name, value, least in (("n", n, 0), ("first", first, 0)):
        check_integer("procedural_images", name, value, least)
    scenes = torch.arange(first, first + n, device=device)
    return draw_pictures(scenes, torch.zeros_like(scenes), image_shape, seed)


def draw_pictures(
    scenes: Tensor, members: Tensor, image_shape: Sequence[int], seed: int = 0
) -> Tensor:
    """Draw members of pseudo-classes: jittered copies of scenes of the library.

    Args:
        scenes, members: int64 `[n]`, which scene and which copy; member 0 is the scene itself.
        image_shape, seed: as for `procedural_images`.

    Returns:
        float32 `[n, C, H, W]` in [0, 1], on the device of `scenes`.

    Raises:
        InputError: an image shape that is not (1 or 3, H, W) with sides of at least 4.
    """
    shape: Any = tuple(image_shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < 4:
        raise InputError(
            "draw_pictures: image_shape must be (C, H, W) with C 1 or 3 and sides of at least 4; "
            f"got {list(shape)}"
        )
    pictures = torch.empty(len(scenes), *shape, dtype=torch.float32, device=scenes.device)
    kind = kinds_of(scenes, seed)
    # A matrix product in TF32 or bfloat16 would be off by more than a step of 1/255.
    with torch.autocast(scenes.device.type, enabled=False), full_float32():
        for number, name in enumerate(KINDS):
            rows = (kind == number).nonzero()[:, 0]
            for part in rows.split(_CHUNK):
                drawn = _drawn(name, scenes[part], members[part], shape, seed)
                pictures[part] = ((255 * _visible(drawn.clamp(0.0, 1.0))).round_() / 255).float()
    return pictures


def _visible(pictures: Tensor) -> Tensor:
    """Stretch the contrast of pictures in which hardly anything can be seen; keep all others.

    The colours of a picture may be alike by chance, and an answer about a flat picture is a wasted
    query. The spread is the root mean square of the deviations from each channel's mean. Deviations
    grow twentyfold where the spread is below 0.01, and stay as they are where it is above 0.02.
    Between the two the factor falls steadily, so that a rounding of the spread makes no visible
    difference.
    """
    mean = pictures.mean((2, 3), keepdim=True)
    deviations = pictures - mean
    spread = deviations.square().mean((1, 2, 3), keepdim=True).sqrt()
    factor = 1 + 19 * ((0.02 - spread) / 0.01).clamp(0.0, 1.0)
    return torch.where(factor > 1, mean + factor * deviations, pictures).clamp(0.0, 1.0)


def kinds_of(scenes: Tensor, seed: int = 0) -> Tensor:
    """Return the kind of each scene, its position in `KINDS`: int64 `[n]`."""
    # Summed on the CPU, so that the bounds are the same bits wherever the scenes are.
    shares = torch.tensor(
        [kind.share for kind in KINDS.values()], dtype=torch.float32, device="cpu"
    )
    bounds = shares.cumsum(0)[:-1].to(scenes.device)
    return torch.bucketize(uniforms(seed, "kind", scenes, 1)[:, 0], bounds, right=True)


def _drawn(
    name: str, scenes: Tensor, members: Tensor, shape: tuple[int, int, int], seed: int
) -> Tensor:
    if name == "mixture":
        return _mixture(scenes, members, shape, seed)
    copies = scenes * _MOST_MEMBERS + members
    jitter = Jitter.drawn(Draws(uniforms(seed, "jitter", copies, N_JITTER)), (members != 0).float())
    kind = KINDS[name]
    draws = Draws(uniforms(seed, name, scenes, kind.n_draws))
    member = Draws(uniforms(seed, f"{name} member", copies, kind.n_member_draws))
    return jitter.shaded(kind.draw(draws, member, jitter, shape))


def _mixture(scenes: Tensor, members: Tensor, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Blend two plain pictures of each scene, evenly or by a texture's light and dark parts."""
    draws = Draws(uniforms(seed, "mixture", scenes, 4 + waves.N_TEXTURE_DRAWS))
    first, step = draws.integer(0, len(_PLAIN) - 1), draws.integer(1, len(_PLAIN) - 1)
    second = (first + step) % len(_PLAIN)
    even, weight = draws.uniform(0, 1)[..., None], draws.uniform(0.3, 0.7)[..., None]
    copies = scenes * _MOST_MEMBERS + members
    jitter = Jitter.drawn(Draws(uniforms(seed, "jitter", copies, N_JITTER)), (members != 0).float())
    field = waves.texture(draws, jitter, shape[1:], 1.0, 2.0)
    mask = torch.where(even < 0.5, weight, (0.5 + field).clamp(0.0, 1.0))[:, None]
    layers = []
    for which in (first, second):
        layer = torch.empty(len(scenes), *shape, dtype=mask.dtype, device=mask.device)
        for number, name in enumerate(_PLAIN):
            rows = (which == number).nonzero()[:, 0]
            if len(rows):
                layer[rows] = _drawn(name, scenes[rows], members[rows], shape, seed)
        layers.append(layer)
    return torch.lerp(layers[0], layers[1], mask)
