"""Measure images per second through servers of the Open Inference Protocol v2, by transport.

The transports are JSON, binary tensors and gRPC.

    bidfmkd serve runs/pool --port 8000 &
    .venv-triton/bin/python examples/servers/triton/serve.py runs/pool \\
        --port 8100 --grpc-port 8101 &
    python benchmarks/remote_throughput.py --server serve http://127.0.0.1:8000 \\
        --server Triton http://127.0.0.1:8100 grpc://127.0.0.1:8101

A number is the median over `--rounds` calls of `--images` images. The project's own clients send
them in requests of `--batch` images, `--in-flight` of them at once; the servers take turns in every
round.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch

from bidfmkd_fast.black_box import BlackBox, GrpcBlackBox, RemoteBlackBox
from bidfmkd_fast.errors import APIUnavailable
from bidfmkd_fast.training.tables import text_table


def main() -> None:
    """Connect to the servers, time the calls and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--server", nargs="+", action="append", required=True, metavar=("NAME", "URL")
    )
    parser.add_argument("--model", default="api_000")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    rows = {
        (name, transport): connect(url, transport, options)
        for name, *urls in options.server
        for url in urls
        for transport in (("gRPC",) if url.startswith("grpc") else ("JSON", "binary"))
    }
    shape = next(api.spec.image_shape for api in rows.values() if api is not None)
    images = torch.rand(options.images, *shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
    for round_number in range(options.rounds + 1):
        for key, api in rows.items():
            if api is not None:
                start = time.perf_counter()
                api(images)
                if round_number > 0:  # the first opens connections
                    seconds[key].append(time.perf_counter() - start)
    print(
        f"images {'x'.join(map(str, shape))}, {options.batch} a request, "
        f"{options.in_flight} requests in flight"
    )
    print(text_table(table(seconds, options.images)))


def connect(url: str, transport: str, options: argparse.Namespace) -> BlackBox | None:
    """Return a black box that has answered one image; None if the server lacks the transport."""
    settings = {"max_batch": options.batch}
    if transport == "gRPC":
        return GrpcBlackBox(url, options.model, settings, in_flight=options.in_flight)
    api = RemoteBlackBox(
        url,
        options.model,
        settings,
        transport=transport.lower(),
        in_flight=options.in_flight,
        retries=0,
    )
    try:
        api(torch.zeros(1, *api.spec.image_shape))
    except APIUnavailable as error:
        warnings.warn(f"no {transport} at {url}: {error}", stacklevel=1)
        return None
    return api


def table(seconds: dict[tuple[str, str], list[float]], n_images: int) -> list[list[str]]:
    """Return a row for each server and transport, from the seconds of its calls."""
    rows = [["server", "transport", "images/s", "from", "to", "times JSON"]]
    for (name, transport), taken in seconds.items():
        if not taken:
            rows.append([name, transport, "not served", "", "", ""])
            continue
        rate, slowest, fastest = (
            n_images / value for value in (statistics.median(taken), max(taken), min(taken))
        )
        json_taken = seconds.get((name, "JSON"))
        times = (
            f"{statistics.median(json_taken) / statistics.median(taken):.1f}" if json_taken else ""
        )
        rows.append([name, transport, f"{rate:,.0f}", f"{slowest:,.0f}", f"{fastest:,.0f}", times])
    return rows


if __name__ == "__main__":
    main()
