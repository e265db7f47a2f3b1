"""Draw the random directions of an estimator: a sequence that a checkpoint can continue."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.arguments import check_integer, check_number
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.checks import check_grid, check_mu
from bidfmkd_fast.zeroth_order.points import Drawing


class DirectionSequence:
    """The settings of an estimator and its position in the sequence of random directions.

    Safe under threads: no two draws give the same directions. Arguments and attributes are those of
    `ZerothOrder`.
    """

    # Attributes that belong to this process and its threads; a copy makes its own.
    _of_process: tuple[str, ...] = ("_lock",)

    def __init__(
        self,
        num_directions: int = 10,
        mu: float = 0.05,
        directions: str = "rademacher",
        grid: int = 0,
        seed: int | None = None,
        antithetic: bool = False,
    ) -> None:
        op = "ZerothOrder"
        self.num_directions = check_integer(op, "num_directions", num_directions, 1)
        self.mu = check_number(op, "mu", mu)
        check_mu(op, self.mu)
        self.directions = directions
        self.grid = check_integer(op, "grid", grid, 0)
        check_grid(op, directions, self.grid)
        if not isinstance(antithetic, bool):
            raise InputTypeError(f"{op}: antithetic must be True or False; got {antithetic!r}")
        self.antithetic = antithetic
        if antithetic and self.num_directions % 2:
            raise InputError(
                f"{op}: num_directions must be even with antithetic=True, since it counts both "
                f"points of each pair; got {self.num_directions}"
            )
        self.seed = _drawn_seed() if seed is None else _checked_seed(op, seed)
        self.state: Tensor | None = None
        self._start_in_process()

    def _start_in_process(self) -> None:
        """Make what belongs to this process and its threads."""
        self._lock = threading.Lock()

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the step of the next ask; on a GPU this waits for the device."""
        return {"seed": self.seed, "step": 0 if self.state is None else int(self.state[1]) + 1}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the position of the estimator that returned `state`.

        The next ask draws the directions that the next ask of that estimator would have drawn. A
        pending ask of this thread is dropped.

        Raises:
            InputError: `state` is not a dict as `state_dict` returns it.
        """
        op = "ZerothOrder.load_state_dict"
        if not isinstance(state, Mapping) or set(state) != {"seed", "step"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise InputError(
                f"{op}: state must hold seed and step, as state_dict() returns them; got {got}"
            )
        seed, step = (
            _checked_seed(op, state["seed"]),
            check_integer(op, "step", state["step"], 0, 2**63 - 1),
        )
        with self._lock, torch.inference_mode(False):
            self.seed = seed
            self.state = torch.tensor([seed, step - 1], dtype=torch.int64) if step else None
        self.reset()

    def reset(self) -> None:
        """Forget what is unfinished; a sequence by itself holds nothing of the kind."""

    def draw(self, device: torch.device) -> Drawing:
        """Advance to the next step and return its directions.

        The drawing holds the int64 `[seed, step]` of the step on `device` as a new tensor.

        The lock keeps two threads from drawing the same step. Inference mode and the transforms of
        `torch.func` are switched off, since their tensors could not be advanced in place later.
        """
        with self._lock, torch.inference_mode(False), torch._C._DisableFuncTorch():
            if self.state is None or self.state.device != device:
                step = -1 if self.state is None else int(self.state[1])
                self.state = torch.tensor([self.seed, step], dtype=torch.int64, device=device)
            # Advance in place, so that the replay of a captured CUDA graph does so too.
            self.state[1] += 1
            state = self.state.clone()
        return Drawing(
            state, self.num_directions, self.mu, self.directions, self.grid, self.antithetic
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return all state but that of this process and its threads.

        A copy starts without a pending ask.
        """
        return {
            name: value for name, value in self.__dict__.items() if name not in self._of_process
        }

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        if self.state is not None:
            self.state = self.state.clone()  # it is advanced in place, and copy.copy() shares it
        self._start_in_process()

    def __repr__(self) -> str:
        grid = f", grid={self.grid}" if self.grid else ""
        pairs = ", antithetic=True" if self.antithetic else ""
        return (
            f"ZerothOrder(num_directions={self.num_directions}, mu={self.mu:g}, "
            f"directions={self.directions!r}{grid}, seed={self.seed}{pairs})"
        )


def _drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def _checked_seed(op: str, seed: object) -> int:
    """Return `seed` as an int; refuse what an int64 tensor cannot hold."""
    return check_integer(op, "seed", seed, -(2**63), 2**63 - 1)
