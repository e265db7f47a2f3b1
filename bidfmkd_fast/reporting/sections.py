"""Say what the page of a run shows, section by section; a section without data is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bidfmkd_fast.reporting.charts import (
    Chart,
    Series,
    accuracy_chart,
    bar_chart,
    dot_chart,
)
from bidfmkd_fast.reporting.curves import learning_curves
from bidfmkd_fast.reporting.facts import RunFacts
from bidfmkd_fast.reporting.pictures import AskedPicture, Picture, asked_pictures, recovered_grids
from bidfmkd_fast.settings import flat_values
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.report import ABOUT_CONTROLS, outcome_rows
from bidfmkd_fast.training.spending import money
from bidfmkd_fast.training.tables import Table

MOST_BARS = 40  # more APIs or classes than this are a table


@dataclass
class Section:
    """A section of the page.

    `notes` stand above charts and tables, `remarks` below. `folded` is a table that is shown on a
    click, under the title `folded_title`.
    """

    anchor: str
    title: str
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    grids: list[Picture] = field(default_factory=list)
    asked: list[AskedPicture] = field(default_factory=list)
    askers: list[str] = field(default_factory=list)
    folded_title: str = ""
    folded: Table = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Return True if there is nothing to show."""
        return not (self.charts or self.tables or self.grids or self.asked or self.folded)


def sentence(facts: RunFacts) -> str:
    """Say in one sentence what the run is and what came out."""
    n_apis, config = len(facts.ledger), facts.config
    apis = f"{n_apis:,} black-box API{'' if n_apis == 1 else 's'}" if n_apis else "black-box APIs"
    how = []
    if config is not None and config.survey.n_images:
        how.append(f"a survey of {config.survey.n_images:,} procedural pictures for each API")
    if facts.sets or (config is not None and config.recovery.steps):
        how.append("images recovered from their answers")
    learned = f"a meta-model that learns from {apis}" + (f" by {' and '.join(how)}" if how else "")
    asked = f"{facts.spending.total.queries:,} queries were asked"
    return f"Run {facts.name!r} ({facts.state}): {learned}; {asked}{_result(facts)}."


def _result(facts: RunFacts) -> str:
    """Say how accurate the meta-model is; nothing if that was not measured."""
    if not facts.comparisons:
        return ""
    first = facts.comparisons[0]
    *others, last = first.accuracies[1:]
    shot = first.accuracies[0][-1]
    against = f", against {others[0][-1]} % of {others[0][0]}" if others else ""
    what = first.title.partition(" accuracy")[0]
    return f"; its {what} {shot} accuracy on unseen classes is {last[-1]} %{against}"


def sections_of(facts: RunFacts) -> list[Section]:
    """Return the sections that have something to show, from top to bottom."""
    made = [
        _accuracy(facts),
        _spending(facts),
        _outcome(facts),
        Section(
            "curves",
            "Learning curves",
            ["Seconds are those that the stages of the run have taken so far."],
            charts=learning_curves(facts),
        ),
        _agreement(facts),
        _images(facts),
        _memory(facts),
        _settings(facts),
        _environment(facts),
    ]
    return [section for section in made if not section.is_empty]


def _accuracy(facts: RunFacts) -> Section:
    section = Section("accuracy", "Accuracy")
    for number, comparison in enumerate(facts.comparisons):
        section.notes.append(f"{comparison.title}.")
        section.charts.append(accuracy_chart(comparison, f"accuracy-{number}"))
        section.tables.append(comparison.accuracies)
        if len(comparison.differences) > 1:
            section.tables.append(comparison.differences)
    if facts.comparisons:
        models = facts.comparisons[0].evaluations
        section.remarks += [text for name, text in ABOUT_CONTROLS.items() if name in models]
        section.remarks += [
            "The interval is mean ± 1.96 standard errors over the episodes: in 95 of 100 such "
            "evaluations of these very models it would hold their mean over all episodes. "
            "All models took the same episodes, so the paired differences are sharper.",
            "The interval says nothing about another seed: a single run proves nothing about the "
            "method. Repeat it with several seeds (bidfmkd compare) before you conclude anything.",
            "Batch norm sees a whole query set at once (transductive evaluation).",
        ]
    return section


def _outcome(facts: RunFacts) -> Section:
    if facts.summary is None:
        return Section("outcome", "The run")
    summary = facts.summary
    notes = []
    if summary["budget_ended"]:
        notes.append("A budget ended before every API was recovered in full.")
    notes += [f"{name} was left out: {reason}" for name, reason in summary["skipped"].items()]
    if labels_only := summary.get("labels_only"):
        notes.append(f"Labels only, so nothing is recovered from them: {', '.join(labels_only)}.")
    return Section("outcome", "The run", notes, tables=[outcome_rows(summary)])


