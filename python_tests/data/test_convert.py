"""Convert class folders, and check what all layouts share: order, size, splits, wrong inputs."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from converting import encoded, pixels, refused, splits, stored, write_tree
from PIL import Image

from bidfmkd_fast.data import load_dataset
from bidfmkd_fast.data.convert import convert_dataset

ANIMALS = {
    f"{name}/{file}": encoded(pixels(number))
    for number, (name, file) in enumerate(
        [("ox", "b.png"), ("ox", "a.png"), ("cat", "z.PNG"), ("dog", "1.png")]
    )
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_class_folders_in_the_order_of_names() -> None:
    write_tree(
        Path("animals"), ANIMALS | {"notes.txt": b"no image", ".hidden/x.png": b"no image either"}
    )
    converted = convert_dataset("animals")
    assert (converted.layout, converted.path, converted.left_out) == (
        "class_folders",
        Path("animals.npz"),
        0,
    )
    got = stored(converted)
    assert got["class_names"].tolist() == ["cat", "dog", "ox"]
    assert got["labels"].tolist() == [0, 1, 2, 2] and got["labels"].dtype == np.int64
    np.testing.assert_array_equal(
        got["images"], np.stack([pixels(number) for number in (2, 3, 1, 0)])
    )
    again = load_dataset("animals.npz")
    assert again.name == converted.dataset.name == "animals"
    assert again.image_shape == (3, 6, 5)


def test_folders_above_all_images_do_not_count_and_folders_below_join() -> None:
    write_tree(Path("deep"), {f"data/{name}": content for name, content in ANIMALS.items()})
    assert convert_dataset("deep").dataset.class_names == ("cat", "dog", "ox")
    write_tree(
        Path("nested"),
        {"a/b/1.png": encoded(pixels(1)), "a/c/1.png": encoded(pixels(2)), "d/1.png": b""},
    )
    Path("nested/d/1.png").write_bytes(encoded(pixels(3)))
    assert convert_dataset("nested").dataset.class_names == ("a/b", "a/c", "d")


@pytest.mark.parametrize(
    "names",
    [("meta_train", "meta_val", "meta_test"), ("train", "val", "test"), ("base", "val", "novel")],
)
def test_split_folders(names: tuple[str, str, str]) -> None:
    files = dict(zip(("ox", "cat", "dog"), names))
    write_tree(
        Path("animals"),
        {f"{files[name.split('/')[0]]}/{name}": content for name, content in ANIMALS.items()},
    )
    converted = convert_dataset("animals")
    assert splits(converted) == {"ox": "meta_train", "cat": "meta_val", "dog": "meta_test"}
    assert "folders" in converted.split


def test_a_class_named_train_is_no_split_folder() -> None:
    write_tree(Path("things"), {"train/1.png": encoded(pixels(1)), "bus/1.png": encoded(pixels(2))})
    assert convert_dataset("things").dataset.class_names == ("bus", "train")
    write_tree(Path("both"), {"train/1.png": encoded(pixels(1)), "test/1.png": encoded(pixels(2))})
    assert convert_dataset("both").dataset.class_names == ("test", "train")


def test_the_random_split_is_a_function_of_the_seed() -> None:
    write_tree(
        Path("many"), {f"{number:02}/1.png": encoded(pixels(number)) for number in range(25)}
    )
    first, again, other = (
        convert_dataset("many", f"{name}.npz", seed=seed) for name, seed in zip("abc", (3, 3, 4))
    )
    assert splits(first) == splits(again) != splits(other)
    assert [
        len(first.dataset.classes(split)) for split in ("meta_train", "meta_val", "meta_test")
    ] == [16, 4, 5]
    assert first.split == "drawn at random, seed 3"


def test_class_lists_beside_the_images_and_elsewhere() -> None:
    write_tree(
        Path("data"), ANIMALS | {"splits/train.txt": b"cat\nox\n\n", "splits/test.txt": b"dog\n"}
    )
    assert splits(convert_dataset("data")) == {
        "cat": "meta_train",
        "ox": "meta_train",
        "dog": "meta_test",
    }
    write_tree(
        Path("lists"),
        {"base.csv": b"label\nox\n", "val.csv": b"label\ncat\n", "novel.csv": b"label\ndog\n"},
    )
    wanted = {"ox": "meta_train", "cat": "meta_val", "dog": "meta_test"}
    assert splits(convert_dataset("data", "given.npz", split="lists")) == wanted
    Path("one.json").write_text('{"train": ["dog"], "test": ["ox"]}')
    converted = convert_dataset("data", "json.npz", split="one.json")
    assert splits(converted) == {"dog": "meta_train", "ox": "meta_test"}
    assert converted.left_out == 1 and converted.split == "one.json"
    Path("one.csv").write_text("label,split\ncat,meta_val\nox,meta_test\ndog,meta_train\n")
    assert splits(convert_dataset("data", "csv.npz", split="one.csv"))["cat"] == "meta_val"
    Path("data/splits/train.json").write_text(
        '["ox/b"]'
    )  # lists of images by another's rule, two kinds of them
    Path("data/splits/test.json").write_text('["ox/a"]')
    assert "random" in convert_dataset("data", "random.npz", split="random").split


def test_zip_and_tar_read_as_the_folder_does() -> None:
    write_tree(Path("animals"), ANIMALS)
    with zipfile.ZipFile("animals.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in reversed(ANIMALS.items()):
            archive.writestr(f"animals/{name}", content)
        archive.writestr("__MACOSX/animals/ox/._b.png", b"no image")
    for kind in ("tar", "tar.gz", "tar.xz"):
        with tarfile.open(f"animals.{kind}", f"w:{kind[4:]}") as packed:
            packed.add("animals")
    wanted = stored(convert_dataset("animals", "folder.npz"))
    assert convert_dataset("animals.tar.gz").path == Path("animals.npz")
    for kind in ("zip", "tar", "tar.gz", "tar.xz"):
        converted = convert_dataset(f"animals.{kind}", f"{kind}.npz")
        for key, value in stored(converted).items():
            np.testing.assert_array_equal(value, wanted[key])


def triangle(image: np.ndarray, size: int) -> np.ndarray:
    """Reduce an image bilinearly with antialiasing, in float64.

    The filter is a triangle as wide as two source pixels per target pixel.
    """
    for axis in (0, 1):
        scale = image.shape[axis] / size
        centres = (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(image.shape[axis])[None] + 0.5 - centres[:, None])
        weights = np.maximum(0, 1 - distance / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image.astype(np.float64), (1, axis)), 0, axis)
    return image


def test_images_are_squeezed_to_the_size_asked_for(seed: int) -> None:
    shapes = {"a": (50, 31), "b": (23, 44), "c": (8, 8), "d": (3, 5)}
    images = {name: pixels(seed + row, *shape) for row, (name, shape) in enumerate(shapes.items())}
    write_tree(Path("sizes"), {f"{name}/1.png": encoded(image) for name, image in images.items()})
    got = stored(convert_dataset("sizes", size=8))["images"]
    assert got.shape == (4, 8, 8, 3)
    for image, source in zip(got, images.values()):
        assert (
            np.abs(image - triangle(source, 8)).max() <= 1.01
        )  # each of the two passes rounds to 8 bits
    assert "images differ in size: a/1.png is 31x50, b/1.png is 44x23; give --size" in refused(
        "sizes", "own.npz"
    )


def test_wordnet_names_mean_84() -> None:
    write_tree(
        Path("mini"), {f"n0000000{number}/1.png": encoded(pixels(number)) for number in (1, 2)}
    )
    assert convert_dataset("mini").dataset.image_shape == (3, 84, 84)
    assert convert_dataset("mini", "own.npz", size=7).dataset.image_shape == (3, 7, 7)


def test_grey_stays_grey_and_becomes_rgb_beside_colours() -> None:
    grey, colour = pixels(1, channels=1), pixels(2)
    palette = Image.fromarray(colour).quantize(8)
    palette.save("palette.png")
    files = {"a/1.png": encoded(grey), "b/1.png": encoded(grey > 127)}
    assert load_dataset(convert_dataset(write_tree(Path("grey"), files)).path).image_shape == (
        1,
        6,
        5,
    )
    files |= {
        "c/1.png": encoded(colour),
        "d/1.png": Path("palette.png").read_bytes(),
        "e/1.png": encoded(grey),
    }
    files |= {"f/1.png": encoded(np.dstack([colour, grey]))}  # transparency is dropped
    got = stored(convert_dataset(write_tree(Path("mixed"), files)))["images"]
    grey_as_rgb = np.dstack([grey] * 3)
    wanted = [
        grey_as_rgb,
        (grey_as_rgb > 127) * np.uint8(255),
        colour,
        np.asarray(palette.convert("RGB")),
    ]
    np.testing.assert_array_equal(got, np.stack([*wanted, grey_as_rgb, colour]))


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
def test_common_formats(kind: str) -> None:
    flat = np.full((6, 5, 3), 200, np.uint8)
    suffix = {"JPEG": "JPEG", "TIFF": "tif"}.get(kind, kind.lower())
    write_tree(Path("kinds"), {f"{name}/1.{suffix}": encoded(flat, kind) for name in "ab"})
    got = stored(convert_dataset("kinds"))["images"].astype(int)
    assert got.shape == (2, 6, 5, 3) and np.abs(got - 200).max() <= 2


def test_wrong_folders() -> None:
    write_tree(Path("one"), {"cat/1.png": encoded(pixels(1)), "cat/2.png": encoded(pixels(2))})
    assert "one has one class folder, 'cat'; few-shot tasks need at least two classes" in refused(
        "one"
    )
    assert "flat: 1.png lies in no class folder" in refused(
        write_tree(Path("flat"), {"1.png": encoded(pixels(1))})
    )
    assert "no images" in refused(write_tree(Path("empty"), {"cat/1.txt": b"text"}))
    assert "there is no file or folder nowhere" in refused("nowhere")
    write_tree(Path("loose"), ANIMALS | {"stray.png": encoded(pixels(1))})
    assert "stray.png lies in no class folder" in refused("loose")
    write_tree(
        Path("twice"),
        {
            f"{split}/{name}/1.png": encoded(pixels(1))
            for split in ("train", "test")
            for name in "ab"
        },
    )
    assert "class 'a' is in meta_test and in meta_train" in refused("twice")


def test_wrong_split_lists() -> None:
    write_tree(Path("animals"), ANIMALS)
    cases = {
        "absent": (
            "names classes that the source lacks: 'cow', 'emu', 'hen' and 1 more; "
            "it has 'cat', 'dog', 'ox'",
            '{"train": ["cow", "emu", "ox"], "test": ["hen", "yak"]}',
        ),
        "twice": (
            "class 'ox' is in meta_train and in meta_test",
            '{"train": ["ox"], "test": ["ox", "cat"]}',
        ),
        "single": ("has one class, 'ox'", '{"train": ["ox"]}'),
        "keys": ("wanted {'meta_train': [classes]", '{"training": ["ox"]}'),
        "nothing": ("must name classes", '{"train": []}'),
        "numbers": ("wanted a list of class names", '{"train": [1]}'),
        "cut": ("cannot be read as JSON", '{"train": ["ox"'),
        "deep": ("cannot be read as JSON", "[" * 100_000),
    }  # fmt: skip
    for name, (message, text) in cases.items():
        Path(f"{name}.json").write_text(text)
        assert message in refused("animals", split=f"{name}.json"), name
    write_tree(
        Path("nested"),
        {f"a/{name}/1.png": encoded(pixels(1)) for name in "bc"} | {"d/1.png": encoded(pixels(2))},
    )
    Path("folders.json").write_text('{"train": ["a", "d"], "test": ["a/c"]}')
    assert "class 'a/c' is in meta_train and in meta_test" in refused(
        "nested", split="folders.json"
    )
    Path("bad.csv").write_bytes(b"label,split\n\xff,train\n")
    assert "cannot be read as CSV" in refused("animals", split="bad.csv")
    Path("bad.csv").write_text("name,split\nox,train\n")
    assert "wanted the columns ['filename', 'label', 'split']; got ['name', 'split']" in refused(
        "animals", split="bad.csv"
    )
    for row in ("ox,training", "ox", "ox,train,more", ",train"):
        Path("bad.csv").write_text(f"label,split\ncat,train\n{row}\n")
        assert "bad.csv, line 3" in refused("animals", split="bad.csv")
    assert "split lists are a folder, a .csv or a .json file; got list.txt" in refused(
        "animals", split="list.txt"
    )
    assert "cannot read the split list none.csv" in refused("animals", split="none.csv")
    assert "animals holds no split lists: wanted train, val, test (or" in refused(
        "animals", split="animals"
    )
    lists = write_tree(Path("lists"), {"train.txt": b"ox", "test.txt": b"cat", "base.txt": b"dog"})
    assert "two lists for meta_train" in refused("animals", split=lists)
    (lists / "base.txt").rename(lists / "train.csv")
    (lists / "test.csv").write_text("label\nox\n")
    assert "lists of several kinds" in refused("animals", split=lists)
    write_tree(
        Path("animals"),
        {f"{folder}/{split}.txt": b"ox" for folder in "xy" for split in ("train", "test")},
    )
    assert "holds split lists in 'x', 'y'; choose with --split" in refused("animals")


def test_files_that_are_no_images() -> None:
    whole = encoded(pixels(1, 40, 40))
    bombs = [bytearray(encoded(np.zeros((1, 1), np.uint8), "BMP")) for _ in range(2)]
    for bomb, side in zip(
        bombs, (10_000, 40_000)
    ):  # Pillow itself warns of the first and refuses the second
        bomb[18:26] = side.to_bytes(4, "little") * 2
    deep = encoded(np.zeros((4, 4), np.int32), "TIFF")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n"
    for content, message in (
        (b"a cat", "is not an image (wanted one of PNG"),
        (script, "is not an image (wanted one of PNG"),
        (b"", "is not an image"),
        (whole[: len(whole) // 2], "cannot be read as an image"),
        (bytes(bombs[0]), "exceeds limit"),
        (bytes(bombs[1]), "exceeds limit"),
        (deep, "holds 32-bit integers, whose range is unknown"),
        (
            encoded(np.zeros((4, 4), np.float32), "TIFF"),
            "holds floats, whose range is unknown",
        ),
    ):
        write_tree(Path("animals"), ANIMALS | {"cat/new.png": content})
        assert message in (error := refused("animals")) and "cat/new.png" in error


def test_damaged_archives() -> None:
    noise = {f"{name}/1.png": encoded(pixels(number, 60, 60)) for number, name in enumerate("abc")}
    write_tree(Path("noise"), noise)
    with tarfile.open("whole.tar.gz", "w:gz") as packed, tarfile.open("whole.tar", "w") as plain:
        packed.add("noise")
        plain.add("noise")
    with zipfile.ZipFile("whole.zip", "w") as archive:
        for name, content in noise.items():
            archive.writestr(name, content)
    for kind in ("tar.gz", "tar", "zip"):
        content = Path(f"whole.{kind}").read_bytes()
        for share in (0.0, 0.01, 0.5):
            Path(f"cut.{kind}").write_bytes(content[: int(share * len(content))])
            assert "cut off" in refused(f"cut.{kind}"), (kind, share)
    whole = Path(
        "whole.tar"
    ).read_bytes()  # the folder, three times a folder and an image, and the mark of the end
    with tarfile.open("whole.tar") as packed:
        headers = [member.offset for member in packed]
        end = packed.offset
    for offset in (*headers[1:], end):
        for inside in (0, 1, 100, 511):
            Path("cut.tar").write_bytes(whole[: offset + inside])
            error = refused("cut.tar")
            assert "cut.tar cannot be read" in error and "damaged or cut off" in error, (
                offset,
                inside,
            )
        flipped = bytearray(whole)
        flipped[offset : offset + 8] = b"\xff" * 8
        Path("cut.tar").write_bytes(flipped)
        assert "damaged or cut off" in refused("cut.tar"), offset
    Path("cut.tar").write_bytes(whole[: end + 512])  # a single block of zeros ends an archive too
    assert len(convert_dataset("cut.tar").dataset.class_names) == 3
    broken = bytearray(Path("whole.zip").read_bytes())
    broken[len(broken) // 2] ^= 255
    Path("flipped.zip").write_bytes(broken)
    assert "flipped.zip cannot be read: Bad CRC-32" in refused("flipped.zip")


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "..\\out.png"])
def test_paths_that_leave_the_archive(name: str) -> None:
    with zipfile.ZipFile("escape.zip", "w") as archive:
        archive.writestr("cat/1.png", encoded(pixels(1)))
        archive.writestr(name, encoded(pixels(2)))
    with tarfile.open("escape.tar", "w") as packed:
        packed.addfile(tarfile.TarInfo(name))
    for file in ("escape.zip", "escape.tar"):
        assert "leads out of the archive" in refused(file)


def test_links_and_giants_in_an_archive() -> None:
    link, giant = tarfile.TarInfo("cat/1.png"), tarfile.TarInfo("cat/2.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    giant.size = 1 << 40
    for member, message in (
        (link, "is a link or device"),
        (giant, "holds 1,099,511,627,776 bytes"),
    ):
        with tarfile.open("bad.tar", "w") as packed:
            packed.addfile(member)
        assert message in refused("bad.tar")


def test_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(Path("animals"), ANIMALS)
    assert convert_dataset("animals", "new/folder/x.npz").dataset.name == "x"
    assert "new/folder/x.npz exists already" in refused("animals", "new/folder/x.npz")
    assert "must end in .npz; got x.zip" in refused("animals", "x.zip")
    assert "size must be in 1..1024; got 0" in refused("animals", size=0)
    assert "layout must be one of auto, class_folders" in refused("animals", layout="folders")
    Path("file").touch()
    assert "cannot write to file/x.npz" in refused("animals", "file/x.npz")

    def full(file: IO[bytes], **_: object) -> None:
        file.write(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    assert "cannot write to y.npz: No space left on device" in refused("animals", "y.npz")
