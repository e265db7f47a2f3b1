"""End every command by Ctrl-C and SIGTERM: within two seconds, with one line.

The ledger is exact afterwards.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.cli import ending as cli_ending
from bidfmkd_fast.cli.main import main
from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.pools import train_pool

MAIN = "from bidfmkd_fast.cli.main import main; raise SystemExit(main())"
SPEC = {"n_classes": 3, "image_shape": [1, 16, 16]}
TINY = [
    "--config.n_per_class=3",
    "--config.replay.n_query=2",
    "--config.survey.n_images=9",  # as many pictures as a recovery step has images
    "--config.meta_model_width=4",
    "--config.recovery.generator_width=4",
]
LIMIT = 2.0  # seconds from the signal to the end of the process


@dataclass
class Silent:
    """A v2 server that takes every request for scores and never answers.

    The first request sets `asked`.
    """

    url: str = ""
    asked: threading.Event = field(default_factory=threading.Event)
    requests: int = 0


@pytest.fixture
def silent() -> Iterator[Silent]:
    state, over = Silent(), threading.Event()
    outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 1, 16, 16]}]
    known: dict[str, Any] = {
        "/v2": {"name": "silent", "extensions": ["binary_tensor_data"]},
        "/v2/models/m": {"name": "m", "inputs": inputs, "outputs": outputs},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(known.get(self.path, {})).encode()
            self.send_response(200 if self.path in known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            state.requests += 1
            state.asked.set()
            over.wait()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def pool(silent: Silent, tmp_path: Path) -> str:
    services = [
        {
            "kind": "remote",
            "url": silent.url,
            "model": "m",
            "spec": SPEC | {"name": f"silent {number}"},
        }
        for number in range(2)
    ]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.yaml").write_text(yaml.safe_dump({"format": 1, "apis": services}))
    return "pool"


def started(code: str, *arguments: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=lambda: (
            signal.signal(signal.SIGINT, signal.SIG_DFL) and None
        ),  # whatever started the tests
    )


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, str, str]:
    """Send a signal; return exit code, stdout and stderr. Fail if the end takes too long."""
    since = time.monotonic()
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - since < LIMIT
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "code", "by"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_train_on_a_silent_service(
    number: int, code: int, by: str, silent: Silent, pool: str, tmp_path: Path
) -> None:
    process = started(MAIN, "train", "--pool", pool, *TINY, folder=tmp_path)
    assert silent.asked.wait(60), process.communicate()
    time.sleep(0.3)  # both services are asked at once
    returned, out, err = ended(process, number)
    assert returned == code
    assert out == ""
    again = shlex.join(["bidfmkd", "train", "--pool", pool, *TINY, "--out", "runs/train"])
    # Two of the nine pictures make the first round.
    queries, requests = 2 * silent.requests, silent.requests
    assert err == (
        f"bidfmkd train: ended by {by}; kept in runs/train: 0 recovered sets; "
        f"asked {queries} queries in {requests} requests; go on with: {again}\n"
    )
    ledger = LedgerFile(tmp_path / "runs" / "train" / "ledger.sqlite")
    assert sum(row.requests for row in ledger.rows()) == requests
    assert sum(row.answered_queries for row in ledger.rows()) == 0
    ledger.close()


@pytest.mark.parametrize("command", ["probe", "train --dry-run"])
def test_commands_without_a_run_folder(
    command: str, silent: Silent, pool: str, tmp_path: Path
) -> None:
    process = started(MAIN, *command.split(), "--pool", pool, folder=tmp_path)
    assert silent.asked.wait(60), process.communicate()
    returned, out, err = ended(process, signal.SIGINT)
    assert (returned, out) == (130, "")
    assert err.startswith(f"bidfmkd {command.split()[0]}: ended by Ctrl-C; nothing to keep; asked ")
    assert (
        err.endswith(f"; start again with: bidfmkd {command} --pool {pool}\n")
        and err.count("\n") == 1
    )


def test_recover_goes_on_in_its_folder(silent: Silent, pool: str, tmp_path: Path) -> None:
    process = started(
        MAIN, "recover", "--pool", pool, "--n-per-class=2", "--config.mu=0.1", folder=tmp_path
    )
    assert silent.asked.wait(60), process.communicate()
    returned, out, err = ended(process, signal.SIGINT)
    assert (returned, out) == (130, "")
    assert err.startswith(
        "bidfmkd recover: ended by Ctrl-C; kept in runs/recover: 0 recovered sets; asked "
    )
    go_on = f"bidfmkd recover --pool {pool} --n-per-class=2 --config.mu=0.1 --out runs/recover"
    assert err.endswith(f"; go on with: {go_on}\n") and err.count("\n") == 1


def test_a_command_that_asks_nobody(tmp_path: Path) -> None:
    arguments = ["pool", "--n-apis=2", "--n-way=3", "--epochs=100000", "--out=new"]
    process = started(MAIN, *arguments, folder=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "new").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    returned, out, err = ended(process, signal.SIGINT)
    assert (returned, out) == (130, "")
    assert err == (
        "bidfmkd pool: ended by Ctrl-C; nothing to keep; nothing was asked; "
        f"start again with: bidfmkd {' '.join(arguments)}\n"
    )


def test_stopped_after_a_time(tmp_path: Path) -> None:
    """Stop a training that would take hours after six seconds; a signal's checkpoint is there."""
    train_pool(load_dataset("glyphs"), tmp_path / "pool", n_apis=2, width=4, epochs=1)
    arguments = ["train", "--pool", "pool", "--config.survey.n_images=100", "--out=run"]
    arguments += ["--config.survey.epochs=100000", "--stop-after=6s"]
    process = started(MAIN, *arguments, folder=tmp_path)
    code, said = process.wait(300), process.communicate()[1].splitlines()[-1]
    assert code == 75
    assert said.startswith("bidfmkd train: ended by --stop-after; kept in run: 0 recovered sets"), (
        "this machine takes more than six seconds to begin a run"
    )
    assert said.endswith(f"; go on with: bidfmkd {' '.join(arguments)}")
    assert list((tmp_path / "run" / "checkpoints").glob("*/state.json"))


