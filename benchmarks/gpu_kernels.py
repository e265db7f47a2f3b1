"""Define the cases of `gpu.py` that are single kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import BestEager, keyed_points, paper_order
from benchmarks.cases.drop_in import prepare_estimate
from benchmarks.gpu_harness import CALLS_IN_A_GRAPH, captured, rows_of
from benchmarks.harness import OURS, Row
from bidfmkd_fast import ops

# The paper's sizes: images, their shape, directions, classes of an API; and a step length.
B, SHAPE, Q, N_CLASSES, MU = 150, (3, 32, 32), 100, 5, 0.05


def kernels(runs: int) -> Iterator[Row]:
    """Time perturb and gradient at the paper's size, against the bandwidth of fill and copy."""
    x, state = torch.randn(B, *SHAPE, device="cuda"), torch.tensor([1, 2], device="cuda")
    out, other = (torch.empty(1 + Q, B, *SHAPE, device="cuda") for _ in range(2))
    scores = torch.randn(1 + Q, B, N_CLASSES, device="cuda")
    labels = torch.randint(0, N_CLASSES, (B,), device="cuda")
    n_bytes = out.numel() * 4
    limits = {"write limit": (captured(lambda: out.fill_(1.0)), CALLS_IN_A_GRAPH)}
    copy = {"copy limit": (captured(lambda: other.copy_(out)), CALLS_IN_A_GRAPH)}
    yield from rows_of("limits/copy", {OURS: copy["copy limit"]}, runs, 2 * n_bytes)
    for kind, grid in (("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 4)):
        perturb = partial(ops.perturb, x, state, Q, MU, kind, grid, out=out)
        gradient = partial(
            ops.zo_kd_gradient, scores, labels, state, x.shape, MU, directions=kind, grid=grid
        )
        contenders = {
            OURS: (captured(perturb), CALLS_IN_A_GRAPH),
            "ours, called": (perturb, 1),
            **limits,
        }
        if kind == "gaussian" and (keyed := keyed_points(x, Q, MU)):
            contenders["torch.func._random, add_"] = (keyed, 1)
        yield from rows_of(f"perturb/{kind}/150x3072x100", contenders, runs, n_bytes, "write limit")
        contenders = {OURS: (captured(gradient), CALLS_IN_A_GRAPH), "ours, called": (gradient, 1)}
        yield from rows_of(f"zo_kd_gradient/{kind}/150x3072x100", contenders, runs)

    def cross_entropy(points: Tensor) -> Tensor:
        answers = scores[: points.shape[0]]
        return F.cross_entropy(
            answers.flatten(0, 1), labels.repeat(len(answers)), reduction="none"
        ).view(-1, B)

    for kind in ("rademacher", "sphere"):
        best = BestEager(x, Q, kind)

        def ours(kind: str = kind) -> Tensor:
            ops.perturb(x, state, Q, MU, kind, out=out)
            return ops.zo_kd_gradient(scores, labels, state, x.shape, MU, directions=kind)[0]

        contenders = {
            OURS: (captured(ours), CALLS_IN_A_GRAPH),
            "ours, called": (ours, 1),
            "best eager (b)": (partial(best, x, MU, cross_entropy), 1),
            "best eager, graph": (captured(partial(best, x, MU, cross_entropy), 2), 2),
        }
        yield from rows_of(f"estimate/{kind}/150x3072x100", contenders, runs)
        contenders = {
            OURS: contenders[OURS],
            "paper order (a)": (partial(paper_order, x, Q, MU, kind, cross_entropy), 1),
        }
        yield from rows_of(f"estimate_paper/{kind}/150x3072x100", contenders, min(runs, 5))
    prepared = prepare_estimate(size := "256x3072x10", "cuda")
    prepared.check()
    asked = {name: (contender, 1) for name, contender in prepared.contenders.items()}
    yield from rows_of(f"drop_in/{size}", asked, min(runs, 9))
