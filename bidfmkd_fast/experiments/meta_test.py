"""Train a method of an experiment and meta-test its meta-model; each result is kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.experiment import Experiment
from bidfmkd_fast.experiments.folder import made_once
from bidfmkd_fast.experiments.kept_evaluations import KeptEvaluations
from bidfmkd_fast.experiments.methods import METHODS, SETS
from bidfmkd_fast.files.atomic import write_exact
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.meta import Evaluation, MetaModel, evaluate
from bidfmkd_fast.meta.evaluate import mean_and_ci95
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.training.run_folder import CHECKPOINTS, CONFIG, META_MODEL, STAND_INS, RunFolder

EVALUATION = "evaluation.json"
UNFINISHED = "evaluations.jsonl"  # of a meta-test that is under way


@dataclass(frozen=True, eq=False)
class MetaTest:
    """The accuracy of a meta-model on one data set with one number of shots.

    `learning_rate` is the rate of the adaptation, chosen on meta_val or taken from the run. `own`
    is the accuracy on the same episodes with the rate of the run, for which no real image was used;
    None in files that version 0.1 wrote, or where no rate is chosen.
    """

    learning_rate: float
    evaluation: Evaluation
    own: Evaluation | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """One method under one seed.

    `meta_tests` has one entry per data set and number of shots. `queries` are those that the
    method needs, and `seconds` the time of its training.
    """

    meta_tests: list[MetaTest]
    queries: int
    seconds: float

    @property
    def at_own_rate(self) -> Result | None:
        """Return the same result with the rate of the run, or None if that is not known."""
        tests = [MetaTest(test.learning_rate, test.own) for test in self.meta_tests if test.own]
        return replace(self, meta_tests=tests) if len(tests) == len(self.meta_tests) else None


Results = Mapping[str, Sequence[Result]]  # by method; one result per seed


def train_and_test(method: str, experiment: Experiment, folder: Path) -> Result:
    """Train `method` in `folder` and meta-test it; read from the folder what is done already."""
    _, train = METHODS[method]
    scratch = (CHECKPOINTS, STAND_INS, SETS)
    made_once(folder, lambda partial: train(experiment, partial), META_MODEL, [CONFIG], scratch)

    kept = KeptEvaluations(folder / UNFINISHED)

    def make() -> list[MetaTest]:
        meta_model = MetaModel.load(folder / META_MODEL)
        meta_model.module.to(experiment.device)
        return meta_test(meta_model, experiment, kept)

    summary, tests = RunFolder(folder).summary(), meta_tests_once(folder, make)
    kept.remove()
    return Result(tests, summary["queries"], sum(summary["seconds"].values()))


def meta_test(
    meta_model: MetaModel, experiment: Experiment, kept: KeptEvaluations | None = None
) -> list[MetaTest]:
    """Meta-test a model on every data set with every number of shots of the experiment.

    Evaluations that are in `kept` are taken from there, and others are added. If the settings give
    learning rates for the adaptation, the best one on meta_val is taken, and the rate of the run is
    tested as well.
    """
    config, tests = experiment.config.evaluation, []
    kept = KeptEvaluations(None) if kept is None else kept
    for dataset in experiment.datasets:
        for n_shot in config.n_shots:

            def accuracy(
                rate: float,
                split: str,
                n_episodes: int,
                dataset: Dataset = dataset,
                n_shot: int = n_shot,
            ) -> Evaluation:
                adapting = MetaModel(
                    meta_model.module, adapt_steps=meta_model.adapt_steps, adapt_learning_rate=rate
                )
                make = partial(
                    evaluate,
                    adapting,
                    dataset,
                    n_way=experiment.config.pool.n_way,
                    n_shot=n_shot,
                    n_query=config.n_query,
                    n_episodes=n_episodes,
                    split=split,
                    seed=experiment.episode_seed,
                    progress=experiment.progress,
                )
                return kept.once(make, dataset.name, n_shot, rate, split, n_episodes)

            best = own_rate = meta_model.adapt_learning_rate
            if config.adapt_lrs:
                means = {
                    rate: accuracy(rate, "meta_val", config.n_val_episodes).mean
                    for rate in config.adapt_lrs
                }
                best = max(means, key=lambda rate: means[rate])
            chosen = accuracy(best, config.split, config.n_episodes)
            own = chosen
            if best != own_rate:
                own = accuracy(own_rate, config.split, config.n_episodes)
            tests.append(MetaTest(best, chosen, own if config.adapt_lrs else None))
    return tests


def meta_tests_once(folder: Path, make: Callable[[], list[MetaTest]]) -> list[MetaTest]:
    """Return the meta-tests in `folder/evaluation.json`; if there is no such file, make it."""
    file = folder / EVALUATION
    if not file.is_file():
        write_exact(file, json.dumps(scrubbed([_to_record(test) for test in make()])))
    return kept_meta_tests(folder)


def kept_meta_tests(folder: Path) -> list[MetaTest]:
    """Return the meta-tests in `folder/evaluation.json`; InputError if the file is damaged."""
    file = folder / EVALUATION
    records = read_json(file, "evaluation")
    try:
        return [_from_record(record) for record in records]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"evaluation: {file} is damaged ({error!r}); remove it to meta-test again"
        ) from None


def share_episodes(evaluations: Sequence[Evaluation]) -> bool:
    """Return True if evaluations of one data set and number of shots are of the same episodes."""
    return len({(evaluation.seed, len(evaluation.per_episode)) for evaluation in evaluations}) == 1


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return one evaluation over the results of several seeds.

    If the seeds share their episodes, the accuracy on an episode is the mean over the seeds.
    Otherwise the episodes of all seeds are put together.
    """
    accuracies = [evaluation.per_episode for evaluation in evaluations]
    # The results of several seeds on the same episode depend on each other: an episode that is hard
    # is hard for all. Counted as separate episodes, they would make the interval too narrow.
    shared = share_episodes(evaluations)
    per_episode = torch.stack(accuracies).mean(0) if shared else torch.cat(accuracies)
    mean, ci95 = mean_and_ci95(per_episode)
    return replace(evaluations[0], mean=mean, ci95=ci95, per_episode=per_episode)


def _to_record(test: MetaTest) -> dict[str, Any]:
    record = {"learning_rate": test.learning_rate, **test.evaluation.to_record()}
    return record if test.own is None else {**record, "own_rate": test.own.to_record()}


def _from_record(record: dict[str, Any]) -> MetaTest:
    values = dict(record)
    rate, own = values.pop("learning_rate"), values.pop("own_rate", None)
    return MetaTest(
        rate, Evaluation.from_record(values), Evaluation.from_record(own) if own else None
    )
