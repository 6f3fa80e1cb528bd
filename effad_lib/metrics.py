"""How good are the scores and the maps: image-level and pixel-level metrics, exact (nothing is binned).

Every metric that cannot be computed, because there is no good or no defective image (or pixel), is None.
Throughout, a score or pixel counts as found at a threshold t when it is >= t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

Maps = Sequence[np.ndarray] | np.ndarray
Curve = tuple[np.ndarray, np.ndarray]

# Regions that touch only at a corner are one region, as in the evaluation code of the MVTec data sets.
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve of the image scores.

    scores: float [N], higher is more anomalous, any scale. labels: [N], 0 good, 1 defective.
    Returns a value in [0, 1]. Raises ValueError for NaN scores (naming the index) and for other labels.
    """
    scores, labels = _check_scores(scores, labels)
    from sklearn.metrics import roc_auc_score  # scikit-learn takes a second: loaded where it is used

    return float(roc_auc_score(labels, scores)) if _has_both(labels) else None


def image_ap(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Average precision of the image scores: the precision, averaged over the steps in recall.

    Arguments and errors as in `image_auroc`. A random scorer reaches the share of defective images.
    """
    scores, labels = _check_scores(scores, labels)
    from sklearn.metrics import average_precision_score

    return min(1.0, float(average_precision_score(labels, scores))) if _has_both(labels) else None


def image_f1_max(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Best F1 over all thresholds, and the highest threshold that reaches it.

    Arguments and errors as in `image_auroc`. The threshold is chosen with the labels in hand, so it
    measures separability: it must not be used to operate a detector.
    """
    scores, labels = _check_scores(scores, labels)
    if not _has_both(labels):
        return None, None
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = np.flatnonzero(f1[:-1] == f1[:-1].max())[-1]  # the last point of the curve has no threshold
    return float(f1[best]), float(thresholds[best])


class Region(NamedTuple):
    """An annotated defect: its pixels, bool [H, W], and how many of them, found, count as all of it (at least 1)."""

    mask: np.ndarray
    saturation: int


Regions = Sequence[Sequence[Region]]


class FoundShares(NamedTuple):
    """How much of the defective pixels is found at every threshold at which that changes, from the highest down.

    Made by `sweep`. T `thresholds`, P defective pixels, G groups of images. `normals` and `normals_above` count the
    normal pixels of each group: those >= and those > each threshold, int [G, T]; `total` int [G] all of them. `step`
    int [P] is the threshold at which a pixel is found, `group` int [P] where it is; `overlap` and `saturated` float [P]
    are the shares of its region that it makes up, summed over the regions it lies in: without saturation and with it.
    """

    thresholds: np.ndarray
    normals: np.ndarray
    normals_above: np.ndarray
    total: np.ndarray
    step: np.ndarray
    group: np.ndarray
    overlap: np.ndarray
    saturated: np.ndarray

    @property
    def auroc(self) -> float:
        """Area under the ROC curve over all pixels of all maps together."""
        return _area(*self._curve(self._counts(), np.ones(len(self.total), dtype=bool)))

    @property
    def ap(self) -> float:
        """Average precision of the pixels; a random map reaches the share of defective ones."""
        counts = self._counts()
        found = np.cumsum(counts)
        return min(1.0, float((counts * found / (found + self.normals.sum(axis=0))).sum() / found[-1]))

    @property
    def f1_max(self) -> tuple[float, float]:
        """Best F1 of the pixels over all thresholds, and the highest threshold that reaches it; as `image_f1_max`."""
        found = np.cumsum(self._counts())
        f1 = 2 * found / (found + self.normals.sum(axis=0) + found[-1])
        return float(f1.max()), float(self.thresholds[f1.argmax()])

    def pro_curve(self, groups: Sequence[int] | None = None, *, saturated: bool = False) -> Curve | None:
        """Per-region overlap against false-positive rate, as the vertices of the exact curve.

        Overlap: the found share of each region, averaged over all regions of all images, so that a small region
        counts as much as a large one; `saturated` divides by the saturation of the region instead of its area (sPRO).
        False-positive rate: the found share of all normal pixels, those of defect-free images included. `groups` takes
        the images of these as if there were no others: neither the regions nor the normal pixels of the rest count. Two
        float arrays [V] rising from (0, 0) to (1, 1), or None if the chosen images have no region or no normal pixel.
        """
        chosen = np.full(len(self.total), groups is None)
        if groups is not None:
            chosen[list(groups)] = True
        weights = (self.saturated if saturated else self.overlap) * chosen[self.group]
        if not weights.any() or not self.total[chosen].any():
            return None
        return self._curve(np.bincount(self.step, weights, minlength=len(self.thresholds)), chosen)

    def au_pro(
        self, fpr_limit: float = 0.3, groups: Sequence[int] | None = None, *, saturated: bool = False
    ) -> float | None:
        """Area under `pro_curve` up to a false-positive rate, divided by that rate: AU-PRO, or saturated AU-sPRO.

        The overlap at the limit is interpolated linearly. In [0, 1]; a random map reaches fpr_limit / 2. fpr_limit in
        (0, 1], 0.3 in the paper, 0.05 for MVTec LOCO and MVTec AD 2. None where there is no curve.
        """
        if not 0 < fpr_limit <= 1:
            raise ValueError(f"fpr_limit is {fpr_limit}; it must lie in (0, 1], usually 0.3")
        curve = self.pro_curve(groups, saturated=saturated)
        return None if curve is None else _area(*curve, fpr_limit)

    def _counts(self) -> np.ndarray:
        """Defective pixels found at each threshold."""
        return np.bincount(self.step, minlength=len(self.thresholds))

    def _curve(self, weights: np.ndarray, chosen: np.ndarray) -> Curve:
        """Found share of the normal pixels, and of these weights of the thresholds: just above each, then at it."""
        found = np.cumsum(weights)
        normals = [chosen @ self.normals_above, chosen @ self.normals]  # of the chosen groups together
        fpr = np.stack(normals, axis=1).ravel() / (chosen @ self.total)
        share = np.stack([np.append(0.0, found[:-1]), found], axis=1).ravel() / found[-1]
        return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], share, [1.0]])


