"""Draw the library's pictures as a user would without it: in numpy, one picture after the other.

Each function draws one picture of a kind, `[C, H, W]`, and asks for its random numbers in the order
in which the library does. From the same numbers it makes the same picture, which is how the two are
compared; when it is timed, numpy's generator draws the numbers. numpy rather than torch, since its
operations start several times sooner on arrays as small as a picture. Sums over waves and dots are
matrix products, as in the library: a loop over them would be slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bidfmkd_fast.priors import KINDS, waves

Array = np.ndarray
Shape = tuple[int, int, int]
PLAIN = [name for name in KINDS if name != "mixture"]
N_NUMBERS = {name: KINDS[name].n_draws for name in PLAIN} | {"mixture": 4 + waves.N_TEXTURE_DRAWS}


class Numbers:
    """The random numbers of one picture, handed out one after the other."""

    def __init__(self, values: Array) -> None:
        self.values, self.next = values, 0

    def uniform(self, low: float, high: float, count: int) -> Array:
        self.next += count
        return low + (high - low) * self.values[self.next - count : self.next]

    def number(self, low: float, high: float) -> float:
        return float(self.uniform(low, high, 1)[0])

    def integer(self, low: int, high: int) -> int:
        return min(int(self.number(low, high + 1)), high)


def axis(size: int) -> Array:
    """Return the positions of pixels on an axis that runs from -1/2 to 1/2, `[size]`."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5


def colours(numbers: Numbers, count: int, channels: int) -> Array:
    """Draw a palette, `[count, channels]`."""
    grey = numbers.uniform(0, 1, count)[:, None]
    chroma = numbers.uniform(-0.5, 0.5, 3 * count).reshape(count, 3)[:, :channels]
    strength = min(max(2 * numbers.number(0, 1) - 0.6, 0), 1)
    return np.clip(grey + (chroma * strength if channels > 1 else 0 * chroma), 0, 1)


def between(first: Array, second: Array, share: Array) -> Array:
    """Blend two colours `[C]` by a field `[H, W]`."""
    return first[:, None, None] + share * (second - first)[:, None, None]


def strokes(numbers: Numbers, shape: Shape) -> Array:
    channels, height, width = shape
    n_curves = numbers.integer(1, 4)
    control = numbers.uniform(-0.36, 0.36, 24).reshape(4, 3, 2)
    joined = numbers.uniform(0, 1, 4)
    for k in range(1, n_curves):
        if joined[k] < 0.5:
            control[k, 0] = control[k - 1, 2]
    sigma = max(numbers.number(0.018, 0.05), 0.55 / min(height, width))
    t = (np.arange(20, dtype=np.float32)[:, None] + 0.5) / 20
    profile = np.zeros((height, width), np.float32)
    for start, middle, end in control[:n_curves]:
        dots = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        speed = np.hypot(*(2 * (1 - t) * (middle - start) + 2 * t * (end - middle)).T)
        columns = np.exp(-0.5 / sigma**2 * (axis(width) - dots[:, :1]) ** 2)
        lines = np.exp(-0.5 / sigma**2 * (axis(height) - dots[:, 1:]) ** 2)
        profile += (lines * (speed / 20 / (2.5066 * sigma))[:, None]).T @ columns
    ink = np.clip((profile - 0.5) * (sigma * min(height, width) / 0.59) + 0.5, 0, 1)
    pair = colours(numbers, 2, channels)
    plain, order = numbers.number(0, 1), numbers.integer(0, 1)
    if plain < 0.6:
        pair = np.array([[0], [1]] if order else [[1], [0]], np.float32).repeat(channels, 1)
    return between(pair[0], pair[1], ink)


