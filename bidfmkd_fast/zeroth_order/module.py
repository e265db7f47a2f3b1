"""Wrap a black box as an `nn.Module`: scores forward, a zeroth-order gradient backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.zeroth_order.estimator import ZerothOrder
from bidfmkd_fast.zeroth_order.queries import (
    as_asked,
    as_tensor,
    check_images,
    check_model,
    full_precision,
    in_full_precision,
    is_mapped,
)
from bidfmkd_fast.zeroth_order.surrogate import once
from bidfmkd_fast.zeroth_order.uncompiled import uncompiled


class _Query(torch.autograd.Function):
    """Ask the black box forward; estimate the gradient backward."""

    @staticmethod
    def forward(x: Tensor, module: DifferentiableBlackBox) -> Tensor:
        return module.ask(x.clone())  # the query may work in place on what it gets

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        x, context.module = inputs
        context.save_for_backward(x, output)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scores = context.saved_tensors
        with torch.no_grad():
            estimate = context.module.gradient(x, scores, grad)
        return once(estimate, x, grad), None

    @staticmethod
    def jvp(context: Any, *tangents: Tensor | None) -> Tensor:
        raise InputError(
            "as_differentiable: the estimate has no forward-mode derivative (torch.func.jvp); take "
            "the gradient by backward(), torch.autograd.grad or torch.func.grad"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, module: DifferentiableBlackBox) -> Any:
        """Ask about all images of the mapped dimension in one batch."""
        images = x.movedim(in_dims[0], 0)
        scores = _Query.apply(images.flatten(0, 1), module)
        return scores.unflatten(0, images.shape[:2]), 0


class DifferentiableBlackBox(nn.Module):
    """A black box that gradients flow through; made by `as_differentiable`."""

    query: Callable[[Tensor], Tensor]

    def __init__(
        self, query: Callable[[Tensor], Tensor], estimator: ZerothOrder, max_images: int
    ) -> None:
        super().__init__()
        # If `query` is a module, nn.Module's own __setattr__ would make it a part of this module:
        # its parameters would show up here, and train() would switch its batch norms.
        object.__setattr__(self, "query", query)
        self.estimator = estimator
        self.max_images = max_images
        self.register_load_state_dict_pre_hook(_keep_position_if_absent)

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[N, n_classes]` of images `[N, *S]`.

        Raises:
            InputError: the images are no floating-point tensor with a batch dimension.
        """
        check_images("as_differentiable", x)
        return _Query.apply(x, self)

    def ask(self, images: Tensor) -> Tensor:
        """Return the scores `[N, n_classes]` of images `[N, *S]`, detached.

        The query gets float32 images (float64 if they are, and the query is no black box), at most
        `max_images` at once, outside of autocast.

        Raises:
            InputError: the query returned anything else (InputTypeError: neither a tensor nor a
                NumPy array).
        """
        images = as_asked(self.query, full_precision(images))
        with in_full_precision():
            parts = [self._ask(part) for part in images.split(self.max_images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _ask(self, images: Tensor) -> Tensor:
        wanted = f"as_differentiable: query must return scores [N, n_classes], N = {len(images)}"
        scores = as_tensor(f"{wanted}, as a tensor", self.query(images), images.device)
        if scores.dim() < 2 or scores.shape[0] != images.shape[0]:
            raise InputError(f"{wanted}; got {list(scores.shape)}")
        if not scores.is_floating_point():
            raise InputTypeError(f"{wanted}, as floating-point numbers; got {scores.dtype}")
        return scores

    def gradient(self, x: Tensor, scores: Tensor, grad: Tensor) -> Tensor:
        """Return an estimate of `grad` times the Jacobian of the black box A, in the dtype of x.

        The estimate is `s / (q mu) * sum_k <grad, A(x + mu u_k) - A(x)> u_k`, where `s` is the
        dimension of the space that the q directions `u_k` span, and mu the step length. With
        antithetic pairs it is `s / (q mu) * sum_k <grad, A(x + mu u_k) - A(x - mu u_k)> u_k` over
        q/2 directions.
        """
        zo = self.estimator
        if is_mapped(x):
            raise InputError(
                "as_differentiable: torch.func.vmap cannot map over gradients of a black box, "
                "since each image needs directions of its own; map over the scores and take the "
                "gradient outside, as in grad(lambda x: vmap(teacher)(x).sum())"
            )
        drawing = zo.draw(x.device)
        images, grad = full_precision(x), full_precision(grad)
        rows = max(1, self.max_images // max(x.shape[0], 1))
        changes = [grad.new_zeros(1, x.shape[0])]
        for points in drawing.chunks(images, False, rows):
            answers = self.ask(points.flatten(0, 1)).unflatten(0, points.shape[:2])
            if answers.shape[1:] != scores.shape:
                raise InputError(
                    "as_differentiable: query must return as many scores as for the images, "
                    f"{list(scores.shape)}; got {list(answers.shape[1:])}"
                )
            changes.append(((answers - scores) * grad).flatten(2).sum(-1))
            del points
        differences = drawing.differences(torch.cat(changes), base=True)
        return drawing.gradient(differences, x.shape).to(x.dtype)

    def get_extra_state(self) -> Tensor:
        """Return the position of the estimator, int64 `[seed, step]`.

        The position is a tensor, since every checkpoint format can hold tensors.
        """
        position = self.estimator.state_dict()
        return torch.tensor([position["seed"], position["step"]], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a position that `get_extra_state` returned.

        Raises:
            InputError: `state` is not an int64 tensor `[seed, step]`.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,):
            raise InputError(
                f"as_differentiable: the extra state must be int64 [seed, step]; got {state!r}"
            )
        seed, step = state.tolist()
        self.estimator.load_state_dict({"seed": seed, "step": step})

    def extra_repr(self) -> str:
        zo = self.estimator
        return f"num_directions={zo.num_directions}, mu={zo.mu}, directions={zo.directions!r}"


def _keep_position_if_absent(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Add the present position to a checkpoint that has none, so that it loads strictly.

    Such a checkpoint comes from a model that held an ordinary module in place of this one.
    """
    state_dict.setdefault(prefix + "_extra_state", module.get_extra_state())


def as_differentiable(
    query: Callable[[Tensor], Tensor],
    num_directions: int = 10,
    mu: float = 0.05,
    directions: str = "rademacher",
    grid: int = 0,
    seed: int | None = None,
    max_images: int = 4096,
    antithetic: bool = False,
) -> DifferentiableBlackBox:
    """Wrap a black box so that code that needs gradients can train through it.

    >>> teacher = as_differentiable(lambda images: images.flatten(1)[:, :3], seed=0)
    >>> images = torch.rand(4, 1, 4, 4, requires_grad=True)
    >>> torch.nn.functional.cross_entropy(teacher(images), torch.tensor([0, 1, 2, 0])).backward()
    >>> images.grad.shape
    torch.Size([4, 1, 4, 4])

    Args:
        query: maps images `[N, *S]` to scores `[N, n_classes]`: a black box of this package or any
            function. The forward pass asks N queries. The backward pass asks `q * N` more, where q
            is `num_directions`; it runs only if a gradient is wanted.
        num_directions, mu, directions, grid, seed, antithetic: as for `ZerothOrder`. The forward
            pass asks for the images themselves in any case, so that pairs cost nothing more.
        max_images: the most images given to `query` at once, forward and backward.

    Returns:
        An `nn.Module` with scores forward and a zeroth-order gradient backward, for any loss of the
        scores. It has no parameters, buffers or submodules: if `query` is a module, it stays
        outside, and `parameters`, `train` and `state_dict` do not reach it. `state_dict` holds the
        position in the sequence of random directions; a checkpoint without one loads as well.

    Raises:
        InputError: a value is out of range, as for `ZerothOrder`, or `query` is a black box that
            gives labels only.
    """
    check_model("as_differentiable", "query", query)
    max_images = check_integer("as_differentiable", "max_images", max_images, 1)
    return DifferentiableBlackBox(
        query,
        ZerothOrder(num_directions, mu, directions, grid, seed, antithetic),
        max_images,
    )
