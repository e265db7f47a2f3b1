"""Share what all estimators of other projects need: arguments, models and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidfmkd_fast.arguments import check_integer, check_number
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.scores import SCORES_KINDS, probabilities_of
from bidfmkd_fast.zeroth_order.estimator import ZerothOrder
from bidfmkd_fast.zeroth_order.queries import as_asked

_MISSING = object()


def read(op: str, args: Any, name: str, default: object = _MISSING) -> Any:
    """Return the field `name` of `args`, a mapping or an object with attributes.

    A mapping that has attributes besides its keys is read by its keys first.

    Raises:
        InputError: `args` has no such field, and there is no `default`.
    """
    value = args.get(name, _MISSING) if isinstance(args, Mapping) else _MISSING
    if value is _MISSING:
        value = getattr(args, name, default)
    if value is _MISSING:
        raise InputError(f"{op}: args lacks {name!r}; set it as the original code does")
    return value


def new_estimator(
    op: str,
    num_directions: object,
    mu: object,
    *,
    names: tuple[str, str],
    parity: bool,
    directions: str | None,
    seed: int | None,
    antithetic: bool,
) -> ZerothOrder:
    """Return the estimator of one call.

    Args:
        num_directions, mu: as for `ZerothOrder`.
        names: what the caller calls these two, for errors.
        parity: draw `sphere` directions by default, as the authors do; `rademacher` otherwise.
        directions: the kind of directions; None for the default.
        seed, antithetic: as for `ZerothOrder`.

    Raises:
        InputError: a value is out of range, or pairs are asked for together with parity.
    """
    if parity and antithetic:
        raise InputError(
            f"{op}: antithetic=True goes with parity=False only, since the authors' code takes "
            "forward differences"
        )
    if directions is None:
        directions = "sphere" if parity else "rademacher"
    return ZerothOrder(
        check_integer(op, names[0], num_directions, 1),
        check_number(op, names[1], mu),
        directions,
        seed=seed,
        antithetic=antithetic,
    )


def check_images(op: str, name: str, x: object) -> Tensor:
    """Return `x`; raise InputError unless it is a floating-point tensor `[N, *S]` with N >= 1."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputTypeError(f"{op}: {name} must be a floating-point tensor [N, *S]; got {got}")
    if x.dim() < 2 or len(x) < 1:
        raise InputError(f"{op}: {name} must be [N, *S] with N >= 1; got {list(x.shape)}")
    return x


def scores_kind_of(model: object) -> str:
    """Return the kind of scores that a model returns: that of its spec, or else logits."""
    kind = getattr(getattr(model, "spec", None), "returned_kind", "logits")
    return kind if kind in SCORES_KINDS else "logits"


def ask(op: str, name: str, model: Any, images: Tensor) -> Tensor:
    """Return a model's scores `[N, n_classes]` of images `[N, *S]` in float64, on their device.

    The scores keep their graph, if there is one. Differences of losses along a short step are
    small, so everything after the model is computed in float64.

    Raises:
        InputError: the model returned anything else (InputTypeError: no floating-point tensor).
    """
    scores = model(as_asked(model, images))
    wanted = f"{op}: {name} must return scores [N, n_classes], N = {len(images)}"
    if not isinstance(scores, Tensor):
        raise InputTypeError(f"{wanted}, as a tensor; got {type(scores).__name__}")
    if scores.dim() != 2 or scores.shape[0] != len(images):
        raise InputError(f"{wanted}; got {list(scores.shape)}")
    if not scores.is_floating_point():
        raise InputTypeError(f"{wanted}, as floating-point numbers; got {scores.dtype}")
    return scores.to(images.device, torch.float64)


def check_same_classes(op: str, names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    """Raise InputError unless the scores of two models have the same number of classes."""
    if first.shape[-1] != second.shape[-1]:
        raise InputError(
            f"{op}: {names[0]} and {names[1]} must score the same classes; "
            f"got {first.shape[-1]} and {second.shape[-1]}"
        )


def kl(scores: Tensor, scores_kind: str, student_logits: Tensor) -> Tensor:
    """Return KL(model || student) per image, `[N]`, summed over the classes.

    `scores` `[N, n_classes]` of the model are of `scores_kind`; the student's are logits.
    """
    probabilities = probabilities_of(scores, scores_kind)
    return F.kl_div(student_logits.log_softmax(-1), probabilities, reduction="none").sum(-1)


def _modules(models: Iterable[object]) -> list[nn.Module]:
    return [m for model in models if isinstance(model, nn.Module) for m in model.modules()]


def images_at_once(max_images: int | None, x: Tensor, *models: object) -> int:
    """Return `max_images`, or how many images to ask the models for at once if it is None.

    On a CPU 200 images of 28 x 28 take a plain module a fifth less time each than 700, whose
    activations fit no cache. On a GPU, or for a service, which is paid by request, it is 600.
    """
    if max_images is not None:
        return max_images
    is_service = any(getattr(model, "is_service", False) for model in models)
    return 600 if is_service or x.device.type != "cpu" else 200


def in_training(*models: object) -> bool:
    """Return True if any part of the models is in training mode.

    Its batch norms would then mix the images of a call.
    """
    return any(module.training for module in _modules(models))


@contextmanager
def in_eval_mode(*models: object) -> Iterator[None]:
    """Put the models into eval mode, and each of their parts back into its own mode afterwards."""
    modes = [(module, module.training) for module in _modules(models)]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def full_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for images in float64, and float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
