"""Data sets as values: MVTec AD, any folder of good images, ELPV, synthetic products, your own function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from effad_lib.images import ImageError, find_images, read_image, read_mask
from effad_lib.runs import resolve
from effad_lib.settings import nearest

MVTEC_AD = tuple(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood "
    "zipper".split()
)

MVTEC_HELP = """Download it from https://www.mvtec.com/company/research/datasets/mvtec-ad
(licence CC BY-NC-SA 4.0: no commercial use), unpack it, and give as root the folder that then holds:
    <category>/train/good/000.png
    <category>/test/good/000.png
    <category>/test/<defect>/000.png
    <category>/ground_truth/<defect>/000_mask.png"""

FEWEST_TRAIN, FEWEST_VALIDATION = 10, 3

ELPV_MODULES = (*[60] * 20, 54, *[60] * 12, 110, 60, 72, *[60] * 3, 48, *[60] * 3)
"""Cells of each solar module of ELPV in file order, read off the images. The 110 are two modules."""


class DatasetError(ValueError):
    """A data set that cannot be found or used; the message names it, what was found and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One image with what is known of it.

    `mask` is None when the image is good or no mask is known; `label` is 0 for good, 1 for defective;
    `defect` is the name of its defect class, "good" for good ones.
    """

    image: Path
    mask: Path | None
    label: int
    defect: str


Samples = tuple[Sample, ...]


@dataclass(frozen=True, repr=False)
class Split:
    """A data set: good images to train on, good ones held out for calibration, and the test images."""

    name: str
    train: Samples
    validation: Samples
    test: Samples

    @property
    def has_masks(self) -> bool:
        """Whether there are defective test images and each has its mask."""
        defective = [sample for sample in self.test if sample.label]
        return bool(defective) and all(sample.mask for sample in defective)

    def __repr__(self) -> str:
        bad = sum(sample.label for sample in self.test)
        return (
            f"Split({self.name!r}: {len(self.train)} train, {len(self.validation)} validation, "
            f"{len(self.test)} test: {len(self.test) - bad} good and {bad} defective, "
            f"{'with' if self.has_masks else 'no'} masks)"
        )


Loader = Callable[[Path | None, str, int, float], Split]

_loaders: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Make `load_dataset` know a function `(root, category, seed, validation_share) -> Split` by this name.

    The function gets `root` as an absolute `Path`, or None when none was given. A name that is taken raises
    `DatasetError`; only the same function, defined anew by running its cell again, replaces itself.
    """

    def add(loader: Loader) -> Loader:
        old = _loaders.get(name)
        if old and (old.__module__, old.__qualname__) != (loader.__module__, loader.__qualname__):
            owner = f"{old.__module__}.{old.__qualname__}"
            raise DatasetError(f"the data set name {name!r} is taken by {owner}: choose another name.")
        _loaders[name] = loader
        return loader

    return add


def dataset_names() -> list[str]:
    """Return the names that `load_dataset` takes."""
    return sorted(_loaders)


def load_dataset(
    dataset: str, *, root: str | Path = "", category: str = "", seed: int = 0, validation_share: float = 0.1
) -> Split:
    """Find the images of a data set and split them; no image is decoded (see `verify`).

    - "mvtec_ad": `root` holds the category folders (default `data/mvtec_ad`); `category` is one of them.
    - "folder": `root` is any folder of good images, see `load_folder`.
    - "elpv": solar cells from the PyPI package `elpv-dataset`; `category` is "mono" (default), "poly" or "all".
    - "synthetic": `category` is a product (default "board"); rendered into `root` (default `data/synthetic`) if absent.
    - the name of a function of your own, see `register`.

    `validation_share` of the good training images, at least three, is drawn by `seed` and held out for
    calibration, unless there is a folder `validation/good`; test images never are. Relative roots are taken
    from the project's folder. Raises `DatasetError` for unknown names, missing folders and masks, or fewer
    than ten images left to train on.
    """
    if dataset not in _loaders:
        raise DatasetError(f"unknown data set {dataset!r}: {nearest(dataset, _loaders)}")
    if not 0 < validation_share < 1:
        raise DatasetError(f"validation_share = {validation_share!r}: takes a share above 0 and below 1.")
    if seed < 0:
        raise DatasetError(f"seed = {seed!r}: takes a whole number from 0.")
    split = _loaders[dataset](resolve(root) if str(root) else None, category, seed, validation_share)
    _check(split, dataset)
    return split


