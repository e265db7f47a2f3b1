"""Ask a function for the losses or scores of points, and check what it answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError, ServiceWarning

Function = Callable[..., Any]
_SUM_TOLERANCE = 1e-3  # how far the sum of probabilities in half precision may be from 1


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Switch gradients and autocast off: half precision would drown the differences of losses.

    Autocast is switched off on every device, since a function may compute on another device than
    that of the images.
    """
    with torch.no_grad(), ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def full_precision(x: Tensor) -> Tensor:
    """Return a tensor without its graph, in float32 if it is in half precision."""
    x = x.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def is_mapped(tensor: Tensor) -> bool:
    """Return True if `torch.func.vmap` maps over the tensor, under other transforms or not."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor inside of the wrappers of `torch.func`, which end with the transform."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def as_asked(model: object, images: Tensor) -> Tensor:
    """Return images in the dtype that a model takes: its `images_dtype`, which black boxes have."""
    return images.to(getattr(model, "images_dtype", images.dtype))


def warn_of_probabilities(scores: Tensor, stacklevel: int) -> None:
    """Warn if scores `[..., n_classes]` that are said to be logits look like probabilities.

    Those are not negative and sum to 1 in every row.
    """
    sums = scores.sum(-1)
    if scores.numel() and (scores >= 0).all() and ((sums - 1).abs() < _SUM_TOLERANCE).all():
        warnings.warn(
            "ZerothOrder.tell_scores: the scores are not negative and sum to 1, as probabilities "
            "do, but scores_kind is 'logits'; give scores_kind='probabilities'",
            ServiceWarning,
            stacklevel=stacklevel + 1,
        )


def check_model(op: str, name: str, model: object) -> None:
    """Raise InputError if a model cannot be asked for scores.

    A black box is known by its spec only, since this package is below that of the black boxes; one
    that gives labels only is refused.
    """
    spec = getattr(model, "spec", None)
    if getattr(spec, "labels_only", False):
        raise InputError(
            f"{op}: {getattr(spec, 'name', name)} gives labels only, and a label alone gives no "
            "gradient; ask the service for scores"
        )
    if not callable(model):
        raise InputTypeError(f"{op}: {name} must be callable on images; got {type(model).__name__}")


def as_tensor(operation: str, answer: object, device: torch.device) -> Tensor:
    """Return an answer as a tensor of its own on `device`; NumPy arrays are taken too.

    The answer is copied, since a function may write its next answer into the same memory.

    Raises:
        InputTypeError: the answer is neither a tensor nor an array of real numbers.
    """
    if isinstance(answer, np.ndarray):
        if answer.dtype.kind not in "fiu":
            raise InputTypeError(f"{operation}; got an array of dtype {answer.dtype}")
        # torch takes no other byte order, and no wider floats.
        wide = answer.dtype.kind == "f" and answer.dtype.itemsize > 8
        dtype = np.dtype(np.float64) if wide else answer.dtype.newbyteorder("=")
        answer = torch.from_numpy(np.ascontiguousarray(answer, dtype=dtype))
    if not isinstance(answer, Tensor):
        raise InputTypeError(f"{operation}; got {type(answer).__name__}")
    return answer.detach().to(device, copy=True)


def losses_told(answer: object, base: bool, shape: tuple[int, int], x: Tensor) -> Tensor:
    """Return losses that a caller tells as a tensor of their own, on the device of the images x.

    Args:
        answer: what was told.
        base: whether the first row is that of the images themselves.
        shape: the shape that is wanted.
        x: the images.

    Raises:
        InputError: the losses have another shape (InputTypeError: they are no floating numbers).
    """
    wanted = f"ZerothOrder.tell: losses must be [{'1 + q' if base else 'q'}, B] = {list(shape)}"
    losses = as_tensor(f"{wanted}, as a tensor", answer, x.device)
    if losses.shape != shape:
        raise InputError(f"{wanted}; got {list(losses.shape)}")
    if not losses.is_floating_point():
        raise InputTypeError(f"{wanted}, as floating-point numbers; got {losses.dtype}")
    return losses


def losses_of_chunks(
    function: Function,
    chunks: Iterable[Tensor],
    arguments: Sequence[Tensor],
    max_images: int | None,
) -> Tensor:
    """Ask `function` for the losses of all points: chunks `[r, B, *S]` -> `[R, B]`.

    Args:
        function: images `[N, *S]`, and the arguments of these images, to losses `[N]`.
        chunks: the points, in rows of B images.
        arguments: tensors `[B, ...]` that belong to the images of every row.
        max_images: most images per call; None to ask a whole chunk at once.

    Raises:
        InputError: the function returned anything but a loss for each image.
    """
    losses = []
    for points in chunks:
        rows, n_images = points.shape[:2]
        repeated = [argument.repeat(rows, *[1] * (argument.dim() - 1)) for argument in arguments]
        images = points.flatten(0, 1)
        if not len(images):  # a batch of none
            losses.append(points.new_zeros(rows, n_images))
            continue
        size = max_images or len(images)
        parts = [
            _losses(function, images[at : at + size], [a[at : at + size] for a in repeated])
            for at in range(0, len(images), size)
        ]
        losses.append((parts[0] if len(parts) == 1 else torch.cat(parts)).view(rows, n_images))
        del points, images
    return torch.cat(losses)


def check_images(operation: str, x: object) -> None:
    """Raise InputTypeError unless x is a tensor of floating-point numbers."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{operation}: x must be a tensor [B, *S]; got {type(x).__name__}")
    if not x.is_floating_point():
        got = str(x.dtype).removeprefix("torch.")
        raise InputTypeError(f"{operation}: x must be float32 or float64; got {got}")
    if x.dim() < 1:
        raise InputError(f"{operation}: x must be [B, *S]; got a single number")


def check_tensors(op: str, scores: object, labels: object, student_scores: object) -> None:
    """Raise InputTypeError unless all are tensors; the student's scores may be None."""
    named = {"scores": scores, "labels": labels, "student_scores": student_scores}
    for name, given in named.items():
        if not isinstance(given, Tensor) and (given is not None or name != "student_scores"):
            raise InputTypeError(f"{op}: {name} must be a tensor; got {type(given).__name__}")


def check_arguments(function: object, x: Tensor, arguments: Sequence[Tensor]) -> None:
    """Raise InputError unless x are images, and every argument has an entry for each of them."""
    op = "ZerothOrder.estimate"
    if not callable(function):
        raise InputTypeError(
            f"{op}: function must map images [N, *S] to losses [N]; got {type(function).__name__}"
        )
    check_images(op, x)
    n_images = len(x)
    for argument in arguments:
        if not isinstance(argument, Tensor):
            raise InputTypeError(
                f"{op}: arguments must be tensors [B, ...]; got {type(argument).__name__}"
            )
        if argument.dim() < 1 or len(argument) != n_images:
            raise InputError(
                f"{op}: arguments must be tensors [B, ...] with an entry for each of the "
                f"{n_images} images; got {list(argument.shape)}"
            )


def _losses(function: Function, images: Tensor, arguments: Sequence[Tensor]) -> Tensor:
    wanted = f"ZerothOrder.estimate: function must return a loss for each image, [{len(images)}]"
    losses = as_tensor(wanted, function(images, *arguments), images.device)
    if losses.shape != (len(images),):
        advice = " (losses of single images, such as reduction='none' gives)"
        raise InputError(f"{wanted}{advice}; got {list(losses.shape)}")
    if not losses.is_floating_point():
        raise InputTypeError(f"{wanted}, as floating-point numbers; got {losses.dtype}")
    return losses
