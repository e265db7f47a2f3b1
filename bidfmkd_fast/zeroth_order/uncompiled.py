"""Keep `torch.compile` out of what asks queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def uncompiled(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a method that compiled code calls as it is, with a break in the graph.

    Queries, the position in the sequence of directions and what an estimator keeps for its caller
    lie outside of tensors, so that a graph would lose them. `torch.compiler.disable` does the same,
    but as a decorator it imports the compiler, which takes seconds.
    """

    @functools.wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return call
