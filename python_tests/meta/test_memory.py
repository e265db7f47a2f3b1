"""Check what the task memory holds, and the tasks drawn from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.meta import TaskMemory
from bidfmkd_fast.models import fit_images


def marked(api: int, class_number: int, n: int) -> Tensor:
    """Make `n` images that show where they come from.

    Pixel 0 is the class, pixel 1 the API, pixel 2 the image's number.
    """
    images = torch.zeros(n, 1, 2, 2)
    images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 1, 0] = (
        class_number,
        api,
        torch.arange(n).float(),
    )
    return images


def key(class_number: int) -> tuple[str, str]:
    return "data", f"class {class_number:02d}"


def memory_of_two_apis(n: int = 10) -> TaskMemory:
    """Fill a memory from two APIs.

    API 0 knows the classes 0..4 and API 1 the classes 3..7, so classes 3 and 4 come from both.
    """
    memory = TaskMemory()
    for api, classes in ((0, range(0, 5)), (1, range(3, 8))):
        for class_number in classes:
            memory.add(marked(api, class_number, n), [key(class_number)] * n)
    return memory


def test_classes_and_counts_follow_what_is_added() -> None:
    memory = memory_of_two_apis()
    counts = memory.counts
    assert counts == [10, 10, 10, 20, 20, 10, 10, 10] and memory.counts is counts  # kept
    memory.add(marked(2, 9, 3), [key(9)] * 3)
    memory.add(marked(2, 0, 2), [key(0)] * 2)
    assert memory.classes == (*(key(c) for c in range(8)), key(9))
    assert memory.counts == [12, 10, 10, 20, 20, 10, 10, 10, 3]
    memory.load_state_dict(memory_of_two_apis().state_dict())
    assert memory.counts == counts and len(memory.classes) == 8


def test_it_holds_what_was_added_by_class() -> None:
    memory = memory_of_two_apis()
    assert len(memory) == 100
    assert memory.classes == tuple(key(c) for c in range(8))
    assert torch.equal(memory.images_of(key(3)), torch.cat([marked(0, 3, 10), marked(1, 3, 10)]))
    mixed = TaskMemory()
    mixed.add(
        torch.stack([marked(0, 0, 1)[0], marked(0, 1, 1)[0], marked(0, 0, 2)[1]]),
        [key(0), key(1), key(0)],
    )
    assert torch.equal(mixed.images_of(key(0)), marked(0, 0, 2))
    assert "3 images of 2 classes" in repr(mixed)


def test_the_memory_copies_no_image_of_a_set_sorted_by_class() -> None:
    images = torch.cat([marked(0, 0, 3), marked(0, 1, 3)])
    memory = TaskMemory()
    memory.add(images, [key(0)] * 3 + [key(1)] * 3)
    assert memory.images_of(key(1)).data_ptr() == images[3:].data_ptr()


def test_episodes_have_the_right_images_under_the_right_labels(seed: int) -> None:
    memory = memory_of_two_apis()
    for index in range(20):
        episode = memory.sample_episode(5, 2, 3, seed=seed, index=index)
        assert episode.support_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert episode.query_labels.tolist() == [label for label in range(5) for _ in range(3)]
        assert len(set(episode.classes)) == 5
        seen = []
        for images, labels in (
            (episode.support_images, episode.support_labels),
            (episode.query_images, episode.query_labels),
        ):
            wanted = [
                float(memory.classes[episode.classes[label]][1].split()[1])
                for label in labels.tolist()
            ]
            assert images[:, 0, 0, 0].tolist() == wanted
            seen += [tuple(image.flatten().tolist()) for image in images]
        # Images are drawn without replacement, so support and query set share none.
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("rotations", [2, 4])
def test_turned_classes_are_classes_of_their_own(seed: int, rotations: int) -> None:
    memory, generator = TaskMemory(), torch.Generator().manual_seed(seed)
    for position in range(3):
        memory.add(torch.rand(4, 1, 5, 5, generator=generator), [key(position)] * 4)
    drawn: set[int] = set()
    for index in range(60):
        episode = memory.sample_episode(3, 1, 3, seed=seed, index=index, rotations=rotations)
        drawn |= set(episode.classes)
        for label, number in enumerate(episode.classes):
            held = [
                torch.rot90(image, number // 3, (1, 2))
                for image in memory.images_of(key(number % 3))
            ]
            query = episode.query_images[3 * label : 3 * label + 3]
            mine = torch.cat([episode.support_images[label : label + 1], query])
            assert all(
                sum(torch.equal(image, candidate) for candidate in mine) == 1 for image in held
            )
    assert drawn == {
        position + 3 * turns for position in range(3) for turns in range(0, 4, 4 // rotations)
    }
    with pytest.raises(InputError, match=r"rotations must be 1 \(none\), 2 .* or 4 .*; got 3"):
        memory.sample_episode(3, 1, 3, seed=seed, index=0, rotations=3)


def test_tasks_mix_apis_and_classes_come_evenly(seed: int) -> None:
    memory = memory_of_two_apis()
    drawn: Counter[int] = Counter()
    mixed_tasks = mixed_classes = 0
    n_episodes = 400
    for index in range(n_episodes):
        episode = memory.sample_episode(5, 5, 5, seed=seed, index=index)
        drawn.update(episode.classes)
        images = torch.cat([episode.support_images, episode.query_images])
        apis = {(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in images}
        mixed_tasks += len({api for _, api in apis}) == 2
        mixed_classes += any((c, 0) in apis and (c, 1) in apis for c in (3, 4))
    # Of the 56 choices of classes only {0..4} and {3..7} can come from a single API.
    assert mixed_tasks > 0.9 * n_episodes
    assert mixed_classes > 0.5 * n_episodes
    # Each class is in a task with probability 5/8, and the standard deviation of its
    # count is 9.7. Six of these are allowed.
    assert all(abs(drawn[c] - 250) < 58 for c in range(8)), drawn


def test_an_episode_is_a_pure_function_of_seed_index_and_contents(seed: int) -> None:
    memory = memory_of_two_apis()
    later = memory.sample_episode(3, 1, 2, seed=seed, index=7)
    for _ in range(3):
        torch.rand(1)  # torch's global generator must have no influence
        again = memory_of_two_apis().sample_episode(3, 1, 2, seed=seed, index=7)
        assert torch.equal(again.support_images, later.support_images)
        assert again.classes == later.classes
        assert torch.equal(again.query_images, later.query_images)
    others = [
        memory.sample_episode(3, 1, 2, seed=seed, index=index).support_images
        for index in range(8, 16)
    ]
    others += [memory.sample_episode(3, 1, 2, seed=seed + 1, index=7).support_images]
    assert not all(torch.equal(other, later.support_images) for other in others)


def test_classes_with_too_few_images_are_not_drawn(seed: int) -> None:
    memory = memory_of_two_apis(n=4)  # classes 3 and 4 hold 8, the others 4
    for index in range(10):
        assert set(memory.sample_episode(2, 1, 5, seed=seed, index=index).classes) == {3, 4}
    with pytest.raises(
        InputError, match=r"wanted 3 classes with n_shot .* = 6 images each; 2 of the 8 classes"
    ):
        memory.sample_episode(3, 1, 5, seed=seed, index=0)
    with pytest.raises(InputError, match="n_shot must be 1 or more; got 0"):
        memory.sample_episode(2, 0, 5, seed=seed, index=0)
    with pytest.raises(InputError, match="0 of the 0 classes"):
        TaskMemory().sample_episode(2, 1, 5, seed=seed, index=0)


def test_the_state_goes_through_safetensors(seed: int, tmp_path: Path) -> None:
    memory = memory_of_two_apis()
    memory.add(marked(2, 9, 2), [("другие data", 'quote " and \n')] * 2)
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    restored = TaskMemory()
    restored.add(marked(0, 0, 1), [("replaced", "by the load")])
    restored.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert restored.classes == memory.classes
    for class_key in memory.classes:
        assert torch.equal(restored.images_of(class_key), memory.images_of(class_key))
    ours, theirs = (m.sample_episode(5, 1, 3, seed=seed, index=3) for m in (memory, restored))
    assert torch.equal(ours.support_images, theirs.support_images)
    assert torch.equal(ours.query_images, theirs.query_images)

    empty = TaskMemory()
    save_file(empty.state_dict(), tmp_path / "empty.safetensors")
    restored.load_state_dict(load_file(tmp_path / "empty.safetensors"))
    assert len(restored) == 0


def test_bad_images_keys_and_states_are_refused() -> None:
    memory = memory_of_two_apis()
    good = marked(0, 0, 2)
    for images, keys, error, message in (
        (
            good.byte(),
            [key(0)] * 2,
            InputTypeError,
            "float32 tensor in unit range; got torch.uint8",
        ),
        (good.numpy(), [key(0)] * 2, InputTypeError, "got ndarray"),
        (good[0], [key(0)], InputError, r"\[N, C, H, W\]"),
        (good, [key(0)], InputError, "one class key per image, 2; got 1"),
        (
            torch.zeros(1, 1, 3, 3),
            [key(0)],
            InputError,
            r"must be \[1, 2, 2\], as the images held are; got \[1, 3, 3\]",
        ),
        (good * torch.nan, [key(0)] * 2, InputError, "finite"),
        (good, ["ab", "cd"], InputTypeError, "a class key is a pair"),
        (good, [key(0), ("data", 3)], InputTypeError, "a class key is a pair"),
    ):
        with pytest.raises(error, match=message):
            memory.add(images, keys)
    for state in (
        {},
        memory.state_dict() | {"class_keys": torch.tensor([1, 2, 3], dtype=torch.uint8)},
        memory.state_dict() | {"class_of_image": torch.full((100,), 99)},
        memory.state_dict() | {"class_of_image": torch.zeros(5, dtype=torch.int64)},
    ):
        with pytest.raises(InputError):
            memory.load_state_dict(state)
    assert len(memory) == 100  # what was refused has left nothing


def test_tasks_over_data_sets_of_different_shapes(seed: int, tmp_path: Path) -> None:
    """Bring the images of a class to the shape of the tasks, but store them unchanged."""
    memory = TaskMemory(image_shape=(3, 6, 8))
    of_class = {}
    for data_set, shape in (("small", (1, 4, 4)), ("large", (3, 12, 16)), ("as it is", (3, 6, 8))):
        for name in ("a", "b"):
            of_class[data_set, name] = torch.rand(
                5, *shape, generator=torch.Generator().manual_seed(len(of_class))
            )
            memory.add(of_class[data_set, name], [(data_set, name)] * 5)
    for class_key, images in of_class.items():
        assert torch.equal(memory.images_of(class_key), images)
    episode = memory.sample_episode(6, 2, 3, seed=seed, index=0)
    assert episode.support_images.shape == (12, 3, 6, 8)
    assert episode.query_images.shape == (18, 3, 6, 8)
    for image, label in zip(episode.query_images, episode.query_labels.tolist()):
        candidates = fit_images(of_class[memory.classes[episode.classes[label]]], (3, 6, 8))
        assert any(torch.equal(image, candidate) for candidate in candidates)

    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    restored = TaskMemory()
    restored.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert all(
        torch.equal(restored.images_of(class_key), images) for class_key, images in of_class.items()
    )
    again = restored.sample_episode(6, 2, 3, seed=seed, index=0)
    assert torch.equal(again.query_images, episode.query_images)

    with pytest.raises(
        InputError, match=r"must be \[1, 4, 4\], as the images held are; got \[1, 5, 5\]"
    ):
        memory.add(torch.rand(1, 1, 5, 5), [("small", "c")])
    with pytest.raises(InputError, match="1 or 3 channels"):
        memory.add(torch.rand(1, 2, 5, 5), [("new", "c")])
    with pytest.raises(InputError, match="not the state of a task memory"):
        state = memory.state_dict()
        state["images_1"] = state["images_1"][1:]
        restored.load_state_dict(state)
