"""A data set as a value: samples, their split, and the register of functions that make one."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from effad_lib.consent import allow
from effad_lib.documents import open_plain
from effad_lib.reading import find_images
from effad_lib.runs import printable, resolve

FEWEST_VALIDATION = 3


class DatasetError(ValueError):
    """A data set that cannot be found or used; the message names it, what was found and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    `mask` is None when the image is good or no mask is known, else a file, or a folder of masks, one for each defective
    region; a pixel is defective where its value in one of them is at least `mask_level`, in [1, 255]. `label` is 0 for
    good, 1 for defective; `defect` is the name of its defect class, "good" for good ones.
    """

    image: Path
    mask: Path | None
    label: int
    defect: str
    mask_level: int = 128


Samples = tuple[Sample, ...]


class Saturation(NamedTuple):
    """How much of a region of one kind of `defect` must be found until it counts as found in full (MVTec LOCO).

    `threshold` is a share of the region's area in (0, 1] if `relative`, else a number of pixels.
    """

    defect: str
    threshold: float
    relative: bool

    def pixels(self, area: int) -> int:
        """Return the number of pixels, from 1 to `area`, at which a region of `area` pixels counts as found."""
        return max(1, int(self.threshold * area) if self.relative else min(int(self.threshold), area))


@dataclass(frozen=True, repr=False)
class Split:
    """A data set: good images to train on, good ones held out for calibration, and the test images.

    `saturation` tells by the pixel value of a region in its mask when it is found, for AU-sPRO; empty where the data
    set has no such rule.
    """

    name: str
    train: Samples
    validation: Samples
    test: Samples
    saturation: Mapping[int, Saturation] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def has_masks(self) -> bool:
        """Whether there are defective test images and each has its mask."""
        defective = [sample for sample in self.test if sample.label]
        return bool(defective) and all(sample.mask for sample in defective)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of all images and masks, of their parts, kinds and order: the same wherever the data lie.

        Every file is read for it; one that cannot be read counts as empty.
        """
        return self._hash("train", "validation", "test")

    @property
    def learned_from(self) -> str:
        """A SHA-256 as `fingerprint`, of the images that a training sees or holds out: others may change after it."""
        return self._hash("train", "validation")

    def _hash(self, *parts: str) -> str:
        whole = hashlib.sha256()
        for part in parts:
            for sample in getattr(self, part):
                whole.update(f"{part} {sample.label} {sample.defect}\n".encode())
                masks = find_images(sample.mask) if sample.mask and sample.mask.is_dir() else [sample.mask]
                for path in filter(None, [sample.image, *masks]):
                    whole.update(_digest(path))
        return whole.hexdigest()

    def __repr__(self) -> str:
        bad = sum(sample.label for sample in self.test)
        return (
            f"Split({self.name!r}: {len(self.train)} train, {len(self.validation)} validation, "
            f"{len(self.test)} test: {len(self.test) - bad} good and {bad} defective, "
            f"{'with' if self.has_masks else 'no'} masks)"
        )


def _digest(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""


Loader = Callable[[Path | None, str, int, float], Split]

LOADERS: dict[str, Loader] = {}
"""What `load_dataset` knows, by name; filled by `register`."""


def register(name: str) -> Callable[[Loader], Loader]:
    """Make `load_dataset` know a function `(root, category, seed, validation_share) -> Split` by this name.

    The function gets `root` as an absolute `Path`, or None when none was given. A name that is taken raises
    `DatasetError`; only the same function, defined anew by running its cell again, replaces itself.
    """

    def add(loader: Loader) -> Loader:
        old = LOADERS.get(name)
        if old and (old.__module__, old.__qualname__) != (loader.__module__, loader.__qualname__):
            owner = f"{old.__module__}.{old.__qualname__}"
            raise DatasetError(f"the data set name {name!r} is taken by {owner}: choose another name.")
        LOADERS[name] = loader
        return loader

    return add


def provided(dataset: str) -> str:
    """Return the registered name of a data set given as "path/to/file.py:name", running that file.

    So a function registered there is known in every notebook and command that is told this one string. Relative paths
    are taken from the project's folder. Raises `DatasetError` if the file cannot be run or registers no such name.
    """
    file, _, name = dataset.rpartition(":")
    path = resolve(file)
    allow(path)
    if not path.is_file():
        raise DatasetError(f"data set {dataset!r}: there is no file {path}. Name one that registers {name!r}.")
    module = f"effad_data_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    for known in [known for known, loader in LOADERS.items() if loader.__module__ == module]:
        del LOADERS[known]  # the file may have been edited since
    spec = util.spec_from_file_location(module, path)
    sys.modules[module] = loaded = util.module_from_spec(spec)  # where dataclasses and pickles look
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise DatasetError(f"data set {dataset!r}: {path} stopped with {reason}.") from error
    theirs = [known for known, loader in LOADERS.items() if loader.__module__ == module]
    if name not in theirs:
        there = f"registers {', '.join(theirs)}" if theirs else f'registers nothing: put @register("{name}") there'
        raise DatasetError(f"data set {dataset!r}: {path} has no {name!r}, it {there}.")
    return name


def hold_out(good: Sequence[Sample], seed: int, share: float) -> tuple[Samples, Samples]:
    """Return (train, validation), both in the order of `good`; at least three are held out."""
    count = max(FEWEST_VALIDATION, round(share * len(good)))
    held = set(np.random.default_rng(seed).permutation(len(good))[:count].tolist())
    train = tuple(sample for index, sample in enumerate(good) if index not in held)
    return train, tuple(good[index] for index in sorted(held))


def listed(items: Sequence[object], most: int = 5) -> str:
    """Return the first few items, a line each, and how many more there are."""
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n    {printable(item)}" for item in [*items[:most], *more])
