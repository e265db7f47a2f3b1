"""Define the cases of `gpu.py` that are whole steps; `gpu_kernels.py` has the single kernels.

Each function times some contenders and yields their rows.

Baselines ask a black box in full float32, as ours does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidfmkd_fast as bf
from benchmarks.baselines import paper_order
from benchmarks.cases.steps import (
    DEFAULT,
    PAPER,
    PlainConv4,
    PlainGenerator,
    plain_adapt,
    random_episode,
)
from benchmarks.gpu_harness import Function, captured, rows_of
from benchmarks.gpu_kernels import N_CLASSES, SHAPE, B, Q, kernels
from benchmarks.gpu_survey import joint_distillation, pictures
from benchmarks.harness import OURS, Row
from bidfmkd_fast.meta import InnerLoop, TaskMemory
from bidfmkd_fast.meta.replay_on_device import DeviceReplay
from bidfmkd_fast.models import Conv4
from bidfmkd_fast.recovery import Objective
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.on_device import DeviceRecovery
from bidfmkd_fast.recovery.side_by_side import run_side_by_side
from bidfmkd_fast.recovery.step import RecoveryStep
from bidfmkd_fast.runtime.full_float32 import full_float32

STAGE_CASE = "fit/one of "  # then the name of a stage: the time of one API, round or step of it


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
    """Time a step of recovering 150 images, as a captured graph, against the paper's order."""
    for name, settings in (("paper", PAPER), ("default", DEFAULT)):
        config = bf.RecoveryConfig(**{**vars(settings), "steps": 100 + 20 * runs})
        recovery = _recovery(config)
        for _ in range(10):
            recovery.step()
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
            OURS: (partial(_repeat, recovery.step, 10), 10),
            "of it the API": (captured(ask, 2), 2),
            "of it the generator": (captured(generate, 2), 2),
            "paper order (a)": (plain, 1),
        }
        yield from rows_of(f"recovery/{name}_step", contenders, min(runs, 7))


def _repeat(function: Function, times: int) -> None:
    for _ in range(times):
        function()


def side_by_side(runs: int) -> Iterator[Row]:
    """Time the support sets of four APIs at the defaults, together and one after the other.

    The capture of the graphs is part of the time.
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
    """Time an outer step: 4 tasks, 5-way 1-shot, 15 queries, 5 second-order inner steps."""
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
    on_device = [_moved(random_episode(1, 15)) for _ in range(4)]

    def plain() -> None:
        plain_optimizer.zero_grad()
        for episode in on_device:
            adapted = plain_adapt(plain_module, episode, 5, 0.01, graph=True)
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
    """Time a meta-test of 600 episodes of the embedded characters."""
    module = Conv4(1, 5, (28, 28), batch_statistics=True).cuda()
    meta_model = bf.MetaModel(module, adapt_steps=10, adapt_learning_rate=0.01)
    dataset = bf.load_dataset("glyphs")

    def ours() -> None:
        bf.evaluate(meta_model, dataset, n_way=5, n_shot=1, n_episodes=600, seed=0)

    yield from rows_of("evaluation/600_episodes", {OURS: (ours, 1)}, min(runs, 2))


def black_box(runs: int) -> Iterator[Row]:
    """Time a Conv4 API on the points of one step at the paper's number of directions."""
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
    """Time each stage of a run of eight APIs at the default settings, per API, round or step."""
    n_apis, per_round, final = 8, 100, 300
    config = replace(
        bf.TrainConfig.v01(),
        replay=bf.ReplayConfig(steps_per_round=per_round, patience=0, final_steps=final),
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
            f"{STAGE_CASE}{stage}",
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


# In the order of importance: a run that is cut off has done the first ones.
GROUPS: tuple[Callable[[int], Iterator[Row]], ...] = (
    kernels,
    black_box,
    recovery_steps,
    side_by_side,
    replay_steps,
    evaluation,
    pictures,
    joint_distillation,
    whole_run,
)
