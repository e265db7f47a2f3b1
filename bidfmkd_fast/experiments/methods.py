"""Train BiDf-MKD and the methods it is compared with, each a function of the same experiment.

The other methods leave out recovery or meta-learning, or use the APIs' true gradients or real data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops
from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.data import EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.controls import (
    control,
    random_initialisation,
    random_teachers,
    zero_query,
)
from bidfmkd_fast.experiments.experiment import Experiment, finish_method, fit_run
from bidfmkd_fast.files.atomic import make_folder
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.meta import outer_replay_step
from bidfmkd_fast.meta.replay_on_device import DeviceEpisodes
from bidfmkd_fast.meta.stacked import can_stack
from bidfmkd_fast.models.head import zero_head
from bidfmkd_fast.pools.pool import load_modules, load_pool
from bidfmkd_fast.recovery import recover
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded, torch_generator
from bidfmkd_fast.training import TrainConfig
from bidfmkd_fast.training.comparison import ZERO_QUERY
from bidfmkd_fast.training.kept_steps import KeptSteps
from bidfmkd_fast.training.recovered_set import read_images_and_scores
from bidfmkd_fast.training.run_folder import LEDGER, METRICS, RunFolder
from bidfmkd_fast.training.step_records import StepRecords

SETS = "sets"  # folder of what `single` has recovered, until it is finished
Method = Callable[[Experiment, Path], None]


def bidf_mkd(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD."""
    fit_run(experiment, load_pool(experiment.pool.folder), experiment.train, folder, "bidf_mkd")


