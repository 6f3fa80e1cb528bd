"""Data sets in folders: the layout of MVTec AD and its relatives, and any folder of good images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from effad_lib.datasets.split import DatasetError, Sample, Samples, Split, hold_out, listed, register
from effad_lib.images import ImageError, find_images
from effad_lib.runs import RESULT_FOLDERS, holds_results


@dataclass(frozen=True)
class Layout:
    """How the folders of a data set are named, and from which value a pixel of its masks is defective: as in MVTec AD.

    `good` is the folder of good images below `train`, `validation` and `test`; `masks` the path of the folder of masks.
    """

    good: str = "good"
    test: str = "test"
    masks: tuple[str, ...] = ("ground_truth",)
    mask_level: int = 128


TREE = (
    "train/good/000.png (or good/000.png, or just 000.png)",
    "test/good/000.png (optional, to measure)",
    "test/<defect>/000.png (optional, to measure)",
    "ground_truth/<defect>/000_mask.png (optional, to measure pixels)",
)
"""What a folder of one's own must and may hold, a line each."""


@register("folder")
def load_folder(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read a folder of good images: in `train/good`, else in `good`, else all outside the folders below and outside
    the runs, detections and galleries that this program made there.

    Optional: `test/good` and `test/<defect>`; masks `ground_truth/<defect>/<stem>_mask.png` or `<stem>.png`, or a
    folder `<stem>` of masks, one for each defective region; `validation/good`. Subfolders are searched, links that
    lead out of `root` are not followed, `category` is not used.
    """
    if root is None or not root.is_dir():
        raise DatasetError(
            f"data set 'folder': no folder at root {str(root or '')!r}. Give as root one of good images:{listed(TREE)}"
        )
    return read_layout(root, f"folder/{root.name}", seed, validation_share)


Files = dict[tuple[str, ...], Path]
"""Image files by the parts of their path below the data set's folder."""


def read_layout(base: Path, name: str, seed: int, share: float, layout: Layout = Layout()) -> Split:
    """Read the layout that `load_folder` describes, below `base`; the split is called `name`. Raises `DatasetError`."""
    try:
        files = {path.relative_to(base).parts: path for path in find_images(base)}
    except ImageError as error:
        raise DatasetError(f"{name}: {error}") from error
    if (base / "train" / layout.good).is_dir():
        train = _below(files, "train", layout.good)
    else:
        train = _below(files, layout.good) or _loose(files, base)
    validation = _below(files, "validation", layout.good)
    train, validation = (train, validation) if validation else hold_out(train, seed, share)
    return Split(name, train, validation, _test_samples(files, base, layout))


def _good(paths: Iterable[Path]) -> Samples:
    return tuple(Sample(path, None, 0, "good") for path in paths)


def _below(files: Files, *folder: str) -> Samples:
    return _good(path for parts, path in files.items() if parts[:-1][: len(folder)] == folder)


def _loose(files: Files, base: Path) -> Samples:
    reserved = {"test", "ground_truth", "validation"}
    folders = {base.joinpath(*parts[:depth]) for parts in files for depth in range(1, len(parts))}
    ours = set(filter(holds_results, folders))
    if holds_results(base):  # a run in the folder of its own images
        ours |= {base / name for name in RESULT_FOLDERS}
    loose = {
        parts: path
        for parts, path in files.items()
        if parts[0] not in reserved and ours.isdisjoint(path.parents)  # not the heatmaps of an earlier run
    }
    for parts in loose:
        # Several data sets below one folder: their defective images must not become training images.
        if reserved & set(parts[1:-1]):
            raise DatasetError(f"{base} holds several data sets, such as {parts[0]!r}: give one as root.")
    return _good(loose.values())


def _test_samples(files: Files, base: Path, layout: Layout) -> Samples:
    depth, where = len(layout.masks), "/".join(layout.masks)
    truth = {parts[depth:]: path for parts, path in files.items() if parts[:depth] == layout.masks}
    # A file goes before a folder of masks of the same name, which comes first here to be replaced.
    masks = {parts[:-1]: path.parent for parts, path in truth.items()}
    masks |= {(*parts[:-1], path.stem): path for parts, path in truth.items()}
    expected = base.joinpath(*layout.masks).is_dir()
    samples, unmasked = [], []
    for parts, path in files.items():
        if parts[0] != layout.test or parts[:depth] == layout.masks:
            continue
        if len(parts) < 3:
            raise DatasetError(f"{path}: test images belong in {layout.test}/{layout.good} or {layout.test}/<defect>.")
        label, mask = int(parts[1] != layout.good), None
        if label and expected:
            below = parts[1:-1]
            mask = masks.get((*below, f"{path.stem}_mask")) or masks.get((*below, path.stem))
            unmasked += [] if mask else [path]
        samples.append(Sample(path, mask, label, parts[1] if label else "good", layout.mask_level))
    if unmasked:
        raise DatasetError(
            f"{base}: {len(unmasked)} defective images have no mask {where}/<defect>/<stem>_mask.png. "
            f"Add them, or remove the folder {where} to go without any.{listed(unmasked)}"
        )
    return tuple(samples)
