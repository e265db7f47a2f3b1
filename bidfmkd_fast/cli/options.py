"""Build the parser of `bidfmkd` from its commands; add and read options that commands share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidfmkd_fast.black_box import Budget
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.ranks import current
from bidfmkd_fast.training import TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class Command:
    """A command of `bidfmkd`.

    Args:
        run: does the work; its docstring is the command's text in `--help`.
        add_options: adds the options to the command's parser. The second argument is the whole
            command line, because some options, such as `--preset`, change the defaults of others.
        example: a command line that `--help` shows.
        settings: the class whose fields are the keys under `--config`; None if the command has no
            `--config`.
        positional: the arguments that are typed without a name before them, divided by blanks.
        shared: whether several processes that torchrun has started share the work out.
    """

    run: Callable[[Any], None]
    add_options: Callable[[ArgumentParser, Sequence[str]], None]
    example: str
    settings: type[Any] | None = None
    positional: str = ""
    shared: bool = False


def build_parser(arguments: Sequence[str], commands: Mapping[str, Command]) -> ArgumentParser:
    """Return the parser of all `commands`; `arguments` is the command line it will parse."""
    from jsonargparse import ArgumentParser

    from bidfmkd_fast import __version__

    parser = ArgumentParser(
        prog="bidfmkd",
        description="Learn one small meta-model from black-box image-classification APIs, "
        "without data.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        subparser = ArgumentParser(
            exit_on_error=False,
            allow_abbrev=False,
            description=command.run.__doc__,
            epilog=f"example: {command.example}",
        )
        command.add_options(subparser, arguments)
        subcommands.add_subcommand(name, subparser, help=command.run.__doc__)
    return parser


def add_out(parser: ArgumentParser, command: str) -> None:
    """Add `--out` for a command that writes a new folder; `out_folder` reads it."""
    text = f"new folder; default: runs/{command}, or runs/{command}-2 and so on"
    parser.add_argument("--out", type=str, help=text)


def add_seed(parser: ArgumentParser, *, from_settings: bool = False) -> None:
    """Add `--seed`: 0 by default, or the seed of the settings if `from_settings` is True."""
    if from_settings:
        text = "seed of every random draw; default: that of the settings"
        parser.add_argument("--seed", type=int, help=text)
    else:
        parser.add_argument("--seed", type=int, default=0, help="seed of every random draw")


def add_caps(parser: ArgumentParser) -> None:
    """Add the three caps on what APIs may be asked; `budget_of` reads them."""
    parser.add_argument("--max-queries", type=int, help="cap on the queries, of all APIs together")
    parser.add_argument(
        "--max-requests", type=int, help="cap on the requests, of all APIs together"
    )
    parser.add_argument(
        "--max-cost", type=float, help="cap on the cost, by price_per_1000 of the APIs"
    )


def add_pool_and_device(parser: ArgumentParser, *, required: bool = True) -> None:
    """Add `--pool` and `--device` for a command that learns from the APIs of a pool."""
    parser.add_argument("--pool", type=str, required=required, help="folder of a pool")
    parser.add_argument(
        "--device", type=str, default="cpu", help="device of generator and meta-model"
    )


def add_stop_after(parser: ArgumentParser) -> None:
    """Add `--stop-after` for a command that the same command continues; `main` reads it."""
    parser.add_argument(
        "--stop-after",
        type=str,
        metavar="TIME",
        help="stop after this time, such as 90s, 30m or 11h30m, with exit code 75; the same "
        "command continues",
    )


def seconds_of(option: str, text: str) -> float:
    """Return the seconds that a text such as 90s, 30m or 11h30m stands for.

    Raises InputError for any other text.
    """
    found = re.fullmatch(r"(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,5})s)?", text)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise InputError(f"{option} must be a time such as 90s, 30m or 11h30m; got {text!r}")
    return float(total)


def out_folder(options: Any, command: str) -> Path:
    """Return `--out`, or else the first of `runs/<command>`, `runs/<command>-2`, ... that is free.

    The folder is kept in `options.out`, where the last line of an interrupted command finds it.
    """
    if options.out is None:
        names = itertools.chain([command], (f"{command}-{number}" for number in itertools.count(2)))
        paths = (Path("runs") / name for name in names)
        options.out = str(next(path for path in paths if not path.exists()))
    options.out = current().exchange(options.out)[0]  # one folder for all ranks
    return Path(options.out)


def new_file(command: str, given: str, option: str = "out") -> Path:
    """Return the path of a file that the command will write; raise InputError if it is there."""
    out = Path(given).expanduser()
    if out.exists():
        raise InputError(f"{command}: {out} exists already; give another --{option} or remove it")
    return out


def budget_of(options: Any) -> Budget | None:
    """Return the budget that the options of `add_caps` set; None if they set none."""
    caps = (options.max_queries, options.max_requests, options.max_cost)
    return None if caps == (None, None, None) else Budget(*caps)


def train_config(options: Any) -> TrainConfig:
    """Return the settings of a run under `--config`, with the seed of `--seed` if it was given."""
    config = TrainConfig.from_dict(options.config)
    return config if options.seed is None else replace(config, seed=options.seed)


def without_notes(values: Any) -> Any:
    """Return nested dicts without the notes of jsonargparse, such as the file they came from."""
    if not isinstance(values, dict):
        return values
    return {key: without_notes(value) for key, value in values.items() if not key.startswith("__")}


def check_seeds(options: Any) -> None:
    """Raise InputError for a negative seed, in the same words for every command."""
    for name in ("seed", "seeds"):
        seeds = options.get(name)
        for seed in seeds if isinstance(seeds, list) else [seeds]:
            if seed is not None and seed < 0:
                raise InputError(f"--{name} must be at least 0; got {seed}")


def plain_error(message: str, command: str, positional: str) -> str:
    """Return an error of jsonargparse in one line, with arguments as the user types them."""

    def typed(name: str) -> str:
        return name.upper() if name in positional.split() else f"--{name.replace('_', '-')}"

    message = " ".join(message.split())
    message = re.sub(rf"\b{command}\.(\w+)", lambda match: typed(match[1]), message)
    wrong_type = re.fullmatch(
        r"Parser key \"(\w+)\".*?: Expected a <class '(\w+)'>\. Got value: ?(.*)", message
    )
    if wrong_type is None:
        return message
    name, wanted, value = wrong_type.groups()
    return f"{typed(name)} must be of type {wanted}; got {value!r}"
