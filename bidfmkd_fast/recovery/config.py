"""Define the settings of a recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.directions import DIRECTIONS
from bidfmkd_fast.ops.scores import DIVERGENCES
from bidfmkd_fast.recovery.generator import PRECISIONS
from bidfmkd_fast.recovery.mu import AUTO, as_number
from bidfmkd_fast.settings import (
    MOST_WIDTH,
    check_least,
    check_most,
    check_positive,
    check_types,
)


@dataclass(frozen=True)
class RecoveryConfig:
    """The settings with which one set of images is recovered.

    A step costs `(1 + num_directions) * n_classes * n_per_class` queries; `recovery.cost` counts
    all that a recovery asks.

    Args:
        steps: optimisation steps; 0 keeps the images of the untrained generator (the no-recovery
            control). A run with a survey then recovers nothing.
        num_directions: random directions per image and step (the paper's q).
        mu: step length (mu): how far a point lies from its image along a unit direction, in the
            API's input space; "auto" measures at the first images which length the API resolves,
            for 112 queries more per set.
        directions: "rademacher", "sphere", "gaussian" or "lowres".
        grid: side of the field of "lowres" directions; 0 with all others.
        learning_rate: Adam's learning rate, for the generator and the latents alike.
        betas: Adam's two decay rates.
        latent_dim: numbers in a latent.
        generator_width: channels of the built-in generator (the paper: 64); at most 4,096.
        generator_precision: precision of the generator and its gradients; "tf32" leaves torch's
            settings, with which convolutions on a GPU use TF32, "float32" turns TF32 off,
            "bfloat16" is autocast. The points are float32 in any case.
        boundary_weight: weight of the boundary term (lambda); only used with a student.
        divergence: distance of the boundary term: "l1" on scores, "l1_prob" and "kl" on
            probabilities.
        augment: one random crop and horizontal flip per step before the API sees the images.
        max_images: images held in memory and sent per call, rounded to whole sets of n_classes *
            n_per_class.

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
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.mu, str) and self.mu != AUTO:
            object.__setattr__(self, "mu", as_number(self.mu))
        check_types(self)
        check_least(
            self,
            steps=0,
            num_directions=1,
            grid=0,
            latent_dim=1,
            generator_width=1,
            max_images=1,
        )
        check_most(self, generator_width=MOST_WIDTH)
        check_positive(self, "learning_rate", *(() if self.mu == AUTO else ("mu",)))
        if not 0 <= self.boundary_weight < math.inf:
            raise InputError(
                "RecoveryConfig: boundary_weight must be finite and at least 0; got "
                f"{self.boundary_weight}"
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
                "RecoveryConfig: grid must be at least 1 with directions='lowres' and 0 with all "
                f"others; got grid={self.grid} with directions={self.directions!r}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"RecoveryConfig: betas must be two numbers in [0, 1); got {self.betas!r}"
            )
