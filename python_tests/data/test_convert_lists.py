"""Convert images with lists of their classes: miniImageNet's, CUB's and the authors' own."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from converting import encoded, pixels, refused, splits, stored, write_tree

from bidfmkd_fast.data.convert import convert_dataset

CLASSES = {
    "n01532829": "train",
    "n01558993": "train",
    "n01855672": "val",
    "n01930112": "test",
    "n02099601": "test",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mini_imagenet() -> dict[str, bytes]:
    """Return the files as published: a flat folder of `<class><number>.jpg`, and three lists."""
    files = {f"images/{name}{number:08}.jpg": b"" for name in CLASSES for number in (5, 17)}
    for row, name in enumerate(files):
        files[name] = encoded(np.full((60 + row, 90, 3), 20 * row, np.uint8), "JPEG")
    for split in ("train", "val", "test"):
        of_split = [name for name in CLASSES if CLASSES[name] == split]
        rows = [f"{name}{number:08}.jpg,{name}" for name in of_split for number in (17, 5)]
        files[f"{split}.csv"] = "\n".join(["filename,label", *rows, ""]).encode()
    return files


def test_mini_imagenet_with_ravis_lists() -> None:
    write_tree(Path("mini_imagenet"), mini_imagenet())
    converted = convert_dataset("mini_imagenet")
    assert (converted.layout, converted.split) == ("image_lists", "mini_imagenet")
    assert splits(converted) == {name: f"meta_{split}" for name, split in CLASSES.items()}
    assert converted.dataset.image_shape == (3, 84, 84)
    got = stored(converted)
    assert got["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    means = got["images"].reshape(10, -1).mean(1)
    np.testing.assert_allclose(
        means, 20 * np.arange(10), atol=2
    )  # sorted by file name, not as listed


def test_lists_apart_from_a_zip_of_the_images() -> None:
    files = mini_imagenet()
    write_tree(
        Path("lists"), {name: content for name, content in files.items() if name.endswith(".csv")}
    )
    with zipfile.ZipFile("images.zip", "w") as archive:
        for name, content in files.items():
            if name.endswith(".jpg"):
                archive.writestr(name, content)
    write_tree(Path("whole"), files)
    wanted = stored(convert_dataset("whole"))
    for key, value in stored(
        convert_dataset("images.zip", split="lists", layout="image_lists")
    ).items():
        np.testing.assert_array_equal(value, wanted[key])
    converted = convert_dataset("whole", "random.npz", layout="image_lists", split="random", seed=4)
    assert converted.split == "drawn at random, seed 4"


def test_one_csv_for_all_splits() -> None:
    write_tree(Path("shapes"), {f"{number}.png": encoded(pixels(number)) for number in range(4)})
    Path("all.csv").write_text(
        "filename,label,split\n2.png,oval,test\n0.png,oval,test\n1.png,box,train\n"
    )
    converted = convert_dataset("shapes", split="all.csv")
    assert splits(converted) == {"box": "meta_train", "oval": "meta_test"}
    np.testing.assert_array_equal(
        stored(converted)["images"], np.stack([pixels(number) for number in (1, 0, 2)])
    )


def few_shot_json(files: dict[str, str], names: list[str], prefix: str) -> bytes:
    lists = {"label_names": names, "image_names": [prefix + name for name in files]}
    return json.dumps(
        lists | {"image_labels": [names.index(name) for name in files.values()]}
    ).encode()


def test_json_lists_with_the_paths_of_another_machine() -> None:
    names = ["001.Albatross", "002.Auklet", "003.Bunting"]
    images = {
        f"CUB/images/{name}/{file}.png": name for name in names for file in ("1", "2")
    }  # same names in each folder
    contents = {file: encoded(pixels(row)) for row, file in enumerate(images)}
    write_tree(Path("birds"), contents)
    lists = {
        f"{split}.json": few_shot_json(
            {file[11:]: class_name for file, class_name in images.items() if class_name == name},
            names,
            "/home/someone/images/",
        )
        for name, split in zip(names, ("base", "val", "novel"))
    }
    write_tree(Path("birds/lists"), lists)
    converted = convert_dataset("birds")
    assert converted.layout == "image_lists"
    assert splits(converted) == dict(zip(names, ("meta_train", "meta_val", "meta_test")))
    np.testing.assert_array_equal(
        stored(converted)["images"], np.stack([pixels(row) for row in range(6)])
    )


def test_the_authors_lists_beside_their_split_folders() -> None:
    files = {f"meta_{split}/{name}/{name}_{split}.png": name for name, split in CLASSES.items()}
    contents = {file: encoded(pixels(row, 4, 4)) for row, file in enumerate(files)}
    for split in ("train", "val", "test"):
        rows = [
            f"../DFL2Ldata/Mini/{file},{name}"
            for file, name in files.items()
            if CLASSES[name] == split
        ]
        contents[f"split/meta_{split}.csv"] = "\n".join(["filename,label", *rows]).encode()
    converted = convert_dataset(write_tree(Path("mini"), contents), size=4)
    assert converted.layout == "image_lists"
    assert splits(converted) == {name: f"meta_{split}" for name, split in CLASSES.items()}
    np.testing.assert_array_equal(
        stored(converted)["images"], np.stack([pixels(row, 4, 4) for row in range(5)])
    )


def test_wrong_image_lists() -> None:
    files = {f"{folder}/{name}.png": encoded(pixels(1)) for folder in "ab" for name in "12"}
    write_tree(Path("shapes"), files)
    for listed, message in (
        ("a/3.png", "lists the image 'a/3.png', which shapes lacks"),
        ("c/1.png", "lists the image 'c/1.png', which shapes lacks"),
        ("../../etc/hostname", "lists the image '../../etc/hostname', which shapes lacks"),
        ("1.png", "lists the image '1.png', which may be a/1.png and b/1.png"),
        ("/x/a/2.png", "lists the image a/2.png twice"),
    ):
        Path("all.csv").write_text(
            f"filename,label,split\na/2.png,oval,test\nb/2.png,box,train\n{listed},box,train\n"
        )
        assert message in refused("shapes", split="all.csv")
    Path("all.csv").write_text("filename,label,split\na/2.png,oval,test\n,box,train\n")
    assert "all.csv, line 3" in refused("shapes", split="all.csv")
    for value, message in (
        ({"image_labels": [0, 1]}, "1 image_names but 2 image_labels"),
        ({"image_labels": [2]}, "one of 2 label_names; got 'a/1.png' and 2"),
        ({"image_labels": ["oval"]}, "got 'a/1.png' and 'oval'"),
        (
            {"image_labels": 3},
            "wanted a list of class names, or label_names, image_names, image_labels",
        ),
    ):
        lists = {"label_names": ["oval", "box"], "image_names": ["a/1.png"]} | value
        write_tree(
            Path("lists"),
            {f"{split}.json": json.dumps(lists).encode() for split in ("base", "novel")},
        )
        assert message in refused("shapes", split="lists")
    assert "wanted lists of image files, here or by --split; there are none" in refused(
        "shapes", layout="image_lists"
    )
    Path("classes.csv").write_text("label,split\na,train\nb,test\n")
    assert "classes.csv lists classes only" in refused(
        "shapes", layout="image_lists", split="classes.csv"
    )
