"""Evaluate several models on the same episodes, and compare them by paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidfmkd_fast.data import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.meta import Evaluation, MetaModel, evaluate, paired_difference
from bidfmkd_fast.training.run_folder import META_MODEL, RunFolder
from bidfmkd_fast.training.tables import Table, text_table

RANDOM, CONTROL, LEARNED = "random initialisation", "no-recovery control", "BiDf-MKD"
ZERO_QUERY = "zero_query: pictures alone"
ACCURACY = "accuracy.json"  # in the folder of a run: what the last `evaluate` has found


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models evaluated on the same episodes.

    Attributes:
        evaluations: `evaluations[model][n_shot]`, with the model of interest last.
    """

    evaluations: Mapping[str, Mapping[int, Evaluation]]

    @property
    def title(self) -> str:
        """Say in one line what was measured."""
        some = next(iter(next(iter(self.evaluations.values())).values()))
        return (
            f"{some.n_way}-way accuracy on {len(some.per_episode)} episodes of unseen classes "
            f"({some.dataset} {some.split}), in %, with 95 % CI"
        )

    @property
    def accuracies(self) -> Table:
        """Return a table with a row per model and a column per number of shots."""
        rows = [
            [model, *(_percent(e.mean, e.ci95) for e in by_shot.values())]
            for model, by_shot in self.evaluations.items()
        ]
        return [self._header("model"), *rows]

    @property
    def differences(self) -> Table:
        """Return a table of the last model minus each other, in points, paired by episode.

        With a single model it holds the header only.
        """
        *others, last = self.evaluations
        rows = []
        for other in others:
            pairs = zip(
                self.evaluations[last].values(), self.evaluations[other].values(), strict=True
            )
            differences = [paired_difference(a, b) for a, b in pairs]
            cells = [_percent(d.mean, d.ci95, sign="+") for d in differences]
            rows.append([f"{last} less {other}", *cells])
        return [self._header("difference paired by episode"), *rows]

    def __str__(self) -> str:
        parts = [self.title, "", text_table(self.accuracies)]
        if len(self.differences) > 1:
            parts += ["", text_table(self.differences)]
        return "\n".join(parts)

    def _header(self, first: str) -> list[str]:
        shots = next(iter(self.evaluations.values()))
        return [first, *(f"{n_shot}-shot" for n_shot in shots)]


def controls_of(folder: RunFolder) -> dict[str, RunFolder]:
    """Return the controls that are beside a run, by the names that tables give them."""
    places = {ZERO_QUERY: folder.path / "zero_query", CONTROL: folder.path / "control"}
    made = {name: RunFolder(place) for name, place in places.items()}
    return {name: held for name, held in made.items() if (held.path / META_MODEL).is_file()}


def compare(
    models: Mapping[str, MetaModel],
    dataset: Dataset,
    *,
    n_shots: Sequence[int] = (1, 5),
    **options: Any,
) -> Comparison:
    """Evaluate every model on the same episodes, for every number of shots.

    Args:
        models: the models by name, with the model of interest last.
        dataset: where the episodes come from.
        n_shots: numbers of support images per class.
        options: everything else that `evaluate` takes, such as `n_episodes`.

    Raises:
        InputError: there is no model or no number of shots; or as `evaluate` raises.
    """
    if not models or not n_shots:
        raise InputError("compare: give at least one model and one n_shot")
    return Comparison(
        {
            name: {n_shot: evaluate(model, dataset, n_shot=n_shot, **options) for n_shot in n_shots}
            for name, model in models.items()
        }
    )


def write_comparisons(folder: Path, comparisons: Sequence[Comparison]) -> None:
    """Keep comparisons, with the accuracy on every episode, in `accuracy.json` of a run folder.

    Those of an earlier evaluation are replaced, as in the report of the run.
    """
    kept = [
        {
            model: [evaluation.to_record() for evaluation in by_shot.values()]
            for model, by_shot in comparison.evaluations.items()
        }
        for comparison in comparisons
    ]
    write_json(folder / ACCURACY, kept)


def read_comparisons(folder: Path) -> list[Comparison]:
    """Read what `write_comparisons` kept; an empty list if there is no such file.

    Raises InputError if the file is damaged.
    """
    file = folder / ACCURACY
    if not file.is_file():
        return []
    kept, found = read_json(file, "run folder"), []
    try:
        for models in kept:
            evaluations = {
                model: {
                    evaluation.n_shot: evaluation
                    for evaluation in map(Evaluation.from_record, records)
                }
                for model, records in models.items()
            }
            comparison = Comparison(evaluations)
            # These fail on a file that lacks models or episodes.
            _ = comparison.title, comparison.accuracies, comparison.differences
            found.append(comparison)
    except (TypeError, ValueError, KeyError, AttributeError, StopIteration, InputError) as error:
        raise InputError(
            f"run folder: {file} is damaged ({type(error).__name__}: {error}); remove it and run "
            "`bidfmkd evaluate` again"
        ) from None
    return found


def _percent(mean: float, ci95: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f} ± {100 * ci95:.2f}"
