"""Check that tasks in stacks give what the loop over tasks gives."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES

from bidfmkd_fast.data import Episode, load_dataset
from bidfmkd_fast.meta import InnerLoop, MetaModel, evaluate, inner_loop, maml, outer_replay_step
from bidfmkd_fast.meta import evaluate as evaluate_function
from bidfmkd_fast.meta.stacked import can_stack, stacks_of
from bidfmkd_fast.models import AnySizeConv4, Conv4
from bidfmkd_fast.seeds import seeded, torch_generator


def conv4(seed: int, width: int = 4, **keywords: bool) -> Conv4:
    with seeded(seed, "network"):
        return Conv4(3, 4, (16, 20), width, batch_statistics=True, **keywords).double()


def episode(seed: int, index: int, n_query: int = 2) -> Episode:
    generator = torch_generator(seed, "episode", index)
    return Episode(
        support_images=torch.rand(4, 3, 16, 20, generator=generator, dtype=torch.float64),
        support_labels=torch.arange(4),
        query_images=torch.rand(4 * n_query, 3, 16, 20, generator=generator, dtype=torch.float64),
        query_labels=torch.arange(4).repeat_interleave(n_query),
        classes=(0, 1, 2, 3),
    )


def gradients(
    module: Conv4, episodes: list[Episode], first_order: bool
) -> tuple[dict[str, float], list[torch.Tensor]]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    metrics = outer_replay_step(module, optimizer, episodes, InnerLoop(3, 0.05, first_order))
    return metrics, [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("kind", [Conv4, AnySizeConv4])
@pytest.mark.parametrize("first_order", [False, True])
def test_replay_equals_the_loop(
    first_order: bool, kind: type[Conv4], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kind(3, 4, (16, 20) if kind is Conv4 else (17, 16), 4, batch_statistics=True).double()
    module.load_state_dict(conv4(seed).state_dict())
    episodes = [episode(seed, i, 2 + i // 3) for i in range(5)]  # two shapes make two stacks
    metrics, stacked = gradients(module, episodes, first_order)
    for room in (maml, inner_loop):
        monkeypatch.setattr(room, "can_stack", lambda *_: False)
    wanted, looped = gradients(module, episodes, first_order)
    assert metrics["accuracy"] == pytest.approx(wanted["accuracy"])
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
    for ours, theirs in zip(stacked, looped):
        largest = float(theirs.abs().max())
        rtol, atol = TOLERANCES["float64"]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * max(largest, 1.0))


def test_frozen_parameters_stay(seed: int) -> None:
    module = conv4(seed)
    module.blocks[0][0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    before = module.blocks[0][0].weight.clone()
    outer_replay_step(module, optimizer, [episode(seed, 0)], InnerLoop(1, 0.1))
    assert torch.equal(module.blocks[0][0].weight, before)


@pytest.mark.parametrize("n_shot", [1, 3])
def test_evaluation_equals_the_loop(
    n_shot: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    dataset = load_dataset("glyphs")
    with seeded(seed, "network"):
        module = Conv4(1, 3, (28, 28), 4, batch_statistics=True)
    meta_model = MetaModel(module, adapt_steps=3)
    keywords = {"n_way": 3, "n_shot": n_shot, "n_query": 5, "n_episodes": 19, "seed": seed}
    stacked = evaluate(meta_model, dataset, **keywords)
    for room in (sys.modules[evaluate_function.__module__], inner_loop):
        monkeypatch.setattr(room, "can_stack", lambda *_: False)
    looped = evaluate(meta_model, dataset, **keywords)
    # Rounding may change one of the 19 * 15 predictions, which are counted in steps of 1 / 15.
    assert (stacked.per_episode - looped.per_episode).abs().sum() <= 1.5 / 15


def test_which_modules_and_episodes_stack(seed: int) -> None:
    assert can_stack(conv4(seed), 4)
    assert not can_stack(conv4(seed), 5)
    assert not can_stack(Conv4(3, 4, (16, 16)), 4)  # it keeps running statistics
    assert not can_stack(torch.nn.Flatten(), 4)
    sizes = [len(stack) for stack in stacks_of(conv4(seed), [episode(seed, i) for i in range(11)])]
    assert sizes == [8, 3]
    some = [episode(seed, i) for i in range(5)]
    assert [len(stack) for stack in stacks_of(conv4(seed), some, 2)] == [2, 2, 1]
