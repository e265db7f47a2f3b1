"""Packages that only some commands need, and the advice for who lacks them."""

from __future__ import annotations

import shlex

from bidfmkd_fast.errors import InputError

# As in pyproject.toml. By their own names, since pip finds `bidfmkd-fast[serve]` neither from a
# source tree nor from an installation that came from one.
EXTRAS = {
    "bench": ("matplotlib>=3.7",),
    "serve": ("starlette>=0.40", "uvicorn>=0.30"),
    "onnx": ("onnxruntime>=1.17",),
    "grpc": ("tritonclient[grpc]>=2.40",),
}


def not_installed(operation: str, module: str | None, extra: str) -> InputError:
    """Return the error that says which `module` of which of the `EXTRAS` `operation` lacks, and
    how to install it.
    """
    command = shlex.join(["pip", "install", *EXTRAS[extra]])
    return InputError(f"{operation}: {module} is not installed; `{command}`")
