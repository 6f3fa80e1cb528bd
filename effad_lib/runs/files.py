"""Paths, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import shutil
import tempfile
import time
import unicodedata
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

PROJECT = Path(__file__).resolve().parents[2]
"""The folder of the workbook: relative paths in settings are taken from here, wherever a notebook's kernel runs."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk is full, or a user's share of it."""

FORSAKEN = 3600.0
"""Seconds without a change after which what is half made counts as that of a process that was killed."""


class RunError(RuntimeError):
    """A run folder that cannot be used as asked."""


class BadNameError(RunError):
    """A file whose name is longer than its file system takes, or a folder's, or below that of a file."""


def resolve(path: str | Path, start: Path | None = None) -> Path:
    """Return `path` as an absolute path, relative ones taken from `start`, the project's folder; `~` is expanded.

    Raises `RunError` for what can be no path, such as a link that leads to itself.
    """
    if not str(path):
        raise RunError("'' names no file and no folder. Name one; . is the folder that one is in.")
    try:
        return ((start or PROJECT) / Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{str(path)[:200]!r} is no path that can be followed: {error}") from error


def here(path: str | Path) -> Path:
    """Return a path as one means it on the command line: absolute, relative ones taken from where one is."""
    try:
        return resolve(path, Path.cwd())
    except FileNotFoundError as error:
        raise RunError("the folder that one is in was deleted. Go to another one.") from error


def from_project(path: str | Path) -> str:
    """Return a path, as seen from where one is, relative to the project if it lies inside, else absolute."""
    path = here(path)
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()


def write_bytes(path: str | Path, data: bytes | memoryview) -> Path:
    """Write `data` to a temporary neighbour of `path`, then rename it: a reader sees the old file or the whole new one.

    What lies under the neighbour's name goes first and is never written through: in a folder that was sent it may be a
    link. The mode is what the user's umask leaves of a new file's. On failure (a full disk, Ctrl-C) the temporary file
    is removed and the old file stays as it was. What torch and safetensors save is made in memory first, as their own
    writers report a full disk in ways of their own.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def unwritable(path: Path, error: OSError) -> RunError:
    """Return what to say of a file that could not be written, with the remedy for its reason."""
    said = f"cannot write {path}: {error.strerror or error}"
    if error.errno == errno.ENAMETOOLONG:
        return BadNameError(f"{said}. Shorten the name.")
    if error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
        return BadNameError(f"{said}: no file and folder have one name. Choose another folder, or rename one of them.")
    remedy = ". Choose another folder"
    if error.errno in NO_SPACE:
        there = next(folder for folder in path.parents if folder.exists())
        remedy = (
            f" ({shutil.disk_usage(there).free / 2**20:.0f} MB free there). Free some space or choose another folder"
        )
    return RunError(f"{said}{remedy}, then start again: what was finished before is kept.")


def check_writable(path: Path) -> None:
    """Raise `RunError` if no file could be written at `path`, before the work for it; nothing stays behind."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def partial_of(path: Path) -> Path:
    """Return the hidden neighbour under whose name this process makes a file or a folder until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_forsaken(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left half made in a folder under any `partial_of` a name, after `FORSAKEN` seconds.

    What may be at work stays: something has changed in it since.
    """
    for left in folder.glob(f".{name}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has just become whole
            changed = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - changed <= FORSAKEN:
                continue
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path` whole or not at all."""
    return write_bytes(path, text.encode("utf-8"))


def harmless(text: Any) -> Any:
    """Return a text that a spreadsheet would take for a formula (= + - @ at its start) with a ' before it, else as is.

    So a file that is called "=HYPERLINK(...).png" stays a name when a table of scores is opened.
    """
    return f"'{text}" if isinstance(text, str) and text[:1] in tuple("=+-@\t\r") else text


def printable(text: Any, keep: str = "") -> str:
    """Return a text with what would control a terminal, such as ESC, as its escape; letters in `keep` stay."""
    controls = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        letter if letter in keep or unicodedata.category(letter) not in controls else ascii(letter)[1:-1]
        for letter in str(text)
    )


def write_csv(path: str | Path, table: pandas.DataFrame) -> Path:
    """Write a table as CSV to `path` whole or not at all, its texts `harmless`."""
    texts = {name: column.map(harmless) for name, column in table.items() if column.dtype.kind == "O"}
    as_csv = partial(table.assign(**texts).rename(columns=harmless).to_csv, index=False, lineterminator="\n")
    text = as_csv()
    if "\r" in text:  # Python before 3.13 leaves it unquoted, and readers take it for the end of a row
        text = as_csv(quoting=csv.QUOTE_NONNUMERIC)
    return write_text(path, text)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON to `path` whole or not at all; NaN and infinities are refused."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_links(folder: Path) -> None:
    """Raise `RunError` for a folder in `folder` that is a link to elsewhere, where whoever sent it lets us write."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and entry.is_dir() and not resolve(entry.path).is_relative_to(folder.resolve()):
                raise RunError(f"{entry.path} is a link that leads out of its folder. Put the files themselves there.")


def check_link(path: str | Path) -> None:
    """Raise `RunError` for a file that is a link to another one, in whose place, or beside it, nothing is written."""
    path = Path(path).expanduser()
    if path.is_symlink() and not path.is_dir():
        raise RunError(f"{path} is a link to {here(path)}. Name that file itself, or where to write: --out FILE.")


def within(folder: Path, name: str) -> Path:
    """Return the path of a file to be written below a folder. Raises `RunError` if a link would lead it elsewhere."""
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{path} would lie outside {folder}. Remove the link in it, or choose another folder.")
    return path
