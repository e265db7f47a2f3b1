"""Serve the APIs of a pool with Triton over HTTP and gRPC on loopback; see setup.sh."""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import DEFAULT_PROTECTED_ENDPOINTS, Triton, TritonConfig, TritonSecurityConfig

import bidfmkd_fast as bf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="folder of a trained pool")
    parser.add_argument("--port", type=int, default=8000, help="of HTTP")
    parser.add_argument("--grpc-port", type=int, default=8001, help="of gRPC")
    parser.add_argument("--max-batch", type=int, default=256, help="images per request")
    options = parser.parse_args()

    # Triton's Python process is linked against libpython, which lies in LIBDIR.
    libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=options.port,
        grpc_address="127.0.0.1",
        grpc_port=options.grpc_port,
        allow_metrics=False,
    )
    # Anyone on this machine may read the statistics, to compare them with a client's ledger.
    security = TritonSecurityConfig(
        restricted_endpoints=sorted(set(DEFAULT_PROTECTED_ENDPOINTS) - {"statistics"})
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Triton(config=config, workspace=f"{folder}/triton", security_config=security) as triton,
    ):
        for api in bf.load_pool(options.pool):
            triton.bind(
                model_name=api.name,
                infer_func=scorer(api),
                inputs=[Tensor(name="images", dtype=np.float32, shape=api.spec.image_shape)],
                outputs=[Tensor(name="scores", dtype=np.float32, shape=(api.spec.n_classes,))],
                config=ModelConfig(max_batch_size=options.max_batch),
                strict=True,
            )
        triton.serve()


def scorer(api: bf.TorchBlackBox):
    @batch
    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"scores": api(torch.tensor(images)).numpy()}

    return infer


if __name__ == "__main__":
    main()
