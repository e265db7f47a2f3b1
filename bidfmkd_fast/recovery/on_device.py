"""Recovery without the host: every step of it stays on the API's device, so that a CUDA graph can hold it.

What it computes is what the loop in `recover.py` does, in the same order. That loop looks at every answer as it comes
and serves any black box; this one keeps losses, best images and the record of every step on the device, and looks once
at the end. It is for a `TorchBlackBox` on the CUDA device that makes the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bidfmkd_fast.black_box import BlackBox, TorchBlackBox
from bidfmkd_fast.black_box.first_answers import check_range
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError
from bidfmkd_fast.ops import backend
from bidfmkd_fast.recovery.cost import step_cost
from bidfmkd_fast.recovery.objective import Objective, augment_at, crop_of
from bidfmkd_fast.recovery.step_length import warn_if_unmoved
from bidfmkd_fast.runtime.captured_step import RepeatedStep
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.zeroth_order import ZerothOrder

if TYPE_CHECKING:
    from bidfmkd_fast.recovery.image_maker import ImageMaker
    from bidfmkd_fast.recovery.recover import Record, Recovered, RecoveryConfig

AT_ONCE = 8  # torch has 32 streams, and here two are taken for each


def serves(api: BlackBox, config: RecoveryConfig, labels: Tensor) -> bool:
    """Whether a recovery of `labels` can stay where they are: on the CUDA device of a local module
    that it can pay.

    The module has to answer in full, all images at once: what 8 bits, rounding or top-k take away
    is taken outside of it, and so are calls cut into batches of `max_batch`.
    """
    spec = api.spec
    if not labels.is_cuda or not isinstance(api, TorchBlackBox) or api.device != labels.device:
        return False
    if not backend.selects("recover", labels):  # the plain ops look at the state on the host
        return False
    if spec.is_8_bit or not (spec.decimals is spec.top_k is spec.max_batch is None):
        return False
    cost = step_cost(api, config, len(labels)) * config.steps
    return api.budget is None or api.budget.affords(cost.queries, cost.requests, cost.price)


class DeviceRecovery:
    """The recovery of one set from an API that `serves`; the arguments are those of the loop in
    `recover.py`.
    """

    def __init__(
        self,
        api: BlackBox,
        maker: ImageMaker,
        objective: Objective,
        config: RecoveryConfig,
        seed: int,
        warn: bool = True,
    ) -> None:
        self.api, self.config, self.done, self._warn = api, config, 0, warn
        self._maker, self.objective = maker, objective
        self._cost = step_cost(api, config, len(objective.labels))
        self._zeroth_order = ZerothOrder(
            num_directions=config.num_directions,
            mu=float(config.mu),  # chosen by now
            directions=config.directions,
            grid=config.grid,
            seed=derive_seed(seed, "recovery", "directions"),
        )
        spec, n_images, device = api.spec, len(objective.labels), objective.labels.device
        self._images = torch.zeros(
            n_images, *spec.image_shape, device=device
        )  # per slot the best so far
        self._scores = torch.zeros(n_images, spec.n_classes, device=device)
        # What the first step was answered, for the warning.
        self._first = torch.zeros(
            1 + config.num_directions, n_images, spec.n_classes, device=device
        )
        self._losses = torch.full((n_images,), torch.inf, device=device)
        self._records = torch.zeros(
            config.steps, 3, device=device
        )  # loss, best_loss, matched of every step
        self._finite = torch.ones(
            2, dtype=torch.bool, device=device
        )  # all the student's scores, all the API's
        self._range = torch.tensor(
            [torch.inf, -torch.inf], device=device
        )  # the API's lowest and highest score
        self._index = torch.zeros(1, dtype=torch.int64, device=device)  # of the step
        crops = [crop_of(seed, step, *spec.image_shape[1:]) for step in range(config.steps)]
        self._crops = torch.tensor(crops, dtype=torch.int64, device=device)
        self._repeated = RepeatedStep(device)

    def step(self) -> None:
        """One step; the host only counts its cost. Raises BudgetExhausted, with nothing done, if
        that is too much.
        """
        queries, requests = self._cost.queries, self._cost.requests
        self.api.reserve(queries, requests)
        self.api.ledger.record(queries, requests)
        self.api.ledger.record_answered(queries, requests)
        self._repeated(self._step)
        self.done += 1
        if self.done == 1 and not self.api.first_answers.done:
            self._look_at_first()

    def _look_at_first(self) -> None:
        """As a call to the API does, with the one wait for the device that this takes, once for an
        API.
        """
        if self._finite[1]:  # else `result` tells
            check_range(self.api.spec, *self._range.tolist())
            self.api.first_answers.check(self._first.flatten(0, 1))
            self.api.first_answers.warn(self._images, self._scores, stacklevel=3)

    def run(self, callback: Callable[[Record], None] | None = None) -> Recovered:
        """All steps, or as many as a budget shared with others still pays, then `result`."""
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
        """What was recovered; waits for the device. Warns as `recover` where steps of mu change no
        answer.

        Raises:
            BadAnswer, InputError: the API or the student answered something that is not finite in
                one of the steps.
        """
        from bidfmkd_fast.recovery.recover import Recovered

        student_finite, scores_finite = self._finite.tolist()
        if not student_finite:
            raise InputError(
                "recover: student returned NaN or infinity; check its parameters and its input range"
            )
        if not scores_finite:
            raise BadAnswer(
                f"{self.api.name}: the API must answer finite scores; it answered NaN or infinity"
            )
        check_range(self.api.spec, *self._range.tolist())
        if self._warn:
            warn_if_unmoved(
                self._first, self.objective.labels, self.api.spec, float(self.config.mu)
            )
        history = [
            self._record(step, values)
            for step, values in enumerate(self._records[: self.done].tolist())
        ]
        self.api.first_answers.warn_of_one_class(
            [record["matched"] for record in history], stacklevel=3
        )
        images, labels, scores, losses = (
            self._images,
            self.objective.labels,
            self._scores,
            self._losses,
        )
        complete = self.done == self.config.steps
        return Recovered(
            images, labels, scores, losses, history, complete, mu=float(self.config.mu)
        )

    def _record(self, step: int, values: list[float]) -> Record:
        queries = (step + 1) * self._cost.queries
        return {
            "step": step,
            **dict(zip(("loss", "best_loss", "matched"), values)),
            "queries": queries,
        }

    def _step(self) -> None:
        images = self._maker.generate()
        if self.config.augment:
            images = augment_at(images, self._crops.index_select(0, self._index)[0])
        x = self.api.spec.from_unit(images)
        student_scores = self.objective.unchecked_student_scores(x.detach())
        answers = []
        with torch.no_grad():
            for points in self._zeroth_order.ask_chunks(x, max_images=self.config.max_images):
                answer = self.api.score(points.flatten(0, 1)).to(torch.float32, copy=True)
                answers.append(answer.unflatten(0, points.shape[:2]))
        scores = torch.cat(answers)  # [1+q, B, n_classes]
        self._first.copy_(torch.where(self._index == 0, scores, self._first))
        loss, losses = self.objective.tell(self._zeroth_order, scores, student_scores)
        wins = losses < self._losses
        for best, new in (
            (self._images, x.detach()),
            (self._scores, scores[0]),
            (self._losses, losses),
        ):
            best.copy_(torch.where(wins.view(-1, *[1] * (best.ndim - 1)), new, best))
        self._maker.step(loss)
        matched = (scores[0].argmax(1) == self.objective.labels).float().mean()
        self._records.index_copy_(
            0, self._index, torch.stack([losses.mean(), self._losses.mean(), matched])[None]
        )
        self._finite[1:] &= scores.isfinite().all()
        if self.api.spec.returned_kind != "logits":
            low, high = scores.aminmax()
            self._range.copy_(
                torch.stack([low.minimum(self._range[0]), high.maximum(self._range[1])])
            )
        if student_scores is not None:
            self._finite[:1] &= student_scores.isfinite().all()
        self._index += 1


def run_side_by_side(recoveries: Sequence[DeviceRecovery]) -> list[Recovered | Exception]:
    """Several sets at once, each on a stream of its own: one API does not fill a large GPU.

    In place of a set the error that ended it, if one did.
    """
    results = []
    for first in range(0, len(recoveries), AT_ONCE):
        results += _run_at_once(recoveries[first : first + AT_ONCE])
    return results


def _run_at_once(recoveries: Sequence[DeviceRecovery]) -> list[Recovered | Exception]:
    device = recoveries[0]._losses.device
    streams = [torch.cuda.Stream(device) for _ in recoveries] if device.type == "cuda" else []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    errors: dict[int, Exception] = {}
    for step in range(max(one.config.steps for one in recoveries)):
        for i, one in enumerate(recoveries):
            if i in errors or one.done < step or step >= one.config.steps:
                continue  # failed, out of budget, or done
            try:
                with torch.cuda.stream(streams[i]) if streams else nullcontext():
                    one.step()
            except BudgetExhausted as error:
                if step == 0:
                    errors[i] = error
            except Exception as error:
                errors[i] = error
    for stream in streams:
        torch.cuda.current_stream(device).wait_stream(stream)
    return [errors[i] if i in errors else _result_or_error(one) for i, one in enumerate(recoveries)]


def _result_or_error(one: DeviceRecovery) -> Recovered | Exception:
    try:
        return one.result()
    except Exception as error:
        return error
