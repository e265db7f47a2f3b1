"""Check that `DeviceReplay` and `DeviceEpisodes` take the steps of `outer_replay_step`.

Here it runs on the CPU, where steps are plain calls instead of a graph.
"""

from __future__ import annotations

import copy

import pytest
import torch
from looks import NoLooks

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import InnerLoop, TaskMemory, outer_replay_step
from bidfmkd_fast.meta.replay_on_device import DeviceEpisodes, DeviceReplay
from bidfmkd_fast.models import AnySizeConv4, Conv4

N_WAY, N_SHOT, N_QUERY, N_TASKS = 3, 1, 4, 2
INNER = InnerLoop(2, 0.1)


def make_memory(seed: int) -> TaskMemory:
    memory, generator = TaskMemory(), torch.Generator().manual_seed(seed)
    for _ in range(2):  # classes are unsorted and differ in size
        keys = [
            ("set", f"class {i}") for i in torch.randint(0, 6, (60,), generator=generator).tolist()
        ]
        memory.add(torch.rand(60, 1, 16, 16, generator=generator), keys)
    return memory


def make_module(kind: type[Conv4] = Conv4, in_channels: int = 1) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(in_channels, N_WAY, (16, 16), width=4, batch_statistics=True)


def make_replay(
    module: torch.nn.Module, memory: TaskMemory, learning_rate: float = 1e-2, rotations: int = 1
) -> DeviceReplay:
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    sizes = (N_WAY, N_SHOT, N_QUERY)
    return DeviceReplay(module, optimizer, memory, sizes, N_TASKS, INNER, rotations=rotations)


@pytest.mark.parametrize("rotations", [1, 2, 4])
def test_the_same_steps(seed: int, rotations: int) -> None:
    memory, module = make_memory(seed), make_module()
    twin = copy.deepcopy(module)
    replay, optimizer = (
        make_replay(module, memory, rotations=rotations),
        torch.optim.Adam(twin.parameters(), lr=1e-2),
    )
    records: list[dict[str, float]] = []
    expected: list[dict[str, float]] = []
    for step in range(4):
        replay.step(seed, step * N_TASKS)
        if step in (2, 3):
            records += replay.records()
        tasks = range(step * N_TASKS, (step + 1) * N_TASKS)
        episodes = [
            memory.sample_episode(N_WAY, N_SHOT, N_QUERY, seed=seed, index=i, rotations=rotations)
            for i in tasks
        ]
        expected.append(outer_replay_step(twin, optimizer, episodes, INNER))
    assert len(records) == 4
    for record, wanted in zip(records, expected):
        assert record == pytest.approx(wanted, rel=1e-6)
    for value, wanted in zip(module.parameters(), twin.parameters()):
        assert torch.equal(value, wanted)


def test_episodes_from_the_host_give_the_same_steps(seed: int) -> None:
    memory, module = make_memory(seed), make_module()
    twin = copy.deepcopy(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    plain = torch.optim.Adam(twin.parameters(), lr=1e-2)
    steps = DeviceEpisodes(module, optimizer, (1, 16, 16), (N_WAY, N_SHOT, N_QUERY), N_TASKS, INNER)
    expected: list[dict[str, float]] = []
    for step in range(3):
        episodes = [
            memory.sample_episode(N_WAY, N_SHOT, N_QUERY, seed=seed, index=step * N_TASKS + i)
            for i in range(N_TASKS)
        ]
        steps.step(episodes)
        expected.append(outer_replay_step(twin, plain, episodes, INNER))
    for record, wanted in zip(steps.records(), expected, strict=True):
        assert record == pytest.approx(wanted, rel=1e-6)
    for value, wanted_value in zip(module.parameters(), twin.parameters()):
        assert torch.equal(value, wanted_value)


def test_images_of_different_shapes_are_fitted(seed: int) -> None:
    memory, generator = TaskMemory((3, 16, 16)), torch.Generator().manual_seed(seed)
    for data_set, shape in (("grey", (1, 12, 12)), ("colours", (3, 20, 20))):
        keys = [(data_set, f"class {i % 3}") for i in range(30)]
        memory.add(torch.rand(30, *shape, generator=generator), keys)
    module = make_module(AnySizeConv4, 3)
    twin = copy.deepcopy(module)
    replay, optimizer = make_replay(module, memory), torch.optim.Adam(twin.parameters(), lr=1e-2)
    for step in range(2):
        replay.step(seed, step * N_TASKS)
        tasks = range(step * N_TASKS, (step + 1) * N_TASKS)
        episodes = [
            memory.sample_episode(N_WAY, N_SHOT, N_QUERY, seed=seed, index=i) for i in tasks
        ]
        outer_replay_step(twin, optimizer, episodes, INNER)
    for value, wanted in zip(module.parameters(), twin.parameters()):
        assert torch.equal(value, wanted)


def test_a_loss_that_is_not_finite_is_reported(seed: int) -> None:
    replay = make_replay(make_module(), make_memory(seed), learning_rate=1e30)
    for step in range(3):
        replay.step(seed, step * N_TASKS)
    with pytest.raises(InputError, match="a loss or its gradient is not finite"):
        replay.records()


@pytest.mark.parametrize("rotations", [1, 4])
def test_no_step_looks_at_a_value(seed: int, rotations: int) -> None:
    replay = make_replay(make_module(), make_memory(seed), rotations=rotations)
    replay.step(seed, 0)
    # The optimiser reads values on the CPU, but not on a GPU.
    replay._optimizer.step = lambda: None  # type: ignore[assignment,method-assign]
    with NoLooks():
        replay._step()
