"""The settings of a recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.directions import DIRECTIONS
from bidfmkd_fast.ops.scores import DIVERGENCES
from bidfmkd_fast.recovery.generator import PRECISIONS
from bidfmkd_fast.recovery.mu import AUTO, as_number


@dataclass(frozen=True)
class RecoveryConfig:
    """How to recover one set of images.

    Args:
        steps: optimisation steps; 0 keeps the images of the untrained generator (the no-recovery
            control).
        num_directions: random directions per image and step (the paper's q).
        mu: length of a step along a unit direction, in the API's input space; "auto" measures at
            the first images which length the API resolves, for 112 queries more per set
            (`resolution.QUERIES`).
        directions: "rademacher", "sphere", "gaussian" or "lowres".
        grid: side of the field of "lowres" directions; 0 with all others.
        learning_rate: Adam's learning rate, for the generator and the latents alike.
        betas: Adam's two decay rates.
        latent_dim: numbers in a latent.
        generator_width: channels of the built-in generator (the paper: 64).
        generator_precision: precision of the generator and its gradients; "tf32" leaves torch as it
            is set, whose convolutions on a GPU then use TF32, "float32" turns that off, "bfloat16"
            is autocast. The points are float32 in any case.
        boundary_weight: weight of the boundary term (lambda); only with a student.
        divergence: distance of the boundary term: "l1" on scores, "l1_prob" and "kl" on
            probabilities.
        augment: one random crop and horizontal flip per step before the API sees the images.
        max_images: images held in memory and sent per call, rounded to whole sets of n_classes *
            n_per_class.

    A step costs `(1 + num_directions) * n_classes * n_per_class` queries; `recovery.cost` counts
    all that is asked.

    Raises:
        InputError: a value out of its range; `InputTypeError` if it is of the wrong type.
    """

    steps: int = 80
    num_directions: int = 8
    mu: float | str = 0.025
    directions: str = "rademacher"
    grid: int = 0
    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.5, 0.999)
    latent_dim: int = 256
    generator_width: int = 16
    generator_precision: str = "tf32"
    boundary_weight: float = 0.3
    divergence: str = "l1_prob"
    augment: bool = False
    max_images: int = 1024

    def __post_init__(self) -> None:
        least = {
            "steps": 0,
            "grid": 0,
            "num_directions": 1,
            "latent_dim": 1,
            "generator_width": 1,
            "max_images": 1,
        }
        for name, low in least.items():
            check_integer(f"RecoveryConfig: {name}", getattr(self, name), low)
        if isinstance(self.mu, str) and self.mu != AUTO:
            object.__setattr__(self, "mu", as_number(self.mu))
        for name in ("mu", "learning_rate", "boundary_weight"):
            if name == "mu" and self.mu == AUTO:
                continue
            value, zero_fits = getattr(self, name), name == "boundary_weight"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputTypeError(f"RecoveryConfig: {name} must be a number; got {value!r}")
            if not (0 < value < math.inf or (value == 0 and zero_fits)):
                wanted = "at least 0" if zero_fits else "above 0"
                raise InputError(
                    f"RecoveryConfig: {name} must be finite and {wanted}; got {value!r}"
                )
        choices = (
            ("directions", DIRECTIONS),
            ("divergence", DIVERGENCES),
            ("generator_precision", PRECISIONS),
        )
        for name, known in choices:
            if (value := getattr(self, name)) not in known:
                raise InputError(
                    f"RecoveryConfig: {name} must be one of {', '.join(known)}; got {value!r}"
                )
        if (self.directions == "lowres") != (self.grid > 0):
            raise InputError(
                "RecoveryConfig: grid must be at least 1 with directions='lowres' and 0 with all others; "
                f"got grid={self.grid} with directions={self.directions!r}"
            )
        if not _are_betas(self.betas):
            raise InputError(
                f"RecoveryConfig: betas must be two numbers in [0, 1); got {self.betas!r}"
            )
        if not isinstance(self.augment, bool):
            raise InputTypeError(
                f"RecoveryConfig: augment must be True or False; got {self.augment!r}"
            )


def check_integer(name: str, value: object, low: int) -> None:
    """Raises InputTypeError or InputError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} must be an integer; got {value!r}")
    if value < low:
        raise InputError(f"{name} must be at least {low}; got {value}")


def _are_betas(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in value)
