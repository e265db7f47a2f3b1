"""Convert pictures as cameras leave them: on their side, of 16 bits, with damaged EXIF, in HEIC."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from converting import encoded, pixels, refused, stored, write_tree
from PIL import Image

from bidfmkd_fast.cli.main import main
from bidfmkd_fast.data.convert import convert_dataset
from bidfmkd_fast.data.readers import images

ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def turned(image: np.ndarray, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, exif=exif)
    return stream.getvalue()


def swapped(image: np.ndarray) -> np.ndarray:
    return image.transpose(1, 0, 2)


def test_pictures_are_turned_upright_unless_switched_off() -> None:
    lying = [pixels(number, 6, 6) for number in range(8)]
    marks = (1, 2, 3, 4, 5, 6, 7, 8)
    write_tree(
        Path("camera"), {f"{row}/1.png": turned(lying[row], mark) for row, mark in enumerate(marks)}
    )
    # Where row 0 and column 0 of the file are in the picture: EXIF 2.3, tag Orientation.
    upright = [
        *(lying[0], lying[1][:, ::-1], lying[2][::-1, ::-1], lying[3][::-1]),
        *(
            swapped(lying[4]),
            swapped(lying[5])[:, ::-1],
            swapped(lying[6])[::-1, ::-1],
            swapped(lying[7])[::-1],
        ),
    ]
    np.testing.assert_array_equal(stored(convert_dataset("camera"))["images"], np.stack(upright))
    as_they_lie = convert_dataset("camera", "lying.npz", upright=False)
    np.testing.assert_array_equal(stored(as_they_lie)["images"], np.stack(lying))
    assert main(["convert", "camera", "--out", "switched.npz", "--upright", "false"]) == 0
    with np.load("switched.npz") as archive:
        np.testing.assert_array_equal(archive["images"], np.stack(lying))


def test_a_turned_picture_has_its_sides_exchanged() -> None:
    write_tree(
        Path("camera"),
        {"a/1.jpg": turned(pixels(1, 4, 8), 6, "JPEG"), "b/1.png": encoded(pixels(2, 8, 4))},
    )
    assert convert_dataset("camera").dataset.image_shape == (3, 8, 4)


def test_damaged_exif_data_are_warned_of_with_the_file() -> None:
    stream = io.BytesIO()
    flat = np.full((6, 5, 3), 90, np.uint8)
    Image.fromarray(flat).save(stream, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    files = {
        "cat/1.jpg": stream.getvalue(),
        "cat/2.jpg": stream.getvalue(),
        "dog/1.jpg": encoded(flat, "JPEG"),
    }
    write_tree(Path("camera"), files)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = convert_dataset("camera")
    assert np.abs(stored(converted)["images"].astype(int) - 90).max() <= 1
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith(
        "convert_dataset: camera: cat/1.jpg, camera: cat/2.jpg: damaged EXIF data; "
    )


def test_the_orientation_counts_where_other_exif_data_are_damaged() -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "Maker"
    damaged = exif.tobytes().replace(
        b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02"
    )  # text where a fraction should be
    stream = io.BytesIO()
    Image.fromarray(pixels(1, 4, 8)).save(stream, "PNG", exif=damaged)
    write_tree(Path("camera"), {"a/1.png": stream.getvalue(), "b/1.png": encoded(pixels(2, 8, 4))})
    got = stored(convert_dataset("camera"))["images"]
    np.testing.assert_array_equal(got[0], np.rot90(pixels(1, 4, 8), -1))


def test_grey_of_16_bits_is_scaled_to_8(seed: int) -> None:
    deep = np.random.default_rng(seed).integers(0, 65536, (6, 5), dtype=np.uint16)
    deep[0, :3] = (0, 65535, 257)
    pgm = b"P5 5 6 65535\n" + deep.astype(">u2").tobytes()
    files = {"a/1.png": encoded(deep), "b/1.tif": encoded(deep, "TIFF"), "c/1.pgm": pgm}
    got = stored(convert_dataset(write_tree(Path("deep"), files)))["images"]
    assert got.shape == (3, 6, 5)
    for image in got:
        assert np.abs(image - deep / 257.0).max() <= 0.5 + 1e-9
    assert got[0][0, :3].tolist() == [0, 255, 1]


def test_heic_is_read_where_its_reader_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    flat = np.full((64, 64, 3), 120, np.uint8)
    try:
        heic = turned(flat, 1, "HEIF")
    except (KeyError, OSError, RuntimeError) as error:
        pytest.skip(f"no HEIC encoder: {error}")
    write_tree(Path("phone"), {"a/1.heic": heic, "b/1.jpg": heic, "c/1.png": encoded(flat)})
    got = stored(convert_dataset("phone"))["images"]
    assert got.shape == (3, 64, 64, 3) and np.abs(got.astype(int) - 120).max() <= 3


def test_damaged_heic_is_no_advice_to_install_what_is_there() -> None:
    pytest.importorskip("pillow_heif")
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    write_tree(Path("phone"), {"a/1.heic": heic, "b/1.png": encoded(pixels(1))})
    text = refused("phone")
    assert (
        "a/1.heic is not an image (wanted one of PNG" in text and "HEIF), or a damaged one" in text
    )


def test_heic_without_its_reader_is_named_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._reads_heif.cache_clear()
    try:
        heic = b"\0\0\0\x18ftypheic" + bytes(100)
        files = {"cat/1.png": encoded(pixels(1)), "dog/1.png": encoded(pixels(2))}
        files |= {f"emu/{number}.HEIC": heic for number in range(9)} | {
            "cat/notes.txt": b"",
            "dog/2.heic": heic,
        }
        write_tree(Path("phone"), files)
        assert main(["convert", "phone"]) == 0
        text = capsys.readouterr().out.splitlines()
        hint = "(`pip install pillow-heif` reads them)"
        assert (
            f"left out: 1 folders without an image that can be read: emu (9 .heic {hint})" in text
        )
        assert (
            f"left out: 11 files that are no image of a kind that is read: 10 .heic {hint}, 1 .txt"
            in text
        )
        write_tree(Path("only"), {"a/1.heic": heic, "b/1.heic": heic})
        assert f"only holds no images that can be read; it holds 2 .heic {hint}" in refused("only")
        write_tree(Path("phone"), {"cat/2.jpg": heic})  # by its name a JPEG
        assert "cat/2.jpg is HEIC; `pip install pillow-heif`" in refused("phone", "again.npz")
    finally:
        images._reads_heif.cache_clear()


def test_what_systems_leave_in_folders_is_no_class_and_is_counted() -> None:
    picture = encoded(pixels(1))
    files = {
        "cat/1.png": picture,
        "dog/1.png": encoded(pixels(2)),
        "splits/train.txt": b"cat",
        "splits/test.txt": b"dog",
    }
    left = [
        "@eaDir/1.png",
        "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
        "cat/.thumbnails/1.png",
        "dog/__MACOSX/1.png",
        "#recycle/old/1.png",
        "$RECYCLE.BIN/1.png",
        ".hidden/1.png",
        "cat/Thumbs.db",
        "cat/.DS_Store",
    ]
    write_tree(Path("nas"), files | dict.fromkeys(left, picture))
    converted = convert_dataset("nas")
    assert converted.dataset.class_names == ("cat", "dog") and len(converted.dataset.images) == 2
    (text,) = converted.passed_over
    assert text.startswith("9 hidden files or files of a system: ") and text.endswith(" and 4 more")


def test_images_that_no_list_names_are_counted() -> None:
    lists = {
        "train.csv": b"filename,label\n1.png,cat\n",
        "test.csv": b"filename,label\n2.png,dog\n",
    }
    write_tree(
        Path("listed"),
        lists | {f"images/{number}.png": encoded(pixels(number)) for number in range(1, 5)},
    )
    assert convert_dataset("listed").passed_over == (
        "2 images that are in no list: images/3.png, images/4.png",
    )
