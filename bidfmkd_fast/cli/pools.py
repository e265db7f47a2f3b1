"""Define the commands about pools: `pool` trains a pool, `serve` puts it behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box import APISpec, BlackBox, TorchBlackBox
from bidfmkd_fast.cli.next_command import after_pool, files_of, write_source
from bidfmkd_fast.cli.options import Command, add_out, add_seed, out_folder
from bidfmkd_fast.cli.services import add_services, print_found, services_of
from bidfmkd_fast.data import Dataset, load_dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta import Classifier
from bidfmkd_fast.meta.deployed import check_steady
from bidfmkd_fast.pools import Pool, Services, load_pool, pool_from_services, train_pool
from bidfmkd_fast.pools.api_training import ARCHITECTURES
from bidfmkd_fast.pools.pool import LIST
from bidfmkd_fast.runtime.signals import Terminated
from bidfmkd_fast.serving import Behaviour, behaviours_of
from bidfmkd_fast.training.tables import text_table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


# The options of `pool` about training, with their defaults. The seed is not listed: it may be given
# to any command.
_TRAINING: dict[str, Any] = {
    "scenario": "ss",
    "dataset": ["glyphs"],
    "invert": [False],
    "n_apis": 20,
    "n_way": 5,
    "width": 32,
    "resnet_width": 64,
    "epochs": 30,
}


def pool(options: Any) -> None:
    """Train a pool of APIs on random class subsets: one data set and architecture (ss), mixed
    (sh), both mixed (mh); or list the models of prediction services (--from-services).
    """
    services = services_of(options, "--from-services")
    if services is not None:
        _list_services(services, options)
        return
    datasets = load_datasets(options.dataset, options.invert)
    trained = train_pool(
        datasets,
        out_folder(options, "pool"),
        scenario=options.scenario,
        n_apis=options.n_apis,
        n_way=options.n_way,
        width=options.width,
        resnet_width=options.resnet_width,
        epochs=options.epochs,
        seed=options.seed,
    )
    write_source(trained.folder, {"files": files_of(datasets, options.dataset)})
    accuracies = trained.accuracies
    print(
        f"{len(accuracies)} APIs in {trained.folder}; held-out accuracy: "
        f"mean {100 * trained.accuracy:.1f} %, "
        f"from {100 * min(accuracies):.1f} % to {100 * max(accuracies):.1f} %"
    )
    rows = _accuracy_by_kind(trained)
    if len(rows) > 2:  # the header and two kinds
        print(f"\n{text_table(rows)}\n")
    print(after_pool(trained.folder))


def _list_services(services: Services, options: Any) -> None:
    """Write the pool of `services`, and print what it holds and what to do next."""
    if given := [name for name, default in _TRAINING.items() if options[name] != default]:
        raise InputError(
            f"--{given[0].replace('_', '-')} is about training APIs; --from-services trains none"
        )
    folder = out_folder(options, "pool")
    print_found(pool_from_services(services, folder))
    print(f'look at the lines of {folder / LIST} that say "check"\n{after_pool(folder)}')


def load_datasets(names: Sequence[str], inverted: Sequence[bool]) -> list[Dataset]:
    """Load the data sets of `--dataset`.

    `inverted` is what `--invert` says: one value for all data sets, or one for each.
    """
    if len(inverted) not in (1, len(names)):
        raise InputError(
            f"--invert wants one value, or {len(names)}, one per data set; got {len(inverted)}"
        )
    flags = list(inverted) * (len(names) if len(inverted) == 1 else 1)
    return [load_dataset(name, invert=flag) for name, flag in zip(names, flags, strict=True)]


def _accuracy_by_kind(trained: Pool) -> list[list[str]]:
    """Return a table: the mean accuracy of each pair of data set and architecture."""
    by_kind: dict[tuple[str, str], list[float]] = {}
    for entry in trained.trained:
        by_kind.setdefault((entry.data_set, entry.architecture), []).append(entry.accuracy)
    rows = [["data set", "architecture", "APIs", "held-out accuracy, %"]]
    for (data_set, architecture), accuracies in sorted(by_kind.items()):
        mean = 100 * sum(accuracies) / len(accuracies)
        rows.append([data_set, architecture, str(len(accuracies)), f"{mean:.1f}"])
    return rows


def _add_pool_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_out(parser, "pool")
    add_seed(parser)
    parser.add_argument(
        "--scenario",
        choices=tuple(ARCHITECTURES),
        default=_TRAINING["scenario"],
        help="ss: one data set and architecture; sh: mixed architectures; mh: both mixed",
    )
    parser.add_argument(
        "--dataset",
        type=str,
        nargs="+",
        default=_TRAINING["dataset"],
        help="glyphs, a name in $BIDFMKD_DATA, or a path to an .npz; several for mh",
    )
    parser.add_argument(
        "--invert",
        type=bool,
        nargs="+",
        default=_TRAINING["invert"],
        help="use 255 minus the pixels (for black on white); one for all data sets, or one each",
    )
    parser.add_argument("--n-apis", type=int, default=_TRAINING["n_apis"], help="APIs to train")
    parser.add_argument("--n-way", type=int, default=_TRAINING["n_way"], help="classes per API")
    parser.add_argument(
        "--width", type=int, default=_TRAINING["width"], help="filters of the Conv4"
    )
    parser.add_argument(
        "--resnet-width",
        type=int,
        default=_TRAINING["resnet_width"],
        help="channels of a ResNet's first stage",
    )
    parser.add_argument(
        "--epochs", type=int, default=_TRAINING["epochs"], help="passes over an API's images"
    )
    add_services(
        parser,
        "--from-services",
        "train nothing; list the models of these servers of the Open Inference Protocol v2",
    )


def serve(options: Any) -> None:
    """Serve every API of a pool, or the classifier that `bidfmkd adapt` wrote, over the Open
    Inference Protocol v2 on 127.0.0.1, with faults on demand.
    """
    # Starlette and uvicorn are an extra, which the other commands do without.
    from bidfmkd_fast.serving.server import Service, serve_until_interrupted

    path = Path(options.pool).expanduser()
    is_classifier = path.is_file() and path.suffix not in (".yaml", ".yml")
    apis = [_classifier_api(path)] if is_classifier else load_pool(path)
    common = Behaviour(**options.config)
    behaviours = behaviours_of([api.name for api in apis], common, options.per_model)
    service = Service(apis, behaviours, options.seed)
    try:
        serve_until_interrupted(
            service, options.port, announce=lambda line: print(line, flush=True)
        )
    except KeyboardInterrupt as stop:
        print(text_table(service.rows()))
        if isinstance(stop, Terminated):
            raise  # Ctrl-C is the usual way to end a server and no failure; SIGTERM keeps its code


def _classifier_api(path: Path) -> BlackBox:
    """Return the classifier in a file as an API of probabilities, named by the stem of the file."""
    classifier = Classifier.load(path)
    check_steady("serve", classifier)
    spec = APISpec(
        len(classifier.classes_),
        classifier.image_shape,
        scores_kind="probabilities",
        class_names=tuple(map(str, classifier.classes_)),
        name=path.stem,
    )
    return TorchBlackBox(classifier.as_module(), spec)


def _add_serve_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    add_seed(parser)
    parser.add_argument("pool", type=str, help="folder of a pool, or a file of `bidfmkd adapt`")
    parser.add_argument(
        "--port", type=int, default=8000, help="port of 127.0.0.1; no other address is served"
    )
    parser.add_argument(
        "--per-model",
        type=str,
        help="YAML file with settings of single models: `api_003: {nan: 1.0}`",
    )
    parser.add_class_arguments(
        Behaviour, "config", help="what every model answers, and what goes wrong with it"
    )


POOL = Command(pool, _add_pool_options, "bidfmkd pool --dataset omniglot --invert true --n-apis 20")
SERVE = Command(
    serve,
    _add_serve_options,
    "bidfmkd serve runs/pool --port 8000 --config.failed 0.1",
    Behaviour,
    "pool",
)
