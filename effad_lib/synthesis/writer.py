"""A synthetic data set: on disk in the MVTec AD layout, or in memory."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from effad_lib.documents import DocumentError, is_text, read_json
from effad_lib.images import read_image
from effad_lib.memory import keep_memory
from effad_lib.progress import progress
from effad_lib.runs import partial_of, remove_forsaken, write_json
from effad_lib.synthesis.rendering import TOLERANCE, SyntheticImage
from effad_lib.synthesis.scene import SynthesisError
from effad_lib.synthesis.shots import Shot, SynthesisSettings

MANIFEST = "manifest.json"

TRIES = 100
"""Drawings of a defect, each with the next seed, until one of them shows: an empty mask is none to measure by."""

Result = TypeVar("Result")


def synthesize(settings: SynthesisSettings) -> Path:
    """Write the data set of `settings` and return its folder; one that is there with the same settings is kept.

    The folder gets train/good/000.png, test/good/, test/<defect>/000.png, ground_truth/<defect>/000_mask.png (0 or 255)
    and manifest.json, which holds the settings and, for every image, what it takes to make it again. A defect that
    does not show is drawn again, in `TRIES` places; then it is a `SynthesisError`. The data set appears whole or not at
    all. Another data set that is there is replaced with `overwrite` and is else a `SynthesisError` that names
    the differences; a folder with anything else in it is never replaced.
    """
    folder, identity = settings.folder, settings.identity
    put_back(folder)
    if not _is_there(settings, identity):
        with _put_in_place(settings, identity) as work:
            records = _all(partial(_write, work, settings), settings.plan(), settings, f"rendering {folder.name}")
            manifest = {"settings": identity, "mask_tolerance": TOLERANCE, "images": records}
            write_json(work / MANIFEST, manifest)
    return folder


def _is_there(settings: SynthesisSettings, identity: dict) -> bool:
    """Whether the data set of these settings is there. Raises `SynthesisError` for another one that is not replaced."""
    folder = settings.folder
    if not (manifest := _manifest(folder)):
        return False
    there = manifest["settings"]
    changed = [
        f"{name}: {there.get(name)} there, {value} now" for name, value in identity.items() if there.get(name) != value
    ]
    if changed and not settings.overwrite:
        raise SynthesisError(
            f"{folder} holds another data set ({'; '.join(changed)}). Set overwrite = True to replace it, or name "
            "another data_root."
        )
    if changed:
        _check_own(folder, manifest)
    return not changed


def put_back(folder: Path) -> None:
    """Bring back the data set of a folder if a process that was to replace it was killed when it had moved it away."""
    if folder.exists():
        return
    if left := next(folder.parent.glob(f".{_old(folder).name}.*.partial"), None):
        with suppress(OSError):  # another process has done so
            left.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _manifest(folder: Path) -> dict | None:
    """Return the manifest of the data set in a folder, None if nothing is in it.

    Raises `SynthesisError` if something else is.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        whole = isinstance(manifest["settings"], dict) and all(is_text(record["path"]) for record in manifest["images"])
    except (DocumentError, KeyError, TypeError):
        whole = False
    if not whole:
        raise _left_alone(folder, f"its {MANIFEST} is missing or not whole")
    return manifest


def _check_own(folder: Path, manifest: dict) -> None:
    """Raise `SynthesisError` if a folder to be replaced is a link, or holds a file that is not of the data set."""
    if folder.is_symlink():
        raise SynthesisError(f"{folder} is a link, so it is not replaced. Name the data_root where its folder lies.")
    paths = [record["path"] for record in manifest["images"]]
    own = {MANIFEST, *paths, *(_mask_path(path) for path in paths)}
    for path in folder.rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in own:
            raise _left_alone(folder, f"{path} does not belong to one")


def _left_alone(folder: Path, reason: str) -> SynthesisError:
    return SynthesisError(
        f"{folder} is no synthetic data set ({reason}), so it is left alone. Move it away, or name another data_root."
    )


def _mask_path(path: str) -> str:
    return path.replace("test/", "ground_truth/", 1).replace(".png", "_mask.png")


@dataclass(frozen=True)
class Drawn:
    """A synthetic data set in memory: `records`, the lines of its manifest, and its `shots`, in the same order.

    `images` and `masks` raise `SynthesisError` where photographs differ in size.
    """

    records: list[dict]
    shots: list[SyntheticImage]

    @cached_property
    def images(self) -> np.ndarray:
        """All images, uint8 [N, 3, H, W]."""
        return self._stacked([shot.image.transpose(2, 0, 1) for shot in self.shots])

    @cached_property
    def masks(self) -> np.ndarray:
        """All masks, bool [N, H, W]."""
        return self._stacked([shot.mask for shot in self.shots])

    @staticmethod
    def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
        sizes = sorted({array.shape[-2:] for array in arrays})
        if len(sizes) > 1:
            raise SynthesisError(f"photographs of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}: use shots.")
        return np.stack(arrays)


