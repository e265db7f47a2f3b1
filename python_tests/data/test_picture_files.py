"""Find and read labelled picture files: class folders, CSVs, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from converting import encoded, pixels, write_tree

from bidfmkd_fast.data.convert import convert_dataset
from bidfmkd_fast.data.picture_files import labelled_files, picture_files, read_pictures
from bidfmkd_fast.errors import InputError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_classes_are_those_of_convert() -> None:
    names = ("ox/2.png", "ox/1.JPG", "cat/tabby/1.png", "cat/tabby/2.png", "data/eel/1.png")
    files = {f"top/{name}": encoded(pixels(row)) for row, name in enumerate(names)}
    extra = {"top/ox/notes.txt": b"x", "top/.hidden/1.png": b"", "top/@eaDir/1.png": b""}
    root = write_tree(Path("pictures"), files | extra)
    found = labelled_files("test", root)
    dataset = convert_dataset(root).dataset
    assert found.labels == [dataset.class_names[label] for label in dataset.labels]
    assert found.labels == ["cat/tabby", "cat/tabby", "data/eel", "ox", "ox"]
    assert found.files == picture_files("test", root)
    read = np.stack(read_pictures("test", found.files, None))
    np.testing.assert_array_equal(read.transpose(0, 3, 1, 2), dataset.images.numpy())


def test_a_csv_lists_files_beside_it() -> None:
    write_tree(Path("list"), {"a/1.png": encoded(pixels(1)), "2.png": encoded(pixels(2))})
    away = Path("away.png").resolve()
    away.write_bytes(encoded(pixels(3)))
    Path("list/labels.csv").write_text(
        f'\ufefffile,label,note\na/1.png,"cat, tabby",\n2.png,dog,x\n{away},dog,\n', "utf-8"
    )
    found = labelled_files("test", Path("list/labels.csv"))
    assert found.labels == ["cat, tabby", "dog", "dog"]
    assert found.files == [Path("list/a/1.png"), Path("list/2.png"), away]
    read = read_pictures("test", found.files, (3, 6, 5))
    for number, image in enumerate(read, 1):
        np.testing.assert_array_equal(image, pixels(number))


PICTURE = encoded(pixels(0))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "does not exist"),
        ({"notes.txt": b"x"}, "holds no pictures that can be read; it holds 1 .txt"),
        ({"a/1.png": PICTURE, "1.png": PICTURE}, "1.png lies in no class folder"),
        ({"1.png": PICTURE, "2.png": PICTURE}, "1.png lies in no class folder"),
        ({"a/1.png": PICTURE, "b/1.txt": b"x"}, "class folder source/b holds no picture"),
        ({"t/a/1.png": PICTURE, "t/b/1.png": PICTURE, "t/c/.x": b""}, "source/t/c holds no"),
        ({"Cat/1.png": PICTURE, "cat/1.png": PICTURE}, "two classes of one name, 'Cat' and 'cat'"),
        ({"e\u0301/1.png": PICTURE, "\u00e9/1.png": PICTURE}, "two classes of one name"),
    ],
)
def test_folders_that_hold_no_classes_are_refused(files: dict[str, bytes], message: str) -> None:
    write_tree(Path("source"), files)
    with pytest.raises(InputError, match=message) as caught:
        labelled_files("test", Path("source"))
    assert str(caught.value).startswith("test: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns file,label; got an empty file"),
        ("filename,label\n1.png,a\n", "columns file,label; got filename,label"),
        ("file,label\n", "lists no pictures"),
        ("file,label\n1.png,a\n2.png\n", "line 3: wanted a file and a label"),
        ("file,label\n1.png,a\n,b\n", "line 3: wanted a file and a label"),
        ("file,label\n1.png,a\n1.png,b\n", "lists the picture 1.png twice"),
        ("file,label\n1.png,a\0\n", "cannot be read as CSV: it holds a NUL byte"),
        ("file,label\n1.png,big, cat\n", "line 2: wanted 2 fields; got 3; quote a field that"),
        ("file,label,label\n1.png,a,b\n", "has the column label twice"),
        ("file,label\n1.png,a\n2.png,A\n", "two classes of one name, 'a' and 'A'"),
        ('file,label\n1.png,"a\n', "cannot be read as CSV"),
        ("file,label\n1.png,\xff\n", "cannot be read as CSV"),
    ],
)
def test_damaged_csvs_are_refused(text: str, message: str) -> None:
    Path("list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        labelled_files("test", Path("list.csv"))
    assert str(caught.value).startswith("test: ") and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named() -> None:
    Path("folder").mkdir()
    Path("bad.png").write_bytes(PICTURE[:60])
    Path("text.png").write_bytes(b"text")
    for name, message in (
        ("none.png", "cannot read none.png: No such file"),
        ("folder", "folder is not a picture file"),
        ("bad.png", "bad.png"),
        ("text.png", "text.png is not an image"),
    ):
        with pytest.raises(InputError, match=f"^test: .*{message}"):
            read_pictures("test", [Path(name)], None)
    with pytest.raises(InputError, match="the model takes 2; give tensors"):
        read_pictures("test", [Path("bad.png")], (2, 8, 8))
    with pytest.raises(InputError, match="holds no pictures"):
        picture_files("test", Path("folder"))
    with pytest.raises(InputError, match="no file or folder nowhere"):
        picture_files("test", Path("nowhere"))
