"""Convert CUB-200-2011 and Omniglot in the layouts of their own archives."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from converting import encoded, pixels, refused, splits, stored, write_tree
from PIL import Image

from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.data.convert import convert_dataset
from bidfmkd_fast.data.readers.splits import PUBLISHED_LISTS

BIRDS = [f"{number:03}.Bird_{chr(96 + number)}" for number in range(1, 9)]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cub(**changes: str) -> dict[str, bytes]:
    """Return two images of each of eight birds, the second grey, as CUB_200_2011.tgz holds them."""
    images = [
        f"{bird}/{bird[4:]}_{number:04}_{7 * number}.jpg" for bird in BIRDS for number in (12, 3)
    ]
    texts = {
        "images.txt": "\n".join(f"{row} {image}" for row, image in enumerate(images, 1)),
        "image_class_labels.txt": "\n".join(f"{row + 1} {row // 2 + 1}" for row in range(16))
        + "\n",
        "classes.txt": "\n".join(f"{row} {bird}" for row, bird in enumerate(BIRDS, 1)),
        "train_test_split.txt": "1 0\n2 1\n",
        "parts/parts.txt": "1 back\n",
    } | changes
    files = {f"CUB_200_2011/{name}": text.encode() for name, text in texts.items()}
    for row, image in enumerate(images):
        picture = np.full((90, 120, 3), 10 * row, np.uint8)
        files[f"CUB_200_2011/images/{image}"] = encoded(
            picture if row % 2 else picture[..., 0], "JPEG"
        )
    return files | {"attributes.txt": b"1 has_bill_shape::dagger\n"}


def tarred(path: str, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return path


def test_cub_from_its_archive_and_its_folder() -> None:
    apple_double = {"CUB_200_2011/images/001.Bird_a/._Bird_a_0012_84.jpg": b"no image"}
    converted = convert_dataset(tarred("CUB_200_2011.tgz", cub() | apple_double))
    assert (converted.layout, converted.path) == ("cub", Path("cub.npz"))
    train, val, test = "meta_train", "meta_val", "meta_test"
    assert splits(converted) == dict(zip(BIRDS, [train, val, train, test] * 2))
    got = stored(converted)
    assert (
        got["images"].shape == (16, 84, 84, 3)
        and got["labels"].tolist() == np.repeat(np.arange(8), 2).tolist()
    )
    by_name = [
        10 * (row + 1 - 2 * (row % 2)) for row in range(16)
    ]  # "_0003_" was the second of each pair
    np.testing.assert_allclose(got["images"].reshape(16, -1).mean(1), by_name, atol=1)
    write_tree(Path("folder"), cub())
    for source in ("folder", "folder/CUB_200_2011"):
        for key, value in stored(
            convert_dataset(source, f"{source.count('/')}.npz", layout="cub")
        ).items():
            np.testing.assert_array_equal(value, got[key])


def test_cub_with_few_shot_lists() -> None:
    """Convert with the JSON lists of Chen et al., as their script writes them.

    The lists hold the paths of the authors' machine.
    """
    for split, chosen in (("base", BIRDS[4:]), ("val", BIRDS[:2]), ("novel", BIRDS[2:4])):
        names = [name for name in cub() if name.endswith(".jpg") and name.split("/")[2] in chosen]
        lists = {
            "label_names": BIRDS,
            "image_names": [f"/home/someone/{name}" for name in names],
            "image_labels": [BIRDS.index(name.split("/")[2]) for name in names],
        }
        write_tree(Path("lists"), {f"{split}.json": json.dumps(lists).encode()})
    tarred("CUB_200_2011.tgz", cub())
    wanted = dict(zip(BIRDS, ["meta_val"] * 2 + ["meta_test"] * 2 + ["meta_train"] * 4))
    converted = convert_dataset("CUB_200_2011.tgz", split="lists")
    assert converted.layout == "cub" and splits(converted) == wanted
    by_list = convert_dataset(
        "CUB_200_2011.tgz", "lists.npz", split="lists", layout="image_lists", size=84
    )
    np.testing.assert_array_equal(stored(by_list)["images"], stored(converted)["images"])


def test_wrong_cub() -> None:
    for changes, message in (
        (
            {"classes.txt": "1 001.Bird_a"},
            "labels.txt gives image 3, 002.Bird_b/Bird_b_0012_84.jpg, no class",
        ),
        ({"image_class_labels.txt": "1 1"}, "image_class_labels.txt gives image 2, "),
        (
            {"images.txt": "1 001.Bird_a/x.jpg"},
            "lists 001.Bird_a/x.jpg, but there is no CUB_200_2011/images/001",
        ),
        (
            {"images.txt": "1 ../../../etc/hostname"},
            "but there is no CUB_200_2011/images/../../../etc/hostname",
        ),
        (
            {"images.txt": "1 a.jpg\n1 b.jpg"},
            "images.txt, line 2: wanted a new number, a space and a value; got",
        ),
        ({"classes.txt": "1\n"}, "classes.txt, line 1"),
        ({"images.txt": ""}, "cub: wrong.tgz has no images"),
    ):
        tarred("wrong.tgz", cub(**changes))
        assert message in refused("wrong.tgz"), message
    write_tree(Path("animals"), {f"{name}/1.png": encoded(pixels(1)) for name in "ab"})
    assert "holds no folder with image_class_labels.txt, classes.txt, images.txt" in refused(
        "animals", layout="cub"
    )
    assert "omniglot: animals lacks images_background" in refused("animals", layout="omniglot")
    assert "cifar100: animals holds no folder with the files" in refused(
        "animals", layout="cifar100"
    )


def omniglot(names: list[str]) -> dict[str, bytes]:
    """Return one drawing of each character, 105 x 105 in black and white.

    images_background.zip and images_evaluation.zip hold such drawings.
    """
    drawing = np.ones((105, 105), bool)
    drawing[20:24, 30:90] = False
    content = io.BytesIO()
    Image.fromarray(drawing).save(content, "PNG")
    return {
        f"images_{name}/{row + 1:04}_01.png": content.getvalue() for row, name in enumerate(names)
    }


def zipped(files: dict[str, bytes], where: Path = Path()) -> None:
    where.mkdir(exist_ok=True, parents=True)
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(where / f"{part}.zip", "w") as archive:
            for name, content in files.items():
                if name.startswith(part):
                    archive.writestr(name, content)


def test_omniglot_with_vinyals_split(real_data: Path) -> None:
    if not (real_data / "omniglot.npz").is_file():
        pytest.skip("BIDFMKD_DATA holds no omniglot.npz")
    real = load_dataset(real_data / "omniglot.npz")
    zipped(omniglot(list(real.class_names)), Path("python"))
    converted = convert_dataset("python")
    assert (converted.layout, converted.path, converted.left_out) == (
        "omniglot",
        Path("omniglot.npz"),
        0,
    )
    assert splits(converted) == dict(zip(real.class_names, real.split_of_class))
    assert converted.dataset.class_names == real.class_names
    assert converted.dataset.image_shape == real.image_shape
    missing = omniglot([name for name in real.class_names if "ULOG" not in name])
    zipped(missing, Path("missing"))
    assert (
        "the published split of omniglot names classes that the source lacks: 'evaluation/ULOG'"
        in refused("missing", "missing.npz")
    )


def test_omniglot_in_folders_and_zips_with_a_split_of_its_own() -> None:
    names = [
        "background/Greek/character01",
        "background/Greek/character02",
        "evaluation/Oriya/character01",
    ]
    files = omniglot(names)
    write_tree(Path("up/omniglot-py"), files | {"strokes_background/x.txt": b"0,0"})
    zipped(files, Path("zips"))
    write_tree(
        Path("lists"),
        {"train.txt": b"background/Greek\n", "test.txt": b"evaluation/Oriya/character01"},
    )
    folders = convert_dataset("up", "folders.npz", split="lists")
    assert splits(folders) == dict(zip(names, ("meta_train", "meta_train", "meta_test")))
    zips = convert_dataset("zips", split="lists")
    for key, value in stored(zips).items():
        np.testing.assert_array_equal(value, stored(folders)[key])
    drawing = np.full((105, 105), 255.0)
    drawing[20:24, 30:90] = 0
    edges = np.arange(29) * 105 / 28
    for axis in (0, 1):  # means over pixels whose centre lies in each twenty-eighth part
        centres = np.arange(drawing.shape[axis]) + 0.5
        parts = [
            drawing.compress((low < centres) & (centres <= high), axis)
            for low, high in pairwise(edges)
        ]
        drawing = np.stack([part.mean(axis) for part in parts], axis)
    assert np.abs(stored(zips)["images"][0] - drawing).max() <= 1.01
    assert drawing.min() < 128


def test_half_of_omniglot() -> None:
    zipped(omniglot(["background/Greek/character01", "evaluation/Oriya/character01"]))
    assert "lacks images_evaluation" in refused("images_background.zip")
    Path("images_evaluation.zip").write_bytes(Path("images_evaluation.zip").read_bytes()[:50])
    assert "images_evaluation.zip is neither a folder nor a whole zip" in refused(".")


def test_the_published_splits_ship_with_the_package() -> None:
    lists = {
        name: [
            (PUBLISHED_LISTS / name / f"{split}.txt").read_text().split()
            for split in ("train", "val", "test")
        ]
        for name in ("cifar_fs", "omniglot")
    }
    assert [len(names) for names in lists["cifar_fs"]] == [64, 16, 20]
    of = {
        name: split
        for split, names in zip(("meta_train", "meta_val", "meta_test"), lists["omniglot"])
        for name in names
    }
    of = {
        name if "character" in name else f"{name}/character01": split for name, split in of.items()
    }
    zipped(omniglot(list(of)))
    assert splits(convert_dataset(".", "omniglot.npz")) == of
