"""What BiDf-MKD is compared with: learners without recovery, without meta-learning, with gradients, with real data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops
from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.black_box.ledger_file import LedgerRow, row_of
from bidfmkd_fast.data import Dataset, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.meta import MetaModel, outer_replay_step
from bidfmkd_fast.pools.pool import Pool, load_modules, load_pool
from bidfmkd_fast.recovery import recover
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded, torch_generator
from bidfmkd_fast.training import BiDfMKD, TrainConfig
from bidfmkd_fast.training.default_model import initial_module
from bidfmkd_fast.training.recovered_set import read_images_and_scores
from bidfmkd_fast.training.run_folder import META_MODEL, SUMMARY, RunFolder


@dataclass(frozen=True)
class Contest:
    """What every method is given: the same pool, data sets, settings and seed.

    `bidf_mkd` is the folder of the finished BiDf-MKD run, for those that use the sets it recovered.
    """

    pool: Pool
    datasets: Sequence[Dataset]
    config: ExperimentConfig
    bidf_mkd: Path
    device: torch.device | str = "cpu"
    progress: bool = True

    @property
    def train(self) -> TrainConfig:
        """The settings of the run; its seed is everyone's."""
        return self.config.train

    def fresh(self) -> nn.Module:
        """The meta-model that all start from."""
        specs = [entry.spec for entry in self.pool.trained]
        return initial_module(specs, self.train).to(self.device)


Method = Callable[[Contest, Path], None]


def random_initialisation(contest: Contest, folder: Path) -> None:
    """The meta-model as it starts."""
    _finish(folder, contest, contest.fresh(), 0, 0.0)


def control(contest: Contest, folder: Path) -> None:
    """The run on images of untrained generators."""
    _fit(contest, load_pool(contest.pool.folder), contest.train.control(), folder, "control")


def bidf_mkd(contest: Contest, folder: Path) -> None:
    """The method itself."""
    _fit(contest, load_pool(contest.pool.folder), contest.train, folder, "bidf_mkd")


def white_box(contest: Contest, folder: Path) -> None:
    """The same run with the APIs' true gradients: what a perfect estimate would give."""
    modules = load_modules(contest.pool.folder)
    boxes = [
        OpenBox(module, entry.spec, device=contest.device)
        for module, entry in zip(modules, contest.pool.trained, strict=True)
    ]
    _fit(contest, boxes, contest.train, folder, "white_box")


def best_api_distilled(contest: Contest, folder: Path) -> None:
    """Single-DFKD: the API most accurate on held-out images, distilled into the meta-model's
    architecture.

    It may spend what the whole run spends: as many sets are recovered from this one API as the run
    recovers from all. The classifier then starts from zero, since its classes mean nothing in
    another task; that adapts better than to keep it (Omniglot, 10 steps, 1-shot: 72 % against 67
    %).
    """
    started = time.perf_counter()
    entries, config = contest.pool.trained, contest.train
    best = max(range(len(entries)), key=lambda i: entries[i].accuracy)
    api = load_pool(contest.pool.folder)[best]
    images, scores = [], []
    with Bar(f"single: recover {api.name}", 2 * len(entries), "sets", contest.progress) as bar:
        for index in bar.over(range(2 * len(entries))):
            seed = derive_seed(config.seed, "best api", index)
            recovered = recover(
                api,
                config.n_per_class,
                None,
                config.recovery,
                seed=seed,
                device=contest.device,
                paper_compat=config.paper_compat,
            )
            images.append(api.spec.to_unit(recovered.images))
            scores.append(recovered.scores)
    module = contest.fresh()
    _distil(contest, module, torch.cat(images), torch.cat(scores), api.spec.returned_kind, best)
    _clear_classifier(module)
    _finish(
        folder,
        contest,
        module,
        api.ledger.queries,
        time.perf_counter() - started,
        [row_of(best, api)],
    )


def distilled_average(contest: Contest, folder: Path) -> None:
    """Distill-Avg: each API distilled by itself, from the same start, and the parameters averaged.

    It learns from the sets that BiDf-MKD recovered, so it has cost the same queries. The classifier
    starts from zero.
    """
    started = time.perf_counter()
    entries = contest.pool.trained
    total: dict[str, Tensor] = {}
    with Bar("average: distil", len(entries), "APIs", contest.progress) as bar:
        for index in bar.over(range(len(entries))):
            images, scores = recovered_sets(contest.bidf_mkd, index)
            module = contest.fresh()
            _distil(contest, module, images, scores, entries[index].spec.returned_kind, index)
            for name, value in module.named_parameters():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(
                    entries
                )
    module = contest.fresh()
    module.load_state_dict(total)
    _clear_classifier(module)
    queries = RunFolder(contest.bidf_mkd).summary()["queries"]
    _finish(folder, contest, module, queries, time.perf_counter() - started)