def sum_of_waves(
    frequency: Array, angle: Array, phase: Array, amplitude: Array, size: tuple[int, int]
) -> Array:
    """Add up plane waves, `[H, W]`: cos(A + B) = cos A cos B - sin A sin B."""
    across = 2 * math.pi * (frequency * np.cos(angle))[:, None] * axis(size[1])
    down = 2 * math.pi * (frequency * np.sin(angle))[:, None] * axis(size[0]) + phase[:, None]
    return (np.cos(down) * amplitude[:, None]).T @ np.cos(across) - (
        np.sin(down) * amplitude[:, None]
    ).T @ np.sin(across)


def field(numbers: Numbers, size: tuple[int, int], low: float, high: float) -> Array:
    """Draw a texture whose amplitude falls as 1/f^a, a from `low` to `high`: `[H, W]`."""
    exponent = numbers.number(low, high)
    frequency = np.exp(numbers.uniform(0, 1, 40) * math.log(min(size) / 2.2))
    angle, phase = numbers.uniform(0, math.pi, 40), numbers.uniform(0, 2 * math.pi, 40)
    amplitude = frequency ** (1 - exponent)
    amplitude /= np.sqrt(0.5 * (amplitude**2).sum())
    return sum_of_waves(frequency, angle, phase, amplitude, size)


def leaves(numbers: Numbers, shape: Shape) -> Array:
    channels, height, width = shape
    n_leaves = int(3 + 33 * numbers.number(0, 1) ** 2)
    palette = colours(numbers, 8, channels)
    n_colours, softness = numbers.integer(2, 8), numbers.number(0.6, 3)
    bars, _, amount = numbers.number(0, 1), numbers.number(0, 1), numbers.number(0, 0.35)
    leaf = numbers.uniform(0, 1, 36 * 9).reshape(36, 9)
    grain = field(numbers, (height, width), 0.5, 2.0)
    picture = np.empty(shape, np.float32)
    picture[:] = palette[0][:, None, None]
    columns, lines = axis(width), axis(height)[:, None]
    for u_x, u_y, u_rx, u_ry, u_bar, turn, u_shape, u_colour, light in leaf[:n_leaves].tolist():
        cx, cy = 1.2 * u_x - 0.6, 1.2 * u_y - 0.6
        rx, ry = 0.04 + 0.19 * u_rx**1.5, 0.04 + 0.19 * u_ry**1.5
        if (bars < 0.25 or u_bar < 0.15) and u_bar < 0.6:
            rx, ry = 1.8 * rx, 0.35 * ry
        cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        u = np.abs(cos / rx * (columns - cx) + sin / rx * (lines - cy))
        v = np.abs(-sin / ry * (columns - cx) + cos / ry * (lines - cy))
        which = min(int(3 * u_shape), 2)
        distance = (
            np.sqrt(u * u + v * v) if which == 0 else np.maximum(u, v) if which == 1 else u + v
        )
        edge = min(rx, ry) * min(height, width) / softness
        cover = np.clip((1 - distance) * edge + 0.5, 0, 1)
        colour = palette[min(int(u_colour * n_colours), 7)] + 0.16 * (light - 0.5)
        picture += cover * (np.clip(colour, 0, 1)[:, None, None] - picture)
    return picture + 0.5 * amount * grain


def texture(numbers: Numbers, shape: Shape) -> Array:
    waves_ = field(numbers, shape[1:], 0.0, 2.2)
    first, second = colours(numbers, 2, shape[0])
    return between(first, second, np.clip(0.5 + 0.35 * waves_, 0, 1))


def grating(numbers: Numbers, shape: Shape) -> Array:
    n_waves = numbers.integer(1, 3)
    frequency = 1.2 * np.exp(numbers.uniform(0, 1, 3) * math.log(min(shape[1:]) / 4))
    angle, phase = numbers.uniform(0, math.pi, 3), numbers.uniform(0, 2 * math.pi, 3)
    present = (np.arange(3) < n_waves).astype(np.float32)
    sharp = numbers.number(0.5, 4) * sum_of_waves(frequency, angle, phase, present, shape[1:])
    first, second = colours(numbers, 2, shape[0])
    return between(first, second, np.clip(0.5 + sharp, 0, 1))


