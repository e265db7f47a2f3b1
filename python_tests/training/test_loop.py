"""Check the shape of the loop: how deep the first query lies, and that the page stays one page."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from training.test_bidf_mkd import TINY, pool

from bidfmkd_fast.black_box import BlackBox, FunctionBlackBox
from bidfmkd_fast.training import BiDfMKD, loop

MOST_CALLS = 6  # calls between `fit` and the black box
MOST_LINES = 150


def package_frames() -> list[str]:
    """List the functions of the package on the stack, the innermost first."""
    return [
        frame.function
        for frame in inspect.stack(context=0)
        if "/bidfmkd_fast/" in Path(frame.filename).as_posix()
    ]


def test_at_most_six_calls_lie_between_fit_and_the_first_query() -> None:
    stacks: list[list[str]] = []
    answering = pool(1)[0]

    def answer(images: torch.Tensor) -> torch.Tensor:
        stacks.append(package_frames())
        return answering.score(images)

    BiDfMKD([FunctionBlackBox(answer, answering.spec)], config=TINY).fit(progress=False)
    first = stacks[0]
    between = first[first.index(BlackBox.__call__.__name__) + 1 : first.index(BiDfMKD.fit.__name__)]
    assert 1 <= len(between) <= MOST_CALLS, f"calls from the inside out: {between}"
    assert loop.run_loop.__name__ in between


def test_the_loop_is_one_page() -> None:
    assert len(inspect.getsource(loop).splitlines()) <= MOST_LINES
