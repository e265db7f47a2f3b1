#!/bin/sh
# Makes .venv-triton: Triton Inference Server from the wheel nvidia-pytriton (no container, no GPU needed) and this project.
set -eu
cd "$(dirname "$0")/../../.."
"${PYTHON:-python3}" -m venv .venv-triton
# PyTriton wants numpy 1, so only torch is held at the version of constraints.txt.
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-triton/bin/pip install --quiet nvidia-pytriton==0.7.0 "$(grep '^torch==' constraints.txt)" .
echo "start it: .venv-triton/bin/python examples/servers/triton/serve.py runs/pool"
