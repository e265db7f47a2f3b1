"""Hold recovered images by class (the task memory), and make tasks from them across APIs."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bidfmkd_fast.data.episodes import Episode, episode_of, turned
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.tensors import Pieces
from bidfmkd_fast.meta.task_draw import TaskSize, draw_task
from bidfmkd_fast.models import fit_images

ClassKey = tuple[str, str]


class TaskMemory:
    """Recovered images in unit range on the CPU, by class key `(data set, class name)`.

    Several APIs that know the same class fill the same key. The memory holds the images that `add`
    is given, without a copy where they are on the CPU and sorted by class, as recovered sets are.

    Args:
        image_shape: `(C, H, W)` of the tasks' images. A task brings those of each class from the
            shape of their data set to this shape, with `fit_images`. When None, all images of the
            memory must have one shape, which tasks then have too.
    """

    def __init__(self, image_shape: tuple[int, int, int] | None = None) -> None:
        self._images: dict[ClassKey, _Chunks] = {}
        self._image_shape = image_shape
        self._shapes: dict[str, torch.Size] = {}  # of the images of each data set
        self._order: tuple[ClassKey, ...] | None = None  # sorted, until another class comes
        self._counts: list[int] | None = None  # until another image comes

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(len(chunks) for chunks in self._images.values())

    def __repr__(self) -> str:
        return f"TaskMemory({len(self)} images of {len(self._images)} classes)"

    @property
    def classes(self) -> tuple[ClassKey, ...]:
        """Return the class keys, sorted; `Episode.classes` are positions in this tuple."""
        if self._order is None:
            self._order = tuple(sorted(self._images))
        return self._order

    @property
    def counts(self) -> list[int]:
        """Return the number of images of each class, in the order of `classes`."""
        if self._counts is None:
            self._counts = [len(self._images[key]) for key in self.classes]
        return self._counts

    def images_of(self, class_key: ClassKey) -> Tensor:
        """Return the images of a class, float32 `[n, C, H, W]`, in the order they were added."""
        return self._images[class_key].all()

    def task_images_of(self, class_key: ClassKey) -> Tensor:
        """Return the images of a class as tasks have them, `[n, *image_shape]`."""
        return self._fitted(self.images_of(class_key))

    def add(self, images: Tensor, class_keys: Sequence[ClassKey]) -> None:
        """Add `images` under `class_keys`, one `(data set, class name)` per image.

        The images must not be changed afterwards.

        Args:
            images: float32 `[N, C, H, W]` in unit range.
            class_keys: N keys.

        Raises:
            InputError: wrong rank, shape or length, or values that are not finite;
                `InputTypeError` for a wrong type.
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
                f"TaskMemory.add: wanted one class key per image, {len(images)}; got "
                f"{len(class_keys)}"
            )
        # Looked at without a temporary of the images' size, which large memories would feel.
        if images.numel() and not torch.stack(images.aminmax()).isfinite().all():
            raise InputError("TaskMemory.add: images must be finite; got NaN or infinity")
        rows: dict[ClassKey, list[int]] = {}
        for row, key in enumerate(class_keys):
            if not _is_class_key(key):
                raise InputTypeError(
                    f"TaskMemory.add: a class key is a pair (data set, class name); got {key!r}"
                )
            rows.setdefault(key, []).append(row)
        self._check_shape(images, {data_set for data_set, _ in rows})
        self._shapes |= dict.fromkeys((data_set for data_set, _ in rows), images.shape[1:])
        images = images.detach().cpu()
        for key, of_class in rows.items():
            first, last = of_class[0], of_class[-1]
            sorted_by_class = last - first + 1 == len(of_class)
            chunk = images[first : last + 1] if sorted_by_class else images[of_class]
            if key not in self._images:
                self._images[key], self._order = _Chunks(), None
            self._images[key].append(chunk)
        self._counts = None

    def sample_episode(
        self, n_way: int, n_shot: int, n_query: int, *, seed: int, index: int, rotations: int = 1
    ) -> Episode:
        """Make task number `index` of the stream `seed`, as `draw_task` draws it.

        Raises:
            InputError: a size is below 1, or too few classes hold n_shot + n_query images.
        """
        classes = self.classes
        size = TaskSize(n_way, n_shot, n_query)
        draw = draw_task(self.counts, size, seed=seed, index=index, rotations=rotations)
        support, query = [], []
        for (position, turns), rows in zip(draw.classes, draw.rows.tolist(), strict=True):
            images = self._fitted(self._images[classes[position]].take(rows))
            images = turned(images, turns)
            support.append(images[:n_shot])
            query.append(images[n_shot:])
        numbers = tuple(position + turns * len(classes) for position, turns in draw.classes)
        return episode_of(support, query, numbers)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole memory as tensors for safetensors.

        They are `image_shape` (empty without one), `class_of_image`, `class_keys` (UTF-8 JSON) and,
        in the same order, the images of each data set in one tensor, `images_0`, `images_1`, ...
        """
        return {
            name: torch.cat(list(value)) if isinstance(value, Pieces) else value
            for name, value in self.in_pieces().items()
        }

    def in_pieces(self) -> dict[str, Tensor | Pieces]:
        """Return what `state_dict` does, for a file, without making the images one tensor."""
        classes = self.classes
        keys = torch.tensor(list(json.dumps(classes).encode()), dtype=torch.uint8)
        counts = torch.tensor(self.counts, dtype=torch.int64)
        shape = torch.tensor(self._image_shape or (), dtype=torch.int64)
        state: dict[str, Tensor | Pieces] = {"image_shape": shape}
        state |= {
            "class_of_image": torch.arange(len(classes)).repeat_interleave(counts),
            "class_keys": keys,
        }
        by_data_set = itertools.groupby(classes, key=lambda class_key: class_key[0])
        for number, (_, class_keys) in enumerate(by_data_set):
            chunks = [chunk for key in class_keys for chunk in self._images[key].chunks]
            state[f"images_{number}"] = Pieces(chunks)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace what the memory holds by `state`, from `state_dict`.

        Raises:
            InputError: `state` is not the state of a task memory.
        """
        try:
            channels_and_size = state["image_shape"].tolist()
            keys = [
                (str(data_set), str(name))
                for data_set, name in json.loads(bytes(state["class_keys"].tolist()))
            ]
            class_keys = [keys[position] for position in state["class_of_image"].tolist()]
            groups = [state[f"images_{number}"] for number in range(len(state) - 3)]
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
        self._shapes, self._order, self._counts = restored._shapes, None, None

    def _fitted(self, images: Tensor) -> Tensor:
        """Bring images to the shape of the tasks."""
        return images if self._image_shape is None else fit_images(images, self._image_shape)

    def _check_shape(self, images: Tensor, data_sets: set[str]) -> None:
        """Refuse images whose shape differs from that of the images held of their data set.

        Without `image_shape` the images of all data sets must have one shape.
        """
        known = self._shapes if self._image_shape is None else data_sets
        held = next(
            (self._shapes[data_set] for data_set in known if data_set in self._shapes), None
        )
        if held is not None and held != images.shape[1:]:
            raise InputError(
                f"TaskMemory.add: images must be {list(held)}, as the images held are; got "
                f"{list(images.shape[1:])}; resize them, or give the memory an image_shape for "
                "data sets that differ"
            )
        if self._image_shape is not None and len(images):
            fit_images(images[:1], self._image_shape)  # refuses channels that do not fit


class _Chunks:
    """The images of one class in the chunks in which they were added, so that none is copied."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self._ends: list[int] = []  # for each chunk, the number of images up to its end

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def append(self, chunk: Tensor) -> None:
        self._ends.append(len(self) + len(chunk))
        self.chunks.append(chunk)

    def all(self) -> Tensor:
        """Return all images as one tensor `[n, C, H, W]`."""
        return self.chunks[0] if len(self.chunks) == 1 else torch.cat(self.chunks)

    def take(self, rows: Sequence[int]) -> Tensor:
        """Return a copy of the images in these rows, `[len(rows), C, H, W]`."""
        return torch.stack([self._image(row) for row in rows])

    def _image(self, row: int) -> Tensor:
        number = bisect.bisect_right(self._ends, row)
        # A negative index, which counts from the end of the chunk.
        return self.chunks[number][row - self._ends[number]]


def _is_class_key(key: object) -> bool:
    """Return True for a pair of strings."""
    if not isinstance(key, tuple) or len(key) != 2:
        return False
    return all(isinstance(part, str) for part in key)
