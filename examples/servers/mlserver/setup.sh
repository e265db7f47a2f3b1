#!/bin/sh
# Makes .venv-mlserver: MLServer and this project.
set -eu
cd "$(dirname "$0")/../../.."
"${PYTHON:-python3}" -m venv .venv-mlserver
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-mlserver/bin/pip install --quiet mlserver==1.7.1 "$(grep '^torch==' constraints.txt)" .
echo "start it: .venv-mlserver/bin/python examples/servers/mlserver/serve.py runs/pool"
