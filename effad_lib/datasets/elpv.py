"""Solar cells from the package `elpv-dataset`."""

from __future__ import annotations

import csv
from importlib import util
from itertools import islice
from pathlib import Path

from effad_lib.datasets.split import DatasetError, Sample, Split, hold_out, register
from effad_lib.settings import nearest

ELPV_MODULES = (*[60] * 20, 54, *[60] * 12, 110, 60, 72, *[60] * 3, 48, *[60] * 3)
"""Cells of each solar module of ELPV in file order, read off the images. The 110 are two modules."""


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
            known = [(name, labels[float(share)]) for name, share, *_ in module if float(share) in labels]
            samples = [Sample(folder / name, None, *label) for name, label in known]
            if number % 3 == 0:
                test += samples
            else:
                good += [sample for sample in samples if not sample.label]
    return Split(f"elpv/{category}", *hold_out(good, seed, validation_share), tuple(test))
