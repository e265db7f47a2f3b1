"""Define the tools beside the method: `convert` makes a data set, `bench` times the kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.cli.next_command import after_convert
from bidfmkd_fast.cli.options import Command, add_seed
from bidfmkd_fast.data.convert import LAYOUTS, convert_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import check_writable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many as it is asked for


def convert(options: Any) -> None:
    """Make an .npz data set of class folders, listed images, or the archive of CIFAR-100, Omniglot
    or CUB-200-2011.
    """
    converted = convert_dataset(
        options.source,
        options.out,
        layout=options.layout,
        split=options.split,
        size=options.size,
        seed=options.seed,
        upright=options.upright,
        progress=True,
    )
    left_out = ""
    if converted.left_out:
        left_out = f"; {converted.left_out} classes of no split left out"
    print(f"{converted.dataset}\nread as {converted.layout}, split: {converted.split}{left_out}")
    for line in converted.passed_over:
        print(f"left out: {line}")
    print(after_convert(converted.dataset, converted.path))


def _add_convert_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("--out", type=str, help="file to write; default: <data set>.npz here")
    add_seed(parser)
    parser.add_argument("source", type=str, help="folder, zip or tar archive of images")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="what the source is; auto recognises it by file names",
    )
    parser.add_argument(
        "--split",
        type=str,
        help="folder of split lists, one CSV or JSON, or 'random'; "
        "default: the source's or published",
    )
    parser.add_argument(
        "--size", type=int, help="height and width; default: the papers', or the images' own"
    )
    parser.add_argument(
        "--upright",
        type=bool,
        default=True,
        help="turn pictures as the orientation mark of their camera (EXIF) says",
    )


def bench(options: Any) -> None:
    """Time kernels and whole steps against plain torch; run it from the root of the source tree."""
    for count in options.threads:
        check_integer("bench", "threads", count, 1, _MOST_THREADS)
    check_integer("bench", "runs", options.runs, 1)
    if not Path("benchmarks/bench.py").is_file():
        raise InputError(
            "the benchmarks are in the source tree, not in the package; "
            "run this from the tree's root"
        )
    sys.path.append(str(Path.cwd()))
    suite = importlib.import_module("benchmarks.bench")
    against = None if options.compare is None else Path(options.compare)
    options.out = options.out or "runs/bench"
    out = Path(options.out)
    check_writable(out / "any")
    if suite.bench(options.cases, options.threads, options.runs, out, against, options.seed):
        sys.exit(1)


def _add_bench_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("--out", type=str, help="folder of the results; default: runs/bench")
    add_seed(parser)
    parser.add_argument(
        "--cases", type=str, nargs="+", default=["*"], help="name patterns; default: all"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each contender")
    parser.add_argument(
        "--compare", type=str, help="a results file; exit code 1 if anything became slower"
    )


CONVERT = Command(
    convert,
    _add_convert_options,
    "bidfmkd convert CUB_200_2011.tgz --out cub.npz",
    positional="source",
)
BENCH = Command(bench, _add_bench_options, "bidfmkd bench --cases 'perturb/*' --threads 1")