def sweep(
    maps: Maps, masks: Maps, regions: Regions | None = None, groups: Sequence[int] | None = None
) -> FoundShares | None:
    """Lower a threshold over all maps together, once for all pixel metrics; None without defective or normal pixels.

    maps: N arrays float [H, W]; masks: N arrays bool [H, W], True where defective; sizes may differ from image to
    image. regions: for each image its annotated ones, for AU-sPRO; they may overlap, and must make up the mask. AU-PRO
    takes 8-connected regions of the mask in any case. groups: for each image the number of its group, from 0, whose
    normal pixels are counted apart; without it all are in one. Raises ValueError for NaN or infinite values and for a
    mask that does not fit, naming the image's index.

    The maps are read twice, one at a time, so the arguments may be sequences that compute their items. Beyond one map
    it takes about 130 bytes a defective pixel, and 16 more for each group. Nothing is binned: the curves bend only at
    values that a defective pixel takes. These are collected and sorted, and of the normal pixels, the many, it is
    enough to count how many lie between one such value and the next.
    """
    groups = np.zeros(len(maps), dtype=int) if groups is None else np.asarray(groups, dtype=int)
    if len(groups) != len(maps):
        raise ValueError(f"{len(maps)} maps but {len(groups)} groups; each map is in one")
    parts: list[tuple[np.ndarray, ...]] = []
    for index, (heat, mask) in enumerate(_pairs(maps, masks)):
        overlap = _overlap(mask)
        saturated = overlap if regions is None else _saturated(heat, mask, regions[index], index)
        parts.append((heat[mask], np.full(len(overlap), groups[index], dtype=np.int32), overlap, saturated))
    if not any(len(part[0]) for part in parts):
        return None
    values, group, overlap, saturated = map(np.concatenate, zip(*parts, strict=True))
    steps, step = np.unique(values, return_inverse=True)

    below = np.zeros((groups.max() + 1, len(steps) + 1), dtype=np.int64)  # [k]: normal in [steps[k - 1], steps[k])
    up_to = np.zeros_like(below)  # [k]: normal pixels in (steps[k - 1], steps[k]]
    for into, (heat, mask) in zip(groups, _pairs(maps, masks), strict=True):
        normal = np.sort(heat[~mask])  # neighbouring look-ups of sorted values stay in the cache
        below[into] += np.bincount(np.searchsorted(steps, normal, side="right"), minlength=len(steps) + 1)
        up_to[into] += np.bincount(np.searchsorted(steps, normal, side="left"), minlength=len(steps) + 1)
    total = below.sum(axis=1)
    if not total.any():
        return None
    for counts in (below, up_to):  # in place, as they are the largest
        np.subtract(total[:, None], np.cumsum(counts, axis=1, out=counts), out=counts)
    normals, above = below[:, -2::-1], up_to[:, -2::-1]
    return FoundShares(steps[::-1], normals, above, total, len(steps) - 1 - step, group, overlap, saturated)


