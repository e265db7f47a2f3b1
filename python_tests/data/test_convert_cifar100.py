"""Convert CIFAR-100's archive in the form that Python 2 gave it; distrust other pickles."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converting import refused, splits, stored, write_tree

from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.data.convert import convert_dataset
from bidfmkd_fast.data.readers.splits import PUBLISHED_LISTS

NAMES = sorted(
    name for file in (PUBLISHED_LISTS / "cifar_fs").iterdir() for name in file.read_text().split()
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Python2Pickler(pickle._Pickler):
    """Protocol 2 with the opcodes that Python 2 used for its `str`, which was bytes, and numpy's
    old module name.
    """

    dispatch: dict = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, value: bytes | str) -> None:
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        short = len(raw) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(raw)])
            if short
            else pickle.BINSTRING + struct.pack("<i", len(raw))
        )
        self.write(raw)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = "numpy.core.multiarray" if value.__name__ == "_reconstruct" else value.__module__
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_bytes
    dispatch[type] = dispatch[type(len)] = save_global


def python_2(value: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(value)
    return stream.getvalue()


def part(n_per_class: int, seed: int) -> dict[str, Any]:
    labels = (
        np.random.default_rng(seed).permutation(np.repeat(np.arange(100), n_per_class)).tolist()
    )
    rows = np.random.default_rng(seed + 1).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {
        "filenames": [f"{row}.png" for row in labels],
        "fine_labels": labels,
        "coarse_labels": labels,
        "data": rows,
    }


TRAIN, TEST, META = (
    part(2, 1),
    part(1, 2),
    {"fine_label_names": NAMES, "coarse_label_names": ["trees"]},
)


def files(**changes: object) -> dict[str, bytes]:
    values = {"train": TRAIN, "test": TEST, "meta": META} | changes
    return {f"cifar-100-python/{name}": python_2(value) for name, value in values.items()}


def test_the_bytes_are_python_2s() -> None:
    content = python_2(TRAIN)
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content and b"_codecs" not in content
    again = pickle.loads(content, encoding="latin1")
    np.testing.assert_array_equal(again["data"], TRAIN["data"])


def test_the_archive_and_its_folder_become_cifar_fs() -> None:
    write_tree(Path(), files())
    with tarfile.open("cifar-100-python.tar.gz", "w:gz") as packed:
        packed.add("cifar-100-python")
    converted = convert_dataset("cifar-100-python.tar.gz")
    assert (converted.layout, converted.path) == ("cifar100", Path("cifar_fs.npz"))
    assert converted.split == "the published split of cifar_fs"
    got = stored(converted)
    assert (
        got["images"].shape == (300, 32, 32, 3)
        and got["labels"].tolist() == np.repeat(np.arange(100), 3).tolist()
    )
    assert got["class_names"].tolist() == NAMES
    for label in (0, 57, 99):
        chosen = [
            row
            for pickled in (TRAIN, TEST)
            for row in pickled["data"][np.array(pickled["fine_labels"]) == label]
        ]
        for image, row in zip(got["images"][3 * label : 3 * label + 3], chosen):
            for channel in range(3):  # a row is all of red, then green, then blue, each by lines
                np.testing.assert_array_equal(
                    image[..., channel].ravel(), row[1024 * channel : 1024 * channel + 1024]
                )
    assert [
        len(converted.dataset.classes(split)) for split in ("meta_train", "meta_val", "meta_test")
    ] == [64, 16, 20]
    for key, value in stored(convert_dataset("cifar-100-python", "folder.npz")).items():
        np.testing.assert_array_equal(value, got[key])
    assert convert_dataset("cifar-100-python", "small.npz", size=16).dataset.image_shape == (
        3,
        16,
        16,
    )


def test_the_split_is_that_of_the_real_file(real_data: Path) -> None:
    if not (real_data / "cifar_fs.npz").is_file():
        pytest.skip("BIDFMKD_DATA holds no cifar_fs.npz")
    real = load_dataset(real_data / "cifar_fs.npz")
    write_tree(Path(), files())
    assert splits(convert_dataset("cifar-100-python")) == dict(
        zip(real.class_names, real.split_of_class)
    )


def test_other_splits_of_cifar_100() -> None:
    write_tree(Path(), files() | {"lists/train.txt": b"apple\nbear", "lists/test.txt": b"wolf"})
    converted = convert_dataset("cifar-100-python", split="lists")
    assert converted.path == Path("cifar100.npz") and converted.left_out == 97
    assert splits(converted) == {"apple": "meta_train", "bear": "meta_train", "wolf": "meta_test"}


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_of_python_3(protocol: int) -> None:
    values = {"train": TRAIN, "test": TEST, "meta": META}
    write_tree(
        Path("cifar"), {name: pickle.dumps(value, protocol) for name, value in values.items()}
    )
    converted = convert_dataset("cifar")
    write_tree(Path(), files())
    np.testing.assert_array_equal(
        stored(converted)["images"],
        stored(convert_dataset("cifar-100-python", "two.npz"))["images"],
    )


class Code:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_wants_to_run_code_runs_nothing(protocol: int) -> None:
    for function, arguments in (
        (os.mkdir, ("ran",)),
        (eval, ("open('ran', 'w')",)),
        (np.save, ("ran", [1])),
    ):
        content = pickle.dumps(TRAIN | {"data": Code(function, *arguments)}, protocol)
        write_tree(
            Path("cifar"), {"train": content, "test": python_2(TEST), "meta": python_2(META)}
        )
        error = refused("cifar")
        assert (
            "cifar: train wants to run " in error
            and f".{function.__name__}, which no array" in error
        )
    assert not Path("ran").exists()


def test_wrong_files() -> None:
    whole = python_2(TRAIN)
    data = TRAIN["data"]
    for name, content, message in (
        ("train", whole[: len(whole) // 2], "train is not a complete pickle"),
        ("train", b"", "train is not a complete pickle"),
        ("train", b"not a pickle", "train is not a complete pickle"),
        ("train", python_2([1]), "train: wanted a pickled dict; got list"),
        (
            "train",
            python_2(META),
            "train: data must be [N, 3072], images of 3 x 32 x 32; got NoneType",
        ),
        ("test", python_2(TRAIN | {"data": data[:, :1024]}), "got an array [200, 1024]"),
        (
            "test",
            pickle.dumps(TRAIN | {"data": data.astype(np.float32)}),
            "not whole rows of bytes",
        ),
        ("test", pickle.dumps(TRAIN | {"data": np.array([None, 1])}), "not whole rows of bytes"),
        (
            "test",
            pickle.dumps(TRAIN | {"data": np.asfortranarray(data)}),
            "not whole rows of bytes",
        ),
        ("test", whole.replace(b"M\x00\x0c", b"M\x00\x0d"), "not whole rows of bytes"),
        (
            "test",
            python_2(TRAIN | {"fine_labels": [1]}),
            "fine_labels must be a list of 200 numbers",
        ),
        ("test", python_2(TRAIN | {"fine_labels": [100] * 200}), "fine_labels must be in 0..99"),
        ("test", python_2(TRAIN | {"fine_labels": [-1] * 200}), "fine_labels must be in 0..99"),
        ("meta", python_2({"label_names": NAMES}), "meta: wanted fine_label_names"),
        (
            "meta",
            python_2({"fine_label_names": [*NAMES[:-1], "wolves"]}),
            "names classes that the source lacks: 'worm'",
        ),
    ):
        write_tree(Path(), files() | {f"cifar-100-python/{name}": content})
        assert message in refused("cifar-100-python"), message
    Path("cifar-100-python/meta").unlink()
    assert "holds no folder with the files meta, train, test" in refused(
        "cifar-100-python", layout="cifar100"
    )
