"""Serve a torch module as a black box: fast, and closed to everything but its scores."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.black_box.answers import one_hot
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.local.fastest_form import fastest_equal, forward, images_at_once
from bidfmkd_fast.black_box.local.local_box import (
    LocalBlackBox,
    refuse_split,
    uses_batch_statistics,
)
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError


class TorchBlackBox(LocalBlackBox):
    """A torch module served as an API: only its scores come out.

    A call costs one request, or one per `spec.max_batch` images.

    The module is copied and put in evaluation mode, and the copy is made faster:

    - batch norms are folded into the convolutions before them;
    - the memory format is channels-last (on a GPU whichever format is faster there);
    - on the CPU, 2x2 max pools become elementwise maxima;
    - on a GPU, a convolution and the ReLU after it become one call;
    - large calls run in micro-batches.

    Each of these is done only if it leaves the scores equal up to rounding, which is measured once,
    here. The module runs in full float32, without autocast and without TF32.

    >>> from bidfmkd_fast import APISpec
    >>> module = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    >>> api = TorchBlackBox(module, APISpec(n_classes=5, image_shape=(1, 4, 4)))
    >>> api(torch.rand(8, 1, 4, 4)).requires_grad  # only its answers come out
    False

    Args:
        module: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]` of
            `spec.scores_kind` (for top-k: the probabilities of all classes; for labels: scores of
            any kind, or class numbers `[N]` of any integer type. A module that gives integers is
            not made faster, since labels do not show whether its scores are still the same).
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.
        device: where the module runs; None for where its parameters are. Images and scores are
            moved.
        micro_batch: most images run at once; None to choose by the size of the module's
            activations. A module whose batch norms use batch statistics is never split, since that
            would change its scores.

    Raises:
        InputError: the module does not map `[N, *image_shape]` to `[N, n_classes]`, cannot be
            copied, or `micro_batch` or `max_batch` does not suit it (InputTypeError: a wrong type).
    """

    def __init__(
        self,
        module: nn.Module,
        spec: APISpec,
        *,
        budget: Budget | None = None,
        device: torch.device | str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(spec, budget=budget)
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"{self.name}: module must be a torch.nn.Module; got {type(module).__name__}"
            )
        if micro_batch is not None:
            check_integer(self.name, "micro_batch", micro_batch, 1)
        # The closure is the only way to the module: no attribute holds it.
        self._answer, self.device = _serve(module, spec, device, micro_batch)

    def score(self, images: Tensor) -> Tensor:
        """Return the module's scores, computed in micro-batches."""
        return self._answer(images)


def _serve(
    module: nn.Module, spec: APISpec, device: torch.device | str | None, micro_batch: int | None
) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    """Return a function from images to scores, and the device on which it computes them.

    The function holds a fast copy of the module, which nothing else can reach. Without a `device`
    the module runs where its parameters are.
    """
    if device is None:
        device = next(
            (tensor.device for tensor in (*module.parameters(), *module.buffers())),
            torch.device("cpu"),
        )
    try:
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        plain = copy.deepcopy(module).to(device).eval()
    except Exception as error:
        raise InputError(f"{spec.name}: module cannot be copied to {device}: {error}") from error

    served, memory_format, image_bytes = fastest_equal(plain, spec, device)
    refuse_split(plain, spec.name, micro_batch=micro_batch, max_batch=spec.max_batch)
    is_sized_here = micro_batch is None and not uses_batch_statistics(plain)

    def answer(images: Tensor) -> Tensor:
        size = images_at_once(image_bytes, device) if is_sized_here else micro_batch or len(images)
        batches = images.split(size)
        answers = forward(served, batches, device, memory_format)
        if spec.labels_only:
            answers = [one_hot(answer, spec, len(batch)) for batch, answer in zip(batches, answers)]
        for batch, scores in zip(batches, answers):
            wanted = (len(batch), spec.n_classes)
            if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
                came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise BadAnswer(
                    f"{spec.name}: module must answer {list(wanted)}; it answered {came}"
                )
        return torch.cat(answers)

    return answer, device
