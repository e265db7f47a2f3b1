"""Run `bidfmkd`: parse the command line, run the command, turn errors into exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from bidfmkd_fast.cli import (
    apis,
    classifiers,
    compare_runs,
    evaluation,
    experiments,
    init_config,
    pools,
    report,
    runs,
    tools,
)
from bidfmkd_fast.cli.ending import last_line
from bidfmkd_fast.cli.options import (
    Command,
    build_parser,
    check_seeds,
    plain_error,
    seconds_of,
    without_notes,
)
from bidfmkd_fast.cli.settings import merge, take_settings
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, BudgetExhausted, InputError, RankLost
from bidfmkd_fast.runtime import job
from bidfmkd_fast.runtime.signals import TIME_IS_UP, ended_by_signals, stop_after
from bidfmkd_fast.runtime.streams import Output, guarded_stdout, open_missing, say, visible

COMMANDS: dict[str, Command] = {  # in the order of `bidfmkd --help`
    "demo": experiments.DEMO,
    "pool": pools.POOL,
    "train": runs.TRAIN,
    "status": runs.STATUS,
    "evaluate": evaluation.EVALUATE,
    "compare-runs": compare_runs.COMPARE_RUNS,
    "report": report.REPORT,
    "adapt": classifiers.ADAPT,
    "predict": classifiers.PREDICT,
    "export": classifiers.EXPORT,
    "recover": apis.RECOVER,
    "probe": apis.PROBE,
    "bench": tools.BENCH,
    "serve": pools.SERVE,
    "convert": tools.CONVERT,
    "compare": experiments.COMPARE,
    "sweep": experiments.SWEEP,
    "init-config": init_config.INIT_CONFIG,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    The code is 0 for success; 2, after one line on stderr, for bad input or an API that cannot be
    used; 141 if the reader of standard output has gone, and 1 if it cannot be written otherwise.

    Without `arguments` the command line of the process is taken, and the process belongs to the
    command: Ctrl-C ends it with one line and exit code 130, SIGTERM with 143, the end of the time
    of `--stop-after` with 75 (`runtime.signals.ended_by_signals`), which is also the exit code if
    another process of the same job is lost.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = next((argument for argument in given if argument in COMMANDS), "")
    name = f"bidfmkd {command}".strip()
    parsed: dict[str, Any] = {}  # gets "options", which the last line of a killed command needs

    def ended(number: int) -> str:
        if not job.speaks():
            return ""
        return last_line(command, given, parsed.get("options"), number)

    if arguments is None:
        open_missing()
    with guarded_stdout() as output:
        try:
            with ended_by_signals(ended) if arguments is None else contextlib.nullcontext():
                code = _run(given, command, name, parsed)
        except SystemExit as stop:  # raised by --help, and by commands that found something wrong
            unwritten = _unwritten(output, name)
            raise SystemExit(stop.code or unwritten) from None
        return code or _unwritten(output, name)


def _unwritten(output: Output, name: str) -> int:
    """Return the exit code for output that could not be written, after a line about it; else 0."""
    failure = output.failure()
    if failure is None:
        return 0
    code, reason = failure
    say(
        f"{name}: cannot write to standard output ({reason}); "
        "what it was to show is lost, files are kept"
    )
    return code


def _run(arguments: Sequence[str], command: str, name: str, parsed: dict[str, Any]) -> int:
    """Parse and run; errors that the user can mend become one line and exit code 2."""
    try:
        from jsonargparse import ArgumentError
    except ImportError:
        say(f"{name}: the command line needs jsonargparse; `pip install jsonargparse`")
        return 2
    kind = COMMANDS[command].settings if command else None
    positional = COMMANDS[command].positional if command else ""
    try:
        arguments, settings = take_settings(arguments, kind)
        given = build_parser(arguments, COMMANDS).parse_args(arguments)
        options = parsed["options"] = given[given.subcommand]
        check_seeds(options)
        if (time := options.get("stop_after")) is not None:
            stop_after(seconds_of("--stop-after", time))
        if "config" in options:
            merge(values := without_notes(options.config.as_dict()), settings)
            options.config = values
        called = COMMANDS[given.subcommand]
        with _one_line_warnings(name), _log_lines(name), _ranks_of(called):
            called.run(options)
    except ArgumentError as error:
        say(f"{name}: {plain_error(str(error), command, positional)}")
        return 2
    except RankLost as error:
        if not error.told and job.speaks():
            say(f"{name}: {' '.join(str(error).split())}")
        return TIME_IS_UP
    except (InputError, BudgetExhausted, BadAnswer, APIUnavailable) as error:
        if job.speaks():
            say(f"{name}: {' '.join(str(error).split())}")
        return 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        say(f"{name}: {error.filename} is too long for a file's name; give a shorter one")
        return 2
    return 0


@contextlib.contextmanager
def _ranks_of(command: Command) -> Iterator[None]:
    """Join the other processes that torchrun has started, if `command` shares its work out.

    Raises InputError if it does not and there are others.
    """
    if command.shared:
        with job.joined():
            yield
    elif (n := job.n_started()) > 1:
        raise InputError(
            f"this command runs in one process, and torchrun has started {n}; start it without "
            "torchrun"
        )
    else:
        yield


@contextlib.contextmanager
def _one_line_warnings(name: str) -> Iterator[None]:
    """Show each warning in one line that opens like an error.

    urllib3's own warnings about repeated requests are silenced, because the ledger counts them.
    """
    before, urllib3 = warnings.formatwarning, logging.getLogger("urllib3")
    level = urllib3.level
    warnings.formatwarning = lambda message, *_, **__: visible(f"{name}: warning: {message}\n")
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = before
        urllib3.setLevel(level)


class _Visible(logging.Formatter):
    """Formats a record as `visible` gives it."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def _log_lines(name: str) -> Iterator[None]:
    """Show the library's log on stderr if the environment variable BIDFMKD_LOG names a level."""
    wanted = os.environ.get("BIDFMKD_LOG", "").upper()
    if not wanted:
        yield
        return
    if not isinstance(logging.getLevelName(wanted), int):
        raise InputError(
            "the environment variable BIDFMKD_LOG must be a level such as info; "
            f"got {wanted.lower()!r}"
        )
    logger, handler = logging.getLogger("bidfmkd_fast"), logging.StreamHandler()
    handler.addFilter(lambda record: not hasattr(record, "warned"))  # shown as a warning already
    handler.setFormatter(_Visible(f"%(asctime)s {name}: %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(wanted)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