def white_box(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD with the APIs' true gradients: what a perfect estimate would give."""
    modules = load_modules(experiment.pool.folder)
    boxes = [
        OpenBox(module, entry.spec, device=experiment.device)
        for module, entry in zip(modules, experiment.pool.trained, strict=True)
    ]
    fit_run(experiment, boxes, experiment.train, folder, "white_box")


def best_api_distilled(experiment: Experiment, folder: Path) -> None:
    """Distil the API that is most accurate on held-out images into the meta-model (Single-DFKD).

    The method may spend what the whole run spends: as many sets are recovered from this one API as
    the run recovers from all. The classifier is then set to zero, because its classes mean nothing
    in another task. A classifier of zeros was measured to adapt better than the distilled one
    (Omniglot, 10 steps, 1-shot: 72 % against 67 %).
    """
    started = time.perf_counter()
    entries = experiment.pool.trained
    best = max(range(len(entries)), key=lambda i: entries[i].accuracy)
    api = load_pool(experiment.pool.folder)[best]
    make_folder(folder / SETS)
    ledger = LedgerFile(folder / SETS / LEDGER)
    with api.ledger.written_to(ledger, best, api.name):
        images, scores = _recover_sets(experiment, api, folder / SETS, 2 * len(entries))
    (row,) = ledger.rows()
    ledger.close()
    module = experiment.fresh()
    records = StepRecords(folder / METRICS, "distillation", row.queries, started)
    _distil(experiment, module, images, scores, api.spec.returned_kind, best, records)
    zero_head(module)
    finish_method(folder, experiment, module, row.queries, records.seconds, [row])


def _recover_sets(
    experiment: Experiment, api: BlackBox, folder: Path, n_sets: int
) -> tuple[Tensor, Tensor]:
    """Recover sets from one API, each kept in `folder`; return all images, in [0, 1], and scores.

    What a process that was cut off has recovered is not asked for again.
    """
    config, images, scores = experiment.train, [], []
    with Bar(f"single: recover {api.name}", n_sets, "sets", experiment.progress) as bar:
        for index in bar.over(range(n_sets)):
            file = folder / f"{index:03d}.safetensors"
            if not file.is_file():
                with Journal(file.with_suffix(".journal")) as journal:
                    recovered = recover(
                        api,
                        config.n_per_class,
                        None,
                        config.recovery,
                        seed=derive_seed(config.seed, "best api", index),
                        device=experiment.device,
                        paper_compat=config.paper_compat,
                        journal=journal,
                    )
                    in_unit_range = api.spec.to_unit(recovered.images)
                    write_tensors(file, {"images": in_unit_range, "scores": recovered.scores})
                    journal.remove()
            held, _ = read_tensors(file)
            images.append(held["images"])
            scores.append(held["scores"])
    return torch.cat(images), torch.cat(scores)


def distilled_average(experiment: Experiment, folder: Path) -> None:
    """Distil each API by itself, from the same start, and average the parameters (Distill-Avg).

    The method learns from the sets that BiDf-MKD recovered, so it costs the same queries. The
    classifier is set to zero, as in `best_api_distilled`.
    """
    started = time.perf_counter()
    entries = experiment.pool.trained
    total: dict[str, Tensor] = {}
    queries = RunFolder(experiment.bidf_mkd).summary()["queries"]
    records = StepRecords(folder / METRICS, "distillation", queries)
    with Bar("average: distil", len(entries), "APIs", experiment.progress) as bar:
        for index in bar.over(range(len(entries))):
            images, scores = recovered_sets(experiment.bidf_mkd, index)
            module = experiment.fresh()
            kind = entries[index].spec.returned_kind
            _distil(experiment, module, images, scores, kind, index, records)
            for name, value in module.named_parameters():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(
                    entries
                )
    module = experiment.fresh()
    module.load_state_dict(total)
    zero_head(module)
    finish_method(folder, experiment, module, queries, time.perf_counter() - started)


def maml_on_real_data(experiment: Experiment, folder: Path) -> None:
    """Train MAML on the real meta-train classes, with the settings of the replay.

    It takes `baselines.maml_steps` outer steps, or as many as the replay if that is 0. Episodes
    come from the data sets in turn.
    """
    config, replay = experiment.train, experiment.train.replay
    samplers = [
        EpisodeSampler(
            dataset,
            "meta_train",
            experiment.config.pool.n_way,
            replay.n_shot,
            replay.n_query,
            derive_seed(config.seed, "maml", dataset.name),
            replay.rotations,
        )
        for dataset in experiment.datasets
    ]
    module = experiment.fresh()
    on_gpu = next(module.parameters()).is_cuda
    optimizer = torch.optim.Adam(module.parameters(), lr=replay.outer_lr, capturable=on_gpu)
    n_way, n_tasks = experiment.config.pool.n_way, config.meta_batch_size
    on_device = None
    if (
        on_gpu
        and can_stack(module, n_way)
        and len({d.image_shape for d in experiment.datasets}) == 1
    ):
        on_device = DeviceEpisodes(
            module,
            optimizer,
            experiment.datasets[0].image_shape,
            (n_way, replay.n_shot, replay.n_query),
            n_tasks,
            replay.inner,
        )
    n_steps = experiment.config.baselines.maml_steps or experiment.replay_steps
    records = StepRecords(folder / METRICS)

    def step(number: int) -> dict[str, float] | None:
        episodes = [
            samplers[index % len(samplers)].episode(index // len(samplers))
            for index in range(number * n_tasks, (number + 1) * n_tasks)
        ]
        if on_device is not None:
            on_device.step(episodes)
            return None
        with seeded(config.seed, "maml", number):
            return outer_replay_step(module, optimizer, episodes, replay.inner)

    with (
        KeptSteps(folder, module, optimizer, records) as kept,
        Bar("maml: train", n_steps, "steps", experiment.progress) as bar,
    ):
        kept.train(n_steps, bar, step, None if on_device is None else on_device.records)
    finish_method(folder, experiment, module, 0, records.seconds)


# Label and function of each method, in the order of the table: without recovery, without
# meta-learning, BiDf-MKD, and the upper bounds.
METHODS: dict[str, tuple[str, Method]] = {
    "random": ("random initialisation", random_initialisation),
    "control": ("no-recovery control", control),
    "zero_query": (ZERO_QUERY, zero_query),
    "random_teachers": ("random_teachers", random_teachers),
    "single": ("best API distilled (Single-DFKD)", best_api_distilled),
    "average": ("Distill-Avg", distilled_average),
    "bidf_mkd": ("BiDf-MKD", bidf_mkd),
    "white_box": ("white-box recovery", white_box),
    "maml": ("MAML on real meta-train data", maml_on_real_data),
}


OURS = "bidf_mkd"
# These use recovered sets, or recover some themselves.
NEED_RECOVERY = ("single", "average", "white_box")
# The first of these that is in a comparison is what the other methods are compared with.
REFERENCES = ("zero_query", "random", "control")
USES_OUR_SETS = frozenset({"average"})  # methods that need the finished BiDf-MKD run


def default_methods(train: TrainConfig) -> list[str]:
    """Return the methods that `compare` trains with these settings unless it is asked for others.

    The no-recovery control is not among them. It is no honest bar, since pictures that ask no API
    (`zero_query`) give more than it does.
    """
    left_out = ["control", *(() if train.recovery.steps else NEED_RECOVERY)]
    return [method for method in METHODS if method not in left_out]


def check_recovered(operation: str, methods: Sequence[str], train: TrainConfig) -> None:
    """Raise InputError if a method needs recovered sets and the settings recover none."""
    needing = [method for method in NEED_RECOVERY if method in methods]
    if needing and not train.recovery.steps:
        raise InputError(
            f"{operation}: recovered sets are needed by {', '.join(needing)}, and "
            "train.recovery.steps is 0; raise it, or leave out what needs them"
        )


def recovered_sets(folder: Path, api_index: int) -> tuple[Tensor, Tensor]:
    """Read the images, in [0, 1], and scores of all sets that a run recovered from one API.

    Raises:
        InputError: `folder` holds no set of this API, or a damaged one.
    """
    files = sorted((folder / "recovered").glob(f"api_{api_index:03d}_*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no recovered set of API {api_index}")
    images, scores = zip(*map(read_images_and_scores, files))
    return torch.cat(images), torch.cat(scores)


def _distil(
    experiment: Experiment,
    module: nn.Module,
    images: Tensor,
    scores: Tensor,
    scores_kind: str,
    api_index: int,
    records: StepRecords,
) -> None:
    """Train `module` with Adam on the KD loss, over random mini-batches.

    `images` is `[N, C, H, W]`, `scores` what API number `api_index` answered, `[N, n_classes]`.
    """
    settings = experiment.config.baselines
    images, scores = images.to(experiment.device), scores.to(experiment.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
    generator = torch_generator(experiment.train.seed, "distil", api_index)
    module.train()
    for _ in range(settings.steps):
        rows = torch.randperm(len(images), generator=generator)[: settings.batch_size].to(
            images.device
        )
        optimizer.zero_grad()
        logits = module(images[rows])
        loss = ops.kd_loss(logits, scores[rows], scores_kind=scores_kind)
        loss.backward()
        optimizer.step()
        agreement = (logits.argmax(1) == scores[rows].argmax(1)).float().mean()
        records.add([{"loss": float(loss.detach()), "accuracy": float(agreement)}])
    records.write()
