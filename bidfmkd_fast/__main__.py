"""Print versions, devices, and which code serves each device: `python -m bidfmkd_fast`."""

from __future__ import annotations

import torch

from bidfmkd_fast.ops import backend
from bidfmkd_fast.runtime.machine import machine_text, versions


def diagnostics() -> list[tuple[str, str]]:
    """Return what a bug report needs, as (name, value) pairs."""
    info = backend.build_info()
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = {"cpu": machine_text("cpu")}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(n_cuda)}
    rows = list(versions().items())
    if info is None:
        rows += [("native module", "not available"), ("load error", str(backend.load_error))]
    else:
        architectures = ", ".join(info["cuda_architectures"])
        rows += [
            ("native module", f"loaded, built with {info['compiler']}"),
            ("native kernels", f"CPU: {info['cpu_level']} (of {', '.join(info['cpu_levels'])})"),
            ("", "CUDA: " + (f"built for {architectures}" if architectures else "not built")),
        ]
    for device, about in devices.items():
        problem = backend.device_problem(torch.device(device))
        served_by = (
            "native kernels" if problem is None else f"plain torch (reference), since {problem}"
        )
        rows.append((device, f"{about}: {served_by}"))
    if n_cuda == 0:
        rows.append(("cuda", "no device that torch can use"))
    return rows


def main() -> None:
    """Print the diagnostics, aligned."""
    rows = diagnostics()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