@pytest.mark.parametrize("time", ["30", "m", "", "0s", "1.5h", "-3m", "1m30"])
def test_a_time_that_is_none(time: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--pool=p", f"--stop-after={time}"]) == 2
    said = f"--stop-after must be a time such as 90s, 30m or 11h30m; got '{time}'"
    assert said in capsys.readouterr().err


def test_the_last_line_counts_unfinished_recoveries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_ending, "asked_by_this_process", lambda: (5, 1, 0.0))
    recovered = tmp_path / "control" / "recovered"
    (recovered / "api_001_support.journal").mkdir(parents=True)
    (recovered / "api_001_support.journal" / "records").write_bytes(b"")
    (recovered / "api_000_support.safetensors").write_bytes(b"")
    ledger = LedgerFile(tmp_path / "control" / "ledger.sqlite")
    ledger.begin(0, "api")
    ledger.add(0, queries=1234, requests=3, cost=0.5)
    ledger.close()
    options = SimpleNamespace(out=str(tmp_path))
    line = cli_ending.last_line(
        "train", ["train", "--pool", "a b", "--out", str(tmp_path)], options, signal.SIGTERM
    )
    assert line == (
        f"bidfmkd train: ended by SIGTERM; kept in {tmp_path}: 1 recovered set and the answers to "
        "1 under way; asked 5 queries in 1 requests this time, 1,234 queries in 3 requests "
        "at a cost of 0.50 in all; go on with: bidfmkd train "
        f"--pool 'a b' --out {tmp_path}"
    )


STUCK = """
import sys, threading, time
from bidfmkd_fast.runtime.signals import ended_by_signals
with ended_by_signals(lambda number: f"the last line, {number}"):
    threading.Thread(target=time.sleep, args=(60,)).start()  # outlives the process
    try:
        print("ready", flush=True)  # inside, since a signal may come right after it
        time.sleep(60)
    finally:
        STUCK
"""


def stuck(folder: Path, how: str) -> subprocess.Popen[str]:
    process = started(STUCK.replace("STUCK", how), folder=folder)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "how", ["pass", "time.sleep(60)", "raise OSError('what a broken connection raises')"]
)
def test_the_process_ends_in_time_whatever_its_main_thread_does(how: str, tmp_path: Path) -> None:
    assert ended(stuck(tmp_path, how), signal.SIGTERM) == (143, "", "the last line, 15\n")


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = stuck(tmp_path, "time.sleep(60)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    since = time.monotonic()
    assert ended(process, signal.SIGINT) == (130, "", "")
    assert time.monotonic() - since < 1.0


def test_the_line_counts_the_apis_that_answered_the_survey(tmp_path: Path) -> None:
    for part in (tmp_path / "control", tmp_path):
        (part / "survey").mkdir(parents=True)
        (part / "survey" / "api_000.answers").touch()
    kept = cli_ending._kept("train", tmp_path)
    assert kept == f"kept in {tmp_path}: 0 recovered sets and answers of 1 API to the survey"


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from bidfmkd_fast.runtime.signals import ended_by_signals\n"
        "with ended_by_signals(lambda number: 'ended'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('goes on')\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    process = started(code, folder=tmp_path)
    assert (*process.communicate(timeout=60), process.returncode) == ("goes on\n", "", 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_loaded(number: int, code: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    program = (
        "import sys; sys.argv[0] = '/somewhere/bin/bidfmkd'; "
        f"sys.path.insert(0, {str(tmp_path)!r})\n{MAIN}"
    )
    process = started(program, "demo", folder=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert ended(process, number) == (code, "", "")
