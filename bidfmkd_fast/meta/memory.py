"""The task memory: recovered images by class, and tasks drawn from it across APIs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bidfmkd_fast.data.episodes import Episode, check_rotations, draw_classes, episode_of, turned
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.models import fit_images
from bidfmkd_fast.seeds import torch_generator

ClassKey = tuple[str, str]


class TaskMemory:
    """Recovered images in unit range, stored on the CPU by class key `(data set, class name)`.

    Several APIs that know the same class fill the same key. Images are stored as they were
    recovered; a task brings those of each class from the shape of its own data set to
    `image_shape`, `(C, H, W)`, with `fit_images`. Without `image_shape` all images of the memory
    must have one shape, which tasks then have too.
    """

    def __init__(self, image_shape: tuple[int, int, int] | None = None) -> None:
        self._images: dict[ClassKey, Tensor] = {}
        self._image_shape = image_shape

    def __len__(self) -> int:
        """The number of images."""
        return sum(len(images) for images in self._images.values())

    def __repr__(self) -> str:
        return f"TaskMemory({len(self)} images of {len(self._images)} classes)"

    @property
    def classes(self) -> tuple[ClassKey, ...]:
        """The class keys, sorted; `Episode.classes` are positions in this tuple."""
        return tuple(sorted(self._images))

    def images_of(self, class_key: ClassKey) -> Tensor:
        """The images of one class, float32 `[n, C, H, W]`, in the order in which they were
        added.
        """
        return self._images[class_key]

    def task_images_of(self, class_key: ClassKey) -> Tensor:
        """The same as tasks have them, `[n, *image_shape]`."""
        images = self._images[class_key]
        return images if self._image_shape is None else fit_images(images, self._image_shape)

    def add(self, images: Tensor, class_keys: Sequence[ClassKey]) -> None:
        """Store `images` (float32 `[N, C, H, W]`, unit range) under `class_keys`, one `(data set,
        class name)` each.

        Raises InputError (InputTypeError) for wrong kind, rank, shape or length, or values that are
        not finite.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.float32:
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputTypeError(
                f"TaskMemory.add: images must be a float32 tensor in unit range; got {got}"
            )
        if images.ndim != 4:
            raise InputError(
                f"TaskMemory.add: images must be [N, C, H, W]; got {list(images.shape)}"
            )
        if len(class_keys) != len(images):
            raise InputError(
                f"TaskMemory.add: wanted one class key per image, {len(images)}; got {len(class_keys)}"
            )
        if not images.isfinite().all():
            raise InputError("TaskMemory.add: images must be finite; got NaN or infinity")
        rows: dict[ClassKey, list[int]] = {}
        for row, key in enumerate(class_keys):
            if not (
                isinstance(key, tuple)
                and len(key) == 2
                and all(isinstance(part, str) for part in key)
            ):
                raise InputTypeError(
                    f"TaskMemory.add: a class key is a pair (data set, class name); got {key!r}"
                )
            rows.setdefault(key, []).append(row)
        self._check_shape(images, {data_set for data_set, _ in rows})
        images = images.detach().cpu()
        for key, of_class in rows.items():
            new = images[of_class]
            self._images[key] = torch.cat([self._images[key], new]) if key in self._images else new

    def sample_episode(
        self, n_way: int, n_shot: int, n_query: int, *, seed: int, index: int, rotations: int = 1
    ) -> Episode:
        """Task number `index` of the stream `seed`: a pure function of both and of what the memory
        holds.

        `n_way` different classes, uniformly from all that hold at least `n_shot + n_query` images,
        whichever APIs they came from; their images uniformly without replacement. With `rotations`
        2 or 4 each class, turned by 180 or by multiples of 90 degrees, is that many classes. Raises
        InputError if there are too few such classes.
        """
        check_rotations("sample_episode", rotations)
        for name, value in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query)):
            if value < 1:
                raise InputError(f"sample_episode: {name} must be 1 or more; got {value}")
        needed = n_shot + n_query
        classes = self.classes
        rich = [
            position for position, key in enumerate(classes) if self._images[key].size(0) >= needed
        ]
        if len(rich) < n_way:
            raise InputError(
                f"sample_episode: {n_way} classes with n_shot + n_query = {needed} images each are wanted; "
                f"{len(rich)} of the {len(classes)} classes held have as many; recover more or lower n_query"
            )
        generator = torch_generator(seed, "replay", index)
        chosen = draw_classes(rich, n_way, rotations, generator)
        support, query = [], []
        for position, turns in chosen:
            images = self._images[classes[position]]
            images = images[torch.randperm(len(images), generator=generator)[:needed]]
            if self._image_shape is not None:
                images = fit_images(images, self._image_shape)
            images = turned(images, turns)
            support.append(images[:n_shot])
            query.append(images[n_shot:])
        return episode_of(
            support, query, tuple(position + turns * len(classes) for position, turns in chosen)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The whole memory as tensors for safetensors: `image_shape` (empty without one),
        `class_of_image`, `class_keys` (UTF-8 JSON) and, in the same order, the images of each data
        set in one tensor, `images_0`, `images_1`, ..."""
        classes = self.classes
        keys = torch.tensor(list(json.dumps(classes).encode()), dtype=torch.uint8)
        counts = torch.tensor([len(self._images[key]) for key in classes], dtype=torch.int64)
        state = {"image_shape": torch.tensor(self._image_shape or (), dtype=torch.int64)}
        state |= {
            "class_of_image": torch.arange(len(classes)).repeat_interleave(counts),
            "class_keys": keys,
        }
        for index, (_, its) in enumerate(
            itertools.groupby(classes, key=lambda class_key: class_key[0])
        ):
            state[f"images_{index}"] = torch.cat([self._images[class_key] for class_key in its])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what the memory holds by `state`, from `state_dict`. Raises InputError if it is
        none.
        """
        try:
            channels_and_size = state["image_shape"].tolist()
            keys = [
                (str(data_set), str(name))
                for data_set, name in json.loads(bytes(state["class_keys"].tolist()))
            ]
            class_keys = [keys[position] for position in state["class_of_image"].tolist()]
            groups = [state[f"images_{index}"] for index in range(len(state) - 3)]
            if sum(map(len, groups)) != len(class_keys):
                raise ValueError(f"{sum(map(len, groups))} images for {len(class_keys)} classes")
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"TaskMemory.load_state_dict: not the state of a task memory: {error!r}"
            ) from error
        restored = TaskMemory(tuple(channels_and_size) or None)
        for images in groups:
            restored.add(images, class_keys[: len(images)])
            class_keys = class_keys[len(images) :]
        self._images, self._image_shape = restored._images, restored._image_shape

    def _check_shape(self, images: Tensor, data_sets: set[str]) -> None:
        """Images of one data set have one shape; without `image_shape` those of all have."""
        held = [
            its
            for key, its in self._images.items()
            if self._image_shape is None or key[0] in data_sets
        ]
        if held and held[0].shape[1:] != images.shape[1:]:
            raise InputError(
                f"TaskMemory.add: images must be {list(held[0].shape[1:])} as those held; got "
                f"{list(images.shape[1:])}; resize them, or give the memory an image_shape for data sets that differ"
            )
        if self._image_shape is not None and len(images):
            fit_images(images[:1], self._image_shape)  # channels that do not fit are refused here
