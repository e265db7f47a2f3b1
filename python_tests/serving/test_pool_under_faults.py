"""Kill and restart `bidfmkd train` on eight services that all misbehave, and check the result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bidfmkd_fast.black_box import APISpec, BlackBox, FunctionBlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.serving import Behaviour
from bidfmkd_fast.serving.server import Service, running
from bidfmkd_fast.training.run_folder import LEDGER

N_CLASSES, SHAPE = 3, (1, 16, 16)
HEALTHY = [f"api_{number}" for number in range(6)]
# 10 % of server errors, 5 % of dropped connections, a storm of 429 at the end of every 10 requests
FAULTS = {
    "failed": 0.1,
    "dropped": 0.05,
    "storm_every": 10,
    "storm_length": 3,
    "retry_after": 0,
    "latency": 0.02,
}
N_PER_CLASS, STEPS, NUM_DIRECTIONS = 3, 4, 2
IMAGES = N_CLASSES * N_PER_CLASS  # of one set; the control asks one query each, the run so many:
QUERIES = STEPS * (1 + NUM_DIRECTIONS) * IMAGES
TRAIN = {
    "survey.n_images": 0,
    "n_per_class": N_PER_CLASS,
    "meta_batch_size": 2,
    "meta_model_width": 4,
    "recovery.steps": STEPS,
    "recovery.num_directions": NUM_DIRECTIONS,
    "recovery.generator_width": 4,
    "recovery.latent_dim": 8,
    "distillation.inner_steps": 1,
    "replay.final_steps": 1,
    "replay.n_query": 2,
}


def api(name: str, number: int) -> BlackBox:
    weights = torch.randn(256, N_CLASSES, generator=torch.Generator().manual_seed(number))
    names = tuple(f"class {number + k}" for k in range(N_CLASSES))
    return FunctionBlackBox(
        lambda images: images.flatten(1) @ weights,
        APISpec(N_CLASSES, SHAPE, class_names=names, name=name),
    )


def train(out: Path) -> subprocess.Popen[str]:
    settings = [f"--config.{name}={value}" for name, value in TRAIN.items()]
    main = "from bidfmkd_fast.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", main, "train", "--controls", "--pool", "pool", *settings]
    command += ["--out", out.name]
    return subprocess.Popen(
        command,
        cwd=out.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ,
    )


def sets_of(out: Path, number: int) -> tuple[int, int]:
    """Count the sets of API `number` on disk: those of the control and those of the run."""
    pattern = f"recovered/api_{number:03d}_*.safetensors"
    return len(list((out / "control").glob(pattern))), len(list(out.glob(pattern)))


def ledgers(out: Path) -> dict[str, Any]:
    """Return the counts per API, control and run together."""
    total: dict[str, Any] = {}
    for folder in (out / "control", out):
        if (folder / LEDGER).exists():
            ledger = LedgerFile(folder / LEDGER)
            for row in ledger.rows():
                queries, requests, answered = total.get(row.name, (0, 0, 0))
                total[row.name] = (
                    queries + row.queries,
                    requests + row.requests,
                    answered + row.answered_queries,
                )
            ledger.close()
    return total


def test_killed_and_started_again(tmp_path: Path, seed: int) -> None:
    apis = [api(name, number) for number, name in enumerate([*HEALTHY, "nan"])]
    behaviours = {name: Behaviour(max_batch=IMAGES, **FAULTS) for name in HEALTHY} | {
        "nan": Behaviour(nan=1.0)
    }
    service = Service(apis, behaviours, seed)
    out, pool = tmp_path / "out", tmp_path / "pool"
    pool.mkdir()

    def counted() -> dict[str, Any]:
        return {model["name"]: model for model in service.statistics()["model_stats"]}

    with running(service) as url:
        spec = {"n_classes": N_CLASSES, "image_shape": list(SHAPE)}
        dead = {
            "kind": "remote",
            "url": "http://127.0.0.1:9",
            "model": "dead",
            "spec": spec,
            "retries": 1,
        }
        served = [
            {
                "kind": "remote",
                "url": url,
                "model": api.name,
                "retries": 40,  # so many failures in a row mean a broken client, not bad luck
                "backoff": 0.0,
                "spec": spec
                | {
                    "class_names": list(api.spec.class_names),
                    "data_set": "made up",
                    "max_batch": IMAGES,
                },
            }
            for api in apis
        ]
        (pool / "pool.yaml").write_text(yaml.safe_dump({"format": 1, "apis": [*served, dead]}))

        first = train(out)
        deadline = time.monotonic() + 120
        while sum(sets_of(out, number)[1] for number in range(6)) < 5:
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
            time.sleep(0.002)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        time.sleep(0.5)  # what was on its way arrives
        kept, before, spent = [sets_of(out, number) for number in range(6)], counted(), ledgers(out)
        assert 5 <= sum(run for _, run in kept) < 12
        for name in HEALTHY:  # what the killed process spent is known
            assert (
                spent[name][1]
                >= before[name]["received"]["requests"]
                >= before[name]["execution_count"]
            )

        second = train(out)
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 0, output
        after, spent = counted(), ledgers(out)

    print(output)
    assert "left out: nan, dead" in output and "NaN" in output and "dead: no answer" in output
    for number, name in enumerate(HEALTHY):
        control, run = kept[number]
        scored = after[name]["inference_count"] - before[name]["inference_count"]
        assert (
            scored <= (2 - control) * IMAGES + (2 - run) * QUERIES
        )  # nothing that was kept is asked for again
        # Of the set that was under way one step at most.
        assert 0 <= after[name]["inference_count"] - 2 * IMAGES - 2 * QUERIES <= QUERIES // STEPS
        assert sets_of(out, number) == (2, 2)
        queries, requests, answered = spent[name]
        received, fates = after[name]["received"], after[name]["fates"]
        assert requests >= received["requests"] >= after[name]["execution_count"]
        assert queries >= received["images"] >= answered
        assert {"served", "throttled"} <= set(fates)
    for fate in ("failed", "dropped"):  # some of 170 requests and more
        assert sum(after[name]["fates"].get(fate, 0) for name in HEALTHY) > 0
    assert not list(out.glob("recovered/api_006*")) and not list(out.glob("recovered/api_007*"))
