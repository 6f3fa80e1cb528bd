"""The run folder: files written whole or not at all, checkpoints, resume."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effad_lib.documents import (
    DocumentError,
    Takes,
    are_numbers,
    fault,
    is_number,
    is_seconds,
    is_share,
    is_text,
    is_whole,
    open_plain,
    read_json,
    read_yaml,
)
from effad_lib.tensors import read_torch

if TYPE_CHECKING:
    import pandas

    from effad_lib.settings import Settings

PROJECT = Path(__file__).resolve().parent.parent
"""The folder of the workbook: relative paths in settings are taken from here, wherever a notebook's kernel runs."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk is full, or a user's share of it."""

GALLERY = '<meta name="generator" content="effad gallery">'
"""What the page of a gallery begins with, which tells it from the page of somebody else."""

COLUMNS = ("file", "score", "threshold", "decision", "marked", "error")
"""Of the `scores.csv` in which `detect` says what it found."""

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
    try:
        return ((start or PROJECT) / Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{str(path)[:200]!r} is no path that can be followed: {error}") from error


def here(path: str | Path) -> Path:
    """Return a path as one means it on the command line: absolute, relative ones taken from where one is."""
    return resolve(path, Path.cwd())


def from_project(path: str | Path) -> str:
    """Return a path, as seen from where one is, relative to the project if it lies inside, else absolute."""
    path = here(path)
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()


# --- files written whole or not at all ------------------------------------------------------------------------------


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


def holds_results(folder: Path) -> bool:
    """Whether a folder holds what this program made of images: a run, what `detect` found, or a gallery.

    Nothing that somebody else may have there counts, such as a `scores.csv` with other columns.
    """
    is_run = all((folder / name).is_file() for name in ("parameters.yaml", "sources.json"))
    return is_run or is_gallery(folder) or _begins(folder / "scores.csv", f"{','.join(COLUMNS)}\n")


def is_gallery(folder: Path) -> bool:
    """Whether a folder holds a gallery, finished or not."""
    return _begins(
        folder / "index.html", f'<!doctype html><meta charset="utf-8">{GALLERY}', f"<!doctype html>{GALLERY}"
    )


def _begins(path: Path, *texts: str) -> bool:
    with contextlib.suppress(OSError), open_plain(path) as file:
        return file.read(1000).startswith(tuple(text.encode() for text in texts))
    return False


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


# --- the run folder -------------------------------------------------------------------------------------------------


SHARES = (
    "image_auroc image_auroc_logical image_auroc_structural image_auroc_mean image_auroc_unnormalised image_ap "
    "image_f1_max pixel_auroc pixel_ap pixel_f1_max au_pro au_pro_05 au_spro_05 au_spro_05_logical "
    "au_spro_05_structural au_spro_05_mean"
).split()

METRICS: Takes = {
    "data": (is_text, "a name"),
    "size": (is_text, "the name of a network"),
    **dict.fromkeys(SHARES, (is_share, "a share from 0 to 1, or null")),
    "latency_ms": (is_number, "a number"),
    "latency_on": (is_text, "the name of a device"),
    "seconds": (lambda value: value is None or is_seconds(value), "seconds, or null"),
    "steps": (lambda value: value is None or is_whole(value), "a whole number, or null"),
    **dict.fromkeys(("loss", "held_out_loss"), (lambda value: value is None or is_number(value), "a number, or null")),
    **dict.fromkeys(
        ("losses", "explained_variance"), (lambda value: is_number(value) or are_numbers(value), "numbers")
    ),
}
"""What values of `metrics.json` take, in evaluations and distillations; a notebook of one's own may add others."""


