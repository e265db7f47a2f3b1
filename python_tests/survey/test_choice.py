"""Test the choice of pictures against the same rule on all candidates at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.survey import choice
from bidfmkd_fast.survey.choice import CANDIDATES, choose_scenes, read_choice, write_choice

SHAPE, N_FIRST, SIZES = (1, 16, 16), 13, (3, 5)


def backbone(seed: int) -> tuple[nn.Module, nn.ModuleList]:
    """Return a module whose answers to a picture do not depend on the pictures beside it."""
    with seeded(seed, "module"):
        body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Tanh())
        heads = nn.ModuleList(nn.Linear(8, size) for size in SIZES)
        for head in heads:
            head.weight.data *= 8  # sure of themselves
        return nn.Sequential(*body, nn.Linear(8, 3)), heads


def shares_of(module: nn.Module, heads: nn.ModuleList, scenes: Tensor, seed: int) -> Tensor:
    """Return the probabilities `[n, all classes]` that the heads give to scenes in a row."""
    pictures = procedural_images(len(scenes), SHAPE, seed=seed, first=int(scenes[0]))
    features = nn.Sequential(*list(module)[:-1])(pictures)  # type: ignore[call-overload]
    return torch.cat([head(features).softmax(1) for head in heads], 1).detach()


@pytest.mark.parametrize("n_chosen", [1, 60])
def test_each_class_gets_its_surest_scenes(
    monkeypatch: pytest.MonkeyPatch, n_chosen: int, seed: int
) -> None:
    monkeypatch.setattr(choice, "_CHUNK", 50)  # several pieces
    module, heads = backbone(seed)
    chosen = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, seed)
    again = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, seed)
    other = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, seed + 1)
    assert torch.equal(chosen, again)
    candidates = torch.arange(N_FIRST, N_FIRST + CANDIDATES * n_chosen)
    assert len(set(chosen.tolist())) == n_chosen and set(chosen.tolist()) <= set(
        candidates.tolist()
    )
    if n_chosen == 1:
        return
    assert not torch.equal(chosen, other)
    shares = shares_of(module, heads, candidates, seed)
    number, sure = 0, set[int]()
    for size in SIZES:
        wanted = n_chosen // (len(SIZES) * size)
        for _ in range(size):
            surest = candidates[shares[:, number].argsort(descending=True)[: 4 * wanted]]
            sure |= set(surest.tolist())
            # Those that another class took as well count for both.
            assert len(set(surest.tolist()) & set(chosen.tolist())) >= wanted
            number += 1
    assert len(set(chosen.tolist()) & sure) >= 0.8 * n_chosen


def test_rare_classes_become_less_rare(seed: int) -> None:
    """Compare the rarest class of each head among chosen and among random scenes."""
    module, heads = backbone(seed)
    n = 400
    chosen = choose_scenes(module, heads, seed, SHAPE, 0, n, seed)
    shares = shares_of(module, heads, torch.arange(CANDIDATES * n), seed)
    least = []
    for rows in (chosen, torch.arange(n)):
        parts = shares[rows].split(SIZES, 1)
        least.append(sum(part.mean(0).min() for part in parts))
    assert least[0] > least[1]


def test_the_choice_is_kept(tmp_path: Path) -> None:
    scenes, path = torch.tensor([5, 9, 11]), tmp_path / "survey" / "chosen.safetensors"
    write_choice(path, scenes)
    assert torch.equal(read_choice(path, 3), scenes)
    with pytest.raises(InputError, match=r"chosen.safetensors does not hold 4 chosen pictures"):
        read_choice(path, 4)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"chosen.safetensors is not readable"):
        read_choice(path, 3)
