"""Test that the help explains every option of every command, in words instead of Python."""

from __future__ import annotations

import re

import pytest

from bidfmkd_fast.black_box.step_length import QUERIES
from bidfmkd_fast.cli.main import COMMANDS, main

_PYTHON = re.compile(r"<(function|class|bound|object)|\bat 0x[0-9a-f]+")
_NOTES = re.compile(r"\((required|type:|default:).*$")  # what jsonargparse adds to a text


def help_of(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def texts(help_text: str) -> dict[str, str]:
    """Return the text of each option, without type and default: `--config.recovery.mu` -> text."""
    explained: dict[str, str] = {}
    option = ""
    for line in help_text.splitlines():
        if match := re.match(r"  (-\S+)( \S+)*?(  +(?P<text>\S.*))?$", line):
            option = match[1].rstrip(",")
            explained[option] = match["text"] or ""
        elif option and line.startswith(" " * 24):
            explained[option] += " " + line.strip()
        else:
            option = ""
    return {option: _NOTES.sub("", text.strip()).strip() for option, text in explained.items()}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_help_shows_what_only_python_reads(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not _PYTHON.search(help_of(command, monkeypatch, capsys))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_text(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = texts(help_of(command, monkeypatch, capsys))
    assert "-h" in explained
    assert [option for option, text in explained.items() if len(text) < 8] == []


def test_the_texts_of_settings_are_those_of_the_docstrings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = texts(help_of("train", monkeypatch, capsys))
    assert explained["--config.recovery.steps"].startswith("optimisation steps; 0 keeps the images")
    assert explained["--config.replay.n_shot"] == "support images per class of a task."
    assert f"for {QUERIES} queries more per set" in explained["--config.recovery.mu"]
