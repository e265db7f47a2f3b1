"""`bidfmkd compare`: chosen methods from the same start, on the same pool and the same episodes, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import (
    ExperimentConfig,
    Judged,
    judge,
    judged_once,
    made_once,
    merged,
    open_folder,
    pool_of,
)
from bidfmkd_fast.experiments.methods import METHODS, Contest
from bidfmkd_fast.files.atomic import check_writable, make_folder, write_text
from bidfmkd_fast.files.folder_lock import FolderLock
from bidfmkd_fast.meta import Evaluation, MetaModel, paired_difference
from bidfmkd_fast.runtime.machine import machine_text
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.settings import plain_values
from bidfmkd_fast.training.run_folder import CONFIG, META_MODEL, RunFolder
from bidfmkd_fast.training.tables import Table, markdown_table, text_table

CONTROL = "control"
REPORT = "comparison.md"


@dataclass(frozen=True, eq=False)
class Result:
    """One method under one seed: its accuracies, its queries and the seconds it learned."""

    judged: list[Judged]
    queries: int
    seconds: float


Results = Mapping[str, Sequence[Result]]  # of each method, one per seed


def run_comparison(
    config: ExperimentConfig,
    out: str | Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> str:
    """Train and judge every method under every seed in the folder `out`; the tables, also in
    `out/comparison.md`.

    A folder that was cut off goes on: no API, method or evaluation that is finished is made twice.
    The control is always among the methods; with other methods or seeds the same folder grows.
    Raises InputError for unknown methods, settings that the data sets cannot serve (before anything
    is trained), a folder of another experiment, of one that is under way, or that cannot be written
    to.
    """
    chosen = _chosen(methods)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"compare: seeds must be one or more different numbers; got {list(seeds)}")
    with FolderLock(out):
        datasets = config.check()
        folder = open_folder(out, plain_values(config.with_seed(0)))
        check_writable(folder / REPORT)
        return _compare_in(folder, config, datasets, chosen, seeds, device, progress)


def _compare_in(
    folder: Path,
    config: ExperimentConfig,
    datasets: Sequence[Dataset],
    chosen: Sequence[str],
    seeds: Sequence[int],
    device: torch.device | str,
    progress: bool,
) -> str:
    results: dict[str, list[Result]] = {method: [] for method in chosen}
    accuracies: list[float] = []
    for seed in seeds:
        seeded = config.with_seed(seed)
        pool = pool_of(folder, config.pool, datasets, seed, progress)
        accuracies.append(pool.accuracy)
        at = folder / f"seed_{seed}"
        contest = Contest(pool, datasets, seeded, at / "bidf_mkd", device, progress)
        make_folder(at)
        # Those that use what BiDf-MKD recovered come after it.
        in_order = sorted(chosen, key=lambda name: name == "average")
        with Bar(f"compare, seed {seed}", len(in_order), "methods", progress) as bar:
            for method in bar.over(in_order):
                results[method].append(learn_and_judge(method, contest, at / method))
    title = (
        f"{len(pool.entries)} APIs, {', '.join(config.pool.data_sets)}, scenario {config.pool.scenario}; "
        f"{100 * sum(accuracies) / len(accuracies):.1f} % accurate on held-out images of their own classes"
    )
    parts = [title, *_told(results, seeds, text_table)]
    head = (
        f"# Comparison\n\n{title}.\n\nseeds {', '.join(map(str, seeds))}; {machine_text(device)}.\n"
    )
    report = "\n\n".join([head, *_told(results, seeds, markdown_table)])
    write_text(folder / REPORT, report + "\n")
    return "\n\n".join(parts)


def _chosen(methods: Sequence[str]) -> list[str]:
    for method in methods:
        if method not in METHODS:
            raise InputError(f"compare: methods must be among {', '.join(METHODS)}; got {method!r}")
    if "average" in methods and "bidf_mkd" not in methods:
        raise InputError(
            "compare: 'average' distils the sets that 'bidf_mkd' recovers; add bidf_mkd to the methods"
        )
    return [method for method in METHODS if method in methods or method == CONTROL]


def learn_and_judge(method: str, contest: Contest, folder: Path) -> Result:
    """A method's result in `folder`; what is there already is not made again."""
    _, train = METHODS[method]
    made_once(folder, lambda partial: train(contest, partial), META_MODEL, goes_on=CONFIG)
    config = contest.config

    def make() -> list[Judged]:
        meta_model = MetaModel.load(folder / META_MODEL)
        meta_model.module.to(contest.device)
        return judge(
            meta_model,
            contest.datasets,
            config.evaluation,
            config.pool.n_way,
            config.train.seed,
            contest.progress,
        )

    summary = RunFolder(folder).summary()
    return Result(judged_once(folder, make), summary["queries"], sum(summary["seconds"].values()))