def blobs(numbers: Numbers, shape: Shape) -> Array:
    channels, height, width = shape
    count = numbers.integer(2, 12)
    centre = numbers.uniform(-0.45, 0.45, 24).reshape(12, 2)[:count]
    sigma = numbers.uniform(0.04, 0.2, 12)[:count, None]
    columns = np.exp(-0.5 * ((axis(width) - centre[:, :1]) / sigma) ** 2)
    lines = np.exp(-0.5 * ((axis(height) - centre[:, 1:]) / sigma) ** 2)
    ground = colours(numbers, 1, channels)[0, :, None, None]
    tint = (1.6 * np.tile(colours(numbers, 6, channels), (2, 1)) - 0.8)[:count]
    return ground + (lines[:, None] * tint[:, :, None]).transpose(1, 2, 0) @ columns


def fractal(numbers: Numbers, shape: Shape) -> Array:
    channels, height, width = shape
    c_real, c_imaginary = numbers.uniform(-0.9, 0.5, 2).tolist()
    zoom, (left, top) = numbers.number(1.2, 3.2), numbers.uniform(-0.4, 0.4, 2).tolist()
    columns = (np.arange(width) + 0.5) / width - 0.5
    lines = (np.arange(height) + 0.5) / height - 0.5
    a, b = np.broadcast_arrays(zoom * columns + left, zoom * lines[:, None] + top)
    for _ in range(7):
        a, b = (
            np.clip(a * a - b * b + c_real, -4, 4),
            np.clip(2 * a * b + c_imaginary, -4, 4),
        )
    level = np.clip(np.log1p(np.hypot(a, b)) / 2, 0, 1).astype(np.float32)
    first, second, third = colours(numbers, 3, channels)
    low = between(first, second, np.minimum(2 * level, 1))
    return low + np.maximum(2 * level - 1, 0) * (third[:, None, None] - low)


DRAWINGS: dict[str, Callable[[Numbers, Shape], Array]] = {
    "strokes": strokes,
    "leaves": leaves,
    "texture": texture,
    "grating": grating,
    "blobs": blobs,
    "fractal": fractal,
}


def picture(kind: str, shape: Shape, numbers_of: Callable[[str], Numbers]) -> Array:
    """Draw one picture of a kind, float32 `[C, H, W]` in steps of 1/255."""
    if kind == "mixture":
        numbers = numbers_of("mixture")
        first, step = numbers.integer(0, 5), numbers.integer(1, 5)
        even, weight = numbers.number(0, 1), numbers.number(0.3, 0.7)
        mask = field(numbers, shape[1:], 1.0, 2.0)
        names = PLAIN[first], PLAIN[(first + step) % 6]
        low, high = (DRAWINGS[name](numbers_of(name), shape) for name in names)
        drawn = low + (weight if even < 0.5 else np.clip(0.5 + mask, 0, 1)) * (high - low)
    else:
        drawn = DRAWINGS[kind](numbers_of(kind), shape)
    drawn = np.clip(drawn, 0, 1)
    mean = drawn.mean((1, 2), keepdims=True)
    spread = float(np.sqrt(np.square(drawn - mean).mean()))
    if spread < 0.02:  # hardly anything can be seen: more contrast
        drawn = np.clip(mean + (1 + 19 * min((0.02 - spread) / 0.01, 1)) * (drawn - mean), 0, 1)
    return np.round(255 * drawn).astype(np.float32) / 255


def pictures(n: int, shape: Shape, seed: int = 0) -> Array:
    """Draw n pictures one after the other, kinds in the library's shares: `[n, C, H, W]`."""
    random = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in KINDS.values()])
    kinds = random.choice(list(KINDS), n, p=shares / shares.sum())

    def numbers_of(kind: str) -> Numbers:
        return Numbers(random.random(N_NUMBERS[kind], dtype=np.float32))

    return np.stack([picture(kind, shape, numbers_of) for kind in kinds])
