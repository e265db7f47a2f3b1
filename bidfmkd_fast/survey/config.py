"""Define the settings of the survey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.settings import check_least, check_positive, check_types

# The fields before pictures were chosen and jittered; a run always wrote them all.
_OLD_KEYS = frozenset(["n_images", "epochs", "batch_size", "temperature", "learning_rate"])


@dataclass(frozen=True)
class SurveyConfig:
    """Settings of the survey, the stage before recovery.

    It costs `n_images` queries per API. `survey.cost` counts them.

    Args:
        n_images: procedural pictures that every API is asked about, once; 0 leaves the survey out.
        chosen: share of them that is chosen after the answers to the others, so that each class of
            each API is met about equally often; 0 takes all pictures as the library has them.
        epochs: passes over all pictures in the joint distillation.
        batch_size: pictures per step of the joint distillation.
        temperature: by which the scores of APIs and heads are softened (T of Hinton et al., 2015).
        learning_rate: Adam's learning rate at the first step; it falls to 0 along a cosine.
        jitter: by how much the backbone sees a picture turned (radians), scaled and, 0.6 times
            that, shifted (sides), at random in each epoch, while the answer stays; 0 for not at
            all.

    Raises:
        InputError: a value out of its range; `InputTypeError` if it is of the wrong type.
    """

    n_images: int = 6000
    chosen: float = 0.75
    epochs: int = 20
    batch_size: int = 64
    temperature: float = 2.0
    learning_rate: float = 2e-3
    jitter: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        # Batch norm needs two images of a batch to differ.
        check_least(self, n_images=0, epochs=1, batch_size=2)
        if self.n_images == 1:
            raise InputError("SurveyConfig: n_images must be 0 or at least 2; got 1")
        check_positive(self, "temperature", "learning_rate")
        for name, value, most in (("chosen", self.chosen, 0.9), ("jitter", self.jitter, 0.5)):
            if not 0 <= value <= most:
                raise InputError(f"SurveyConfig: {name} must be from 0 to {most}; got {value}")

    @property
    def n_first(self) -> int:
        """Return the number of pictures that are asked about before any is chosen."""
        # The choice needs a backbone, which learns from two pictures or more.
        return max(min(2, self.n_images), self.n_images - round(self.chosen * self.n_images))

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out choice and jitter in settings that a run wrote before there were any.

        Without a survey the two mean nothing, and stay the defaults, as `NO_SURVEY` has them.
        """
        if values.keys() == _OLD_KEYS and values["n_images"] != 0:
            return {**values, "chosen": 0.0, "jitter": 0.0}
        return values
