"""Check that no secret is in a file or on the terminal, though services echo what they got."""

from __future__ import annotations

import base64
import html
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import yaml

TOKEN, HEADER, KEY = 's3cr/et+t"ok\\en&é%', "hEaDeR/vAlUe=1", "qUeRy+kEy/2"
N_CLASSES, SHAPE = 3, (1, 16, 16)
TRAIN = {
    "n_per_class": 3,
    "meta_batch_size": 2,
    "meta_model_width": 4,
    "recovery.steps": 1,
    "recovery.num_directions": 1,
    "recovery.generator_width": 4,
    "recovery.latent_dim": 8,
    "distillation.inner_steps": 1,
    "replay.final_steps": 1,
    "replay.n_query": 2,
}
SPELLED: dict[str, Callable[[str], str]] = {
    "raw": lambda text: text,
    "url": lambda text: quote(text, safe=""),
    "plus": quote_plus,
    "json": lambda text: json.dumps(text)[1:-1],
    "unicode": lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
    "html": html.escape,
    "base64": lambda text: base64.b64encode(text.encode("latin-1")).decode(),
    "basic": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
}


def echo(sent: Any) -> str:
    authorization = sent.headers["Authorization"].encode("latin-1").decode("latin-1")
    assert authorization == f"Bearer {TOKEN}"
    return f"{authorization} {sent.headers['X-Key']} {sent.path}"


def answer(sent: Any) -> Any:
    """Answer `/good/...` with scores and an echo of the request, other paths with the echo only."""
    kind, spelling = sent.path.partition("?")[0].strip("/").split("/")
    words = " ".join(SPELLED[spelling](part) for part in (TOKEN, HEADER, KEY)) + f" in {echo(sent)}"
    images = np.array(json.loads(sent.body)["instances"]).reshape(-1, 256)
    scores = (images @ np.random.default_rng(0).normal(size=(256, N_CLASSES))).tolist()
    if kind == "good":
        return (
            200,
            {"X-Echo": quote(words)},
            json.dumps({"predictions": scores, "echo": words}).encode(),
        )
    if kind == "label":
        return (
            200,
            {},
            json.dumps(
                {"predictions": scores, "labels": [[words, "b", "c"]] * len(scores)}
            ).encode(),
        )
    if kind == "error":
        return 200, {}, json.dumps({"error": words}).encode()
    if kind == "html":
        return 200, {}, f"<html>{'&nbsp;' * 20}{words}</html>".encode()
    if kind == "moved":
        return (
            302,
            {
                "Location": f"https://user:{quote(TOKEN, safe='')}@elsewhere/"
                f"?key={quote(KEY, safe='')}"
            },
            b"",
        )
    return 403, {}, words.encode()


def test_no_secret_in_the_run_folder_or_on_the_terminal(server: Any, tmp_path: Path) -> None:
    server.post = answer
    spec = {
        "n_classes": N_CLASSES,
        "image_shape": list(SHAPE),
        "data_set": "made up",
        "class_names": ["a", "b", "c"],
    }
    paths = ["good/raw", "good/json"]
    paths += [f"error/{spelling}" for spelling in SPELLED]
    paths += ["html/raw", "html/url", "refused/raw", "refused/json", "moved/raw", "label/raw"]
    mappings = {path: {"body": {"instances": "$images"}, "scores": "predictions"} for path in paths}
    mappings |= {
        path: mappings[path] | {"labels": "labels"} for path in paths if path.startswith("label")
    }
    apis = [
        {
            "kind": "json",
            "url": f"{server.url}/{path}?key={quote(KEY, safe='')}",
            "mapping": mappings[path],
            "token_variable": "CATS_TOKEN",
            "headers": {"X-Key": HEADER},
            "spec": spec | {"name": path.replace("/", "_")},
        }
        for path in paths
    ]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "pool.yaml").write_text(yaml.safe_dump({"format": 1, "apis": apis}))
    command = [
        sys.executable,
        "-c",
        "from bidfmkd_fast.cli.main import main; raise SystemExit(main())",
        "train",
    ]
    command += [
        "--pool",
        "pool",
        "--out",
        "out",
        *(f"--config.{name}={value}" for name, value in TRAIN.items()),
    ]
    environment = os.environ | {"CATS_TOKEN": TOKEN}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    terminal = done.stdout + done.stderr
    assert done.returncode == 0, terminal
    out = tmp_path / "out"
    for path in paths[2:]:  # the words of the services are there
        name = path.replace("/", "_")
        assert (
            name in terminal and name in json.loads((out / "summary.json").read_text())["skipped"]
        )
    assert "<token>" in terminal and "<token>" in (out / "report.md").read_text()

    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"summary.json", "report.md", "metrics.jsonl", "ledger.sqlite", "source.yaml"} <= {
        path.name for path in files
    }
    texts = {str(file): file.read_bytes() for file in files} | {"terminal": terminal.encode()}
    for where, content in texts.items():
        for secret in (TOKEN, HEADER, KEY):
            for name, spell in SPELLED.items():
                for encoding in ("utf-8", "latin-1"):
                    looked_for = spell(secret).encode(encoding)
                    assert looked_for not in content, f"{secret} as {name} in {where}"
        for part in (b"s3cr", b"S3CR", b"hEaDeR", b"qUeRy"):  # nor any beginning of one
            assert part not in content, f"{part!r} in {where}"
