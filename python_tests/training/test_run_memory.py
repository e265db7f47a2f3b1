"""Check that a run that the memory cannot hold is refused before any API is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery import RecoveryConfig
from bidfmkd_fast.runtime import memory
from bidfmkd_fast.training import BiDfMKD, ReplayConfig, TrainConfig
from bidfmkd_fast.training.config import NO_SURVEY
from bidfmkd_fast.training.plan import plan

N_CLASSES = 3
TINY = TrainConfig(
    n_per_class=3,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=1, num_directions=1, generator_width=4, latent_dim=8),
    replay=ReplayConfig(final_steps=1, n_query=2),
)


def pool(n: int) -> list[FunctionBlackBox]:
    return [
        FunctionBlackBox(
            lambda images: images.flatten(1)[:, :N_CLASSES],
            APISpec(N_CLASSES, (1, 16, 16), name=f"api {number}"),
        )
        for number in range(n)
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(TINY, n_per_class=10**9), ": a step on n_per_class=1000000000 images of 3 class"),
        (
            replace(TINY, recovery=replace(TINY.recovery, num_directions=10**12)),
            ": a step on .* with num_directions=1000000000000 takes",
        ),
    ],
)
def test_a_run_is_refused_before_an_api_is_asked(config: TrainConfig, message: str) -> None:
    apis = pool(2)
    with pytest.raises(InputError, match=f"^BiDfMKD{message}"):
        BiDfMKD(apis, config=config)
    with pytest.raises(InputError, match=f"^plan{message}"):
        plan(apis, config, device="cpu")
    assert [api.ledger.queries for api in apis] == [0, 0]


def test_the_sets_of_all_apis_and_the_tasks_of_a_step_must_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, tiny = 4 * 16 * 16, replace(TINY, survey=NO_SURVEY)
    sets = 400 * 2 * 3 * N_CLASSES * image
    monkeypatch.setattr(memory, "memory_of", lambda device: sets)
    BiDfMKD(pool(400), config=tiny)
    with pytest.raises(InputError, match="images of two sets of each of 401 APIs, n_per_class=3,"):
        BiDfMKD(pool(401), config=tiny)
    tasks = replace(tiny, meta_batch_size=sets // (N_CLASSES * 3 * image))
    BiDfMKD(pool(2), config=tasks)
    larger = replace(tasks, meta_batch_size=tasks.meta_batch_size + 1)
    with pytest.raises(InputError, match="an outer step on meta_batch_size=801 tasks takes"):
        BiDfMKD(pool(2), config=larger)
    BiDfMKD(pool(2), config=replace(larger, task_replay=False))
