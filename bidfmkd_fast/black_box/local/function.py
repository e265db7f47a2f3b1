"""Turn any Python function into a black box."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.local.local_box import LocalBlackBox
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputTypeError


class FunctionBlackBox(LocalBlackBox):
    """An API behind any function.

    A call costs one request, or one per `spec.max_batch` images.

    Args:
        function: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]`, a
            floating tensor of `spec.scores_kind` (for top-k: the probabilities of all classes; for
            labels: scores of any kind, or class numbers `[N]` of any integer type). The function
            runs without autograd and gets a copy of the images, so it may work in place.
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.

    Raises:
        InputTypeError: `function` cannot be called.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], spec: APISpec, *, budget: Budget | None = None
    ) -> None:
        super().__init__(spec, budget=budget)
        if not callable(function):
            raise InputTypeError(
                f"{self.name}: function must be callable; got {type(function).__name__}"
            )
        self._answer = lambda images: function(images.clone())

    def score(self, images: Tensor) -> Tensor:
        """Return the function's answer to a copy of the images."""
        return self._answer(images)
