"""Test the choice of pictures against the same rule on all candidates at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.survey.choice import (
    CANDIDATES,
    _in_turns,
    choose_scenes,
    read_choice,
    write_choice,
)

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
def test_each_class_gets_its_surest_scenes(n_chosen: int, seed: int) -> None:
    module, heads = backbone(seed)
    chosen = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, 50, seed)
    again = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, 50, seed)
    other = choose_scenes(module, heads, seed, SHAPE, N_FIRST, n_chosen, 50, seed + 1)
    assert torch.equal(chosen, again)
    candidates = torch.arange(N_FIRST, N_FIRST + CANDIDATES * n_chosen)
    assert len(set(chosen.tolist())) == n_chosen and set(chosen.tolist()) <= set(
        candidates.tolist()
    )
    if n_chosen == 1:
        return
    assert not torch.equal(chosen, other)
    shares = shares_of(module, heads, candidates, seed)
    wanted, sure = -(-n_chosen // sum(SIZES)), set[int]()
    for number in range(sum(SIZES)):
        surest = candidates[shares[:, number].argsort(descending=True)[: 4 * wanted]]
        sure |= set(surest.tolist())
        # Those that another class took as well count for both; the last turn may not be whole.
        assert len(set(surest.tolist()) & set(chosen.tolist())) >= wanted - 1
    assert set(chosen.tolist()) <= sure


@pytest.mark.parametrize("n_chosen", [3, 7, 19])
def test_classes_take_turns(n_chosen: int, seed: int) -> None:
    """Five classes with scenes of their own: no class takes two more than another."""
    sure = torch.arange(5 * 8).view(5, 8)
    chosen = _in_turns(sure, n_chosen, torch.arange(100), seed)
    taken = torch.bincount(chosen // 8, minlength=5)
    assert int(taken.sum()) == n_chosen and int(taken.max() - taken.min()) <= 1


def test_classes_that_agree_leave_the_rest_to_the_next_scenes(seed: int) -> None:
    sure = torch.tensor([[10, 11], [11, 10]])
    assert _in_turns(sure, 5, torch.arange(8, 40), seed).tolist() == [8, 9, 10, 11, 12]


def test_dropout_does_not_choose(seed: int) -> None:
    body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5))
    module = nn.Sequential(*body, nn.Linear(8, 3))
    heads = nn.ModuleList([nn.Linear(8, 3)])
    chosen = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        module.train()
        chosen.append(choose_scenes(module, heads, seed, SHAPE, N_FIRST, 20, 64, seed))
    assert torch.equal(*chosen)


def test_rare_classes_become_less_rare(seed: int) -> None:
    """Compare the rarest class of each head among chosen and among random scenes."""
    module, heads = backbone(seed)
    n = 400
    chosen = choose_scenes(module, heads, seed, SHAPE, 0, n, 64, seed)
    shares = shares_of(module, heads, torch.arange(CANDIDATES * n), seed)
    least = []
    for rows in (chosen, torch.arange(n)):
        parts = shares[rows].split(SIZES, 1)
        least.append(sum(part.mean(0).min() for part in parts))
    assert least[0] > least[1]


def test_the_choice_is_kept(tmp_path: Path) -> None:
    scenes, path = torch.tensor([5, 9, 11]), tmp_path / "survey" / "chosen.safetensors"
    write_choice(path, scenes, 77, 5)
    assert torch.equal(read_choice(path, 3, 77, 5), scenes)
    for n_chosen, seed, n_first in ((4, 77, 5), (3, 78, 5), (3, 77, 6)):
        with pytest.raises(InputError, match=r"chosen.safetensors does not name the"):
            read_choice(path, n_chosen, seed, n_first)
    for wrong in ([5, 5, 11], [9, 5, 11], [4, 9, 11], [5, 9, 5 + 3 * CANDIDATES]):
        write_choice(path, torch.tensor(wrong), 77, 5)
        with pytest.raises(InputError, match=r"does not name the 3 pictures"):
            read_choice(path, 3, 77, 5)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"chosen.safetensors is not readable"):
        read_choice(path, 3, 77, 5)