def draw(settings: SynthesisSettings, shots: Sequence[Shot] | None = None) -> Drawn:
    """Return the data set that `synthesize` would write, or just these shots as they are, without writing anything."""
    make, plan = (_shown, settings.plan()) if shots is None else (_drawn, shots)
    drawn = _all(partial(make, settings), plan, settings, f"drawing {settings.folder.name}")
    records, shots = zip(*drawn, strict=True) if drawn else ((), ())
    return Drawn(list(records), list(shots))


def _all(
    make: Callable[[Shot], Result], plan: Sequence[Shot], settings: SynthesisSettings, description: str
) -> list[Result]:
    """Return what `make` gives for every shot, in order, made by as many workers as the settings ask for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(settings.workers or cores, max(1, len(plan) // 8))
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. These children draw with NumPy, SciPy and Pillow and nothing else.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        try:
            with _pool(workers) as pool:
                made = pool.map(make, plan, chunksize=4) if pool else map(make, plan)
                return list(progress(made, total=len(plan), desc=description, unit="image", leave=False))
        except BrokenExecutor as error:
            raise SynthesisError(
                f"{description}: one of {workers} drawing processes was ended from outside, as the system does where "
                f"memory is short. Start again, with fewer workers."
            ) from error


@contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Yield workers, or None for one. Forked, they know products that a notebook registered; else they are threads."""
    if workers == 1:
        yield None
        return
    if sys.platform == "linux":
        pool: Executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), _begin_worker, (os.getpid(),)
        )
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Keep memory that is freed, as a fifth of the time went into fresh pages; end when the parent ends.

    Of a parent that was killed a worker would hear nothing, and wait for its next task for ever.
    """
    keep_memory()
    set_signal_at_end_of_parent = 1
    ctypes.CDLL(None).prctl(set_signal_at_end_of_parent, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def _drawn(settings: SynthesisSettings, shot: Shot) -> tuple[dict, SyntheticImage]:
    image = settings.take(shot)
    return shot.record if shot.defect == "good" else shot.record | {"mask_pixels": int(image.mask.sum())}, image


def _shown(settings: SynthesisSettings, shot: Shot) -> tuple[dict, SyntheticImage]:
    """Draw a shot, if it has a defect with the first seed from its own on with which that shows."""
    for again in range(TRIES):
        record, image = _drawn(settings, replace(shot, seed=shot.seed + again))
        if shot.defect == "good" or image.mask.any():
            return record, image
    raise SynthesisError(
        f"{shot.path}: {shot.defect!r} with severity {shot.severity} does not show{' on ' * bool(shot.source)}"
        f"{shot.source}, in {TRIES} places. Leave it out of the defects, or raise the severity."
    )


def _write(root: Path, settings: SynthesisSettings, shot: Shot) -> dict:
    """Render and write one image (and its mask); return its line of the manifest."""
    (root / shot.path).parent.mkdir(parents=True, exist_ok=True)
    if shot.source and shot.defect == "good":
        source = settings.source(shot)
        read_image(source)  # raises for a broken one
        shutil.copyfile(source, root / shot.path)
        return shot.record
    record, image = _shown(settings, shot)
    _save(root / shot.path, image.image)
    if shot.defect != "good":
        path = root / _mask_path(shot.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, image.mask.astype(np.uint8) * 255)
    return record


def _save(path: Path, pixels: np.ndarray) -> None:
    # Sensor noise hardly compresses: anything but runs costs time and saves nothing.
    Image.fromarray(pixels).save(path, compress_level=1, compress_type=zlib.Z_RLE)


@contextmanager
def _put_in_place(settings: SynthesisSettings, identity: dict) -> Iterator[Path]:
    """Yield an empty folder that takes the place of a data set's when all went well, and is deleted if not."""
    folder = settings.folder
    work, old = partial_of(folder), partial_of(_old(folder))
    try:
        remove_forsaken(folder.parent, folder.name)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        if not _is_there(settings, identity):  # looked at again: somebody may have put something there meanwhile
            if (folder / MANIFEST).is_file():
                os.utime(folder)  # not forsaken yet
                folder.rename(old)
            elif folder.exists():
                folder.rmdir()
            work.rename(folder)
    except OSError as error:
        raise SynthesisError(f"{folder} cannot be written ({error}). Name another data_root.") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for done_with in (work, old):
            shutil.rmtree(done_with, ignore_errors=True)
