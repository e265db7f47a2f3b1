"""Serve the APIs of a pool with MLServer, over HTTP and gRPC on loopback; see setup.sh."""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor

import bidfmkd_fast as bf


class PoolModel(MLModel):
    """API number `parameters.extra["number"]` of the pool in the folder `parameters.uri`."""

    async def load(self) -> bool:
        self.api = bf.load_pool(self.settings.parameters.uri)[
            self.settings.parameters.extra["number"]
        ]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        scores = self.api(torch.from_numpy(images)).numpy()
        return InferenceResponse(
            model_name=self.name,
            id=payload.id,
            outputs=[NumpyCodec.encode_output("scores", scores)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", help="folder of a trained pool")
    parser.add_argument("--port", type=int, default=8080, help="of HTTP")
    parser.add_argument("--grpc-port", type=int, default=8081, help="of gRPC")
    options = parser.parse_args()

    models = [
        ModelSettings(
            name=api.name,
            implementation=PoolModel,
            parameters=ModelParameters(uri=options.pool, extra={"number": number}),
            inputs=[
                MetadataTensor(name="images", datatype="FP32", shape=[-1, *api.spec.image_shape])
            ],
            outputs=[
                MetadataTensor(name="scores", datatype="FP32", shape=[-1, api.spec.n_classes])
            ],
        )
        for number, api in enumerate(bf.load_pool(options.pool))
    ]
    settings = Settings(
        host="127.0.0.1",
        http_port=options.port,
        grpc_port=options.grpc_port,
        # the models are small: handing images to other processes costs more than scoring them
        parallel_workers=0,
        metrics_endpoint=None,
        debug=False,
        gzip_enabled=False,
    )
    asyncio.run(start(settings, models))


async def start(settings: Settings, models: list[ModelSettings]) -> None:
    await MLServer(settings).start(models)


if __name__ == "__main__":
    main()
