"""Data sets on disk: any folder of good images, and the layout of MVTec AD."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from effad_lib.datasets.split import DatasetError, Sample, Samples, Split, hold_out, listed, register
from effad_lib.images import ImageError, find_images
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


@register("folder")
def load_folder(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read a folder of good images: in `train/good`, else in `good`, else all outside the folders below.

    Optional: `test/good` and `test/<defect>`; masks `ground_truth/<defect>/<stem>_mask.png` or `<stem>.png`;
    `validation/good`. Subfolders are searched, links that lead out of `root` are not followed, `category` is
    not used.
    """
    if root is None or not root.is_dir():
        raise DatasetError(f"data set 'folder': no folder at root {str(root or '')!r}. Name one of good images.")
    return read_layout(root, f"folder/{root.name}", seed, validation_share)


Files = dict[tuple[str, ...], Path]
"""Image files by the parts of their path below the data set's folder."""


def read_layout(base: Path, name: str, seed: int, share: float) -> Split:
    """Read the layout that `load_folder` describes, below `base`; the split is called `name`. Raises `DatasetError`."""
    try:
        files = {path.relative_to(base).parts: path for path in find_images(base)}
    except ImageError as error:
        raise DatasetError(f"{name}: {error}") from error
    train = _below(files, "train", "good") or _below(files, "good") or _loose(files, base)
    validation = _below(files, "validation", "good")
    train, validation = (train, validation) if validation else hold_out(train, seed, share)
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
            f"Add them, or remove the folder ground_truth to go without any.{listed(unmasked)}"
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
    return read_layout(folders[category], f"mvtec_ad/{category}", seed, validation_share)
