"""What is shown and in which order, as plain values; what follows from them, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from effad_lib import metrics
from effad_lib.images import Size
from effad_lib.viewer.findings import UNKNOWN, Findings

PANELS = ("image", "overlay", "heatmap", "truth")
OUTLINES = ("truth", "marked")

COLOURS = ("inferno", "magma", "viridis", "cividis", "turbo", "jet")
"""Colour maps: the first four are perceptually uniform, so that equal steps of the score look equal."""

SCALINGS = ("run", "image")
"""One scale for all images, or each image stretched to its own range, in which every good one looks broken."""

ZOOMS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)

BY_BRANCHES = "branches disagree most"
ORDERS = ("score, highest first", "score, lowest first", "closest to the threshold", BY_BRANCHES, "file")

OUTCOMES = ("miss", "false alarm", "right", "called defective", "called good", "not scored")
"""What became of an image. The truth of those "called" something is not known."""

ALL = "all"


@dataclass(frozen=True)
class State:
    """All that a view of `Findings` depends on.

    `index` is the image shown; `panels` of it, side by side; `map` one of `MAP_NAMES`; `opacity` in [0, 1] of the
    overlay, everywhere or, with `follow`, rising with the score; `outlines` of the truth and of what is marked, the
    pixels above `pixel_threshold`; `point` (row, column) in pixels of the image, None for the hottest one, and centre
    of the part that `zoom` enlarges. `threshold` decides the outcomes. `order`, `defect` and `outcome` choose the list.
    """

    index: int = 0
    panels: tuple[str, ...] = PANELS
    map: str = "combined"
    colours: str = COLOURS[0]
    scaling: str = SCALINGS[0]
    opacity: float = 0.8
    follow: bool = True
    outlines: tuple[str, ...] = OUTLINES
    threshold: float | None = None
    pixel_threshold: float | None = None
    point: tuple[int, int] | None = None
    zoom: float = 1
    order: str = ORDERS[0]
    defect: str = ALL
    outcome: str = ALL


def region(size: Size, point: tuple[int, int], zoom: float) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the part of an image that is shown: around the point, within the image."""
    sides = [max(1, round(side / zoom)) for side in size]
    starts = [
        min(max(0, centre - part // 2), side - part) for centre, part, side in zip(point, sides, size, strict=True)
    ]
    return starts[0], starts[1], sides[0], sides[1]


def outcomes(findings: Findings, threshold: float | None) -> np.ndarray:
    """Return what becomes of each image at a threshold, one of `OUTCOMES`, str [N]; without one none is decided."""
    scored = np.isfinite(findings.scores)
    if threshold is None:
        return np.where(scored, "", "not scored")
    above, labels = findings.scores > threshold, findings.labels
    unknown = np.where(above, "called defective", "called good")
    mistake = np.where(labels == 1, "miss", "false alarm")
    known = np.where(above == (labels == 1), "right", mistake)
    return np.where(scored, np.where(labels == UNKNOWN, unknown, known), "not scored")


def disagreement(findings: Findings) -> np.ndarray:
    """Return how much the two branches disagree on each image, float [N] in [0, 1]; NaN where a branch is missing.

    It is the distance between its ranks among all images by either branch alone, from last to first: a scale of its
    own that a branch has does not matter.
    """
    result = np.full(len(findings), np.nan)
    known = np.isfinite(findings.branches).all(axis=1)
    if known.sum() > 1:
        branches = findings.branches[known]
        ranks = [np.searchsorted(np.sort(branch), branch) for branch in branches.T]
        result[known] = np.abs(ranks[0] - ranks[1]) / (len(branches) - 1)
    return result


def listed(findings: Findings, state: State) -> np.ndarray:
    """Return the indices of the images that pass the filters, in the order asked for, int [n]; unscored ones last."""
    chosen = np.ones(len(findings), dtype=bool)
    if state.defect != ALL:
        chosen &= np.array(findings.defects) == state.defect
    if state.outcome != ALL:
        chosen &= outcomes(findings, state.threshold) == state.outcome
    indices = np.flatnonzero(chosen)
    scores = findings.scores
    keys = {
        "score, highest first": lambda: -scores,
        "score, lowest first": lambda: scores,
        "closest to the threshold": lambda: np.abs(scores - (state.threshold or 0.0)),
        BY_BRANCHES: lambda: -disagreement(findings),
        "file": lambda: np.argsort(np.argsort(findings.names, kind="stable"), kind="stable"),
    }
    return indices[np.argsort(keys[state.order]()[indices], kind="stable")]  # NaN comes last


def counts(findings: Findings, threshold: float | None) -> np.ndarray:
    """Return how many images of each truth were called what at a threshold, int [3, 2].

    Rows: good, defective, unknown. Columns: called good, called defective. All zero without a threshold.
    """
    table = np.zeros((3, 2), dtype=int)
    if threshold is not None:
        scored = np.isfinite(findings.scores)
        rows = np.where(findings.labels == UNKNOWN, 2, findings.labels)[scored]
        np.add.at(table, (rows, (findings.scores[scored] > threshold).astype(int)), 1)
    return table


def score_range(findings: Findings) -> tuple[float, float, bool]:
    """Return the lowest and highest of all scores and the stored threshold, and whether to draw them in equal ratios.

    Ratios, for positive scores of more than a decade: a few may be many times larger than those that matter.
    """
    known = findings.scores[np.isfinite(findings.scores)].tolist()
    known += [] if findings.threshold is None else [findings.threshold]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5 * abs(low) - 1e-6, high + 0.5 * abs(high) + 1e-6
    return low, high, low > 0 and high > 10 * low


def best_threshold(findings: Findings) -> float | None:
    """Return the threshold of the best F1 over the images whose truth is known: it has seen what it is judged by."""
    known = np.isfinite(findings.scores) & (findings.labels != UNKNOWN)
    best = metrics.image_f1_max(findings.scores[known], findings.labels[known])[1]
    return None if best is None else float(np.nextafter(best, -np.inf))  # decisions ask for more than the threshold
