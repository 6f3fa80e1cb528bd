"""The metrics against slow brute force, against scikit-learn, and against cases worked out by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pyaupro import PerRegionOverlap, auc_compute
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from effad_lib import metrics


def flood_fill(mask):
    """Regions as lists of pixels, found by walking over the eight neighbours."""
    left, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        region, queue = [], [left.pop()]
        while queue:
            y, x = queue.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            queue += near
        regions.append(region)
    return regions


def slow_au_pro(maps, masks, limit):
    """One threshold after another, every pixel looked at for each; the area summed up piece by piece."""
    pairs = list(zip(maps, masks, strict=True))
    regions = [np.array([heat[pixel] for pixel in region]) for heat, mask in pairs for region in flood_fill(mask)]
    normal = np.concatenate([heat[~mask] for heat, mask in pairs])
    points = [(0.0, 0.0)]
    for threshold in sorted({value for heat in maps for value in heat.ravel()}, reverse=True):
        overlap = np.mean([np.mean(region >= threshold) for region in regions])
        points.append((np.mean(normal >= threshold), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_case(seed, levels):
    """Six small maps of two sizes, the first two defect-free; few levels make many ties."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(6):
        shape = (9, 7) if index % 2 else (6, 11)
        masks.append(rng.random(shape) < (0.0 if index < 2 else 0.15))
        maps.append((rng.integers(0, levels, shape) + 2 * masks[-1]).astype(np.float32))
    return maps, masks


@pytest.mark.parametrize("levels", [3, 20, 100_000])
@pytest.mark.parametrize("seed", range(4))
def test_au_pro_equals_the_threshold_loop(seed, levels):
    maps, masks = random_case(seed, levels)
    for limit in (0.05, 0.3, 1.0):
        assert metrics.sweep(maps, masks).au_pro(limit) == pytest.approx(slow_au_pro(maps, masks, limit), abs=1e-12)


