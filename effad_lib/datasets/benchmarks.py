"""The published data sets of several categories: their names, where to get them, and MVTec AD, MVTec AD 2 and BTAD."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effad_lib.datasets.folders import Layout, read_layout
from effad_lib.datasets.split import DatasetError, Split, register
from effad_lib.runs import resolve
from effad_lib.settings import nearest

MVTEC_AD = tuple(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood "
    "zipper".split()
)


@dataclass(frozen=True)
class Benchmark:
    """A published data set: its name for `load_dataset`, its title, its categories and where to get it.

    `tree` shows what its root must hold, a line each; `layout` is that of a category.
    """

    name: str
    title: str
    categories: tuple[str, ...]
    url: str
    licence: str
    tree: tuple[str, ...]
    layout: Layout

    def root(self, root: Path | None) -> Path:
        """Return the folder given as root or, where none was given, that of this data set below `data`."""
        return root or resolve(f"data/{self.name}")

    def folder(self, root: Path | None, category: str, holds: str = "") -> Path:
        """Return the folder of a category: below `root`, or `root` itself, with a folder `holds` in it (`train/good`).

        `category` may be left out when there is only one, and may be one of a user's own in the same layout. Raises
        `DatasetError` if it is not there, which says what is or, if nothing is, where to get the data set.
        """
        root, holds = self.root(root), holds or f"train/{self.layout.good}"
        candidates = [root, *root.iterdir()] if root.is_dir() else []
        folders = {folder.name: folder for folder in candidates if (folder / holds).is_dir()}
        folders = {root.name: root} if root in folders.values() else folders
        if not folders:
            tree = "".join(f"\n    {line}" for line in self.tree)
            raise DatasetError(
                f"{self.title} was not found in {root}. Download it from {self.url}\n(licence: {self.licence}), unpack "
                f"it, and give as root the folder that then holds:{tree}"
            )
        if not category and len(folders) == 1:
            category = next(iter(folders))
        if category not in folders:
            here = ", ".join(sorted(folders))
            if category in self.categories:
                raise DatasetError(f"category {category!r} is not in {root}, only {here}. Unpack it there.")
            known = nearest(category, {*self.categories, *folders})
            raise DatasetError(f"unknown category {category!r}: {known} In {root}: {here}.")
        return folders[category]

    def read(self, base: Path, seed: int, share: float) -> Split:
        """Read the folder of a category by the layout of the data set. Raises `DatasetError` as `read_layout`."""
        return read_layout(base, f"{self.name}/{base.name}", seed, share, self.layout)


_MVTEC_AD = Benchmark(
    "mvtec_ad",
    "MVTec AD",
    MVTEC_AD,
    "https://www.mvtec.com/company/research/datasets/mvtec-ad",
    "CC BY-NC-SA 4.0: no commercial use",
    (
        "<category>/train/good/000.png",
        "<category>/test/good/000.png",
        "<category>/test/<defect>/000.png",
        "<category>/ground_truth/<defect>/000_mask.png",
    ),
    Layout(),
)

_MVTEC_AD_2 = Benchmark(
    "mvtec_ad_2",
    "MVTec AD 2",
    ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
    "https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
    "CC BY-NC-SA 4.0: no commercial use",
    (
        "<category>/train/good/000_regular.png",
        "<category>/validation/good/000_regular.png",
        "<category>/test_public/good/000_regular.png",
        "<category>/test_public/bad/000_regular.png",
        "<category>/test_public/ground_truth/bad/000_regular_mask.png",
    ),
    Layout(test="test_public", masks=("test_public", "ground_truth")),
)

_BTAD = Benchmark(
    "btad",
    "BTAD",
    ("01", "02", "03"),
    "https://avires.dimi.uniud.it/papers/btad/btad.zip",
    "none is stated, ask its authors",
    (
        "<category>/train/ok/0000.bmp",
        "<category>/test/ok/0000.bmp",
        "<category>/test/ko/0000.bmp",
        "<category>/ground_truth/ko/0000.png",
    ),
    Layout(good="ok"),
)


@register("mvtec_ad")
def load_mvtec_ad(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one category of MVTec AD, or a user's own category folder in the same layout.

    `root` holds the category folders, or is one itself; `category` may be left out when there is only one.
    """
    return _MVTEC_AD.read(_MVTEC_AD.folder(root, category), seed, validation_share)


@register("mvtec_ad_2")
def load_mvtec_ad_2(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one category of MVTec AD 2, as `load_mvtec_ad`; its own validation part is held out.

    The test part is `test_public`: the truth of the private ones is known to MVTec's server only.
    """
    return _MVTEC_AD_2.read(_MVTEC_AD_2.folder(root, category), seed, validation_share)


@register("btad")
def load_btad(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one product of BTAD, as `load_mvtec_ad`; its one class of defects is called "ko"."""
    return _BTAD.read(_BTAD.folder(root, category), seed, validation_share)