def verify(split: Split) -> None:
    """Decode every image and mask of a split once, before long work starts.

    Raises one `DatasetError` that lists the first few faults: unreadable, 16-bit or CMYK images, masks of
    another size than their image, and masks of defective images in which nothing is marked.
    """
    samples = [*split.train, *split.validation, *split.test]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        progress = tqdm(pool.map(_fault, samples), total=len(samples), desc="checking images", leave=False)
        faults = [fault for fault in progress if fault]
    if faults:
        raise DatasetError(f"{split.name}: {len(faults)} of {len(samples)} samples are faulty.{_listed(faults)}")


def _fault(sample: Sample) -> str | None:
    try:
        shape = read_image(sample.image).shape[1:]
        if sample.mask and not read_mask(sample.mask, shape).any() and sample.label:
            return f"{sample.mask}: an empty mask, no value reaches 128. Save 0 for good, 255 for defective."
    except ImageError as error:
        return str(error)


def _listed(items: Sequence[object], most: int = 5) -> str:
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n    {item}" for item in [*items[:most], *more])


def _check(split: Split, dataset: str) -> None:
    """Raise unless a loader's result is a split that one can train on without leakage."""
    if not isinstance(split, Split):
        got = type(split).__name__
        raise DatasetError(f"the function registered as {dataset!r} must return a Split, it returned {got}.")
    for sample in chain(split.train, split.validation, split.test):
        if not isinstance(sample, Sample) or sample.label not in (0, 1):
            raise DatasetError(f"{split.name}: {sample!r} is not a Sample with label 0 or 1.")
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


def _hold_out(good: Sequence[Sample], seed: int, share: float) -> tuple[Samples, Samples]:
    """Return (train, validation), both in the order of `good`."""
    count = max(FEWEST_VALIDATION, round(share * len(good)))
    held = set(np.random.default_rng(seed).permutation(len(good))[:count].tolist())
    train = tuple(sample for index, sample in enumerate(good) if index not in held)
    return train, tuple(good[index] for index in sorted(held))


# --- folders ------------------------------------------------------------------------------------------------


