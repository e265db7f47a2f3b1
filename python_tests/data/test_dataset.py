from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bidfmkd_fast.data import Dataset, load_dataset
from bidfmkd_fast.errors import InputError, InputTypeError


def parts(channels: int = 1) -> dict[str, np.ndarray]:
    shape = (9, 5, 6) if channels == 1 else (9, 5, 6, channels)
    return {
        "images": np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8),
        "labels": np.array([2, 0, 1, 1, 2, 0, 2, 2, 0]),
        "class_names": np.array(["cat", "dog", "ox"]),
        "split_of_class": np.array(["meta_train", "meta_test", "meta_train"]),
    }


def write(folder: Path, **changes: object) -> Path:
    path = folder / "animals.npz"
    np.savez_compressed(
        path, **{key: value for key, value in (parts() | changes).items() if value is not None}
    )
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("invert", [False, True])
def test_reads_what_was_written(tmp_path: Path, channels: int, invert: bool) -> None:
    source = parts(channels)
    dataset = load_dataset(write(tmp_path, **source, another_key=np.arange(3)), invert=invert)
    assert (dataset.name, dataset.image_shape, dataset.inverted) == (
        "animals",
        (channels, 5, 6),
        invert,
    )
    assert dataset.class_names == ("cat", "dog", "ox")
    assert dataset.classes("meta_train") == [0, 2] and dataset.classes("meta_val") == []
    for class_index, rows in enumerate([[1, 5, 8], [2, 3], [0, 4, 6, 7]]):
        assert dataset.rows_of(class_index).tolist() == rows
        wanted = source["images"][rows].astype(np.float64) / 255
        wanted = wanted[:, None] if channels == 1 else wanted.transpose(0, 3, 1, 2)
        got = dataset.images_of(class_index)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), 1 - wanted if invert else wanted, rtol=0, atol=1e-7)
    assert "9 images" in repr(dataset) and ("inverted" in repr(dataset)) == invert


def test_name_is_looked_up_in_the_folder_of_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setenv("BIDFMKD_DATA", str(tmp_path))
    assert load_dataset("animals").name == "animals"
    with pytest.raises(InputError, match=r"plants\.npz .*BIDFMKD_DATA=.* holds animals"):
        load_dataset("plants")
    with pytest.raises(
        InputError, match=r"no file .*more/plants\.npz .* holds animals\); a path must end in \.npz"
    ):
        load_dataset("more/plants")
    monkeypatch.setenv("BIDFMKD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_dataset("plants")
    monkeypatch.delenv("BIDFMKD_DATA")
    with pytest.raises(InputError, match="set BIDFMKD_DATA"):
        load_dataset("animals")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": None}, r"lacks \['labels'\]"),
        ({"images": parts()["images"].astype(np.float32)}, "images must be uint8.*float32"),
        ({"labels": parts()["labels"].astype(np.float64)}, "labels integers.*float64"),
        ({"images": parts()["images"][0]}, r"\[5, 6\]"),
        ({"images": parts(3)["images"][..., :2]}, r"\[9, 5, 6, 2\]"),
        ({"images": parts()["images"][:0], "labels": parts()["labels"][:0]}, "no images"),
        ({"images": parts()["images"][:, :0]}, r"\[9, 1, 0, 6\]"),
        ({"labels": parts()["labels"][:8]}, r"\[8\] for 9 images"),
        ({"labels": parts()["labels"] + 1}, "got 1..3"),
        ({"labels": parts()["labels"] - 1}, "got -1..1"),
        ({"class_names": np.array([1, 2, 3])}, "must be text"),
        ({"class_names": np.array([["cat", "dog", "ox"]])}, r"\[1, 3\]"),
        ({"class_names": np.array(["cat", "dog", "cat"])}, "'cat' comes twice"),
        ({"class_names": np.array(["cat", "dog"])}, "3 for 2 class names"),
        ({"split_of_class": np.array(["meta_train", "test", "meta_val"])}, "'dog'.*'test'"),
        ({"labels": np.array([2, 0, 0, 0, 2, 0, 2, 2, 0])}, "class 'dog' has no images"),
        ({"class_names": np.array(["cat", "dog", {}], dtype=object)}, "not a readable .npz"),
    ],
)
def test_refuses_a_file_that_is_no_data_set(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_dataset(write(tmp_path, **changes))
    assert "animals" in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = write(tmp_path).read_bytes()
    pickled = tmp_path / "array.npy"
    np.save(pickled, np.arange(3))
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes(byte ^ 255 for byte in whole[200:300]) + whole[300:],
        "empty": b"",
        "text": b"not a data set",
        "array": pickled.read_bytes(),
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npz is not a readable"):
            load_dataset(path)
    with pytest.raises(InputError, match=r"no file .*nowhere\.npz"):
        load_dataset(tmp_path / "nowhere.npz")


def test_refuses_wrong_questions(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path))
    for class_index in (-1, 3):
        with pytest.raises(InputError, match="0..2"):
            dataset.images_of(class_index)
    with pytest.raises(InputError, match="'test'"):
        dataset.classes("test")
    with pytest.raises(InputTypeError, match="images must be a torch tensor; got ndarray"):
        Dataset(
            "made",
            dataset.images.numpy(),
            dataset.labels,
            dataset.class_names,
            dataset.split_of_class,
        )
    with pytest.raises(InputTypeError, match="torch.float32"):
        Dataset(
            "made",
            dataset.images.float(),
            dataset.labels,
            dataset.class_names,
            dataset.split_of_class,
        )


@pytest.mark.parametrize(
    ("name", "shape", "splits"),
    [
        ("omniglot", (1, 28, 28), None),
        ("cifar_fs", (3, 32, 32), (64, 16, 20)),
        ("caltech101", (3, 64, 64), None),
    ],
)
def test_real_files(
    name: str, shape: tuple[int, int, int], splits: tuple[int, int, int] | None
) -> None:
    if not (Path(os.environ.get("BIDFMKD_DATA", "")) / f"{name}.npz").is_file():
        pytest.skip(f"BIDFMKD_DATA holds no {name}.npz")
    dataset = load_dataset(name)
    counts = tuple(len(dataset.classes(split)) for split in ("meta_train", "meta_val", "meta_test"))
    assert (
        dataset.image_shape == shape
        and sum(counts) == len(dataset.class_names)
        and min(counts) >= 5
    )
    assert splits is None or counts == splits