class Run:
    """A run folder: `parameters.yaml`, `sources.json`, `provenance.json`, `model.safetensors`, `checkpoints/`, `maps/`,
    `figures/`, `tensorboard/` and `metrics.json`, which is written last: a run that has it is done, any other can be
    resumed. Its lock is the hidden `.lock`, see `execution.alone_in`.

    Raises `RunError` as `check_links`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = resolve(folder)
        check_links(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'done' if self.done else 'open'})"

    @property
    def done(self) -> bool:
        """Whether the run has its `metrics.json`."""
        return (self.folder / "metrics.json").is_file()

    @property
    def model(self) -> Path:
        """The trained detector with its card."""
        return self.folder / "model.safetensors"

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`. Raises `RunError` if the run is not done, `DocumentError` if it is broken or a
        value of it is not what it takes in `METRICS`.
        """
        if not self.done:
            raise RunError(f"{self.folder} has no metrics.json: the run is not finished. Evaluate it first.")
        return read_json(self.folder / "metrics.json", takes=METRICS)

    @property
    def parameters(self) -> dict[str, Any]:
        """The content of `parameters.yaml`. Raises `DocumentError` if that is not there or is broken."""
        path = self.folder / "parameters.yaml"
        content = read_yaml(path)
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise DocumentError(f"{path} takes names, each with its value. Restore it or delete the run.")
        return content

    @property
    def sources(self) -> dict[str, str]:
        """Hashes by name of the files that the run is made from, such as its teacher; {} if none are known.

        Raises `DocumentError` if the file is broken.
        """
        path = self.folder / "sources.json"
        found = read_json(path) if path.is_file() else {}
        if not all(map(is_text, found.values())):
            raise DocumentError(f"{path} takes names, each with a hash. Restore or delete it.")
        return found

    def check(self, settings: Settings, sources: dict[str, str] | None = None) -> None:
        """Raise `RunError` naming each difference if the folder holds a run of other settings or from other `sources`.

        Fields in the settings' `MAY_CHANGE`, which do not change the result, may differ. `sources` are hashes by name
        of the files that a run is made from; None leaves them unchecked.
        """
        path = self.folder / "parameters.yaml"
        if not path.is_file():
            return
        new = settings.as_dict()
        old = dict(settings.BEFORE) | self.parameters
        changed = {n for n in new.keys() | old.keys() if old.get(n) != new.get(n)} - settings.MAY_CHANGE
        what = [f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in sorted(changed)]
        for name, digest in (sources or {}).items():
            if (made := self.sources.get(name, "unknown")) != digest:
                what.append(f"{name}: {made[:12]} there, {digest[:12]} now")
        if what:
            raise RunError(
                f"{self.folder} holds a run with other settings ({'; '.join(what)}). Choose another run folder, or "
                f"delete it."
            )

    def start(self, settings: Settings, sources: dict[str, str] | None = None) -> None:
        """`check` the folder, then write `sources.json` and `parameters.yaml`: a resumed run never mixes settings.

        The settings come last: only with them does a folder count as that of a run. What a killed process left half
        made in it is removed.
        """
        self.check(settings, sources)
        for folder in (self.folder, self.folder / "checkpoints"):
            remove_forsaken(folder)
        write_json(self.folder / "sources.json", sources or {})
        write_text(self.folder / "parameters.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False))

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> Path:
        """Save `state` (tensors and plain types only) as `checkpoints/<name>.pt`, whole or not at all."""
        import torch  # what only reads and writes files starts without it

        buffer = io.BytesIO()
        torch.save(state, buffer)
        return write_bytes(self.folder / "checkpoints" / f"{name}.pt", buffer.getbuffer())

    def load_checkpoint(self, name: str = "last") -> dict[str, Any] | None:
        """Return the checkpoint `name`, or None if there is none; nothing is unpickled (`weights_only=True`)."""
        path = self.folder / "checkpoints" / f"{name}.pt"
        if not path.is_file():
            return None
        remedy = "Delete it to start this run anew."
        try:
            state = read_torch(path)
        except ValueError as error:
            raise RunError(f"{path} cannot be read as a checkpoint ({error}). {remedy}") from error
        if not isinstance(state, dict):
            raise RunError(f"{path} cannot be read as a checkpoint, it holds {type(state).__name__}. {remedy}")
        return state

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`: from now on the run counts as done.

        Raises `RunError` for a value that is not what its name takes in `METRICS`; other names are free.
        """
        if wrong := fault(metrics, METRICS):
            raise RunError(f"metrics.json of {self.folder} {wrong}. Give that value another name.")
        write_json(self.folder / "metrics.json", metrics)


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let a loop end its step and save before Ctrl-C or SIGTERM takes effect: yields whether one of them has come.

    The loop saves and raises `KeyboardInterrupt` itself, for both: the exit code is 130. Outside the main thread
    signals cannot be caught and act as usual.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