def tables(results: Results, seeds: Sequence[int]) -> list[tuple[str, Table]]:
    """Titles and tables: accuracies with differences to the control, BiDf-MKD less each, and
    differences by seed.
    """
    told = []
    first = next(iter(results.values()))[0].judged
    for data_set in dict.fromkeys(one.evaluation.dataset for one in first):
        at = [position for position, one in enumerate(first) if one.evaluation.dataset == data_set]
        evaluations = {
            method: [
                merged([result.judged[position].evaluation for result in its]) for position in at
            ]
            for method, its in results.items()
        }
        one = evaluations[CONTROL][0]
        shots = [f"{evaluation.n_shot}-shot" for evaluation in evaluations[CONTROL]]
        title = (
            f"{one.n_way}-way accuracy in %, 95 % CI, {len(one.per_episode)} episodes of unseen classes ({data_set} "
            f"{one.split}) over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; differences paired by episode"
        )
        rows = [
            [
                "method",
                *shots,
                *(f"{shot} less control" for shot in shots),
                "queries",
                "seconds",
                "adapt lr",
            ]
        ]
        for method, its in evaluations.items():
            rows.append(
                [
                    METHODS[method][0],
                    *(f"{100 * e.mean:.2f} ± {100 * e.ci95:.2f}" for e in its),
                    *(
                        difference_text(e, c) if method != CONTROL else ""
                        for e, c in zip(its, evaluations[CONTROL])
                    ),
                    f"{sum(result.queries for result in results[method]) // len(seeds):,}",
                    f"{sum(result.seconds for result in results[method]) / len(seeds):,.0f}",
                    rates_text(results[method], at),
                ]
            )
        told.append((title, rows))
        if "bidf_mkd" in evaluations and len(evaluations) > 2:
            ours = evaluations["bidf_mkd"]
            rows = [
                [
                    f"{METHODS['bidf_mkd'][0]} less {METHODS[method][0]}",
                    *map(difference_text, ours, its),
                ]
                for method, its in evaluations.items()
                if method != "bidf_mkd"
            ]
            told.append((f"paired differences, {data_set}", [["points", *shots], *rows]))
        if len(seeds) > 1:
            rows = [
                ["less the control", *(f"seed {seed}, {shot}" for seed in seeds for shot in shots)]
            ]
            for method in evaluations:
                pairs = zip(_of_seeds(results[method], at), _of_seeds(results[CONTROL], at))
                if method != CONTROL:
                    rows.append([METHODS[method][0], *(difference_text(a, b) for a, b in pairs)])
            told.append((f"by seed, {data_set}", rows))
    return told


def _of_seeds(results: Sequence[Result], positions: Sequence[int]) -> list[Evaluation]:
    return [result.judged[position].evaluation for result in results for position in positions]


def _told(results: Results, seeds: Sequence[int], draw: Callable[[Table], str]) -> list[str]:
    return [f"{title}\n\n{draw(rows)}" for title, rows in tables(results, seeds)]


def difference_text(a: Evaluation, b: Evaluation) -> str:
    difference = paired_difference(a, b)
    return f"{100 * difference.mean:+.2f} ± {100 * difference.ci95:.2f}"


def rates_text(results: Sequence[Result], positions: Sequence[int]) -> str:
    """The learning rates that were chosen: those of the seeds with commas, those of the shots with
    slashes.
    """
    return " / ".join(
        ", ".join(dict.fromkeys(f"{result.judged[position].learning_rate:g}" for result in results))
        for position in positions
    )
