"""How good are the scores and the maps: image-level and pixel-level metrics, exact (nothing is binned).

Every metric that cannot be computed, because there is no good or no defective image (or pixel), is None.
Throughout, a score or pixel counts as found at a threshold t when it is >= t.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import ndimage
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

Maps = Sequence[np.ndarray] | np.ndarray

# Regions that touch only at a corner are one region, as in the evaluation code of the MVTec data sets.
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def image_auroc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve of the image scores.

    scores: float [N], higher is more anomalous, any scale. labels: [N], 0 good, 1 defective.
    Returns a value in [0, 1]. Raises ValueError for NaN scores (naming the index) and for other labels.
    """
    scores, labels = _check_scores(scores, labels)
    return float(roc_auc_score(labels, scores)) if _has_both(labels) else None


def image_ap(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Average precision of the image scores: the precision, averaged over the steps in recall.

    Arguments and errors as in `image_auroc`. A random scorer reaches the share of defective images.
    """
    scores, labels = _check_scores(scores, labels)
    return min(1.0, float(average_precision_score(labels, scores))) if _has_both(labels) else None


def image_f1_max(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Best F1 over all thresholds, and the highest threshold that reaches it.

    Arguments and errors as in `image_auroc`. The threshold is chosen with the labels in hand, so it
    measures separability: it must not be used to operate a detector.
    """
    scores, labels = _check_scores(scores, labels)
    if not _has_both(labels):
        return None, None
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = np.flatnonzero(f1[:-1] == f1[:-1].max())[-1]  # the last point of the curve has no threshold
    return float(f1[best]), float(thresholds[best])


def pixel_auroc(maps: Maps, masks: Maps) -> float | None:
    """Area under the ROC curve over all pixels of all maps together.

    maps: N arrays float [H, W]; masks: N arrays bool [H, W], True where defective; sizes may differ from
    image to image. Memory as in `pro_curve`. Raises ValueError for NaN or infinite values and for a mask
    that does not fit, naming the image's index.
    """
    curve = _curve(maps, masks, weigh=lambda mask: np.ones(np.count_nonzero(mask)))
    return None if curve is None else min(1.0, float(trapezoid(curve[1], curve[0])))


def au_pro(maps: Maps, masks: Maps, fpr_limit: float = 0.3) -> float | None:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    The overlap at the limit is interpolated linearly. Returns a value in [0, 1]; a random map reaches
    fpr_limit / 2. Arguments and errors as in `pixel_auroc`; fpr_limit in (0, 1], 0.3 in the paper.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit is {fpr_limit}; it must lie in (0, 1], usually 0.3")
    curve = pro_curve(maps, masks)
    if curve is None:
        return None
    fpr, overlap = curve
    inside = np.searchsorted(fpr, fpr_limit, side="right")
    overlap = np.append(overlap[:inside], np.interp(fpr_limit, fpr[inside - 1 :], overlap[inside - 1 :]))
    return min(1.0, float(trapezoid(overlap, np.append(fpr[:inside], fpr_limit)) / fpr_limit))  # rounding errors


def pro_curve(maps: Maps, masks: Maps) -> tuple[np.ndarray, np.ndarray] | None:
    """Per-region overlap against false-positive rate, as the vertices of the exact curve.

    Overlap: the found share of each defective region (8-connected), averaged over all regions of all
    images, so that a small region counts as much as a large one. False-positive rate: the found share of
    all normal pixels, those of defect-free images included. Returns two float arrays [V] rising from
    (0, 0) to (1, 1), V at most twice the number of defective pixels plus two.

    The maps are read twice, one at a time, so `maps` and `masks` may be sequences that compute their
    items; beyond one map it takes about 130 bytes a defective pixel.
    """
    return _curve(maps, masks, weigh=_region_shares)


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


def _region_shares(mask: np.ndarray) -> np.ndarray:
    """For each defective pixel, the share of its region that it makes up."""
    regions = ndimage.label(mask, EIGHT_NEIGHBOURS)[0][mask]
    return 1.0 / np.bincount(regions)[regions]


def _curve(maps: Maps, masks: Maps, weigh: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Found weight of the defective pixels against found share of the normal ones.

    The curve bends only at values that a defective pixel takes. So these are collected and sorted, and of
    the normal pixels, the many, it is enough to count how many lie between one such value and the next.
    """
    values, weights = [], []
    for heat, mask in _pairs(maps, masks):
        if mask.any():
            values.append(heat[mask])
            weights.append(weigh(mask))
    if not values:
        return None
    steps, step_of = np.unique(np.concatenate(values), return_inverse=True)
    found = np.cumsum(np.bincount(step_of, np.concatenate(weights))[::-1])

    below = np.zeros(len(steps) + 1, dtype=np.int64)  # [k]: normal pixels in [steps[k - 1], steps[k])
    up_to = np.zeros_like(below)  # [k]: normal pixels in (steps[k - 1], steps[k]]
    for heat, mask in _pairs(maps, masks):
        normal = np.sort(heat[~mask])  # neighbouring look-ups of sorted values stay in the cache
        below += np.bincount(np.searchsorted(steps, normal, side="right"), minlength=len(below))
        up_to += np.bincount(np.searchsorted(steps, normal, side="left"), minlength=len(below))
    normals = below.sum()
    if normals == 0:
        return None

    # Going down the steps: the point just above each step, then the point that includes it (ties at once).
    above, including = normals - np.cumsum(up_to)[-2::-1], normals - np.cumsum(below)[-2::-1]
    fpr = np.stack([above, including], axis=1).ravel() / normals
    share = np.stack([np.append(0.0, found[:-1]), found], axis=1).ravel() / found[-1]
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], share, [1.0]])


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
