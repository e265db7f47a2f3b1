"""Check the memory that a recovery is said to take at least, and that too much is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec, FunctionBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery import RecoveryConfig, recover
from bidfmkd_fast.recovery.generator import Generator
from bidfmkd_fast.recovery.step_memory import step_bytes
from bidfmkd_fast.runtime import memory

SHAPE, N_CLASSES = (1, 8, 8), 3
SMALL: dict[str, Any] = {
    "steps": 2,
    "num_directions": 4,
    "latent_dim": 8,
    "generator_width": 4,
    "max_images": 12,
}


def api() -> FunctionBlackBox:
    return FunctionBlackBox(lambda x: x.flatten(1)[:, :N_CLASSES], APISpec(N_CLASSES, SHAPE))


def test_the_bytes_are_those_of_the_tensors_named() -> None:
    images = 6 * 64  # numbers of 6 images
    fixed = 2 * images + 4 * 6 * 8  # images, best images, latents as Adam holds them
    points = 2 * images + 5 * 6 * N_CLASSES  # 2 rows of 5 at once, the scores of all 5
    generator = 2 * 4 * images + 4 * 8 * (2 * 4 * 2 * 2)
    config = RecoveryConfig(**SMALL)
    assert step_bytes(api(), config, 6) == 4 * (fixed + points + generator)
    assert step_bytes(api(), config, 6, own_generator=True) == 4 * (fixed + points)
    untrained = RecoveryConfig(**SMALL | {"steps": 0})
    assert step_bytes(api(), untrained, 6, own_generator=True) == 4 * (2 * images + 6 * 8)
    half = RecoveryConfig(**SMALL | {"generator_precision": "bfloat16"})
    saved = step_bytes(api(), config, 6) - step_bytes(api(), half, 6)
    assert saved == 2 * 2 * 4 * images


@pytest.mark.parametrize(
    "changes",
    [
        {"n_per_class": 10**9},
        {"num_directions": 10**12},
        {"latent_dim": 10**12},
        {"num_directions": 10**9, "max_images": 10**12},
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_an_absurd_recovery_is_refused_and_nothing_is_asked(
    changes: dict[str, int], own: bool
) -> None:
    settings = SMALL | changes
    n_per_class, asked = settings.pop("n_per_class", 2), api()
    generator = nn.Sequential(nn.Linear(8, 64), nn.Unflatten(1, SHAPE), nn.Sigmoid())
    with pytest.raises(InputError, match=r"recover: a step on n_per_class=.*GB; lower n_per_c"):
        recover(
            asked,
            n_per_class,
            config=RecoveryConfig(**settings),
            generator=generator if own else None,
        )
    assert asked.ledger.queries == 0


def test_a_recovery_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RecoveryConfig(**SMALL)
    needed = step_bytes(api(), config, 6)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    assert recover(api(), 2, config=config).complete
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    with pytest.raises(InputError, match="recover: a step on n_per_class=2 images of 3 classes"):
        recover(api(), 2, config=config)


def test_a_generator_that_no_memory_holds() -> None:
    with pytest.raises(InputError, match="Generator: a network of latent_dim=1000000000000 and"):
        Generator(SHAPE, latent_dim=10**12)
    with torch.device("meta"):
        Generator(SHAPE, latent_dim=10**6)
