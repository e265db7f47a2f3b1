"""Split a meta-model into its features and its last linear layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.inner_loop import forward
from bidfmkd_fast.meta.stacked import can_stack, stacked_features, stacked_parameters
from bidfmkd_fast.models.head import last_linear
from bidfmkd_fast.seeds import seeded

Features = Callable[[Tensor], Tensor]


def check_backbone(operation: str, module: nn.Module, images: Tensor) -> None:
    """Raise InputError unless `features_of` can split the module, which takes `images`."""
    if can_stack(module):
        return
    reason = "has neither"
    if callable(getattr(module, "features", None)):
        try:
            with torch.no_grad(), seeded(0, "features"):
                features = features_of(module, images)(images)
            if isinstance(features, Tensor) and features.shape[:1] == images.shape[:1]:
                return
            reason = f"returns {list(features.shape)} for {len(images)} images"
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = f"has features that fail: {' '.join(str(error).split())}"
    elif last_linear(module, images) is not None:
        return
    raise InputError(
        f"{operation}: the survey trains the features of the meta-model, so its last layer "
        "must be nn.Linear, or it must have a method features(images) that returns "
        f"[N, n_features]; {type(module).__name__} {reason}; set survey.n_images to 0 to "
        "leave the survey out"
    )


def features_of(module: nn.Module, images: Tensor) -> Features:
    """Return the function from images `[N, C, H, W]` to the features `[N, n_features]` of `module`.

    They are what `module.features` returns, if there is such a method, or else what enters the
    last layer, an `nn.Linear`, which is found by running the module on `images`. Buffers, such as
    running statistics, are not changed.
    """
    if can_stack(module):
        parameters = dict(module.named_parameters())
        return lambda images: stacked_features(
            module, stacked_parameters(parameters, 1), images[None]
        )[0]
    if callable(getattr(module, "features", None)):
        return lambda images: _run(_Features(module), images)
    linear = last_linear(module, images)
    assert linear is not None

    def features(images: Tensor) -> Tensor:
        entered: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            _run(module, images)
        finally:
            hook.remove()
        return entered[-1].flatten(1)

    return features


class _Features(nn.Module):
    """A module whose call is `module.features`, so that `functional_call` reaches it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.module.features(images)  # type: ignore[operator]
        return features.flatten(1)


def _run(module: nn.Module, images: Tensor) -> Tensor:
    return forward(module, dict(module.named_parameters()), images)
