"""Run commands whose output cannot be written.

The work is done and kept nevertheless; one line and the exit code say what was lost.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bidfmkd_fast.runtime.streams import guarded_stdout, say

MAIN = "from bidfmkd_fast.cli.main import main; raise SystemExit(main())"
LOST = (
    "bidfmkd convert: cannot write to standard output ({}); what it was to show is lost, "
    "files are kept\n"
)


@pytest.fixture
def convert(tmp_path: Path) -> list[str]:
    """Return a command that writes `two.npz` and then prints a line about it."""
    for name in ("ox", "cat"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "animals" / name / "1.png")
    return [sys.executable, "-c", MAIN, "convert", "animals", "--split=random", "--out=two.npz"]


def in_a_shell(command: list[str], redirection: str, folder: Path) -> tuple[int, str]:
    """Return exit code and stderr of the command under a redirection of the shell."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "reason"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 141, "Broken pipe"),
        (">/dev/full", 1, "No space left on device"),
        (">&-", 1, "it is closed"),
    ],
)
def test_a_stdout_that_takes_nothing(
    redirection: str, code: int, reason: str, convert: list[str], tmp_path: Path
) -> None:
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    assert in_a_shell(convert, redirection, tmp_path) == (code, LOST.format(reason))
    assert (tmp_path / "two.npz").is_file()


def test_no_streams_at_all(convert: list[str], tmp_path: Path) -> None:
    assert in_a_shell(convert, "<&- >&- 2>&-", tmp_path) == (1, "")
    assert (tmp_path / "two.npz").is_file()


def test_letters_that_the_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with guarded_stdout():
        print("84 ± 2 of 3 \N{MULTIPLICATION SIGN} 4, 漢")
    assert raw.getvalue() == b"84 +- 2 of 3 x 4, \\u6f22\n"
    with pytest.raises(UnicodeEncodeError):
        print("±", flush=True)  # outside of the block it is as it was


def test_control_characters_are_shown_and_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded_stdout():
        print("cat\x1b[2J\r\x9b\x7f\tdog\nbird")
    assert stream.getvalue() == "cat\\x1b[2J\\x0d\\x9b\\x7f\tdog\nbird\n"
    say("a\x07b\nc")
    assert capsys.readouterr().err == "a\\x07b\nc\n"


def test_a_failed_write_is_not_repeated_and_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise OSError(28, "No space left on device")

    full = Full()
    monkeypatch.setattr(sys, "stdout", full)
    with guarded_stdout() as output:
        print("one")
        print("two")
        assert output.failure() == (1, "No space left on device")
    assert full.writes == 1 and sys.stdout is full


def test_nothing_written_is_nothing_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with guarded_stdout() as output:
        assert output.failure() is None


def test_a_line_on_a_closed_stderr_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody hears it")
