"""Define the commands about a user's own classes: `adapt`, `predict` and `export`."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.cli.next_command import after_adapt, after_predict, learned_inverted, source_of
from bidfmkd_fast.cli.options import Command, add_seed, new_file
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable, write_exact
from bidfmkd_fast.meta import Classifier
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.training.run_folder import RunFolder
from bidfmkd_fast.training.tables import Table, text_table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_BATCH = 256  # pictures that are read at once
_MOST_ROWS = 50  # of a table in the terminal, where a file holds all


def adapt(options: Any) -> None:
    """Make a classifier of your own classes from a run and a few pictures of each class. Nothing is
    sent anywhere: run and pictures are read on this machine, and no API is asked.
    """
    # Reading pictures needs Pillow, which other commands do without.
    from bidfmkd_fast.data.picture_files import labelled_files

    out = new_file("adapt", options.out)
    meta_model = RunFolder.open(options.run).meta_model()
    invert = options.invert
    if invert is None:
        invert = learned_inverted(source_of(Path(options.run)))
    source = Path(options.pictures).expanduser()
    files, labels = labelled_files("adapt", source)
    with seeded(options.seed, "adapt"):
        classifier = meta_model.adapt(files, labels, invert=invert)
        check_writable(out)
        accuracy = classifier.score(files, labels)
    classifier.save(out)
    counts = Counter(labels)
    rows = [["class", "pictures"], *([name, f"{counts[name]:,}"] for name in sorted(counts))]
    print(f"{_table(rows)}\n")
    print(
        f"{len(counts):,} classes, {len(files):,} pictures, "
        f"{100 * accuracy:.1f} % of these classified correctly; try pictures that it has not seen"
    )
    if invert:
        keep = (
            "" if options.invert else ", as the run's were; --invert false keeps them as they are"
        )
        print(f"pictures are inverted{keep}")
    print(f"classifier: {out}")
    print(after_adapt(out, source if source.is_dir() else files[0]))


def predict(options: Any) -> None:
    """Classify pictures with the file that `bidfmkd adapt` wrote. Nothing is sent anywhere: the
    pictures are read on this machine.
    """
    from bidfmkd_fast.data.picture_files import picture_files

    out = None if options.out is None else new_file("predict", options.out)
    path = Path(options.classifier).expanduser()
    classifier = Classifier.load(path)
    check_integer("predict", "top", options.top, 1, len(classifier.classes_))
    files = list(
        dict.fromkeys(
            file
            for given in options.pictures
            for file in picture_files("predict", Path(given).expanduser())
        )
    )
    if out is not None:
        check_writable(out)
    header = ["file", "label", "probability"]
    for place in range(2, options.top + 1):
        header += [f"label_{place}", f"probability_{place}"]
    with (
        seeded(options.seed, "predict"),
        Bar("predict", len(files), "pictures", True, keep=False) as bar,
    ):
        rows = [header, *bar.over(_predictions(classifier, files, options.top))]
    if out is not None:
        written = io.StringIO(newline="")
        csv.writer(written, lineterminator="\n").writerows(rows)
        write_exact(out, written.getvalue())
    print(_table(rows, whole=out is None))
    if out is not None:
        print(f"\n{len(files):,} pictures in {out}")
    if not classifier.transductive and (line := after_predict(path)):
        print(line)


def export(options: Any) -> None:
    """Export the file that `bidfmkd adapt` wrote, for programs that do without this package: to
    ONNX, to torch.export, or both. Nothing is sent anywhere: the file is written and tried on this
    machine.
    """
    if options.onnx is None and options.torch is None:
        raise InputError("export: give --onnx FILE.onnx, --torch FILE.pt2, or both")
    onnx, torch = (
        None if options[option] is None else new_file("export", options[option], option)
        for option in ("onnx", "torch")
    )
    if onnx is not None and torch is not None and onnx.resolve() == torch.resolve():
        raise InputError(f"export: --onnx and --torch must be two files; got {onnx} for both")
    classifier = Classifier.load(Path(options.classifier).expanduser())
    check_writable(*(out for out in (onnx, torch) if out is not None))  # both or neither
    if onnx is not None:
        classifier.export_onnx(onnx, seed=options.seed)
        print(f"ONNX: {onnx}")
    if torch is not None:
        classifier.export_torch(torch, seed=options.seed)
        print(f"torch.export: {torch}")
    channels, height, width = classifier.image_shape
    print(
        f"images [N, {channels}, {height}, {width}] in [0, 1] -> probabilities of "
        f"{len(classifier.classes_):,} classes; loaded again and equal to the classifier"
    )


def _predictions(classifier: Classifier, files: Sequence[Path], top: int) -> Iterator[list[str]]:
    """Yield a row for each file: its name, and the likeliest labels with their probabilities."""
    # The answers of a transductive classifier depend on all pictures together.
    size = len(files) if classifier.transductive else _BATCH
    for start in range(0, len(files), size):
        part = files[start : start + size]
        ordered = classifier.predict_proba(part).sort(dim=1, descending=True, stable=True)
        labels = classifier.classes_[ordered.indices[:, :top].cpu().numpy()].tolist()
        for file, names, values in zip(part, labels, ordered.values.tolist(), strict=True):
            pairs = zip(names, values[:top], strict=True)
            yield [str(file), *(cell for name, p in pairs for cell in (str(name), f"{p:.4f}"))]


def _table(rows: Table, whole: bool = False) -> str:
    """Return the table as text; without `whole` a long one is cut off, and the rest counted."""
    if whole or len(rows) <= _MOST_ROWS + 1:
        return text_table(rows)
    more = len(rows) - 1 - _MOST_ROWS
    return f"{text_table(rows[: _MOST_ROWS + 1])}\nand {more:,} more"


def _add_adapt_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("--run", type=str, required=True, help="folder of a finished run")
    parser.add_argument(
        "--pictures",
        type=str,
        required=True,
        help="folder with a folder of pictures per class, or a CSV with the columns file,label",
    )
    parser.add_argument("--out", type=str, required=True, help="new file of the classifier")
    parser.add_argument(
        "--invert",
        type=bool,
        help="exchange black and white, here and in all pictures that are classified later; "
        "default: true if the run learned from inverted images in all its data sets",
    )
    add_seed(parser)


def _add_predict_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("classifier", type=str, help="file that `bidfmkd adapt` wrote")
    parser.add_argument(
        "pictures", type=str, nargs="+", help="picture files, or folders of pictures"
    )
    parser.add_argument(
        "--out", type=str, help="new CSV: file,label,probability; default: only the table"
    )
    parser.add_argument("--top", type=int, default=1, help="likeliest labels to show per picture")
    add_seed(parser)


def _add_export_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("classifier", type=str, help="file that `bidfmkd adapt` wrote")
    parser.add_argument("--onnx", type=str, help="new ONNX file, such as pets.onnx")
    parser.add_argument(
        "--torch", type=str, help="new file for torch.export.load, such as pets.pt2"
    )
    add_seed(parser)


ADAPT = Command(
    adapt,
    _add_adapt_options,
    "bidfmkd adapt --run runs/train --pictures pets --out pets.safetensors",
)
PREDICT = Command(
    predict,
    _add_predict_options,
    "bidfmkd predict pets.safetensors new --out labels.csv",
    positional="classifier pictures",
)
EXPORT = Command(
    export,
    _add_export_options,
    "bidfmkd export pets.safetensors --onnx pets.onnx",
    positional="classifier",
)
