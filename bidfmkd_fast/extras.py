"""List the packages that only some commands need, and tell users how to install them."""

from __future__ import annotations

import importlib.util
import re
import shlex

from bidfmkd_fast.errors import InputError

# The same lists as in pyproject.toml. The advice names these packages themselves, since pip finds
# `bidfmkd-fast[serve]` on no index.
EXTRAS = {
    "bench": ("matplotlib>=3.7",),
    "report": ("jinja2>=3.1", "matplotlib>=3.7"),
    "serve": ("starlette>=0.40", "uvicorn>=0.30"),
    "onnx": ("onnxruntime>=1.17",),
    "export": ("onnx>=1.16", "onnxscript>=0.1", "onnxruntime>=1.17"),
    "grpc": ("tritonclient[grpc]>=2.40",),
    "hub": ("huggingface_hub>=0.24",),
    "tensorboard": ("tensorboard>=2.14",),
}


def installed(extra: str) -> bool:
    """Return True if Python finds every package of the extra; nothing is imported."""
    names = [re.split(r"[^\w-]", package)[0] for package in EXTRAS[extra]]
    return all(importlib.util.find_spec(name) is not None for name in names)


def not_installed(operation: str, module: str | None, extra: str) -> InputError:
    """Return the error that says which `module` the `operation` lacks, and how to install it.

    `extra` is the key of `EXTRAS` that the module belongs to.
    """
    command = shlex.join(["pip", "install", *EXTRAS[extra]])
    return InputError(f"{operation}: {module} is not installed; `{command}`")
