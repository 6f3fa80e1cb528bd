"""Figures that others have published, to read ours beside them."""

from __future__ import annotations

import pandas as pd

PUBLISHED_DATA = frozenset({"mvtec_ad", "mvtec_ad_2", "mvtec_loco", "visa", "btad", "elpv"})
"""Data sets that are the same for everybody, as `load_dataset` calls them."""

PAPER = {
    "mvtec_ad": {"S": {"image_auroc": 0.988}, "M": {"image_auroc": 0.991}},
    "visa": {"S": {"image_auroc": 0.975}, "M": {"image_auroc": 0.981}},
    "mvtec_loco": {
        "S": {"image_auroc_mean": 0.900, "image_auroc_logical": 0.858, "image_auroc_structural": 0.941},
        "M": {"image_auroc_mean": 0.907, "image_auroc_logical": 0.868, "image_auroc_structural": 0.947},
    },
}
"""EfficientAD, arXiv 2303.14535: means over all categories of a data set and five seeds, 70,000 steps."""

REPRODUCED = {
    "bottle": (99.9, 95.2, 100, 95.7),
    "cable": (93.5, 88.2, 94.2, 90.4),
    "capsule": (98.4, 97.6, 98.0, 97.0),
    "carpet": (99.4, 91.8, 99.4, 93.0),
    "grid": (99.7, 89.3, 100, 89.2),
    "hazelnut": (99.4, 94.8, 99.8, 95.2),
    "leather": (100, 98.2, 100, 98.2),
    "metal_nut": (99.5, 93.6, 99.6, 94.8),
    "pill": (98.5, 97.0, 99.1, 96.4),
    "screw": (97.9, 95.6, 97.4, 97.3),
    "tile": (99.8, 88.1, 100, 88.4),
    "toothbrush": (100, 94.6, 100, 94.5),
    "transistor": (99.9, 90.3, 99.9, 91.4),
    "wood": (99.6, 90.4, 99.6, 90.5),
    "zipper": (99.6, 94.4, 99.4, 94.1),
}
"""The best-known public reproduction of MVTec AD, last checkpoint: 100 × image AU-ROC and AU-PRO of S, then of M."""


def published(data: str, size: str) -> pd.DataFrame:
    """Return the published figures for a data set such as "mvtec_ad/screw" and a size: a row for each source.

    Columns are names of our metrics. No row if nothing is published for it: an own data set, or the size XS.
    """
    name, _, category = data.partition("/")
    rows = {}
    if figures := PAPER.get(name, {}).get(size):
        rows[f"the paper, mean of all categories of {name}"] = figures
    if name == "mvtec_ad" and size in ("S", "M") and category in REPRODUCED:
        auroc, au_pro = REPRODUCED[category][:2] if size == "S" else REPRODUCED[category][2:]
        rows[f"best-known public reproduction, {category}"] = {"image_auroc": auroc / 100, "au_pro": au_pro / 100}
    return pd.DataFrame.from_dict(rows, orient="index", dtype=float)
