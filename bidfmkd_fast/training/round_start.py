"""Hold what the recoveries of a round begin with."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn


class RoundStart(NamedTuple):
    """The meta-model at the start of a round, and the number of outer steps it had taken."""

    module: nn.Module
    outer_step: int

    def copy(self) -> RoundStart:
        """Return a copy, for a thread that runs the module."""
        return self._replace(module=copy.deepcopy(self.module))
