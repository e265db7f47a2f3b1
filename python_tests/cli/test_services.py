"""Learn from three servers without a line of YAML: list, train, adapt, predict."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.black_box.scores_kind import KIND_QUERIES
from bidfmkd_fast.cli.main import main
from bidfmkd_fast.serving import Behaviour

served = pytest.importorskip("bidfmkd_fast.serving.server", reason="the extra serve is missing")

N_CLASSES = (3, 5, 4)
N_PICTURES = 30
RUN = [
    *("--config.survey.n_images", str(N_PICTURES), "--config.survey.epochs", "2"),
    *("--config.survey.batch_size", "8", "--config.meta_model_width", "4"),
]
BEHAVIOURS = (
    Behaviour(),
    Behaviour(scores_kind="probabilities", decimals=5),
    Behaviour(dtype="uint8", max_batch=20),
)


def box(n_classes: int) -> FunctionBlackBox:
    draws = torch.Generator().manual_seed(n_classes)
    weights = torch.randn(28 * 28, n_classes, generator=draws) / 4
    spec = APISpec(n_classes, (1, 28, 28), name="api_000")
    return FunctionBlackBox(lambda images: images.flatten(1) @ weights, spec)


class Served:
    """Three servers, and the counts of what they were asked."""

    def __init__(self, services: list[served.Service], urls: list[str]) -> None:
        self.services, self.urls = services, urls

    @property
    def asked(self) -> int:
        """Return the images in all requests so far."""
        models = [m for s in self.services for m in s.statistics()["model_stats"]]
        return sum(model["received"]["images"] for model in models)


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.chdir(tmp_path)
    services = [
        served.Service([box(n_classes)], {"api_000": behaviour})
        for n_classes, behaviour in zip(N_CLASSES, BEHAVIOURS, strict=True)
    ]
    with ExitStack() as stack:
        yield Served(services, [stack.enter_context(served.running(s)) for s in services])


def write_pictures(folder: str, names: tuple[str, ...], n: int) -> None:
    for number, name in enumerate(names):
        Path(folder, name).mkdir(parents=True)
        for index in range(n):
            noise = np.random.default_rng(100 * number + index).integers(0, 60, (30, 30, 3))
            noise[10 * number : 10 * number + 10] += 190
            Image.fromarray(noise.astype(np.uint8)).save(Path(folder, name, f"{index}.png"))


def test_from_three_servers_to_labels(servers: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--url", *servers.urls, "--out", "my run", *RUN]) == 0
    output = capsys.readouterr().out
    assert f"{3 * KIND_QUERIES} queries were asked to find the kind" in output
    assert 'look at the lines of my run/pool.yaml that say "check"' in output
    assert servers.asked == 3 * (KIND_QUERIES + N_PICTURES)
    write_pictures("support", ("low", "middle", "top"), 3)
    write_pictures("new pictures", ("any", "other"), 2)
    adapt = ["adapt", "--run", "my run", "--pictures", "support", "--out", "c.safetensors"]
    assert main(adapt) == 0
    assert main(["predict", "c.safetensors", "new pictures", "--out", "labels.csv"]) == 0
    with open("labels.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["file", "label"] and len(rows) == 4
    assert {row[1] for row in rows} <= {"low", "middle", "top"}


def test_a_list_and_no_list_give_the_same_weights(
    servers: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pool", "--from-services", *servers.urls, "--out", "list"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("next: bidfmkd train --pool list --dry-run\n")
    names = [f"api_000@{url.removeprefix('http://')}" for url in servers.urls]
    kinds = ("logits", "probabilities", "logits")
    for name, n_classes, kind in zip(names, N_CLASSES, kinds, strict=True):
        assert any(
            line.split() == [name, f"http://{name[8:]}", "1x28x28", str(n_classes), kind]
            for line in output.splitlines()
        )
    assert main(["train", "--pool", "list", "--out", "from_list", *RUN]) == 0
    assert main(["train", "--url", *servers.urls, "--out", "from_url", *RUN]) == 0
    assert Path("list/pool.yaml").read_bytes() == Path("from_url/pool.yaml").read_bytes()
    for file in ("meta_model.safetensors", "initial_model.safetensors", "memory.safetensors"):
        assert Path("from_list", file).read_bytes() == Path("from_url", file).read_bytes()
    capsys.readouterr()
    assert main(["status", "from_url"]) == 0
    assert capsys.readouterr().out.startswith("from_url: finished")


def test_a_run_goes_on_with_the_list_in_its_folder(
    servers: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--url", *servers.urls, "--out", "run", *RUN]
    assert main([*command, "--dry-run"]) == 0
    assert not Path("run").exists() and "spending" in capsys.readouterr().out
    before = servers.asked
    assert main([*command, "--max-queries", str(3 * KIND_QUERIES - 1)]) == 2
    assert "3 models would be asked" in capsys.readouterr().err
    assert servers.asked == before and not Path("run").exists()
    assert main(command) == 0
    before = servers.asked
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "run holds a run already" in captured.err and captured.out == ""
    Path("run/meta_model.safetensors").unlink()  # as if it had been cut off before the end
    assert main(command) == 0
    assert "queries were asked" not in capsys.readouterr().out
    assert main([*command[:3], "--out", "run", *RUN]) == 2
    assert "run holds other services (url is" in capsys.readouterr().err
    assert servers.asked == before


def test_a_run_that_fails_before_it_asks_leaves_nothing(
    servers: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--url", *servers.urls, "--config.survey.n_images", "0"]
    assert main([*line, "--config.n_per_class", "1000000000", "--config.recovery.steps", "9"]) == 2
    assert "a step on n_per_class=1000000000 images" in capsys.readouterr().err
    assert not Path("runs").exists()
