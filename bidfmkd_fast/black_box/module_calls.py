"""Let a black box stand where code expects a torch module, such as the `teacher` of a distillation.

Such code calls `teacher.eval()`, `teacher.to(device)` or `teacher.parameters()` out of habit. A
black box answers those calls that are harmless and refuses those that would train it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.nn import Parameter

from bidfmkd_fast.errors import InputError

Box = TypeVar("Box", bound="ModuleCalls")


class ModuleCalls(ABC):
    """The calls of `torch.nn.Module` that make sense for an API which only answers.

    Attributes:
        training: always False.
    """

    training = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name of the API, which errors use."""

    def eval(self: Box) -> Box:
        """Return the box; it always answers as in evaluation."""
        return self

    def train(self: Box, mode: bool = True) -> Box:
        """Return the box if `mode` is False.

        Raises:
            InputError: `mode` is True.
        """
        if mode:
            raise InputError(
                f"{self.name}: train() wants a module; a black box only answers and cannot be "
                "trained; call eval(), or leave the call out"
            )
        return self

    def to(self: Box, *args: Any, **kwargs: Any) -> Box:
        """Return the box, unchanged; the arguments are ignored.

        Images and scores are moved as needed: a call takes images on any device and returns the
        scores on the same device.
        """
        return self

    def cuda(self: Box, device: Any = None) -> Box:
        """Return the box, unchanged (see `to`)."""
        return self

    def cpu(self: Box) -> Box:
        """Return the box, unchanged (see `to`)."""
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Return an iterator over no parameters: an API shows none."""
        return iter(())

    def requires_grad_(self: Box, requires_grad: bool = True) -> Box:
        """Return the box if `requires_grad` is False.

        Raises:
            InputError: `requires_grad` is True.
        """
        if requires_grad:
            raise InputError(
                f"{self.name}: requires_grad_() wants a module; a black box has no parameters and "
                "gives no gradient; call requires_grad_(False), or leave the call out (for "
                "gradients to the images see bidfmkd_fast.as_differentiable)"
            )
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: B027 (nothing to do)
        """Do nothing: a black box has no gradients."""
