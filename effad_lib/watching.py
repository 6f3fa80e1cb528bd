"""A folder into which a machine drops images: each judged once, results written whole, whenever it is stopped."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from effad_lib.cards import is_number
from effad_lib.detection import COLUMNS, Wanted, decision, detect_one, inside, write_table
from effad_lib.documents import DocumentError, read_json
from effad_lib.engines import Inspector
from effad_lib.memory import kept_memory
from effad_lib.reading import ImageError, images_below
from effad_lib.runs import finish_step_on_interrupt, write_json

PATIENCE = 10.0
"""Seconds for which a file that cannot be read must stay as it is until it counts as broken and not as half written."""


class Version(NamedTuple):
    """By what a file is told from another one of the same name: its size in bytes and its time of change."""

    size: int
    changed: int


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
    """Judge every image that is or comes below a folder, until Ctrl-C; return how many were judged.

    For an image `a/b.jpg` the results are those of `detect` and, written last, `results/a/b.jpg.json`: file, score,
    threshold, decision, marked, error, and the file's size and time of change. What has it is done, now and after a
    restart; a file that is written anew under the same name is another one. A file is read when it has not changed
    between two looks, `interval` seconds apart; one that cannot be read is looked at again until it has been the same
    for `patience` seconds, and then gets a result with the error. At the end `scores.csv` collects all results. Killed
    at any moment, the folder holds whole results only. Raises `ImageError` if there is no such folder, `SettingsError`
    as `detect`.
    """
    wanted = wanted or Wanted()
    wanted.check(detector)
    images, out = Path(images), Path(out)
    if not images.is_dir():
        raise ImageError(f"{images}: there is no such folder to watch.")
    done: dict[Path, Version] = {}
    seen: dict[Path, tuple[Version, float]] = {}
    count = 0
    with kept_memory(), finish_step_on_interrupt() as interrupted:
        while not interrupted():
            now, there = time.monotonic(), dict(_versions(images, out))
            # What was taken away is forgotten, so that memory does not grow with the years.
            done = {name: version for name, version in done.items() if name in there}
            seen = {name: known for name, known in seen.items() if name in there}
            for name, version in there.items():
                if interrupted():
                    break
                if name not in done and (written := _stored(out, name)):
                    done[name] = written
                if done.get(name) == version:
                    continue
                since = seen[name][1] if name in seen and seen[name][0] == version else None
                if since is None:
                    seen[name] = version, now
                    continue
                result = _judge(detector, images, name, out, wanted, now - since >= patience)
                if result is None:
                    continue
                result |= {"size": version.size, "changed": version.changed}
                write_json(_place(out, name), result)
                done[name] = version
                del seen[name]
                count += 1
                report(f"{name.as_posix()}: {result['error'] or '{decision}, score {score:.4g}'.format(**result)}")
            _wait(interval, interrupted)
    collect(out)
    return count


def collect(out: str | Path) -> None:
    """Write `scores.csv` from all results of a watched folder; a warning names those that are broken, without a row."""
    rows = []
    for path in sorted((Path(out) / "results").rglob("*.json")):
        if (result := _result(path)) is None:
            warnings.warn(f"{path}: no result of this program, left out of scores.csv. Delete it.", stacklevel=2)
        else:
            rows.append(tuple(result[name] for name in COLUMNS))
    write_table(rows, Path(out))


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


def _versions(images: Path, out: Path) -> Iterator[tuple[Path, Version]]:
    """Yield name and version of the images that are there now, the results left out."""
    results = out.resolve()
    for path in images_below(images):
        try:
            if not path.resolve().is_relative_to(results):
                found = path.stat()
                yield path.relative_to(images), Version(found.st_size, found.st_mtime_ns)
        except OSError:
            continue  # it was taken away in between


def _place(out: Path, name: Path) -> Path:
    return inside(out, "results", f"{name}.json")


def _stored(out: Path, name: Path) -> Version | None:
    """Return the version of a file that an earlier call has judged; None if its result is not there or is broken."""
    path = _place(out, name)
    result = _result(path) if path.is_file() else None
    return result and Version(result["size"], result["changed"])


def _judge(detector: Inspector, images: Path, name: Path, out: Path, wanted: Wanted, last: bool) -> dict | None:
    """Return the result of one image, None if it cannot be read yet; `last` says that it will not get better."""
    path = images / name
    result = {"file": name.as_posix(), "score": None, "threshold": detector.threshold, "decision": "", "marked": None}
    try:
        score, marked = detect_one(detector, path, name, out, None, wanted)
    except ImageError as error:
        return result | {"error": str(error)} if last and os.path.exists(path) else None
    return result | {"score": score, "decision": decision(detector, score), "marked": marked, "error": ""}


def _wait(seconds: float, interrupted: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not interrupted():
        time.sleep(min(left, 0.1))
