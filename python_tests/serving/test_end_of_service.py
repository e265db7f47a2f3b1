"""Check that `bidfmkd serve` ends at Ctrl-C and SIGTERM and prints what it has served."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bidfmkd_fast.black_box import RemoteBlackBox
from bidfmkd_fast.data import make_glyphs
from bidfmkd_fast.pools import train_pool

pytest.importorskip("uvicorn")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 0, ""), (signal.SIGTERM, 143, "bidfmkd serve: ended by SIGTERM\n")],
)
def test_what_is_in_flight_is_not_waited_for(
    number: int, code: int, line: str, tmp_path: Path
) -> None:
    train_pool(
        make_glyphs(), tmp_path / "pool", n_apis=1, n_way=3, width=2, epochs=1, progress=False
    )
    main = "from bidfmkd_fast.cli.main import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", main, "serve", "pool", "--port", "0", "--config.latency", "60"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split(" at ")[1].split("/v2")[0]
    RemoteBlackBox(url, "api_000")  # it takes requests
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    body = (
        '{"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 1, 28, 28], '
        '"data": [%s]}]}'
    )
    connection.request("POST", "/v2/models/api_000/infer", body % ", ".join(["0"] * 784))
    time.sleep(0.5)
    since = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - since < 20
    assert process.returncode == code
    assert err == line
    assert out.splitlines()[-1].split()[0] == "api_000"
    connection.close()