@register("folder")
def load_folder(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read a folder of good images: in `train/good`, else in `good`, else all outside the folders below.

    Optional: `test/good` and `test/<defect>`; masks `ground_truth/<defect>/<stem>_mask.png` or `<stem>.png`;
    `validation/good`. Subfolders are searched, links that lead out of `root` are not followed, `category` is
    not used.
    """
    if root is None or not root.is_dir():
        raise DatasetError(f"data set 'folder': no folder at root {str(root or '')!r}. Name one of good images.")
    return _read_layout(root, f"folder/{root.name}", seed, validation_share)


Files = dict[tuple[str, ...], Path]
"""Image files by the parts of their path below the data set's folder."""


def _read_layout(base: Path, name: str, seed: int, share: float) -> Split:
    try:
        files = {path.relative_to(base).parts: path for path in find_images(base)}
    except ImageError as error:
        raise DatasetError(f"{name}: {error}") from error
    train = _below(files, "train", "good") or _below(files, "good") or _loose(files, base)
    validation = _below(files, "validation", "good")
    train, validation = (train, validation) if validation else _hold_out(train, seed, share)
    return Split(name, train, validation, _test_samples(files, base))


def _good(paths: Iterable[Path]) -> Samples:
    return tuple(Sample(path, None, 0, "good") for path in paths)


def _below(files: Files, *folder: str) -> Samples:
    return _good(path for parts, path in files.items() if parts[:-1][: len(folder)] == folder)


def _loose(files: Files, base: Path) -> Samples:
    reserved = {"test", "ground_truth", "validation"}
    loose = {parts: path for parts, path in files.items() if parts[0] not in reserved}
    for parts in loose:
        # Several data sets below one folder: their defective images must not become training images.
        if reserved & set(parts[1:-1]):
            raise DatasetError(f"{base} holds several data sets, such as {parts[0]!r}: give one as root.")
    return _good(loose.values())


def _test_samples(files: Files, base: Path) -> Samples:
    masks = {(*parts[1:-1], path.stem): path for parts, path in files.items() if parts[0] == "ground_truth"}
    expected = (base / "ground_truth").is_dir()
    samples, unmasked = [], []
    for parts, path in files.items():
        if parts[0] != "test":
            continue
        if len(parts) < 3:
            raise DatasetError(f"{path}: test images belong in test/good or test/<defect>.")
        label, mask = int(parts[1] != "good"), None
        if label and expected:
            below = parts[1:-1]
            mask = masks.get((*below, f"{path.stem}_mask")) or masks.get((*below, path.stem))
            unmasked += [] if mask else [path]
        samples.append(Sample(path, mask, label, parts[1]))
    if unmasked:
        raise DatasetError(
            f"{base}: {len(unmasked)} defective images have no mask ground_truth/<defect>/<stem>_mask.png. "
            f"Add them, or remove the folder ground_truth to go without any.{_listed(unmasked)}"
        )
    return tuple(samples)


@register("mvtec_ad")
def load_mvtec_ad(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one category of MVTec AD, or a user's own category folder in the same layout.

    `root` holds the category folders, or is one itself; `category` may be left out when there is only one.
    """
    root = root or resolve("data/mvtec_ad")
    candidates = [root, *root.iterdir()] if root.is_dir() else []
    folders = {folder.name: folder for folder in candidates if (folder / "train" / "good").is_dir()}
    folders = {root.name: root} if root in folders.values() else folders
    if not folders:
        raise DatasetError(f"MVTec AD was not found in {root}. {MVTEC_HELP}")
    if not category and len(folders) == 1:
        category = next(iter(folders))
    if category not in folders:
        here = ", ".join(sorted(folders))
        if category in MVTEC_AD:
            raise DatasetError(f"category {category!r} is not in {root}, only {here}. Unpack it there.")
        known = nearest(category, {*MVTEC_AD, *folders})
        raise DatasetError(f"unknown category {category!r}: {known} In {root}: {here}.")
    return _read_layout(folders[category], f"mvtec_ad/{category}", seed, validation_share)


# --- ELPV and synthetic products ----------------------------------------------------------------------------


@register("elpv")
def load_elpv(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read the electroluminescence images of solar cells that the package `elpv-dataset` holds.

    `category` is "mono", "poly" or "all"; `root` is not used. Good cells have defect probability 0, defective
    ones 1; those between are left out. Neighbouring files are cells of one module and look alike, so whole
    modules are tested: the first, fourth, seventh ... of each type, with their good and defective cells. The
    other modules give their good cells to training. The test part is the same for every seed.
    """
    category = category or "mono"
    if category not in (categories := ("mono", "poly", "all")):
        raise DatasetError(f"unknown category {category!r} of elpv: {nearest(category, categories)}")
    package = util.find_spec("elpv_dataset")
    if package is None:
        raise DatasetError('the package elpv-dataset is not installed: pip install "effad[data]"')
    folder = Path(package.origin).parent / "data"
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file, delimiter=" ", skipinitialspace=True))
    if len(cells) != sum(ELPV_MODULES):
        raise DatasetError(
            f"{folder / 'labels.csv'} lists {len(cells)} cells instead of {sum(ELPV_MODULES)}. Install it "
            'anew: pip install --force-reinstall "elpv-dataset==1.0.*"'
        )
    rows = iter(cells)
    modules = [list(islice(rows, count)) for count in ELPV_MODULES]
    labels = {0.0: (0, "good"), 1.0: (1, "defective")}
    good, test = [], []
    for kind in ("mono", "poly") if category == "all" else (category,):
        for number, module in enumerate(module for module in modules if module[0][2] == kind):
            known = [(name, labels[float(share)]) for name, share, _ in module if float(share) in labels]
            samples = [Sample(folder / name, None, *label) for name, label in known]
            if number % 3 == 0:
                test += samples
            else:
                good += [sample for sample in samples if not sample.label]
    return Split(f"elpv/{category}", *_hold_out(good, seed, validation_share), tuple(test))


@register("synthetic")
def load_synthetic(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read a synthetic product in MVTec layout, rendered first if its folder has no `manifest.json` yet."""
    from effad_lib import synthesis  # only this data set needs its drawing libraries

    category = category or synthesis.DEFAULT_PRODUCT
    if category not in synthesis.product_names():
        raise DatasetError(f"unknown product {category!r}: {nearest(category, synthesis.product_names())}")
    folder = (root or resolve("data/synthetic")) / category
    if not (folder / "manifest.json").is_file():
        synthesis.write_dataset(category, folder)
    return _read_layout(folder, f"synthetic/{category}", seed, validation_share)
