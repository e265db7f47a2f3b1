"""Share between `pool` and `train` the options and the output about prediction services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.pools import Services
from bidfmkd_fast.pools.services import STATED_KINDS, Found
from bidfmkd_fast.training.tables import text_table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_services(parser: ArgumentParser, option: str, text: str) -> None:
    """Add `option`, which takes URLs, and the options about the models behind them."""
    parser.add_argument(option, type=str, nargs="+", help=text)
    parser.add_argument(
        "--model",
        type=str,
        nargs="+",
        help="models on these servers; default: all that take images and give scores",
    )
    parser.add_argument(
        "--scores-kind",
        choices=STATED_KINDS,
        help="kind of the scores of all these models; default: found with a few queries each",
    )
    parser.add_argument(
        "--token-variable",
        type=str,
        nargs="+",
        help="environment variable with a token; one for all servers, or one each",
    )


def services_of(options: Any, option: str) -> Services | None:
    """Return the services that the options of `add_services` name; None if they name none.

    Raises InputError if there are options about services without `option`.
    """
    urls = options[option.removeprefix("--").replace("-", "_")]
    if urls is not None:
        return Services(
            urls, options.model or (), options.scores_kind, options.token_variable or ()
        )
    for name in ("model", "scores_kind", "token_variable"):
        if options[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with {option}")
    return None


def print_found(found: Found) -> None:
    """Print the models that were found, those that are left out, and what the search has asked."""
    rows = [["model", "server", "images", "classes", "scores"]]
    for model in found.models:
        spec = model.spec
        size = "x".join(map(str, spec.image_shape))
        rows.append([spec.name, model.url, size, str(spec.n_classes), spec.scores_kind])
    print(f"{text_table(rows)}\n")
    for model in found.models:
        for note in model.notes:
            print(f"check {model.spec.name}: {note}")
    for reason in found.left_out:
        print(f"left out: {reason}")
    if found.queries:
        print(f"{found.queries:,} queries were asked to find the kind of scores")
