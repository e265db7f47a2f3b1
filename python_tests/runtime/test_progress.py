"""Test how progress is shown.

Terminals of any width and notebooks show a bar, files get a line per minute, and nothing is shown
if that is unwanted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.runtime import progress
from bidfmkd_fast.runtime.progress import Bar, in_notebook


@pytest.fixture
def every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "_REFRESH", 0.01)


def wait_for_text(capsys: pytest.CaptureFixture[str], text: str) -> str:
    shown, end = "", time.monotonic() + 60
    while text not in shown:
        assert time.monotonic() < end, shown
        time.sleep(0.01)
        shown += capsys.readouterr().err
    return shown


def test_a_file_gets_lines_with_rate_and_time_left(
    every_moment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("recover api_003", 1000, "queries", True) as bar:
        bar.advance(250)
        bar.show(loss=0.25)
        shown = wait_for_text(capsys, "loss 0.25")
    line = next(line for line in shown.splitlines() if "loss 0.25" in line)
    assert line.startswith("recover api_003: 250 of 1,000 queries after 0 s, ")
    assert "queries/s, " in line and " left, loss 0.25" in line


def test_a_line_comes_although_nothing_advances(
    every_moment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("recover", 10, "queries", True):
        wait_for_text(capsys, "recover: 0 of 10 queries after")


def test_the_outermost_speaks_for_all(
    every_moment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("compare", 7, "methods", True) as outer, Bar("control: recover", 10, "queries", True):
        outer.advance()
        shown = wait_for_text(capsys, "; control: recover: 0 of 10")
    assert all(line.startswith("compare: ") for line in shown.splitlines())


def test_a_minute_passes_over_short_pieces_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.3)
    monkeypatch.setattr(progress, "_REFRESH", 0.01)
    for _ in range(12):
        with Bar("evaluate", 1, "episodes", True):
            time.sleep(0.05)
    assert 1 <= capsys.readouterr().err.count("evaluate: 0 of 1 episodes") <= 3


def test_nothing_is_shown_when_unwanted_or_without_stderr(
    every_moment: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bar("quiet", 10, "queries", False) as bar:
        bar.advance()
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)
    with Bar("deaf", 10, "queries", True) as bar:
        bar.advance()


def test_what_was_done_before_is_no_part_of_the_rate() -> None:
    bar = Bar("recover", 100, "queries", False)
    bar.skip(50)
    assert bar.line() == "recover: 50 of 100 queries after 0 s"
    bar.advance(1)
    assert "recover: 51 of 100" in bar.line() and "/s, 0 s left" in bar.line()


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_of_any_width_gets_a_bar(columns: int) -> None:
    import fcntl
    import struct
    import termios

    code = (
        "from bidfmkd_fast.runtime.progress import Bar\n"
        "with Bar('control: recover', 20000, 'queries', True) as bar:\n"
        "    bar.advance(15000); bar.show(loss=0.5)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0)
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"control: recover:  75%|" in shown and b"15.0k/20.0k" in shown and b"loss=0.5" in shown


def test_a_notebook_gets_its_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not in_notebook()
    made: list[dict[str, Any]] = []

    class Widget:
        n = last_print_n = initial = 0

        def __init__(self, **settings: Any) -> None:
            made.append(settings)

        def update(self, n: int) -> None:
            self.n += n

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    ipython, auto = ModuleType("IPython"), ModuleType("tqdm.auto")
    ipython.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})  # type: ignore[attr-defined]
    auto.tqdm = Widget  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    with Bar("recover", 10, "queries", True) as bar:  # stderr is no terminal here
        bar.advance()
    assert [widget["desc"] for widget in made] == ["recover"]


def slow_api() -> bf.FunctionBlackBox:
    weight = torch.randn(256, 3, generator=torch.Generator().manual_seed(0))

    def answer(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return images.flatten(1) @ weight

    return bf.FunctionBlackBox(answer, bf.APISpec(3, (1, 16, 16), name="slow"))


def test_recover_counts_queries_and_shows_the_loss(
    every_moment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bf.RecoveryConfig(steps=10, num_directions=1, generator_width=4, latent_dim=8)
    bf.recover(slow_api(), 2, config=config, progress=True)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("recover slow: ")
    ]
    counts = [int(line.split()[2]) for line in lines]
    assert (
        counts == sorted(counts)
        and all(count % 12 == 0 for count in counts)
        and 0 < counts[-1] <= 120
    )
    assert " of 120 queries " in lines[-1] and "loss " in lines[-1]


def test_a_run_and_its_control_are_told_apart(
    every_moment: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=0),
        n_per_class=3,
        meta_model_width=4,
        recovery=bf.RecoveryConfig(steps=3, num_directions=1, generator_width=4, latent_dim=8),
        replay=bf.ReplayConfig(final_steps=1, n_query=2, inner_steps=1),
    )
    from bidfmkd_fast.training import fit_with_control

    fit_with_control([slow_api()], tmp_path / "run", config)
    shown = capsys.readouterr().err
    assert "control: recover: " in shown and " of 18 queries" in shown
    assert "run: recover: " in shown and " of 108 queries" in shown


def test_a_logger_tells_what_happens_and_is_quiet_by_itself(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=0),
        n_per_class=3,
        meta_model_width=4,
        recovery=bf.RecoveryConfig(steps=1, num_directions=1, generator_width=4, latent_dim=8),
        replay=bf.ReplayConfig(final_steps=1, n_query=2, inner_steps=1),
    )
    handlers = logging.getLogger("bidfmkd_fast").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]
    with caplog.at_level(logging.INFO, "bidfmkd_fast"):
        run = bf.BiDfMKD([slow_api()], config=config).fit(progress=False)
    distilled, replayed = (record["loss"] for record in run.history[2:])
    assert caplog.messages == [
        "slow: recovering the support set",
        "slow: recovering the query set",
        "slow: kept the support set of 9 images",
        "slow: kept the query set of 9 images",
        f"run: distillation, outer step 1: loss {distilled:.4g}",
        f"run: replay until outer step 2: loss {replayed:.4g}",
        "run: finished with 2 sets, 36 queries in 2 requests",
    ]
    config = bf.TrainConfig(survey=bf.SurveyConfig(n_images=8, epochs=2), meta_model_width=4)
    caplog.clear()
    with caplog.at_level(logging.INFO, "bidfmkd_fast"):
        run = bf.BiDfMKD([slow_api()], config=config).fit(progress=False)
    assert caplog.messages == [
        "run: the survey of 8 pictures begins",
        "slow: asking about 2 pictures",
        "run: chose 6 pictures",
        "slow: asking about 6 pictures",
        f"run: the survey has ended with a loss of {run.history[-1]['loss']:.4g} after 2 epochs",
        "run: finished with 0 sets, 8 queries in 2 requests",
    ]
    assert capsys.readouterr().err == ""


def test_bars_are_made_in_one_place() -> None:
    package = Path(progress.__file__).parent
    assert [file.name for file in package.rglob("*.py") if "tqdm(" in file.read_text()] == [
        "progress.py"
    ]
