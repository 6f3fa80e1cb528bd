"""Command-line options made from the settings and arguments of the library."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from effad_lib.runs import printable

PATHS = frozenset({"run_folder", "runs", "data_root", "penalty_images", "images", "backbone_weights"})
"""Settings that are paths: on the command line relative to where one is, in settings relative to the project."""


def say(message: object) -> None:
    """Print a message of one or more lines, whatever names it holds, to the terminal."""
    print("effad:", printable(message, keep="\n\t"), file=sys.stderr)


def open_closed_streams() -> None:
    """Let a standard stream that was closed, for which Python has None, lead nowhere; no other file gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def mute() -> None:
    """Let what is printed from now on go nowhere: the reader of our output has left, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        say(f"{message}. See `{self.prog} --help`.")
        raise SystemExit(2)


class Option(NamedTuple):
    """One option made from a field or an argument of the library."""

    name: str
    hint: Any
    default: Any
    help: str = ""


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add `--some-name` for each; only those given on the command line end up in the parsed namespace."""
    for name, hint, default, text in options:
        flag = f"--{name.replace('_', '-')}"
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        text = f"{text} (default: {'none' if shown == '' else shown})".replace("%", "%%").strip()
        common = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(hint) in (list, tuple):
            inner = typing.get_args(hint)[0]
            parser.add_argument(flag, nargs="*", type=inner, metavar=inner.__name__.upper(), **common)
        else:
            parser.add_argument(flag, type=hint, metavar=hint.__name__.upper(), **common)


def add_data_sets(parser: argparse.ArgumentParser) -> None:
    """Add `--on`, the data sets that teachers are probed on, each read by `as_split`."""
    parser.add_argument(
        "--on",
        nargs="+",
        default=["elpv/mono"],
        metavar="DATA",
        help="data sets, each DATASET[/CATEGORY][=FOLDER], such as mvtec_ad/screw=data/mvtec_ad (default: elpv/mono)",
    )


def settings_options(settings: type) -> list[Option]:
    """Return an option for each field of a settings dataclass, its help taken from the comment beside the field."""
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(settings), re.MULTILINE))
    hints = typing.get_type_hints(settings)
    return [
        Option(field.name, hints[field.name], field.default, comments.get(field.name, ""))
        for field in dataclasses.fields(settings)
    ]


def add_recipes(parser: argparse.ArgumentParser, settings: type, cpu: str) -> None:
    """Add `--recipe` with the recipes of a settings dataclass; `cpu` says what that for CPUs is."""
    known = " or ".join(settings.RECIPES)
    parser.add_argument("--recipe", default="paper", help=f"settings to start from: {known}, {cpu} (default: paper)")


def add_data_files(parser: argparse.ArgumentParser) -> None:
    """Add `--data-file`: what `allow_data_files` allows."""
    parser.add_argument(
        "--data-file",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a Python file of a data set of your own that may be executed, as what is stored in files is not unasked",
    )


def allow_data_files(options: argparse.Namespace) -> None:
    """Take the files that were given as `--data-file` for named by the user."""
    from effad_lib.consent import allow
    from effad_lib.runs import here

    for file in options.data_file:
        allow(here(file))


def given(options: argparse.Namespace, known: Iterable[Option]) -> dict[str, Any]:
    """Return the values given on the command line, paths as seen from the project."""
    values = {option.name: getattr(options, option.name) for option in known if hasattr(options, option.name)}
    values |= {name: as_path(values[name]) for name in PATHS & values.keys()}
    if "dataset" in values:
        values["dataset"] = as_dataset(values["dataset"])
    return values | ({"teacher": as_teacher(values["teacher"])} if "teacher" in values else {})


def as_path(path: str) -> str:
    """Return a path as seen from the project; "" stays as it is."""
    from effad_lib.runs import from_project

    return path and from_project(path)


def as_dataset(name: str) -> str:
    """Return a data set's name as it is, the file of "path/to/file.py:name" as seen from the project."""
    file, separator, own = name.rpartition(":")
    return f"{as_path(file)}:{own}" if separator and file.endswith(".py") else name


def as_teacher(name: str) -> str:
    """Return the size of a shipped teacher as it is, a file's path as seen from the project."""
    from effad_lib.networks import PDN_LAYERS

    return name if name.upper() in PDN_LAYERS else as_path(name)


def as_split(text: str, seed: int) -> Any:
    """Return the `Split` that DATASET[/CATEGORY][=FOLDER] names."""
    from effad_lib.datasets import load_dataset

    name, _, folder = text.partition("=")
    dataset, _, category = name.partition("/")
    return load_dataset(dataset, root=as_path(folder), category=category, seed=seed)
