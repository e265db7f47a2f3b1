"""Runs the cases on a CUDA device: `python benchmarks/gpu.py --out FOLDER`; `gpu_check.sh` does the rest beside it.

Times are from CUDA events. "ours" is what the device takes, from a graph of several calls in a row; "ours, called"
adds what Python takes to get there. The write and copy limits are measured in the same run. Baselines ask a black box
in full float32, as ours does. Results are written after every group of cases; one that fails ends the run with code 1,
but not the groups after it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidfmkd_fast as bf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(
    0, str(ROOT)
)  # after the import above: the package that was built, the benchmarks of this tree

from benchmarks.baselines import BestEager, paper_order  # noqa: E402
from benchmarks.bench import table  # noqa: E402
from benchmarks.cases.steps import (  # noqa: E402
    DEFAULT,
    PAPER,
    PlainConv4,
    PlainGenerator,
    _episode,
    _plain_adapt,
)
from benchmarks.harness import OURS, Row, _median_ratio  # noqa: E402
from bidfmkd_fast import ops  # noqa: E402
from bidfmkd_fast.meta import InnerLoop, TaskMemory  # noqa: E402
from bidfmkd_fast.meta.replay_on_device import DeviceReplay  # noqa: E402
from bidfmkd_fast.models import Conv4  # noqa: E402
from bidfmkd_fast.recovery import Objective  # noqa: E402
from bidfmkd_fast.recovery.image_maker import ImageMaker  # noqa: E402
from bidfmkd_fast.recovery.on_device import DeviceRecovery  # noqa: E402
from bidfmkd_fast.recovery.side_by_side import run_side_by_side  # noqa: E402
from bidfmkd_fast.recovery.step import RecoveryStep  # noqa: E402
from bidfmkd_fast.runtime.full_float32 import full_float32  # noqa: E402

B, SHAPE, Q, N_CLASSES, MU = 150, (3, 32, 32), 100, 5, 0.05
CALLS_IN_A_GRAPH = 10
WHOLE = {"APIs": 100, "outer steps": 60_000}  # the paper's run on CIFAR-FS
WHOLE_CASE = "fit/one of "  # before the name of a stage: an API, a round or a step of it

Function = Callable[[], object]


def captured(function: Function, calls: int = CALLS_IN_A_GRAPH) -> Function:
    """A replay of that many calls in one graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def rows_of(
    case: str,
    contenders: dict[str, tuple[Function, int]],
    runs: int,
    n_bytes: int = 0,
    limit: str | None = None,
) -> list[Row]:
    """Contenders take turns; each is a function and how often it does the work. Memory is of those
    that do it once.
    """
    memory: dict[str, float | None] = {}
    for name, (function, calls) in contenders.items():  # warms up too
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        output = torch.cuda.memory_allocated() - before
        memory[name] = (
            (torch.cuda.max_memory_allocated() - before - output) / 2**20 if calls == 1 else None
        )
        del result
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, (function, calls) in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    rows = []
    for name, own in times.items():
        median, q1, q3 = (float(torch.tensor(own).double().quantile(p)) for p in (0.5, 0.25, 0.75))
        rows.append(
            Row(
                case=case,
                contender=name,
                threads=0,
                median_ms=median,
                iqr_ms=q3 - q1,
                ratio_to_ours=_median_ratio(own, times[OURS]),
                gb_per_s=n_bytes / median / 1e6 if n_bytes else None,
                ratio_to_limit=None if limit is None else _median_ratio(own, times[limit]),
                extra_mb=memory[name],
                runs=runs,
            )
        )
    return rows


def kernels(runs: int) -> Iterator[Row]:
    """Perturb and gradient at the paper's size, against the bandwidth that fill and copy reach."""
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


def _api(seed: int = 0) -> tuple[nn.Module, bf.TorchBlackBox]:
    torch.manual_seed(seed)
    module = Conv4(3, N_CLASSES, SHAPE[1:]).cuda().eval()
    return module, bf.TorchBlackBox(module, bf.APISpec(n_classes=N_CLASSES, image_shape=SHAPE))


