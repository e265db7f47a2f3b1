"""Define the black box: images in, scores out, every call checked and counted, never a gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box.answers import advice_on_rows, one_hot, usable
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.first_answers import FirstAnswers, check_range
from bidfmkd_fast.black_box.image_range import ImageRange
from bidfmkd_fast.black_box.ledger import Ledger
from bidfmkd_fast.black_box.module_calls import ModuleCalls
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError


class BlackBox(ModuleCalls):
    """An image-classification API of which only the scores are seen.

    Call the box to ask the API: `scores = api(images)` checks the images, takes their price from
    the budget, counts them in the ledger, asks, and checks the answer. The box may be called from
    several threads at once if its `score` may.

    **To write a box**, call `super().__init__(spec, budget=budget)` and define `score`. Everything
    else has a default:

    - `score(images)`, required: ask the API once and return its scores. It gets checked images, at
      most `spec.max_batch` of them, and neither checks nor counts anything itself.
    - `requests_for(n_images)`: override it if a call sends another number of requests than one per
      `spec.max_batch` images. The number must be known before anything is sent.
    - `release()`: override it if the box holds connections or files that it can open again.
    - `is_service`: set it to True if the API may fail for a while through no fault of the caller,
      as a remote API does. A training run then waits for the API or leaves it out for a while
      instead of ending.

    For example, a box that scores images by a matrix::

        class TableBox(BlackBox):
            def __init__(self, table: Tensor, spec: APISpec) -> None:
                super().__init__(spec)
                self._table = table

            def score(self, images: Tensor) -> Tensor:
                return images.flatten(1) @ self._table

    Where code expects a torch module, such as a `teacher`, a box answers the harmless calls of a
    module (`eval()`, `to(device)`, `parameters()`; see `ModuleCalls`) and refuses to be trained.

    **To use a box** in code that plans, pays or counts, rely on `spec`, `name`, `ledger`, `budget`,
    `is_service`, `requests_for`, `price_of`, `reserve`, `release` and `first_answers`, which every
    box has. Code outside a box calls the box, not `score`. The exception is code that cannot wait
    for checks on the host, such as a captured CUDA graph. It has to `reserve` and to record in the
    `ledger` before it calls `score`, and to check the scores itself.

    Attributes:
        is_service: True if the API may fail for a while through no fault of the caller.
        images_dtype: the dtype of the images that a call takes.
        first_answers: compares the first answers with the spec and warns about what looks wrong;
            each check runs once and sends nothing.

    Args:
        spec: what is known of the API.
        budget: cap on what the API may cost. The same `Budget` given to several APIs caps their
            sum. None for no cap.

    Raises:
        InputTypeError: `spec` is no `APISpec`, or `budget` is neither a `Budget` nor None.
    """

    is_service = False
    images_dtype = torch.float32

    def __init__(self, spec: APISpec, *, budget: Budget | None = None) -> None:
        if not isinstance(spec, APISpec):
            raise InputTypeError(
                f"{type(self).__name__}: spec must be an APISpec; got {type(spec).__name__}"
            )
        self._spec = spec
        self._ledger = Ledger(spec.price_per_1000)
        self.first_answers = FirstAnswers(spec)
        self._image_range = ImageRange(spec)
        self.budget = budget

    @property
    def spec(self) -> APISpec:
        """Return what is known of the API."""
        return self._spec

    @property
    def ledger(self) -> Ledger:
        """Return the count of what the API has been asked so far."""
        return self._ledger

    @property
    def budget(self) -> Budget | None:
        """Return the cap on what the API may cost; it may be set at any time, and shared."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | None) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise InputTypeError(
                f"{self.name}: budget must be a Budget or None; got {type(budget).__name__}"
            )
        self._budget = budget

    @property
    def name(self) -> str:
        """Return `spec.name`, which errors and reports use."""
        return self._spec.name

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores of a batch of images.

        Args:
            images: `[N, C, H, W]` float32 in `spec.input_range`, a tensor or a NumPy array. Values
                outside of the range are sent as they are.

        Returns:
            scores `[N, n_classes]` float32 of `spec.returned_kind`, on the images' device, without
            a graph; an array if the images are one. Rounded probabilities are at least half a unit
            of their last decimal. The probability that a top-k answer leaves out is spread evenly
            over the classes that it leaves out.

        Raises:
            InputError: the images do not fit the spec (InputTypeError: they are no float32 tensor);
                nothing was sent.
            BudgetExhausted: the call would overrun the budget; nothing was sent, counted or spent.
            BadAnswer: the API did not answer with finite scores, or the first answer cannot be of
                the spec's `scores_kind`; the call is counted.
            APIUnavailable: a service did not answer after all attempts; every attempt is counted.

        Warns:
            ServiceWarning, PrecisionWarning: images lie outside of `input_range` by more than half
                of its width, or are 0 to 1 where it is much wider, or the first answers look wrong
                (see `first_answers`); each warning comes once.
        """
        if isinstance(images, np.ndarray):  # the types speak of tensors, which most callers have
            return self(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        self._check_images(images)
        n_images = images.shape[0]
        n_requests = self.requests_for(n_images)
        self.reserve(n_images, n_requests)
        with torch.no_grad():
            answer = self._ask(images.detach(), n_requests)
        self.first_answers.warn(images, answer, stacklevel=2)
        # Copy outside of inference mode: the result may enter a graph later, and it is no view of
        # a tensor inside the box.
        return usable(
            answer.detach().to(device=images.device, dtype=torch.float32, copy=True).contiguous(),
            self._spec,
        )

    def __repr__(self) -> str:
        spec, ledger = self._spec, self._ledger
        channels, height, width = spec.image_shape
        low, high = spec.input_range
        return (
            f"{type(self).__name__}({spec.name!r}: {channels}x{height}x{width} in "
            f"[{low:g}, {high:g}] -> {spec.n_classes} {spec.scores_kind}; "
            f"{ledger.queries:,} queries in {ledger.requests:,} requests)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputTypeError(
            f"{self.name}: a black box cannot be copied or pickled (a copy of its ledger "
            "would count the same queries twice); share the object, or build another from its "
            "source"
        )

    @abstractmethod
    def score(self, images: Tensor) -> Tensor:
        """Ask the API for the scores of images that are checked and paid for.

        Subclasses define this method. It neither checks nor counts: `__call__` does both, before
        and after. Call the box itself, not this method.

        Args:
            images: `[N, C, H, W]` float32 in `spec.input_range`, N from 1 to `spec.max_batch`. The
                method must not change them.

        Returns:
            scores `[N, n_classes]`, a floating-point tensor of `spec.returned_kind` on any device.
            In a top-k answer the classes that are left out are 0. An API of labels may also return
            the class numbers `[N]`, of any integer type.

        Raises:
            BadAnswer: the API answered something that is no set of scores.
            APIUnavailable: the API did not answer.
        """

    def requests_for(self, n_images: int) -> int:
        """Return how many requests a call with `n_images` images sends, without repetitions.

        By default a call is one request, or one per `spec.max_batch` images.
        """
        return 1 if self._spec.max_batch is None else -(-n_images // self._spec.max_batch)

    def release(self) -> None:
        """Let go of what the next call can open again, such as idle connections.

        A run calls this when it has no further question to the API for a while. By default nothing
        happens.
        """

    def price_of(self, n_images: int) -> float:
        """Return the price of scoring `n_images` images, in the currency of `price_per_1000`."""
        return n_images * self._spec.price_per_1000 / 1000

    def reserve(self, n_images: int, n_requests: int) -> None:
        """Take `n_images` queries in `n_requests` requests from the budget, if there is a budget.

        `__call__` does this by itself. Only code that calls `score` directly has to call `reserve`.

        Raises:
            BudgetExhausted: the budget does not cover them; nothing was taken.
        """
        if self._budget is not None:
            self._budget.reserve(n_images, n_requests, self.price_of(n_images))

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        """Ask for images that are paid for, count every request, and return the checked answer."""
        self._ledger.record(len(images), n_requests)
        answers = []
        for part in images.split(self._spec.max_batch or len(images)):
            answers.append(self._checked(self.score(part), len(part)))
        self._ledger.record_answered(len(images), n_requests)
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _check_images(self, images: Tensor) -> None:
        """Raise InputError unless the images fit the spec and are finite; warn of their range."""
        if not isinstance(images, Tensor):
            raise InputTypeError(
                f"{self.name}: images must be a float32 tensor; got {type(images).__name__}"
            )
        if images.dtype != self.images_dtype:
            raise InputTypeError(f"{self.name}: images must be float32; got {images.dtype}")
        if (
            images.dim() != 4
            or tuple(images.shape[1:]) != self._spec.image_shape
            or images.shape[0] < 1
        ):
            wanted = ", ".join(map(str, self._spec.image_shape))
            raise InputError(
                f"{self.name}: images must be [N, {wanted}] with N >= 1; got {list(images.shape)}"
            )
        # If any value is NaN, both the minimum and the maximum are NaN.
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{self.name}: images must be finite; got NaN or infinity")
        self._image_range.warn(low, high, stacklevel=3)

    def _checked(self, answer: Tensor, n_images: int) -> Tensor:
        """Return the answer, labels as one-hot scores, once it has passed `_check_answer`."""
        if self._spec.labels_only:
            answer = one_hot(answer, self._spec, n_images)
        self._check_answer(answer, n_images)
        return answer

    def _check_answer(self, answer: object, n_images: int) -> None:
        """Raise BadAnswer unless the answer is finite scores `[n_images, n_classes]`."""
        wanted = (
            f"{self.name}: the API must answer finite scores [{n_images}, {self._spec.n_classes}]"
        )
        if not isinstance(answer, Tensor):
            raise BadAnswer(f"{wanted}; it answered a {type(answer).__name__}")
        if tuple(answer.shape) != (n_images, self._spec.n_classes):
            advice = advice_on_rows(answer.shape, n_images)
            raise BadAnswer(f"{wanted}; it answered shape {list(answer.shape)}{advice}")
        if not answer.is_floating_point():
            raise BadAnswer(f"{wanted}; it answered {answer.dtype}")
        if not _all_finite(answer):
            raise BadAnswer(f"{wanted}; it answered NaN or infinity")
        if answer.dtype == torch.float64 and not _all_finite(answer.float()):
            raise BadAnswer(f"{wanted}; it answered scores that float32 cannot hold")
        if self._spec.returned_kind != "logits":
            low, high = answer.detach().aminmax()
            check_range(self._spec, low.item(), high.item())
        self.first_answers.check(answer)


def _all_finite(tensor: Tensor) -> bool:
    """Return True if no element is NaN or infinite.

    The sum is computed first, which needs no mask: a NaN or infinite element makes the sum NaN or
    infinite. The sum of finite elements may overflow, too, so after such a sum each element is
    checked.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