def _spending(facts: RunFacts) -> Section:
    spent, cap = facts.spending.total, facts.spending.cap
    notes = []
    shares = [
        f"{100 * amount / most:.0f} % of the {unit}"
        for unit, amount, most in (
            ("queries", spent.queries, cap.queries),
            ("requests", spent.requests, cap.requests),
            ("cost", spent.price, cap.price),
        )
        if most
    ]
    if shares:
        notes.append(f"Used of the cap: {', '.join(shares)}.")
    ledger = facts.ledger
    names = [row.name for row in ledger]
    columns = {
        "queries": [float(row.queries) for row in ledger],
        "requests": [float(row.requests) for row in ledger],
        "cost": [row.cost for row in ledger],
    }
    section = Section("spending", "Queries, requests and cost", notes)
    section.tables.append(facts.spending.rows())
    unanswered = any(row.queries != row.answered_queries for row in ledger)
    if len(ledger) <= MOST_BARS:
        section.charts.extend(
            bar_chart(names, values, f"{unit} of the run, by API", f"spending-{unit}")
            for unit, values in columns.items()
            if any(values)
        )
    if len(ledger) > MOST_BARS or unanswered:
        section.tables.append(
            [
                ["API", "queries", "answered", "requests", "answered", "cost at most"],
                *(
                    [
                        row.name,
                        *(f"{n:,}" for n in (row.queries, row.answered_queries)),
                        *(f"{n:,}" for n in (row.requests, row.answered_requests)),
                        money(row.cost),
                    ]
                    for row in ledger
                ),
            ]
        )
    return section


def _agreement(facts: RunFacts) -> Section:
    """Show for each API how often head and API agree, and how many images came as wanted."""
    surveyed = facts.of_stage("survey")
    kinds = {"survey: head and API agree": _by_api(surveyed[-1] if surveyed else {})}
    for part, title in (("support", "support set"), ("query", "boundary query set")):
        kinds[f"{title}: as wanted"] = {
            course.api_name: course.matched for course in facts.sets if course.part == part
        }
    kinds = {kind: by_api for kind, by_api in kinds.items() if by_api}
    section = Section("agreement", "Agreement by API")
    names = list(dict.fromkeys(api for by_api in kinds.values() for api in by_api))
    if not names:
        return section
    if _by_api(surveyed[-1] if surveyed else {}):
        section.notes.append(
            "Survey: share of the pictures to which the API and the model's head for it give the "
            "same class, in the last epoch."
        )
    if facts.sets:
        section.notes.append(
            "Sets: share of the recovered images that the API classifies as wanted."
        )
    if len(names) <= MOST_BARS:
        dots = [
            Series(
                kind,
                [100 * share for share in by_api.values()],
                [names.index(api) for api in by_api],
            )
            for kind, by_api in kinds.items()
        ]
        section.charts.append(dot_chart(names, dots, "agreement, %", "agreement"))
        return section
    rows = [
        [api, *(f"{100 * by_api[api]:.0f}" if api in by_api else "" for by_api in kinds.values())]
        for api in names
    ]
    section.tables.append([["API", *(f"{kind}, %" for kind in kinds)], *rows])
    return section


def _by_api(record: dict[str, Any]) -> dict[str, float]:
    """Return the agreement of each API in a record of the survey; none in older records."""
    found = record.get("accuracy_by_api")
    shares = found.items() if isinstance(found, dict) else ()
    return {api: float(share) for api, share in shares if isinstance(share, (int, float))}


def _images(facts: RunFacts) -> Section:
    grids = recovered_grids(facts.shown)
    if grids:
        notes = [
            "A row per class. Blue frame: the API classifies the image as wanted; orange frame "
            "with a filled corner: it does not. Recovered images need not look like anything, "
            "since they are optimised for the API and not for the eye."
        ]
        return Section("images", "Recovered images", notes, grids=grids)
    if not facts.answers:
        return Section("images", "Pictures that were asked")
    notes = ["The survey's first pictures, drawn again from its seed, and what APIs answered."]
    asked = asked_pictures(facts.answers)
    askers = [answers.name for answers in facts.answers]
    return Section("images", "Pictures that were asked", notes, asked=asked, askers=askers)


def _memory(facts: RunFacts) -> Section:
    names = [f"{name} ({data_set})" if data_set else name for data_set, name in facts.memory]
    counts = list(facts.memory.values())
    section = Section("memory", "Task memory")
    if not counts:
        return section
    section.notes.append(
        f"{sum(counts):,} images of {len(counts):,} classes, from {min(counts):,} to "
        f"{max(counts):,} for each. APIs that know the same class fill the same row."
    )
    if len(counts) <= MOST_BARS:
        section.charts.append(bar_chart(names, counts, "images of each class", "memory"))
    else:
        rows = [[name, f"{count:,}"] for name, count in zip(names, counts)]
        section.tables.append([["class", "images"], *rows])
    return section


def _settings(facts: RunFacts) -> Section:
    section = Section("settings", "Settings", folded_title="All settings")
    if facts.config is None:
        return section
    held, usual = map(flat_values, (facts.config, TrainConfig()))
    differing = [
        [key, str(value), str(usual[key])] for key, value in held.items() if value != usual[key]
    ]
    if differing:
        section.tables.append([["setting", "here", "default"], *differing])
    else:
        section.notes.append("All settings are the defaults.")
    section.folded.extend([["setting", "value"], *([key, str(v)] for key, v in held.items())])
    return section


def _environment(facts: RunFacts) -> Section:
    kept = (facts.summary or {}).get("environment")
    rows = (
        [[str(name), str(value)] for name, value in kept.items()] if isinstance(kept, dict) else []
    )
    tables = [[["where the run was made", ""], *rows]] if rows else []
    return Section("environment", "Environment", tables=tables)
