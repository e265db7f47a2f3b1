"""Recover a set without the host: every step stays on the API's device, in a CUDA graph.

This loop serves a `TorchBlackBox` on the CUDA device that makes the images. It takes the
optimisation step of `step`, as the loop `stepwise` does, but reads no value on the host. The module
is called without the checks of a call to the API, and the crop comes from a table on the device.
Records and checks stay on the device until `result` reads them at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bidfmkd_fast.black_box import BlackBox, TorchBlackBox
from bidfmkd_fast.black_box.first_answers import check_range
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.ops import backend
from bidfmkd_fast.recovery.augment import augment_at, crop_of
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.cost import step_cost
from bidfmkd_fast.recovery.mu import warn_if_unmoved
from bidfmkd_fast.recovery.objective import NOT_FINITE
from bidfmkd_fast.recovery.recovered import Record, Recovered
from bidfmkd_fast.recovery.step import RecoveryStep
from bidfmkd_fast.runtime.captured_step import RepeatedStep


def serves(api: BlackBox, config: RecoveryConfig, labels: Tensor) -> bool:
    """Return True if the whole recovery can run on the GPU without host reads.

    That takes a local torch API on the device of `labels` and a budget that covers every step. The
    API must also answer in full and take all images at once, since 8-bit inputs, rounding, top-k
    and batches of `max_batch` are made outside of the module.
    """
    spec = api.spec
    if not labels.is_cuda or not isinstance(api, TorchBlackBox) or api.device != labels.device:
        return False
    if not backend.selects("recover", labels):  # the plain ops read their state on the host
        return False
    if spec.is_8_bit or not (spec.decimals is spec.top_k is spec.max_batch is None):
        return False
    cost = step_cost(api, config, len(labels)) * config.steps
    return api.budget is None or api.budget.affords(cost.queries, cost.requests, cost.price)


class DeviceRecovery:
    """A recovery from an API that `serves` accepts.

    Args:
        step: the recovery to run.
        warn: warn if steps of length mu change no answer; for a mu that the user has set.

    Attributes:
        done: steps taken so far.
    """

    def __init__(self, step: RecoveryStep, warn: bool = True) -> None:
        self.api, self.config, self.objective = step.api, step.config, step.objective
        self.done = 0
        self._recovery, self._maker, self._warn = step, step.maker, warn
        self._cost = step_cost(self.api, self.config, len(step.labels))
        steps, spec, device = self.config.steps, self.api.spec, step.labels.device
        # The answers of the first step, from which the warnings are made.
        self._first = torch.zeros(
            1 + self.config.num_directions, len(step.labels), spec.n_classes, device=device
        )
        # A row per step: loss, best_loss, matched.
        self._records = torch.zeros(steps, 3, device=device)
        # Whether all scores of the student were finite, and all scores of the API.
        self._finite = torch.ones(2, dtype=torch.bool, device=device)
        # The lowest and the highest score of the API.
        self._range = torch.tensor([torch.inf, -torch.inf], device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)  # step under way
        crops = [crop_of(step.maker.seed, i, *spec.image_shape[1:]) for i in range(steps)]
        self._crops = torch.tensor(crops, dtype=torch.int64, device=device)
        self._repeated = RepeatedStep(device)

    @property
    def device(self) -> torch.device:
        """Return the device that makes the images."""
        return self._records.device

    def step(self) -> None:
        """Take one step; the host only counts its cost.

        Raises:
            BudgetExhausted: the budget does not pay the step; nothing was done.
        """
        queries, requests = self._cost.queries, self._cost.requests
        self.api.reserve(queries, requests)
        self.api.ledger.record(queries, requests)
        self.api.ledger.record_answered(queries, requests)
        self._repeated(self._step)
        self.done += 1
        if self.done == 1 and not self.api.first_answers.done:
            self._check_first_answers()

    def _check_first_answers(self) -> None:
        """Check the first answers as a call to the API does.

        This makes the host wait for the device, once for each API.
        """
        if self._finite[1]:  # otherwise `result` raises
            check_range(self.api.spec, *self._range.tolist())
            self.api.first_answers.check(self._first.flatten(0, 1))
            best = self._recovery.best
            self.api.first_answers.warn(best.images, best.scores, stacklevel=3)

    def run(self, callback: Callable[[Record], None] | None = None) -> Recovered:
        """Take all steps, or as many as a budget shared with others still pays, then `result`."""
        for step in range(self.config.steps):
            try:
                self.step()
            except BudgetExhausted:
                if step == 0:
                    raise
                break
            if callback is not None:
                callback(self._record(step, self._records[step].tolist()))
        return self.result()

    def result(self) -> Recovered:
        """Return what was recovered; the host waits for the device.

        Warns as `recover` does if steps of length mu change no answer.

        Raises:
            BadAnswer, InputError: the API or the student answered something that is not finite in
                one of the steps.
        """
        student_finite, scores_finite = self._finite.tolist()
        if not student_finite:
            raise InputError(NOT_FINITE)
        if not scores_finite:
            raise BadAnswer(
                f"{self.api.name}: the API must answer finite scores; it answered NaN or infinity"
            )
        check_range(self.api.spec, *self._range.tolist())
        labels, mu = self.objective.labels, float(self.config.mu)
        if self._warn:
            warn_if_unmoved(self._first, labels, self.api.spec, mu)
        history = [
            self._record(step, values)
            for step, values in enumerate(self._records[: self.done].tolist())
        ]
        shares = [record["matched"] for record in history]
        self.api.first_answers.warn_of_one_class(shares, stacklevel=3)
        best, complete = self._recovery.best, self.done == self.config.steps
        return Recovered(best.images, labels, best.scores, best.losses, history, complete, mu)

    def _record(self, step: int, values: list[float]) -> Record:
        """Return the history's record of a step from its row of values."""
        loss, best_loss, matched = values
        return {
            "step": step,
            "loss": loss,
            "best_loss": best_loss,
            "matched": matched,
            "queries": (step + 1) * self._cost.queries,
        }

    def _step(self) -> None:
        """Do the work of one step, in place on the tensors of this object; a graph holds it."""
        images = self._maker.generate()
        if self.config.augment:
            images = augment_at(images, self._crops.index_select(0, self._index)[0])
        x = self.api.spec.from_unit(images)
        student_scores = self.objective.unchecked_student_scores(x.detach())
        answers = []
        with torch.no_grad():
            for points in self._recovery.points(x):
                answer = self.api.score(points.flatten(0, 1)).to(torch.float32, copy=True)
                answers.append(answer.unflatten(0, points.shape[:2]))
        scores = torch.cat(answers)  # [1+q, B, n_classes]
        self._first.copy_(torch.where(self._index == 0, scores, self._first))
        values = self._recovery.learn(x, scores, student_scores)
        self._records.index_copy_(0, self._index, values[None])
        self._note(scores, student_scores)
        self._index += 1

    def _note(self, scores: Tensor, student_scores: Tensor | None) -> None:
        """Update on the device the flags and the range of scores that `result` checks."""
        self._finite[1:] &= scores.isfinite().all()
        if self.api.spec.returned_kind != "logits":
            low, high = scores.aminmax()
            self._range.copy_(
                torch.stack([low.minimum(self._range[0]), high.maximum(self._range[1])])
            )
        if student_scores is not None:
            self._finite[:1] &= student_scores.isfinite().all()
