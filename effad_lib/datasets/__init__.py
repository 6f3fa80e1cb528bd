"""Data sets as values: the published ones, any folder of good images, synthetic products, your own function."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

from effad_lib.datasets import elpv, folders, loco, synthetic, visa  # noqa: F401  (each registers its data sets)
from effad_lib.datasets.benchmarks import MVTEC_AD
from effad_lib.datasets.split import (
    FEWEST_VALIDATION,
    LOADERS,
    DatasetError,
    Sample,
    Samples,
    Saturation,
    Split,
    hold_out,
    listed,
    provided,
    register,
)
from effad_lib.documents import is_text
from effad_lib.images import ALL_LEVELS, ImageError, read_image, read_regions
from effad_lib.progress import progress
from effad_lib.runs import resolve
from effad_lib.settings import SEEDS, nearest

__all__ = [
    "MVTEC_AD",
    "DatasetError",
    "Sample",
    "Samples",
    "Saturation",
    "Split",
    "dataset_names",
    "hold_out",
    "load_dataset",
    "register",
    "verify",
    "verify_masks",
]

FEWEST_TRAIN = 10


def dataset_names() -> list[str]:
    """Return the names that `load_dataset` takes."""
    return sorted(LOADERS)


def load_dataset(
    dataset: str,
    *,
    root: str | Path | None = "",
    category: str = "",
    seed: int = 0,
    validation_share: float = 0.1,
) -> Split:
    """Find the images of a data set and split them; no image is decoded (see `verify`).

    - "mvtec_ad", "mvtec_ad_2", "mvtec_loco", "visa", "btad": `root` holds the category folders (default: the folder
      of the same name in `data`); `category` is one of them. If there is none, the error says where to get them.
    - "folder": `root` is any folder of good images, see `load_folder`.
    - "elpv": solar cells from the PyPI package `elpv-dataset`; `category` is "mono" (default), "poly" or "all".
    - "synthetic": `category` is a product (default "board"); rendered into `root` (default `data/synthetic`) if absent.
    - the name of a function of your own, see `register`; "path/to/file.py:name" executes that file to find it. Whoever
      calls this has named the file; of strings that come out of a file ask `consent.check_named` first.

    `validation_share` of the good training images, at least three, is drawn by `seed` and held out for
    calibration, unless there is a folder `validation/good` (MVTec AD 2, MVTec LOCO); test images never are.
    Relative roots are taken from the project's folder, "" and None are the default. Raises `DatasetError`
    for unknown names, missing folders and masks, or fewer than ten images left to train on.
    """
    if ".py:" in dataset:
        dataset = provided(dataset)
    if dataset not in LOADERS:
        raise DatasetError(f"unknown data set {dataset!r}: {nearest(dataset, LOADERS)}")
    if not 0 < validation_share < 1:
        raise DatasetError(f"validation_share = {validation_share!r}: takes a share above 0 and below 1.")
    if seed not in SEEDS:
        raise DatasetError(f"seed = {seed!r}: takes a whole number from 0 to below 2^63.")
    split = LOADERS[dataset](resolve(root) if root else None, category, seed, validation_share)
    _check(split, dataset)
    return split


def verify(split: Split) -> None:
    """Decode every image and mask of a split once, before long work starts.

    Raises one `DatasetError` that lists the first few faults: unreadable, 16-bit or CMYK images, masks of another size
    than their image, masks of defective images in which nothing is marked, and regions without a saturation threshold.
    """
    _raise_faults(split, [*split.train, *split.validation, *split.test], masks_only=False)


def verify_masks(split: Split) -> None:
    """Check every mask of a split against its image; as `verify`, but images that cannot be read are passed over.

    For a training: a test image that is broken will be skipped and reported, a mask that does not fit is a mistake.
    """
    _raise_faults(split, [sample for sample in split.test if sample.mask], masks_only=True)


def _raise_faults(split: Split, samples: list[Sample], masks_only: bool) -> None:
    fault = partial(_fault, saturation=split.saturation, masks_only=masks_only)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        bar = progress(pool.map(fault, samples), total=len(samples), desc="checking images", leave=False)
        faults = [found for found in bar if found]
    if faults:
        raise DatasetError(f"{split.name}: {len(faults)} of {len(samples)} samples are faulty.{listed(faults)}")


def _fault(sample: Sample, saturation: Mapping[int, Saturation], masks_only: bool) -> str | None:
    try:
        shape = read_image(sample.image, levels=ALL_LEVELS).shape[1:]
    except ImageError as error:
        return None if masks_only else str(error)
    if not sample.mask:
        return None
    try:
        values = read_regions(sample.mask, shape).max(axis=(1, 2)).tolist()
    except ImageError as error:
        return str(error)
    if not sample.label:
        return None
    if min(values) < sample.mask_level:
        return (
            f"{sample.mask}: an empty mask, no value reaches {sample.mask_level}. Save 0 for good, 255 for defective."
        )
    if unknown := set(values) - saturation.keys() if saturation else None:
        known = ", ".join(map(str, sorted(saturation)))
        return f"{sample.mask}: pixel values {sorted(unknown)} have no saturation threshold, only {known} have."
    return None


def _check(split: Split, dataset: str) -> None:
    """Raise unless a loader's result is a split that one can train on without leakage."""
    if not isinstance(split, Split):
        got = type(split).__name__
        raise DatasetError(f"the function registered as {dataset!r} must return a Split, it returned {got}.")
    if not is_text(split.name):
        raise DatasetError(f"the name {split.name!r} of a data set is no text in UTF-8: rename its folder.")
    for sample in chain(split.train, split.validation, split.test):
        if not isinstance(sample, Sample) or sample.label not in (0, 1):
            raise DatasetError(f"{split.name}: {sample!r} is not a Sample with label 0 or 1.")
        if sample.mask_level not in range(1, 256):
            raise DatasetError(f"{split.name}: {sample!r} has a mask_level outside 1 to 255.")
    owner: dict[Path, str] = {}
    for part, samples in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        for sample in samples:
            if sample.label and part != "test":
                raise DatasetError(f"{split.name}: {sample.image} is defective, so it cannot be in {part}.")
            if owner.setdefault(sample.image, part) != part:
                raise DatasetError(f"{split.name}: {sample.image} is in {owner[sample.image]} and in {part}.")
    if len(split.train) < FEWEST_TRAIN or not split.validation:
        raise DatasetError(
            f"{split.name}: {len(split.train)} good images to train on ({FEWEST_TRAIN} are needed) and "
            f"{len(split.validation)} held out for validation (1 is needed). Add good images"
            f"{', or lower validation_share' if len(split.validation) > FEWEST_VALIDATION else ''}."
        )
