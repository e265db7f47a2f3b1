"""Open a local module for comparison: a box whose gradients may be used.

Its results are the upper bound for every estimate of the gradients.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.first_answers import FirstAnswers
from bidfmkd_fast.black_box.local.local_box import refuse_split, refuse_wire_fields
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import InputError


class OpenBox(BlackBox):
    """A local module that answers with a graph, so that `recover` uses its true gradient.

    Use it for comparisons only. A call counts the queries of its images; the gradient is free. The
    module is copied, put in evaluation mode, and answers exactly: `dtype`, `encoding`, `decimals`
    and `top_k`, which say what a service loses, have no effect.

    Args:
        module: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]` of
            `spec.returned_kind`.
        spec: what is known of the API.
        device: where the module runs. Images are moved there, scores back.

    Raises:
        InputError: the spec says labels, which have no gradient; it asks for another size, layout
            or normalisation; or it asks for a `max_batch` that would change the scores of a module
            whose batch norms use batch statistics.
    """

    def __init__(
        self, module: nn.Module, spec: APISpec, *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(spec)
        if spec.labels_only:
            raise InputError(
                f"{self.name}: an open box gives gradients, and a label has none; set the "
                "scores_kind of its spec to the kind of the module's scores"
            )
        self.first_answers = FirstAnswers(
            replace(spec, scores_kind=spec.returned_kind, decimals=None, top_k=None)
        )
        refuse_wire_fields(spec)
        refuse_split(module, self.name, max_batch=spec.max_batch)
        self._device = torch.device(device)
        self._module = copy.deepcopy(module).to(self._device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Return differentiable scores `[N, n_classes]` of images `[N, C, H, W]`.

        Images and scores are checked, paid for and counted as by any black box.
        """
        self._check_images(images)
        n_requests = self.requests_for(len(images))
        self.reserve(len(images), n_requests)
        answer = self._ask(images, n_requests)
        self.first_answers.warn(images, answer, stacklevel=2)
        return answer

    def score(self, images: Tensor) -> Tensor:
        """Return the module's scores, with a graph."""
        return self._module(images.to(self._device)).to(images.device)
