"""Write the model card of a meta-model: what it learned from, what that cost, how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.files.tensors import read_tensors
from bidfmkd_fast.files.yaml_files import dump_yaml, read_mapping
from bidfmkd_fast.models import model_arguments, model_summary
from bidfmkd_fast.secrets import scrub, scrubbed

if TYPE_CHECKING:
    from bidfmkd_fast.meta.evaluate import Evaluation
    from bidfmkd_fast.meta.model import MetaModel
    from bidfmkd_fast.training.run import Run

Facts = dict[str, Any]
TAGS = ["bidfmkd_fast", "meta-learning", "few-shot", "black-box", "data-free"]
_MOST_NAMES = 30  # names of APIs that a card lists


def facts_of_run(operation: str, run: Run | str | Path, model: MetaModel) -> Facts:
    """Return what a card says of a run: names of APIs and data sets, what was asked, settings.

    Args:
        operation: opens the message of an error.
        run: a `Run`, or the folder of a finished one.
        model: the meta-model of the card, which must be that of the run.

    Raises:
        InputError: the folder holds no finished run or is damaged, or the run has other weights.
    """
    if isinstance(run, (str, Path)):
        weights, facts = _of_folder(operation, Path(run).expanduser())
    else:
        try:
            weights, facts = run.meta_model.module.state_dict(), _of_run(run)
        except AttributeError:
            raise InputTypeError(
                f"{operation}: run must be a Run or the folder of a run; got {type(run).__name__}"
            ) from None
    if not _equal(weights, model.module.state_dict()):
        raise InputError(
            f"{operation}: the run has another meta-model; give the run that made this one"
        )
    return dict(scrubbed(facts))


def _of_run(run: Run) -> Facts:
    data_sets = {data_set for data_set, _ in run.memory.classes if data_set}
    return {
        "apis": [row.name for row in run.ledger],
        "data_sets": sorted(data_sets),
        "queries": run.queries,
        "requests": run.requests,
        "survey_pictures": run.config.survey.n_images,
        "recovery_steps": run.config.recovery.steps,
        "seed": run.config.seed,
    }


def _of_folder(operation: str, folder: Path) -> tuple[dict[str, Tensor], Facts]:
    """Read weights and facts of the finished run in a folder."""
    files = {name: folder / name for name in ("meta_model.safetensors", "summary.json")}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise InputError(
            f"{operation}: {folder} holds no finished run, since {missing[0]} is missing; give a "
            "folder that `bidfmkd train` or fit(run_dir) wrote"
        )
    weights, _ = read_tensors(files["meta_model.safetensors"])
    summary = read_json(files["summary.json"], operation)
    config = read_mapping(folder / "config.yaml", operation)
    source = folder / "source.yaml"  # only the command `train` writes it
    known = read_mapping(source, operation) if source.is_file() else {}
    try:
        return weights, {
            "apis": [row["name"] for row in summary.get("ledger", [])],
            "data_sets": sorted({entry["name"] for entry in known.get("data_sets", [])}),
            "queries": int(summary["queries"]),
            "requests": int(summary["requests"]),
            # Folders of version 0.1 know no survey.
            "survey_pictures": config.get("survey", {}).get("n_images", 0),
            "recovery_steps": config["recovery"]["steps"],
            "seed": config["seed"],
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{operation}: the run in {folder} is damaged: {error!r}") from None


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return True if two modules hold the same weights under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def evaluations_of(
    operation: str, evaluation: Evaluation | Sequence[Evaluation] | None
) -> list[Facts]:
    """Return protocol and accuracy of each evaluation as plain values.

    Raises:
        InputTypeError: something else was given.
    """
    given = evaluation if isinstance(evaluation, Sequence) else [evaluation]
    names = ("dataset", "split", "n_way", "n_shot", "n_query", "seed", "steps", "mean", "ci95")
    found = []
    for each in given if evaluation is not None else ():
        try:
            values = {name: getattr(each, name) for name in names}
            values["n_episodes"] = len(each.per_episode)  # type: ignore[union-attr]
        except AttributeError:
            raise InputTypeError(
                f"{operation}: evaluation must be what bf.evaluate returned, or a list of those; "
                f"got {type(each).__name__}"
            ) from None
        found.append(dict(scrubbed(values)))
    return found


def card_text(
    model: MetaModel,
    name: str,
    facts: Facts | None,
    evaluations: Sequence[Facts],
    licence: str | None,
) -> str:
    """Return the card as Markdown with a header in YAML, as the Hugging Face Hub reads it."""
    header: Facts = {"library_name": "bidfmkd_fast", "pipeline_tag": "image-classification"}
    header |= {"tags": TAGS} | ({"license": licence} if licence else {})
    lines = [
        *("---", dump_yaml(header).rstrip(), "---", "", f"# {_plain(name)}", ""),
        f"A meta-model for few-shot image classification: {model_summary(model.module)}. It adapts "
        f"to a new task of 2 to 1,000 classes, from a few pictures of each, in "
        f"{model.adapt_steps} gradient steps with a learning rate of "
        f"{model.adapt_learning_rate:g}.",
        "",
    ]
    if facts is not None:
        lines += ["## What it learned from", "", *_sources(facts), ""]
    if evaluations:
        lines += ["## Accuracy", "", *_accuracies(evaluations), ""]
    own = model_arguments(model.module) is None
    place = f'"{_plain(name)}", module=module' if own else f'"{_plain(name)}"'
    lines += ["## Use", "", "```python", "import bidfmkd_fast as bf", ""]
    lines += [
        f"meta_model = bf.MetaModel.from_pretrained({place})",
        'classifier = meta_model.adapt("support/")  # a folder of pictures per class',
        'classifier.predict("new/")',
        "```",
        "",
    ]
    if own:
        kind = type(model.module).__name__
        lines += [f"`module` is a {kind} as the one that was saved; its weights are replaced.", ""]
    return scrub("\n".join(lines))


def _sources(facts: Facts) -> list[str]:
    names = [f"`{_plain(name).replace('`', '')}`" for name in facts["apis"]]
    listed = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        listed += f" and {len(names) - _MOST_NAMES:,} more"
    rows = [
        ("black-box APIs", f"{len(names):,}: {listed}" if names else "not known"),
        ("data sets that they know", ", ".join(map(_plain, facts["data_sets"])) or "not known"),
        ("queries asked of all together", f"{facts['queries']:,}"),
        ("requests", f"{facts['requests']:,}"),
        ("procedural pictures of the survey", f"{facts['survey_pictures']:,}"),
        ("recovery steps per set", f"{facts['recovery_steps']:,}"),
        ("seed", str(facts["seed"])),
    ]
    text = (
        "It was learned from the answers of black-box APIs (BiDf-MKD, Hu et al., ICML 2023, arXiv "
        "2305.18413), without their weights and without the pictures that they were trained on."
    )
    return [text, "", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _accuracies(evaluations: Sequence[Facts]) -> list[str]:
    lines = [
        "| data set | split | task | episodes (seed) | queries per class | steps | accuracy in % |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for each in evaluations:
        cells = [
            _plain(each["dataset"]),
            each["split"],
            f"{each['n_way']}-way {each['n_shot']}-shot",
            f"{each['n_episodes']:,} ({each['seed']})",
            str(each["n_query"]),
            str(each["steps"]),
            f"{100 * each['mean']:.2f} ± {100 * each['ci95']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = "± is the half width of the 95 % confidence interval over the episodes."
    return [*lines, "", note]


def _plain(text: object) -> str:
    """Return a name on one line, without what would break a table or a quotation."""
    return " ".join(str(text).replace("|", "/").replace('"', "'").split())
