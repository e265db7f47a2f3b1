"""Find out with a few queries which kind of scores an API gives, for a spec that leaves it open."""

from __future__ import annotations

from dataclasses import replace

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.first_answers import FirstAnswers
from bidfmkd_fast.black_box.probe import sample_images
from bidfmkd_fast.black_box.signature import decimals_of, kind_of
from bidfmkd_fast.black_box.spec import APISpec

KIND_QUERIES = 8
# One decimal is also what the scores of an overconfident model show, all of them 0 or 1 to the last
# digit of float32.
_LEAST_DECIMALS = 2


def look_at_scores(api: BlackBox) -> tuple[APISpec, list[str]]:
    """Ask an API about `KIND_QUERIES` random patterns for the kind and the decimals of its scores.

    A spec that states another kind than logits, as a server may have said, keeps it: logits can be
    any numbers, so that they are also what a spec says of an unknown kind.

    Returns:
        the spec with the `scores_kind` and `decimals` that the scores look like, and what looks
        wrong in them (see `FirstAnswers`).

    Raises:
        BudgetExhausted, BadAnswer, APIUnavailable: as a call of the box.
    """
    images = sample_images(api, KIND_QUERIES, seed=0)
    # The scores are compared with the spec below, once their kind is known.
    api.first_answers, kept = FirstAnswers(api.spec, silent=True), api.first_answers
    try:
        scores = api(images)
    finally:
        api.first_answers = kept
    stated, decimals = api.spec.scores_kind, decimals_of(scores)
    kind = kind_of(scores) if stated == "logits" else stated
    if kind == "labels" or decimals is None or decimals < _LEAST_DECIMALS:
        decimals = None
    spec = replace(api.spec, scores_kind=kind, decimals=decimals)
    return spec, [text for _, text in FirstAnswers(spec).look(images, scores)]
