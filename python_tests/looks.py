"""Notice where a step reads the value of a tensor on the host.

On a GPU the host would wait there, and no CUDA graph could hold the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_LOOKS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
}


class NoLooks(TorchDispatchMode):
    """A block inside which such an operation raises AssertionError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _LOOKS, f"{func} needs a tensor's value on the host"
        return func(*args, **(kwargs or {}))
