"""Define the settings of the survey."""

from __future__ import annotations

from dataclasses import dataclass

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.settings import check_least, check_positive, check_types


@dataclass(frozen=True)
class SurveyConfig:
    """Settings of the survey, the stage before recovery.

    It costs `n_images` queries per API. `survey.cost` counts them.

    Args:
        n_images: procedural pictures that every API is asked about, once; 0 leaves the survey out.
        epochs: passes over all pictures in the joint distillation.
        batch_size: pictures per step of the joint distillation.
        temperature: by which the scores of APIs and heads are softened (T of Hinton et al., 2015).
        learning_rate: Adam's learning rate at the first step; it falls to 0 along a cosine.

    Raises:
        InputError: a value out of its range; `InputTypeError` if it is of the wrong type.
    """

    n_images: int = 6000
    epochs: int = 20
    batch_size: int = 64
    temperature: float = 2.0
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        check_types(self)
        # Batch norm needs two images of a batch to differ.
        check_least(self, n_images=0, epochs=1, batch_size=2)
        if self.n_images == 1:
            raise InputError("SurveyConfig: n_images must be 0 or at least 2; got 1")
        check_positive(self, "temperature", "learning_rate")
