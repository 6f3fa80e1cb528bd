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

PAPER_AU_PRO = {"S": 0.925, "M": 0.933}
"""The same source: the mean over these three data sets."""

PAPER_LATENCY = {"S": 2.2, "M": 4.5}
"""The same source: milliseconds for one image of 256×256 pixels on an RTX A6000."""

TRAINING_MINUTES = {
    "the paper, about 20 minutes a category": 20.0,
    "an independent timing, M on an RTX 5060, 15 categories of MVTec AD in 30 h 41 min": (30 * 60 + 41) / 15,
}
"""What one training of 70,000 steps took others on one GPU, by source."""

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

REPRODUCED_MEAN = (99.03, 93.28, 99.09, 93.74)
"""The same source: its own means over the 15 categories."""

ELSEWHERE = {"screw": {"anomalib": {"S": 0.960, "M": 0.975}, "the runs of PUAD's authors": {"S": 0.961, "M": 0.974}}}
"""Image AU-ROC of other implementations on categories of MVTec AD."""

MVTEC_AD_2 = {"same lighting": 0.308, "mixed lighting": 0.192}
"""AU-PRO up to 0.05 of EfficientAD in the paper of MVTec AD 2: means of its eight categories; the size is not known."""


def published(data: str, size: str) -> pd.DataFrame:
    """Return the published figures for a data set such as "mvtec_ad/screw" and a size: a row for each source.

    Columns are names of our metrics; each row says of which size it is, and for our own XS these are the figures of S.
    No row if nothing is published for the data set or for networks of that size.
    """
    name, _, category = data.partition("/")
    size = "S" if size == "XS" else size
    rows: dict[str, dict[str, float]] = {}
    if size not in PAPER_AU_PRO:
        name = ""
    if name in PAPER:
        rows[f"the paper, {size}, mean of all categories of {name}"] = PAPER[name][size]
        rows[f"the paper, {size}, mean of mvtec_ad, visa and mvtec_loco"] = {"au_pro": PAPER_AU_PRO[size]}
        rows[f"the paper, {size}, on an RTX A6000"] = {"latency_ms": PAPER_LATENCY[size]}
    if name == "mvtec_ad":
        for what, figures in ((category, REPRODUCED.get(category)), ("mean of 15 categories", REPRODUCED_MEAN)):
            if figures:
                auroc, au_pro = figures[:2] if size == "S" else figures[2:]
                found = {"image_auroc": auroc / 100, "au_pro": au_pro / 100}
                rows[f"best-known public reproduction, {size}, {what}"] = found
        for source, aurocs in ELSEWHERE.get(category, {}).items():
            rows[f"{source}, {size}, {category}"] = {"image_auroc": aurocs[size]}
    if name == "mvtec_ad_2":
        for lighting, au_pro in MVTEC_AD_2.items():
            rows[f"the paper of MVTec AD 2, private test images, {lighting}"] = {"au_pro_05": au_pro}
    return pd.DataFrame.from_dict(rows, orient="index", dtype=float)