def _recovery(config: bf.RecoveryConfig, seed: int = 0) -> DeviceRecovery:
    _, api = _api(seed)
    labels = torch.arange(N_CLASSES, device="cuda").repeat_interleave(B // N_CLASSES)
    maker = ImageMaker(api, B, config, None, seed, "cuda")
    objective = Objective(labels, "logits", None, 0.0, "l1")
    return DeviceRecovery(RecoveryStep(api, maker, objective, config))


def recovery_steps(runs: int) -> Iterator[Row]:
    """One step of recovering 150 images, from the captured graph, against the paper's order on the
    same device.
    """
    for name, settings in (("paper", PAPER), ("default", DEFAULT)):
        config = bf.RecoveryConfig(**{**vars(settings), "steps": 100 + 20 * runs})
        one = _recovery(config)
        for _ in range(10):
            one.step()
        module, _ = _api()
        generator = PlainGenerator(config.generator_width).cuda()
        latents = nn.Parameter(torch.randn(B, config.latent_dim, device="cuda"))
        optimizer = torch.optim.Adam(
            [latents, *generator.parameters()], lr=config.learning_rate, betas=config.betas
        )
        labels = torch.arange(N_CLASSES, device="cuda").repeat_interleave(B // N_CLASSES)

        def losses(points: Tensor, module: nn.Module = module, labels: Tensor = labels) -> Tensor:
            with torch.no_grad(), full_float32():
                answers = module(points.flatten(0, 1))
            return F.cross_entropy(answers, labels.repeat(len(points)), reduction="none").view(
                -1, B
            )

        def plain(
            config: bf.RecoveryConfig = config,
            generator: nn.Module = generator,
            latents: Tensor = latents,
            optimizer: torch.optim.Optimizer = optimizer,
            losses: Callable[[Tensor], Tensor] = losses,
        ) -> None:
            optimizer.zero_grad()
            x = generator(latents)
            with torch.no_grad():
                gradient = paper_order(
                    x, config.num_directions, config.mu, config.directions, losses
                )
            (x * gradient).flatten(1).sum(1).mean().backward()
            optimizer.step()

        points = torch.rand(1 + config.num_directions, B, *SHAPE, device="cuda")
        rows_at_once = max(1, config.max_images // B)
        aside = _recovery(config)

        def ask(
            aside: DeviceRecovery = aside, points: Tensor = points, rows_at_once: int = rows_at_once
        ) -> None:
            for part in points.split(rows_at_once):
                aside.api.score(part.flatten(0, 1))

        def generate(aside: DeviceRecovery = aside) -> None:
            aside._maker.step(aside._maker.generate().square().mean())

        for _ in range(3):
            generate()
        contenders = {
            OURS: (partial(_repeat, one.step, 10), 10),
            "of it the API": (captured(ask, 2), 2),
            "of it the generator": (captured(generate, 2), 2),
            "paper order (a)": (plain, 1),
        }
        yield from rows_of(f"recovery/{name}_step", contenders, min(runs, 7))


def _repeat(function: Function, times: int) -> None:
    for _ in range(times):
        function()


def side_by_side(runs: int) -> Iterator[Row]:
    """The support sets of four APIs at the defaults, together and one after the other, captures
    included.
    """
    config = bf.RecoveryConfig()

    def together() -> None:
        run_side_by_side([_recovery(config, seed) for seed in range(4)])

    def alone() -> None:
        for seed in range(4):
            _recovery(config, seed).run()

    yield from rows_of(
        "recovery/4_sets_80_steps",
        {OURS: (together, 1), "one after the other": (alone, 1)},
        min(runs, 3),
    )


def replay_steps(runs: int) -> Iterator[Row]:
    """An outer step: 4 tasks, 5-way 1-shot, 15 queries, 5 second-order inner steps."""
    module = Conv4(3, 5, (32, 32), batch_statistics=True).cuda()
    plain_module = PlainConv4(module).cuda()
    memory = TaskMemory()
    memory.add(
        torch.rand(64 * 30, *SHAPE), [("set", f"class {i // 30:02}") for i in range(64 * 30)]
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, capturable=True)
    replay = DeviceReplay(module, optimizer, memory, (5, 1, 15), 4, InnerLoop(5, 0.01))
    step = 0

    def ours() -> None:
        nonlocal step
        for _ in range(10):
            replay.step(0, 4 * step)
            step += 1
        replay.records()

    plain_optimizer = torch.optim.Adam(plain_module.parameters(), lr=1e-3)
    on_device = [_moved(_episode(1, 15)) for _ in range(4)]

    def plain() -> None:
        plain_optimizer.zero_grad()
        for episode in on_device:
            adapted = _plain_adapt(plain_module, episode, 5, 0.01, graph=True)
            logits = torch.func.functional_call(plain_module, adapted, (episode.query_images,))
            F.cross_entropy(logits, episode.query_labels).backward()
        plain_optimizer.step()

    yield from rows_of(
        "replay/4x5way1shot15query", {OURS: (ours, 10), "plain loop": (plain, 1)}, min(runs, 9)
    )


def _moved(episode: bf.Episode) -> bf.Episode:
    images = (episode.support_images.cuda(), episode.query_images.cuda())
    return bf.Episode(
        images[0],
        episode.support_labels.cuda(),
        images[1],
        episode.query_labels.cuda(),
        episode.classes,
    )


def evaluation(runs: int) -> Iterator[Row]:
    """600 episodes of the embedded characters."""
    module = Conv4(1, 5, (28, 28), batch_statistics=True).cuda()
    meta_model = bf.MetaModel(module, adapt_steps=10, adapt_learning_rate=0.01)
    dataset = bf.load_dataset("glyphs")

    def ours() -> None:
        bf.evaluate(meta_model, dataset, n_way=5, n_shot=1, n_episodes=600, seed=0)

    yield from rows_of("evaluation/600_episodes", {OURS: (ours, 1)}, min(runs, 2))


def black_box(runs: int) -> Iterator[Row]:
    """One step's points at the paper's q, asked of a Conv4."""
    module, api = _api()
    images = torch.rand((1 + Q) * B, *SHAPE, device="cuda")

    def plain() -> Tensor:
        with torch.inference_mode(), full_float32():
            return module(images)

    yield from rows_of(
        "black_box/conv4/15150x3x32x32",
        {OURS: (partial(api, images), 1), "plain module": (plain, 1)},
        runs,
    )


def whole_run(runs: int) -> Iterator[Row]:
    """What each stage of a run takes, from one of eight APIs at the default settings."""
    n_apis, per_round, final = 8, 100, 300
    config = bf.TrainConfig(
        replay=bf.ReplayConfig(steps_per_round=per_round, patience=0, final_steps=final)
    )
    rounds = n_apis // config.meta_batch_size
    start = time.perf_counter()
    apis = [_api(seed)[1] for seed in range(n_apis)]
    seconds = {"making": time.perf_counter() - start}
    run = bf.BiDfMKD(apis, config=config, device="cuda").fit(progress=False)
    seconds |= run.seconds
    counts = {
        "making": n_apis,
        "recovery": n_apis,
        "distillation": rounds,
        "replay": per_round * (rounds - 1) + final,
    }
    for stage, count in counts.items():
        yield Row(
            f"{WHOLE_CASE}{stage}",
            OURS,
            0,
            1e3 * seconds[stage] / count,
            0.0,
            1.0,
            None,
            None,
            None,
            1,
        )


def extrapolated(rows: list[Row]) -> dict[str, float]:
    """Minutes of the paper's run at our default query settings, by stage, from these times;
    training a pool aside.
    """
    ms = {row.case: row.median_ms for row in rows if row.contender == OURS}
    rounds = WHOLE["APIs"] / bf.TrainConfig().meta_batch_size
    stages = {
        "making the APIs": (f"{WHOLE_CASE}making", WHOLE["APIs"]),
        "recovery": (f"{WHOLE_CASE}recovery", WHOLE["APIs"]),
        "distillation": (f"{WHOLE_CASE}distillation", rounds),
        "replay": (f"{WHOLE_CASE}replay", WHOLE["outer steps"]),
        "evaluation": ("evaluation/600_episodes", 1),
    }
    return {stage: ms[case] * times / 6e4 for stage, (case, times) in stages.items() if case in ms}


def write(rows: list[Row], out: Path, runs: int) -> Path:
    device = torch.cuda.get_device_name()
    meta: dict[str, Any] = {
        "device": device,
        "package": bf.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "native": ops.backend.build_info(),
        "runs": runs,
        "whole": WHOLE,
        "minutes_of_the_whole": extrapolated(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    text = json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=int, default=21, help="timed runs of each contender")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device that torch can use")
    problem = ops.backend.device_problem(torch.device("cuda", torch.cuda.current_device()))
    if problem is not None:
        raise SystemExit(f"gpu.py: {problem}")
    rows: list[Row] = []
    failed: list[str] = []
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(500):  # about a second, until the clocks are up
        busy = (busy @ busy).clamp_(-1, 1)
    for cases in (
        kernels,
        black_box,
        recovery_steps,
        side_by_side,
        replay_steps,
        evaluation,
        whole_run,
    ):
        start, first = time.perf_counter(), len(rows)
        try:
            for row in cases(options.runs):
                rows.append(row)
        except Exception:  # the others' results are worth having
            traceback.print_exc()
            failed.append(cases.__name__)
        file = write(rows, options.out, options.runs)
        print(
            f"{table(rows[first:])}\n\n{cases.__name__}: {time.perf_counter() - start:.0f} s\n",
            flush=True,
        )
    told = ", ".join(f"{stage} {value:.1f}" for stage, value in extrapolated(rows).items())
    print(
        f"\n{WHOLE['APIs']} APIs and {WHOLE['outer steps']:,} outer steps, minutes by these times: {told}"
    )
    print(f"written: {file}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