def _check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 [N] and labels as int [N]; ValueError if they do not fit or hold a wrong value."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be lists of the same length")
    if np.isnan(scores).any():
        raise ValueError(f"the score of image {int(np.isnan(scores).argmax())} is NaN")
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"label of image {index} is {labels[index]}; 0 means good, 1 defective")
    return scores, labels.astype(int)


def _has_both(labels: np.ndarray) -> bool:
    return 0 < labels.sum() < len(labels)


def _area(x: np.ndarray, y: np.ndarray, limit: float = 1.0) -> float:
    """The area under a curve up to a limit, divided by it."""
    from scipy.integrate import trapezoid

    inside = np.searchsorted(x, limit, side="right")
    y = np.append(y[:inside], np.interp(limit, x[inside - 1 :], y[inside - 1 :]))
    return min(1.0, float(trapezoid(y, np.append(x[:inside], limit)) / limit))  # rounding errors


def _overlap(mask: np.ndarray) -> np.ndarray:
    """For each defective pixel, the share of its connected region that it makes up."""
    regions = ndimage.label(mask, EIGHT_NEIGHBOURS)[0][mask]
    return 1.0 / np.bincount(regions)[regions]


def _saturated(heat: np.ndarray, mask: np.ndarray, regions: Sequence[Region], index: int) -> np.ndarray:
    """For each defective pixel, its weight in sPRO: only the hottest of a region, as many as saturate it, have one."""
    weights, union = np.zeros(mask.shape), np.zeros_like(mask)
    for region in regions:
        if region.mask.shape != mask.shape or region.saturation < 1 or not region.mask.any():
            raise ValueError(
                f"image {index}: a region {region.mask.shape} of {np.count_nonzero(region.mask)} pixels, saturated by "
                f"{region.saturation}; it must fit the mask {mask.shape}, have pixels and be saturated by at least 1"
            )
        union |= region.mask
        inside = np.flatnonzero(region.mask)
        hottest = inside[np.argsort(-heat.ravel()[inside], kind="stable")[: region.saturation]]
        weights.ravel()[hottest] += 1.0 / len(hottest)
    if (union != mask).any():
        raise ValueError(f"image {index}: its regions together are not its mask")
    return weights[mask]


def _pairs(maps: Maps, masks: Maps) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps but {len(masks)} masks; each map needs one (all False if good)")
    for index in range(len(maps)):
        heat, mask = np.asarray(maps[index]), np.asarray(masks[index])
        if heat.ndim != 2 or heat.shape != mask.shape:
            raise ValueError(f"image {index}: map {heat.shape} and mask {mask.shape} must be equal [H, W]")
        if mask.dtype != bool:
            raise ValueError(f"image {index}: the mask is {mask.dtype}; make it bool (>= half of full scale)")
        if not np.isfinite(heat).all():
            raise ValueError(f"image {index}: the map holds NaN or infinite values")
        yield heat, mask