def maml_on_real_data(contest: Contest, folder: Path) -> None:
    """MAML on the real meta-train classes, data sets in turn, with the replay's settings and
    number of outer steps.
    """
    started = time.perf_counter()
    config, replay = contest.train, contest.train.replay
    rounds = -(-len(contest.pool.entries) // config.meta_batch_size)
    samplers = [
        EpisodeSampler(
            dataset,
            "meta_train",
            contest.config.pool.n_way,
            replay.n_shot,
            replay.n_query,
            derive_seed(config.seed, "maml", dataset.name),
            replay.rotations,
        )
        for dataset in contest.datasets
    ]
    module = contest.fresh()
    optimizer = torch.optim.Adam(module.parameters(), lr=replay.outer_lr)
    n_steps = replay.final_steps + replay.steps_per_round * (rounds - 1)
    with Bar("maml: train", n_steps, "steps", contest.progress) as bar:
        for step in bar.over(range(n_steps)):
            indices = range(step * config.meta_batch_size, (step + 1) * config.meta_batch_size)
            episodes = [
                samplers[index % len(samplers)].episode(index // len(samplers)) for index in indices
            ]
            with seeded(config.seed, "maml", step):
                outer_replay_step(
                    module,
                    optimizer,
                    episodes,
                    replay.inner,
                )
    _finish(folder, contest, module, 0, time.perf_counter() - started)


# In the order of the table: without recovery, without meta-learning, the method, the ceilings.
METHODS: dict[str, tuple[str, Method]] = {
    "random": ("random initialisation", random_initialisation),
    "control": ("no-recovery control", control),
    "single": ("best API distilled (Single-DFKD)", best_api_distilled),
    "average": ("Distill-Avg", distilled_average),
    "bidf_mkd": ("BiDf-MKD", bidf_mkd),
    "white_box": ("white-box recovery", white_box),
    "maml": ("MAML on real meta-train data", maml_on_real_data),
}


def recovered_sets(folder: Path, api_index: int) -> tuple[Tensor, Tensor]:
    """Images (unit range) and scores of all sets that the run in `folder` recovered from one API.

    Raises InputError if there is none, or one is damaged.
    """
    files = sorted((folder / "recovered").glob(f"api_{api_index:03d}_*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no recovered set of API {api_index}")
    images, scores = zip(*map(read_images_and_scores, files))
    return torch.cat(images), torch.cat(scores)


def _fit(
    contest: Contest, apis: Sequence[BlackBox], config: TrainConfig, folder: Path, label: str
) -> None:
    learner = BiDfMKD(apis, config=config, device=contest.device)
    learner.label = label
    learner.fit(folder, contest.progress)


def _distil(
    contest: Contest,
    module: nn.Module,
    images: Tensor,
    scores: Tensor,
    scores_kind: str,
    api_index: int,
) -> None:
    """Adam on the KD loss over random mini-batches of images `[N, C, H, W]` and their scores `[N,
    n_classes]`.
    """
    settings = contest.config.baselines
    images, scores = images.to(contest.device), scores.to(contest.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
    generator = torch_generator(contest.train.seed, "distil", api_index)
    module.train()
    for _ in range(settings.steps):
        rows = torch.randperm(len(images), generator=generator)[: settings.batch_size].to(
            images.device
        )
        optimizer.zero_grad()
        ops.kd_loss(module(images[rows]), scores[rows], scores_kind=scores_kind).backward()
        optimizer.step()


@torch.no_grad()
def _clear_classifier(module: nn.Module) -> None:
    assert isinstance(module.classifier, nn.Linear)
    module.classifier.weight.zero_()
    module.classifier.bias.zero_()


def _finish(
    folder: Path,
    contest: Contest,
    module: nn.Module,
    queries: int,
    seconds: float,
    ledger: Sequence[LedgerRow] = (),
) -> None:
    """Write a finished method; `queries` may be another method's, `ledger` is what this one has
    asked by itself.
    """
    config = contest.train
    rows = [asdict(row) for row in ledger]
    summary = {"queries": queries, "seconds": {"training": round(seconds, 3)}, "ledger": rows}
    write_json(folder / SUMMARY, summary)
    meta_model = MetaModel(
        module, adapt_steps=config.adapt_steps, adapt_learning_rate=config.adapt_lr
    )
    meta_model.save(folder / META_MODEL)