@pytest.mark.parametrize("levels", [3, 20, 100_000])
def test_pixel_metrics_equal_scikit_learn(levels):
    maps, masks = random_case(5, levels)
    truth, heat = (np.concatenate([item.ravel() for item in items]) for items in (masks, maps))
    found = metrics.sweep(maps, masks)
    assert found.auroc == pytest.approx(roc_auc_score(truth, heat), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(truth, heat), abs=1e-12)
    best, threshold = found.f1_max
    assert best == pytest.approx(max(f1_score(truth, heat >= t) for t in np.unique(heat)), abs=1e-12)
    assert best == pytest.approx(f1_score(truth, heat >= threshold), abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_au_pro_equals_a_published_evaluator(limit):
    rng = np.random.default_rng(7)
    masks = np.zeros((5, 40, 48), dtype=bool)
    for index, (y, x) in enumerate(rng.integers(0, 30, (8, 2))):
        masks[index % 4, y : y + 3 + index, x : x + 9 - index] = True  # the fifth image has no defect
    maps = rng.normal(1.5 * masks).astype(np.float32)
    fpr, overlap = PerRegionOverlap(thresholds=None)(torch.from_numpy(maps), torch.from_numpy(masks).int())
    published = float(auc_compute(fpr, overlap, limit=limit))
    assert metrics.sweep(maps, masks).au_pro(limit) == pytest.approx(published, abs=1e-5)  # it is float32


def slow_spro(maps, regions, thresholds):
    """False-positive rate and mean saturated overlap at each threshold, region by region."""
    unions = [
        np.logical_or.reduce([np.zeros(heat.shape, bool), *[r.mask for r in some]])
        for heat, some in zip(maps, regions, strict=True)
    ]
    normal = np.concatenate([heat[~union] for heat, union in zip(maps, unions, strict=True)])
    pairs = [(heat, region) for heat, some in zip(maps, regions, strict=True) for region in some]
    return [
        (
            np.mean(normal >= t),
            np.mean([min(np.sum(heat[region.mask] >= t) / region.saturation, 1) for heat, region in pairs]),
        )
        for t in thresholds
    ]


@pytest.mark.parametrize("levels", [4, 100_000])
def test_spro_equals_the_region_loop(levels):
    maps, _ = random_case(3, levels)
    rng = np.random.default_rng(4)
    regions = [[] for _ in maps]
    for index in (2, 3, 3, 4):  # image 3 has two, which overlap
        mask = np.zeros(maps[index].shape, dtype=bool)
        y, x = rng.integers(0, 3, 2)
        mask[y : y + 4, x : x + 3] = True
        regions[index].append(metrics.Region(mask, int(rng.integers(1, 13))))
    masks = [
        np.logical_or.reduce([np.zeros(h.shape, bool), *[r.mask for r in some]])
        for h, some in zip(maps, regions, strict=True)
    ]
    found = metrics.sweep(maps, masks, regions)
    steps = sorted({value for heat in maps for value in heat.ravel()}, reverse=True)
    slow = np.array([(0.0, 0.0), *slow_spro(maps, regions, steps)])
    for limit in (0.05, 0.3, 1.0):
        x = np.append(slow[slow[:, 0] <= limit, 0], limit)
        y = np.append(slow[slow[:, 0] <= limit, 1], np.interp(limit, *slow.T))
        assert found.au_pro(limit, saturated=True) == pytest.approx(trapezoid(y, x) / limit, abs=1e-12)


def test_spro_by_hand():
    heat = np.array([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    mask = np.arange(10)[None] < 4
    spro = metrics.sweep([heat], [mask], [[metrics.Region(mask, 2)]])
    overlap = spro.pro_curve(saturated=True)[1]
    assert overlap[:8].tolist() == [0, 0, 0.5, 0.5, 1, 1, 1, 1]  # two of its four pixels are all of it
    late = metrics.sweep([heat[:, ::-1]], [mask], [[metrics.Region(mask, 2)]])
    assert late.au_pro(1.0, saturated=True) == 0.0 == late.au_pro(1.0)  # the normal pixels come first
    assert spro.au_pro(0.3, saturated=True) == spro.au_pro(0.3) == 1.0


@pytest.mark.parametrize("levels", [3, 100_000])
def test_groups_of_images_count_as_if_there_were_no_others(levels):
    maps, masks = random_case(6, levels)
    regions = [[metrics.Region(mask, 2)] if mask.any() else [] for mask in masks]
    found = metrics.sweep(maps, masks, regions, [0, 0, 1, 2, 1, 2])
    for groups, chosen in (([0, 1], [0, 1, 2, 4]), ([0, 2], [0, 1, 3, 5]), ([1], [2, 4]), (None, range(6))):
        alone = metrics.sweep(*[[items[k] for k in chosen] for items in (maps, masks, regions)])
        for limit in (0.05, 0.3, 1.0):
            assert found.au_pro(limit, groups) == pytest.approx(alone.au_pro(limit), abs=1e-12)
            saturated = found.au_pro(limit, groups, saturated=True)
            assert saturated == pytest.approx(alone.au_pro(limit, saturated=True), abs=1e-12)
    whole = metrics.sweep(maps, masks)
    assert (found.auroc, found.ap, found.f1_max) == (whole.auroc, whole.ap, whole.f1_max)
    assert found.au_pro(0.3, [0]) is None  # no defect in these
    every = [heat.astype(bool) | True for heat in maps[:1]]
    assert metrics.sweep(maps[:2], [*every, masks[1]], groups=[0, 1]).au_pro(0.3, [0]) is None  # no normal pixel
    with pytest.raises(ValueError, match="6 maps but 5 groups"):
        metrics.sweep(maps, masks, groups=[0] * 5)


def test_regions_that_do_not_fit_are_named():
    heat, mask = np.zeros((2, 3)), np.array([[True, True, False], [False, False, False]])
    part = metrics.Region(mask & (np.arange(3) < 1), 1)
    with pytest.raises(ValueError, match="image 0: its regions together are not its mask"):
        metrics.sweep([heat], [mask], [[part]])
    with pytest.raises(ValueError, match=r"image 0: a region \(2, 3\) of 2 pixels, saturated by 0"):
        metrics.sweep([heat], [mask], [[metrics.Region(mask, 0)]])


def test_au_pro_of_one_pixel_found_after_a_tenth_of_the_normal_ones():
    heat = np.arange(101, dtype=float)[None]  # 100 normal pixels, the defect is the eleventh highest
    mask = np.arange(101)[None] == 90
    # overlap 0 up to FPR 0.1, then 1
    assert metrics.sweep([heat], [mask]).au_pro(0.3) == pytest.approx(2 / 3)
    assert metrics.sweep([heat], [mask]).au_pro(0.1) == 0.0
    assert metrics.sweep([heat], [mask]).auroc == pytest.approx(0.9)


def test_au_pro_of_perfect_constant_and_inverted_maps():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:2, :3] = True  # in a corner
    assert metrics.sweep([mask.astype(float)], [mask]).au_pro() == pytest.approx(1.0)
    # All equal: the curve is the diagonal, whose area up to a limit is half of limit squared.
    assert metrics.sweep([np.ones((8, 8))], [mask]).au_pro(0.3) == pytest.approx(0.15)
    assert metrics.sweep([-mask.astype(float)], [mask]).au_pro() == 0.0


def test_regions_that_touch_at_a_corner_are_one():
    heat = np.zeros((4, 6))
    mask = np.zeros((4, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[1, 2] = mask[2, 3] = True
    heat[0, 0] = 1  # one of four pixels is found without a false alarm
    fpr, overlap = metrics.sweep([heat], [mask]).pro_curve()
    assert overlap[fpr == 0].max() == pytest.approx(1 / 4)
    mask[1, 1] = False  # now two regions, and the first is found completely
    fpr, overlap = metrics.sweep([heat], [mask]).pro_curve()
    assert overlap[fpr == 0].max() == pytest.approx(1 / 2)


def test_defect_free_images_dilute_the_false_positive_rate():
    heat, mask = np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[False, True, False, False]])
    clean = np.zeros((1, 7))
    fpr, overlap = metrics.sweep([heat, clean], [mask, np.zeros((1, 7), dtype=bool)]).pro_curve()
    assert fpr[np.argmax(overlap == 1)] == pytest.approx(1 / 10)


def test_the_curve_runs_from_the_origin_to_one_and_never_falls():
    curve = metrics.sweep(*random_case(2, 20)).pro_curve()
    for axis in curve:
        assert axis[0] == 0 and axis[-1] == 1 and (np.diff(axis) >= 0).all()


def test_metrics_that_cannot_be_computed_are_none():
    heat, none, every = np.ones((3, 3)), np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
    for mask in (none, every):
        assert metrics.sweep([heat], [mask]) is None
    for labels in ([0, 0], [1, 1]):
        assert metrics.image_auroc([1.0, 2.0], labels) is None
        assert metrics.image_ap([1.0, 2.0], labels) is None
        assert metrics.image_f1_max([1.0, 2.0], labels) == (None, None)


def test_image_metrics_by_hand():
    scores, labels = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 1, 0, 0])
    assert metrics.image_auroc(scores, labels) == pytest.approx(5 / 6)  # five of six pairs in order
    assert metrics.image_ap(scores, labels) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.image_f1_max(scores, labels) == (pytest.approx(0.8), 3.0)
    assert metrics.image_auroc(np.ones(5), labels) == 0.5


