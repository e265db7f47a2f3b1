"""Define what a recovery minimises: cross entropy with the wanted labels minus a boundary term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.scores import as_scores, objective
from bidfmkd_fast.zeroth_order import ZerothOrder

Student = Callable[[Tensor], Tensor]

NOT_FINITE = "recover: student returned NaN or infinity; check its parameters and its input range"


@dataclass(frozen=True)
class Objective:
    """The objective of a recovery, per image x_i with wanted label y_i, API A and student f.

    `CE(A(x_i), y_i) - boundary_weight * [argmax A(x_i) == argmax f(x_i)] * D(A(x_i), f(x_i))`

    The second term pulls images to where API and student begin to disagree, the boundary between
    them. The student (the task model) is asked at `x_i` only and counts as a constant; without a
    student the second term is absent. Source: Hu et al., ICML 2023, arXiv 2305.18413, section 3.2
    and the authors' code.

    Args:
        labels: wanted labels, int64 `[B]`.
        scores_kind: kind of the API's scores: "logits", "probabilities" or "log_probabilities".
        student: images `[B, C, H, W]` in the API's input range -> logits `[B, n_classes]`.
        boundary_weight: weight of the boundary term (lambda), at least 0.
        divergence: D: "l1" on the scores as given, "l1_prob" and "kl" on probabilities.
    """

    labels: Tensor
    scores_kind: str
    student: Student | None
    boundary_weight: float
    divergence: str

    def student_scores(self, images: Tensor, n_classes: int) -> Tensor | None:
        """Ask the student at `images` and return its scores `[B, n_classes]` in the API's kind.

        Returns None without a student.

        Raises:
            InputError: the student's answer is no set of finite logits `[B, n_classes]`.
        """
        logits = self._student_logits(images)
        if logits is None:
            return None
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise InputTypeError(
                f"recover: student must return a tensor of floating-point logits; got {kind}"
            )
        wanted = (images.shape[0], n_classes)
        if logits.shape != wanted:
            came = tuple(logits.shape)
            raise InputError(
                f"recover: student must return logits [B, n_classes] = {wanted}; got {came}"
            )
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        return as_scores(logits.detach().float(), self.scores_kind)

    def unchecked_student_scores(self, images: Tensor) -> Tensor | None:
        """Compute `student_scores` without reading values, since the host would wait for them."""
        logits = self._student_logits(images)
        return None if logits is None else as_scores(logits.float(), self.scores_kind)

    def _student_logits(self, images: Tensor) -> Tensor | None:
        if self.student is None:
            return None
        with torch.no_grad():
            return self.student(images)

    def losses(self, scores: Tensor, student_scores: Tensor | None) -> Tensor:
        """Compute the objective per image, float32 `[B]`.

        `scores` are the API's `[B, n_classes]` at the images themselves.
        """
        return objective(
            scores,
            self.labels,
            student_scores,
            self.boundary_weight,
            self.scores_kind,
            self.divergence,
        ).float()

    def tell(
        self, zeroth_order: ZerothOrder, scores: Tensor, student_scores: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Estimate the objective's gradient from the scores `[1+q, B, n_classes]` of all points.

        Returns the mean objective, whose backward pass carries the estimate into the images, and
        the objective per image `[B]`.
        """
        loss = zeroth_order.tell_scores(
            scores,
            self.labels,
            student_scores=student_scores,
            boundary_weight=0.0 if student_scores is None else self.boundary_weight,
            scores_kind=self.scores_kind,
            divergence=self.divergence,
        )
        assert zeroth_order.last_loss is not None
        return loss, zeroth_order.last_loss
