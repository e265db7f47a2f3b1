"""Check that a box written from the documentation of `BlackBox` alone serves every use of a box."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.black_box.probe import PROBE_QUERIES, probe
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted
from bidfmkd_fast.training import fit_with_control
from bidfmkd_fast.training.plan import plan

SHAPE, N_CLASSES = (1, 28, 28), 3


class TableBox(bf.BlackBox):
    """Scores images by a matrix: the example in the documentation of `BlackBox`."""

    def __init__(self, table: Tensor, spec: bf.APISpec) -> None:
        super().__init__(spec)
        self._table = table

    def score(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self._table


class SlowBox(TableBox):
    """Overrides all that the documentation lets a subclass override: two requests an image."""

    is_service = True

    def requests_for(self, n_images: int) -> int:
        return 2 * n_images


def table_box(
    kind: type[TableBox] = TableBox, max_batch: int | None = None, price: float = 0.0
) -> TableBox:
    table = torch.randn(28 * 28, N_CLASSES, generator=torch.Generator().manual_seed(5)) / 28
    spec = bf.APISpec(
        N_CLASSES, SHAPE, name="table", max_batch=max_batch, price_per_1000=price, data_set="tables"
    )
    return kind(table, spec)


def test_a_call_checks_pays_and_counts_what_score_does_not() -> None:
    api = table_box(max_batch=4, price=2.0)
    images = torch.rand(10, *SHAPE)
    scores = api(images)
    torch.testing.assert_close(scores, api.score(images))
    assert (api.ledger.queries, api.ledger.requests, api.ledger.cost) == (10, 3, 0.02)
    assert (api.requests_for(10), api.price_of(10)) == (3, 0.02)
    api.budget = bf.Budget(max_queries=12)
    api.reserve(5, 2)
    with pytest.raises(BudgetExhausted):
        api(images)
    assert api.ledger.queries == 10


def test_an_override_of_requests_for_is_what_is_counted_and_paid() -> None:
    api = table_box(SlowBox)
    api.budget = bf.Budget(max_requests=9)
    api(torch.rand(4, *SHAPE))
    assert (api.ledger.requests, api.budget.requests) == (8, 8)
    with pytest.raises(BudgetExhausted):
        api(torch.rand(1, *SHAPE))


def test_the_first_answers_are_compared_with_the_spec() -> None:
    spec = bf.APISpec(N_CLASSES, SHAPE, scores_kind="probabilities")
    wrong = TableBox(torch.ones(28 * 28, N_CLASSES), spec)
    with pytest.raises(BadAnswer, match="does it give logits?"):
        wrong(torch.rand(4, *SHAPE))


def test_a_box_of_ones_own_is_recovered_from() -> None:
    api = table_box()
    config = bf.RecoveryConfig(steps=2, num_directions=3, generator_width=4, latent_dim=8)
    recovered = bf.recover(api, 2, config=config)
    assert recovered.complete and recovered.images.shape == (6, *SHAPE)
    assert api.ledger.queries == 2 * 4 * 6


def test_a_box_of_ones_own_is_probed() -> None:
    api = table_box()
    report = probe(api)
    assert report.problem is None and report.scores_kind == "logits"
    assert report.queries == api.ledger.queries == PROBE_QUERIES


@pytest.mark.parametrize("kind", [TableBox, SlowBox])
def test_a_box_of_ones_own_is_planned_and_trained_on(kind: type[TableBox], tmp_path: Path) -> None:
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=0),
        n_per_class=2,
        meta_batch_size=1,
        meta_model_width=4,
        recovery=bf.RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
        distillation=bf.DistillationConfig(inner_steps=1),
        replay=bf.ReplayConfig(final_steps=1, n_query=1, inner_steps=1),
    )
    planned = plan([table_box(kind)], config, controls=True)
    api = table_box(kind)
    run, control = fit_with_control([api], tmp_path / "run", config, progress=False)
    assert run.complete and control.complete
    assert planned.queries == api.ledger.queries == run.queries + control.queries
    assert api.ledger.requests == planned.total.requests


def private_names(tree: ast.AST, of_self: bool) -> list[ast.Attribute]:
    """Return the uses of `x._name` in a module, where x is `self` or where it is anything else."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and (ast.unparse(node.value) in ("self", "super()")) == of_self
    ]


def test_no_module_outside_of_black_box_touches_private_names_of_a_box() -> None:
    package = Path(bf.__file__).parent
    modules = {
        path: ast.parse(path.read_text())
        for root in (package, package.parent / "benchmarks", package.parent / "examples")
        for path in root.rglob("*.py")
    }
    of_boxes = {
        node.attr
        for path, tree in modules.items()
        if package / "black_box" in path.parents
        for node in private_names(tree, of_self=True)
    }
    assert {"_ask", "_ledger", "_spec"} <= of_boxes
    touched = []
    for path, tree in modules.items():
        if package / "black_box" in path.parents:
            continue
        own = {node.attr for node in private_names(tree, of_self=True)}
        touched += [
            f"{path}:{node.lineno}: {ast.unparse(node)}"
            for node in private_names(tree, of_self=False)
            if node.attr in of_boxes - own
        ]
    assert not touched