def test_f1_max_equals_the_best_of_all_thresholds():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 80)
    scores = np.round(rng.normal(labels, 1.0), 1)
    f1, threshold = metrics.image_f1_max(scores, labels)
    assert f1 == pytest.approx(max(f1_score(labels, scores >= t) for t in scores))
    assert f1 == pytest.approx(f1_score(labels, scores >= threshold))
    assert metrics.image_ap(scores, labels) == pytest.approx(average_precision_score(labels, scores))


def test_items_may_be_computed_on_request():
    maps, masks = random_case(1, 20)

    class OnRequest:
        def __init__(self, items):
            self.items = items

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return self.items[index].copy()

    assert metrics.sweep(OnRequest(maps), OnRequest(masks)).au_pro() == metrics.sweep(maps, masks).au_pro()


def test_wrong_input_is_named():
    heat, mask = np.zeros((2, 2)), np.zeros((2, 2), dtype=bool)
    spoilt = np.array([[0.0, np.nan], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r"image 1.*NaN"):
        metrics.sweep([heat, spoilt], [mask, mask])
    with pytest.raises(ValueError, match=r"image 0.*uint8"):
        metrics.sweep([heat], [mask.astype(np.uint8)])
    with pytest.raises(ValueError, match=r"image 0.*\(2, 2\).*\(2, 3\)"):
        metrics.sweep([heat], [np.zeros((2, 3), dtype=bool)])
    with pytest.raises(ValueError, match="2 maps but 1 masks"):
        metrics.sweep([heat, heat], [mask])
    with pytest.raises(ValueError, match="fpr_limit is 0"):
        metrics.sweep([heat], [~mask & (np.arange(2) > 0)]).au_pro(0)
    with pytest.raises(ValueError, match="score of image 2 is NaN"):
        metrics.image_auroc([0.0, 1.0, np.nan], [0, 1, 1])
    with pytest.raises(ValueError, match="label of image 1 is 2"):
        metrics.image_ap([0.0, 1.0], [0, 2])
    with pytest.raises(ValueError, match="same length"):
        metrics.image_f1_max([0.0, 1.0], [0])
