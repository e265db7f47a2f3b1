"""The black box: images in, scores out, every call checked and counted, never a gradient."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.black_box.answers import usable
from bidfmkd_fast.black_box.first_answers import FirstAnswers, check_range
from bidfmkd_fast.black_box.ledger import Budget, Ledger
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError, ServiceWarning

# Widths of the input range that images may leave it by: steps lead a little out of it, 0..255 and
# normalised ones far.
_OUTSIDE = 0.5


class BlackBox(ABC):
    """An API of which only the scores are seen. Subclasses define `score`, which gets `max_batch`
    images at most.

    `api.ledger` counts what it was asked. Safe under threads, as far as `score` is.

    Args:
        spec: what is known of the API.
        budget: cap on what it may cost; the same `Budget` given to several APIs caps their sum.
            None for no cap.

    Raises:
        InputTypeError: `spec` or `budget` is something else.
    """

    # whether it may fail for a while through no fault of the caller's, as a remote one does
    is_service = False

    def __init__(self, spec: APISpec, *, budget: Budget | None = None) -> None:
        if not isinstance(spec, APISpec):
            raise InputTypeError(
                f"{type(self).__name__}: spec must be an APISpec; got {type(spec).__name__}"
            )
        self._spec = spec
        self._ledger = Ledger(spec.price_per_1000)
        self.first_answers = FirstAnswers(spec)
        self._warned_of_range = False
        self.budget = budget

    @property
    def spec(self) -> APISpec:
        """What is known of the API."""
        return self._spec

    @property
    def ledger(self) -> Ledger:
        """What the API has been asked so far."""
        return self._ledger

    @property
    def budget(self) -> Budget | None:
        """The cap on what the API may cost; may be set at any time, and shared."""
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
        """`spec.name`, which errors and reports use."""
        return self._spec.name

    def __call__(self, images: Tensor) -> Tensor:
        """The scores of a batch of images.

        Args:
            images: `[N, C, H, W]` float32 in `spec.input_range` (values outside are passed on as
                they are).

        Returns:
            scores `[N, n_classes]` float32 of `spec.returned_kind`, on the images' device, without
            a graph. Rounded probabilities are at least half a unit of their last place; top-k
            answers have the missing mass spread evenly over the classes that were not told.

        Raises:
            InputError: the images are not what the API takes (InputTypeError: no float32 tensor);
                nothing was sent.
            BudgetExhausted: the call would overrun the budget; nothing was sent, counted or spent.
            BadAnswer: the API answered something else than finite scores, or the first ones cannot
                be of its `scores_kind`; the call is counted.
            APIUnavailable: a service did not answer, whatever was tried; every attempt is counted.

        Warns:
            ServiceWarning, PrecisionWarning: once each, of images more than half the width of
                `input_range` outside of it, and of first answers that look wrong (see
                `first_answers`).
        """
        self._check_images(images)
        n_images = images.shape[0]
        n_requests = self.requests_for(n_images)
        self.reserve(n_images, n_requests)
        with torch.no_grad():
            answer = self._ask(images.detach(), n_requests)
        self.first_answers.warn(images, answer, stacklevel=2)
        # A copy made outside inference mode: usable in a later graph, and no view of anything
        # inside the box.
        return usable(
            answer.detach().to(device=images.device, dtype=torch.float32, copy=True).contiguous(),
            self._spec,
        )

    def __repr__(self) -> str:
        spec, ledger = self._spec, self._ledger
        channels, height, width = spec.image_shape
        return (
            f"{type(self).__name__}({spec.name!r}: {channels}x{height}x{width} in [{spec.input_range[0]:g}, "
            f"{spec.input_range[1]:g}] -> {spec.n_classes} {spec.scores_kind}; {ledger.queries:,} queries in "
            f"{ledger.requests:,} requests)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputTypeError(
            f"{self.name}: a black box cannot be copied or pickled (its inside is closed and its ledger counts once); "
            "share the object, or build another from its source"
        )

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        """The checked answer to a call that is paid for, every request of it counted."""
        self._ledger.record(len(images), n_requests)
        answers = []
        for part in images.split(self._spec.max_batch or len(images)):
            answers.append(self.score(part))
            self._check_answer(answers[-1], len(part))
        self._ledger.record_answered(len(images), n_requests)
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def reserve(self, n_images: int, n_requests: int) -> None:
        if self._budget is not None:
            self._budget.reserve(n_images, n_requests, self.price_of(n_images))

    def price_of(self, n_images: int) -> float:
        return n_images * self._spec.price_per_1000 / 1000

    @abstractmethod
    def score(self, images: Tensor) -> Tensor:
        """Scores `[N, n_classes]` of checked images `[N, C, H, W]`, which must be left as they
        are.
        """

    def requests_for(self, n_images: int) -> int:
        """How many requests a call with `n_images` images sends: one, or as many as `max_batch`
        makes of it.
        """
        return 1 if self._spec.max_batch is None else -(-n_images // self._spec.max_batch)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise InputTypeError(
                f"{self.name}: images must be a float32 tensor; got {type(images).__name__}"
            )
        if images.dtype != torch.float32:
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
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):  # a NaN is the lowest and the highest
            raise InputError(f"{self.name}: images must be finite; got NaN or infinity")
        self._warn_of_range(low, high)

    def _warn_of_range(self, low: float, high: float) -> None:
        lowest, highest = self._spec.input_range
        most = _OUTSIDE * (highest - lowest)
        if self._warned_of_range or (low >= lowest - most and high <= highest + most):
            return
        self._warned_of_range = True
        message = (
            f"{self.name}: images of {low:.4g} to {high:.4g} are far outside of its input_range, {lowest:g} to "
            f"{highest:g}; are they 0 to 255, or normalised? Bring them to input_range, or set it in the spec"
        )
        warnings.warn(message, ServiceWarning, stacklevel=4)

    def _check_answer(self, answer: object, n_images: int) -> None:
        wanted = (
            f"{self.name}: the API must answer finite scores [{n_images}, {self._spec.n_classes}]"
        )
        if not isinstance(answer, Tensor):
            raise BadAnswer(f"{wanted}; it answered a {type(answer).__name__}")
        if tuple(answer.shape) != (n_images, self._spec.n_classes):
            raise BadAnswer(f"{wanted}; it answered shape {list(answer.shape)}")
        if not answer.is_floating_point():
            raise BadAnswer(f"{wanted}; it answered {answer.dtype}")
        if not _all_finite(answer):
            raise BadAnswer(f"{wanted}; it answered NaN or infinity")
        if self._spec.returned_kind != "logits":
            low, high = answer.detach().aminmax()
            check_range(self._spec, low.item(), high.item())
        self.first_answers.check(answer)


def _all_finite(tensor: Tensor) -> bool:
    # A sum carries any NaN or infinity and needs no mask; finite values that overflow it are looked
    # at one by one.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
