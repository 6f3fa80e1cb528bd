"""A folder into which a machine drops images: each judged once, results written whole, whenever it is stopped."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from effad_lib.detection import WATCH_LOCK, Wanted, decision, detect_one, inside, write_table
from effad_lib.documents import DocumentError, is_number, read_json
from effad_lib.engines import Inspector
from effad_lib.execution.lock import Lock, LockError
from effad_lib.memory import kept_memory
from effad_lib.reading import ImageError, UnreachableError, image_entries
from effad_lib.runs import COLUMNS, RunError, finish_step_on_interrupt, printable, write_json
from effad_lib.settings import SettingsError

PATIENCE = 10.0
"""Seconds for which a file that cannot be read must stay as it is until it counts as broken and not as half written."""

LOOKING, SLOWEST = 0.05, 5.0
"""While nothing is new, looking may take this share of the time; seconds between two looks at most."""

LONGEST_NAME = 200
"""Bytes of an image's name up to which its result is called by it; a hash stands for longer ones."""


class Version(NamedTuple):
    """By what a file is told from another one of the same name: its size in bytes and its time of change."""

    size: int
    changed: int


class Faults:
    """What keeps files or folders from being looked at, each reported when it begins, and not again while it lasts."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self._report = report
        self._before: set[str] = set()
        self._now: set[str] = set()

    def look_again(self) -> None:
        """From here on a fault that is not told once more is over."""
        self._before, self._now = self._now, set()

    def tell(self, fault: ImageError) -> None:
        """Report a fault unless it was there before."""
        text = str(fault)
        if text not in self._before | self._now:
            self._report(f"passed by until it is mended: {printable(text)}")
        self._now.add(text)


def watch(
    detector: Inspector,
    images: str | Path,
    out: str | Path,
    wanted: Wanted | None = None,
    *,
    interval: float = 0.5,
    patience: float = PATIENCE,
    report: Callable[[str], object] = print,
) -> int:
    """Judge every image that is or comes below a folder, until Ctrl-C or SIGTERM; return how many were judged.

    For an image `a/b.jpg` the results are those of `detect`, by default with a heatmap of defective ones alone, and,
    written last, `results/a/b.jpg.json`: file, score, threshold, decision, marked, error, the file's size and time of
    change, and the detector's identity and tiles. What has it is done, now and after a restart; a file that is written
    anew under the same name is another one. A file is read when it has not changed between two looks, `interval`
    seconds apart; one that cannot be read is looked at again until it has been the same for `patience` seconds, and
    then gets a result with the error. What cannot be looked at, such as a name that is no text, a file without rights
    or the folder while it is not there, is reported once and tried again. While nothing is new, looks are as far apart
    as makes them 5 % of the time, 5 seconds at most. At the end `scores.csv` collects all results. Killed at any
    moment, the folder holds whole results only.

    Raises `ImageError` if there is no such folder or if it lies in `out`, `LockError` while another watch is at work in
    `out`, `RunError` if that holds other results: of `detect`, of another model or of other tiles; `SettingsError` as
    `detect`.
    """
    wanted = wanted or Wanted(heatmaps="defective")
    wanted.check(detector)
    if not 0 < interval < math.inf:
        raise SettingsError(f"interval = {interval}: takes a number of seconds above 0.")
    images, out = Path(images), Path(out)
    if not images.is_dir():
        raise ImageError(f"{images}: there is no such folder to watch.")
    if images.resolve().is_relative_to(out.resolve()):
        raise ImageError(f"{images} lies in {out}, where pictures are results. Choose another folder for these.")
    made_by = {"model": detector.identity, "tile_overlap": wanted.tile_overlap}
    done: dict[str, Version] = {}
    seen: dict[str, tuple[Version, float]] = {}
    faults, count = Faults(report), 0
    with _alone(out, made_by), kept_memory(), finish_step_on_interrupt() as interrupted:
        while not interrupted():
            faults.look_again()
            now, there = time.monotonic(), dict(_versions(images, out, faults))
            took = time.monotonic() - now
            # What was taken away is forgotten, so that memory does not grow with the years.
            done = {name: version for name, version in done.items() if name in there}
            seen = {name: known for name, known in seen.items() if name in there}
            for name, version in there.items():
                if done.get(name) == version:
                    continue
                if interrupted():
                    break
                try:
                    place = _place(out, name)
                except ImageError as fault:
                    faults.tell(fault)
                    continue
                if name not in done and name not in seen and _stored(place) == version:
                    done[name] = version
                    continue
                if name not in seen or seen[name][0] != version:
                    seen[name] = version, now
                    continue
                last = now - seen[name][1] >= patience
                try:
                    result = _judge(detector, images, name, out, wanted, last)
                except UnreachableError as fault:
                    faults.tell(fault)
                    continue
                if result is None:
                    continue
                write_json(place, result | version._asdict() | made_by)
                done[name] = version
                del seen[name]
                count += 1
                found = result["error"] or "{decision}, score {score:.4g}".format(**result)
                report(printable(f"{name}: {found}"))
            _wait(interval if seen else max(interval, min(took / LOOKING, SLOWEST)), interrupted)
    return count


@contextmanager
def _alone(out: Path, made_by: dict[str, Any]) -> Iterator[None]:
    """Hold the lock of a folder for results of this origin alone, and leave it with all of them in `scores.csv`."""
    lock, results = Lock(out / WATCH_LOCK), inside(out, "results", "*.json").parent
    if (out / "scores.csv").exists() and not (lock.path.exists() or results.exists()):
        raise RunError(f"{out} holds the scores.csv of a `detect` without --watch. Choose another folder.")
    try:
        lock.take()
    except LockError as error:
        raise LockError(f"another watch is at work there: {error}") from error
    try:
        _check_origin(results, made_by)
        try:
            yield
        finally:
            collect(out)
    finally:
        lock.leave()


def _check_origin(results: Path, made_by: dict[str, Any]) -> None:
    """Raise `RunError` for results of another model or other tiles; as all are of one origin, one of them tells it."""
    sound = filter(None, map(_result, _results(results)))
    if (one := next(sound, None)) is None:
        return
    was = {"model": str(one.get("model", "unknown")), "tile_overlap": one.get("tile_overlap")}
    if was != made_by:
        there, here = (f"model {made['model'][:12]}, tile overlap {made['tile_overlap']}" for made in (was, made_by))
        raise RunError(
            f"{results.parent} holds results of {there}; now it is {here}. Choose another folder for these results, or "
            f"delete {results} to judge all images anew."
        )


def collect(out: str | Path) -> None:
    """Write `scores.csv` from all results of a watched folder; a warning names those that are broken, without a row."""
    rows = []
    for path in sorted(_results(Path(out) / "results")):
        if (result := _result(path)) is None:
            warnings.warn(f"{path}: no result of this program, left out of scores.csv. Delete it.", stacklevel=2)
        else:
            rows.append(tuple(result[name] for name in COLUMNS))
    write_table(rows, Path(out))


def _results(folder: Path) -> Iterator[Path]:
    """Yield the files of all results; a folder of images may be called like one."""
    return filter(Path.is_file, folder.rglob("*.json"))


def _result(path: Path) -> dict | None:
    """Return a result as it was written; None for a file that somebody or a broken disk has altered."""
    try:
        result = read_json(path)
    except DocumentError:
        return None
    kinds = {"file": str, "decision": str, "error": str, "size": int, "changed": int}
    numbers = [result.get(name, "") for name in ("score", "threshold", "marked")]
    sound = all(type(result.get(name)) is kind for name, kind in kinds.items())
    return result if sound and all(value is None or is_number(value) for value in numbers) else None


def _versions(images: Path, out: Path, faults: Faults) -> Iterator[tuple[str, Version]]:
    """Yield name and version of the images that are there now, the results left out."""
    start = len(os.path.join(images, ""))
    for entry in image_entries(images, out, faults.tell):
        try:
            found = entry.stat()
        except OSError:
            continue  # it was taken away in between
        yield entry.path[start:], Version(found.st_size, found.st_mtime_ns)


def _place(out: Path, name: str) -> Path:
    """Return the path of a result. Raises `ImageError` as `inside`, and if other results keep it from being a file."""
    folder, _, last = name.rpartition("/")
    if len(last.encode()) > LONGEST_NAME:
        last = hashlib.sha256(last.encode()).hexdigest()
    place = inside(out, "results", os.path.join(folder, f"{last}.json"))
    above = next(path for path in place.parents if path.exists())
    if place.is_dir() or not above.is_dir():
        raise ImageError(f"{place}: an image and a folder want this name for their results. Rename one of them.")
    return place


def _stored(place: Path) -> Version | None:
    """Return the version of a file that an earlier call has judged; None if its result is not there or is broken."""
    result = _result(place) if place.is_file() else None
    return result and Version(result["size"], result["changed"])


def _judge(detector: Inspector, images: Path, name: str, out: Path, wanted: Wanted, last: bool) -> dict | None:
    """Return the result of one image, None if it cannot be read yet; `last` says that it will not get better.

    Raises `UnreachableError` for one that the system does not let us read.
    """
    path = images / name
    result = {"file": name, "score": None, "threshold": detector.threshold, "decision": "", "marked": None}
    try:
        score, marked = detect_one(detector, path, Path(name), out, None, wanted)
    except UnreachableError:
        raise
    except ImageError as error:
        return result | {"error": printable(error)} if last and os.path.exists(path) else None
    return result | {"score": score, "decision": decision(detector, score), "marked": marked, "error": ""}


def _wait(seconds: float, interrupted: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not interrupted():
        time.sleep(min(left, 0.1))
