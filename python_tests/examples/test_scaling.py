"""Check the files that start a run on several machines: their syntax, and the commands in them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from bidfmkd_fast.cli.main import COMMANDS
from bidfmkd_fast.cli.options import build_parser

FOLDER = Path(__file__).parent.parent.parent / "examples" / "scaling"


def kubernetes_command() -> str:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    service, job = documents
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    pod = job["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert f"--nnodes={job['spec']['completions']} " in container["args"][0]
    return str(container["args"][0])


def slurm_command() -> str:
    file = FOLDER / "train.sbatch"
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text()
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(line.split()[1].startswith("--") and "=" in line for line in options)
    return text[text.index("torchrun") :]


@pytest.mark.parametrize("command", [kubernetes_command, slurm_command])
def test_torchrun_and_bidfmkd_take_the_command(
    command: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(command)
    words = shlex.split(command().replace("\\\n", " "))
    words = words[words.index("torchrun") + 1 :]
    # The shell fills in numbers.
    words = [
        word.replace("$SLURM_NNODES", "2").replace("$JOB_COMPLETION_INDEX", "1") for word in words
    ]
    given = get_args_parser().parse_args(words)
    assert given.training_script == "bidfmkd" and given.no_python
    assert given.nnodes == "2" and given.nproc_per_node == "8"
    arguments = given.training_script_args
    options = build_parser(arguments, COMMANDS).parse_args(arguments)
    assert options.subcommand == "train" and options.train.device == "cuda"
