"""What a recovery minimises: cross entropy with the wanted labels, less the boundary term; augmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.scores import objective
from bidfmkd_fast.seeds import torch_generator
from bidfmkd_fast.zeroth_order import ZerothOrder

Student = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """Per image: `CE(A(x_i), y_i) - boundary_weight * [argmax A(x_i) == argmax f(x_i)] * D(A(x_i),
    f(x_i))`.

    `f` is the student (the task model), asked at `x_i` only and held constant; without one the
    second term is absent (equations 5 and 9 of Hu et al., ICML 2023, arXiv 2305.18413, as in the
    authors' code).

    Args:
        labels: wanted labels, int64 `[B]`.
        scores_kind: kind of the API's scores: "logits", "probabilities" or "log_probabilities".
        student: images `[B, C, H, W]` in the API's input range -> logits `[B, n_classes]`.
        boundary_weight: lambda, at least 0.
        divergence: D: "l1" on the scores as given, "l1_prob" and "kl" on probabilities.
    """

    labels: torch.Tensor
    scores_kind: str
    student: Student | None
    boundary_weight: float
    divergence: str

    def student_scores(self, images: torch.Tensor, n_classes: int) -> torch.Tensor | None:
        """The student's scores `[B, n_classes]` at `images`, in the API's kind; None without a
        student.

        Raises:
            InputError: the student's answer is no set of finite logits `[B, n_classes]`.
        """
        logits = self._student_logits(images)
        if logits is None:
            return None
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
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
            raise InputError(
                "recover: student returned NaN or infinity; check its parameters and its input range"
            )
        return as_scores(logits.detach().float(), self.scores_kind)

    def unchecked_student_scores(self, images: torch.Tensor) -> torch.Tensor | None:
        """The same without a look at the values, which would make the host wait for a device."""
        logits = self._student_logits(images)
        return None if logits is None else as_scores(logits.float(), self.scores_kind)

    def _student_logits(self, images: torch.Tensor) -> torch.Tensor | None:
        if self.student is None:
            return None
        with torch.no_grad():
            return self.student(images)

    def losses(self, scores: torch.Tensor, student_scores: torch.Tensor | None) -> torch.Tensor:
        """The objective per image, float32 `[B]`, from the API's scores `[B, n_classes]` at the
        images themselves.
        """
        weight = self.boundary_weight
        return objective(
            scores, self.labels, student_scores, weight, self.scores_kind, self.divergence
        ).float()

    def tell(
        self, zeroth_order: ZerothOrder, scores: torch.Tensor, student_scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of all points `[1+q, B, n_classes]` -> their objective: its mean, to go backward
        from, and `[B]`.
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


def as_scores(logits: torch.Tensor, scores_kind: str) -> torch.Tensor:
    """Logits `[B, n_classes]` as scores of the kind an API gives."""
    if scores_kind == "probabilities":
        return logits.softmax(1)
    return logits.log_softmax(1) if scores_kind == "log_probabilities" else logits


def crop_of(seed: int, step: int, height: int, width: int) -> tuple[int, int, int]:
    """The crop's first line and column in the padded images, and whether they are flipped, drawn
    from (seed, step).
    """
    draw = torch.rand(3, generator=torch_generator(seed, "recovery", "augment", step)).tolist()
    return (
        int(draw[0] * (2 * (height // 8) + 1)),
        int(draw[1] * (2 * (width // 8) + 1)),
        int(draw[2] < 0.5),
    )


def augment(images: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """One random crop (zero padding of H/8 and W/8) and horizontal flip, drawn from (seed, step),
    for the whole batch.

    `[B, C, H, W]` in the unit range -> the same shape; differentiable.
    """
    height, width = images.shape[-2:]
    top, left, flip = crop_of(seed, step, height, width)
    cropped = _padded(images)[..., top : top + height, left : left + width]
    return cropped.flip(-1) if flip else cropped


def augment_at(images: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """`augment` with a crop that lives on the device: int64 `[3]`, from `crop_of`."""
    height, width = images.shape[-2:]
    lines = torch.arange(height, device=images.device) + crop[0]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(crop[2] == 1, width - 1 - columns, columns) + crop[1]
    return _padded(images).index_select(-2, lines).index_select(-1, columns)


def _padded(images: torch.Tensor) -> torch.Tensor:
    height, width = (side // 8 for side in images.shape[-2:])
    return functional.pad(images, (width, width, height, height))
