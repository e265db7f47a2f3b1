"""Notices where a step asks for a tensor's value: on a GPU the host would wait there, and no graph could hold it."""

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
    """Inside the block such an operation raises AssertionError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _LOOKS, f"{func} needs a tensor's value on the host"
        return func(*args, **(kwargs or {}))
