"""Turn any Python function into a black box, whatever images it takes and scores it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.local.function_answers import as_tensor
from bidfmkd_fast.black_box.local.local_box import LocalBlackBox
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import wire_array, wire_tensor
from bidfmkd_fast.errors import InputTypeError


class FunctionBlackBox(LocalBlackBox):
    """An API behind any function.

    The function gets images as the spec's wire fields say, as a service would: resampled to
    `server_shape`, with its number of channels, as `(x - mean) / std`, in its `layout`. A call
    costs one request, or one per `spec.max_batch` images, each of which is one call of the
    function.

    The function returns one of these, on any device:

    - scores `[N, n_classes]` of `spec.scores_kind`, in the order of the classes, as a floating
      torch tensor, a NumPy array of floats or integers, or nested lists of numbers (for top-k: the
      probabilities of all classes);
    - for labels: scores of any kind, class numbers `[N]` of any integer type, or class names `[N]`;
    - a list with one list of `{"label": name, "score": p}` per image, in any order, as Hugging Face
      pipelines give: the scores are placed by `spec.class_names`. A label may also be a class
      number. Fewer labels than classes need `scores_kind="top_k"` (or "labels").

    >>> import torch
    >>> from bidfmkd_fast import APISpec, Budget, FunctionBlackBox
    >>> spec = APISpec(n_classes=3, image_shape=(1, 4, 4), class_names=("cat", "dog", "owl"))
    >>> def ask_my_service(images):  # float32 [N, 1, 4, 4] in [0, 1] -> scores [N, 3]
    ...     return images.flatten(1)[:, :3]
    >>> api = FunctionBlackBox(ask_my_service, spec, budget=Budget(max_queries=100))
    >>> api(torch.rand(8, 1, 4, 4)).shape, api.ledger.queries
    (torch.Size([8, 3]), 8)

    Args:
        function: images `[N, *wire_shape]` (`[N, H, W, C]` with layout NHWC) -> scores. The images
            are a float32 tensor on the device of the caller's images; 8-bit images stay in
            `spec.input_range` and lose what 8 bits lose. The function runs without autograd and
            gets a copy of the images, so it may work in place.
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.
        as_numpy: give the function a NumPy array on the CPU instead of a tensor: float32, or uint8
            of 0 to 255 if the spec says 8 bits (`dtype="uint8"` or an `encoding`).

    Raises:
        InputTypeError: `function` cannot be called, or `as_numpy` is no bool. A call raises
            BadAnswer if the function returns none of the above.
    """

    _converts_images = True

    def __init__(
        self,
        function: Callable[[Any], Any],
        spec: APISpec,
        *,
        budget: Budget | None = None,
        as_numpy: bool = False,
    ) -> None:
        super().__init__(spec, budget=budget)
        if not callable(function):
            raise InputTypeError(
                f"{self.name}: function must be callable; got {type(function).__name__}"
            )
        if not isinstance(as_numpy, bool):
            raise InputTypeError(f"{self.name}: as_numpy must be True or False; got {as_numpy!r}")
        convert = _own_array if as_numpy else _own_tensor
        # The closure is the only way to the function: no attribute holds it.
        self._answer = lambda images: function(convert(images, spec))

    def score(self, images: Tensor) -> Tensor:
        """Return the function's answer to a converted copy of the images, as a tensor."""
        return as_tensor(self._answer(images), self._spec, len(images))


def _own_tensor(images: Tensor, spec: APISpec) -> Tensor:
    """Return the images as the spec says, in memory of their own."""
    converted = wire_tensor(images, spec)
    return converted.clone() if converted.data_ptr() == images.data_ptr() else converted


def _own_array(images: Tensor, spec: APISpec) -> np.ndarray[Any, Any]:
    """Return the images as the array that the spec says, in memory of its own."""
    if spec.encoding == "jpeg":  # an array does not show what JPEG loses
        images = wire_tensor(images, spec)
    return np.array(wire_array(images, spec), order="C")
