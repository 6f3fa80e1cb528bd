"""Synthetic products and defects: determinism, exact masks, severity, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from effad_lib import synthesis
from effad_lib.images import ImageError
from effad_lib.synthesis import (
    DEFAULT_PRODUCT,
    DEFECTS,
    PRODUCTS,
    TOLERANCE,
    SynthesisError,
    defect_names,
    product_names,
    render,
    scene,
)

PAIRS = [(product, defect) for product in product_names() for defect in defect_names(product)]
SMALL = (96, 96)


def difference(shot):
    """Largest change of a colour channel, int [H, W]."""
    return np.abs(shot.image.astype(int) - shot.good_twin).max(axis=2)


def test_white_noise_is_white_and_nearly_normal():
    noise = scene.white(np.random.default_rng(0), (400, 500))
    assert noise.dtype == np.float32 and noise.shape == (400, 500)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    for level, beyond in ((1, 0.3173), (2, 0.0455)):  # of a normal distribution
        assert (np.abs(noise) > level).mean() == pytest.approx(beyond, rel=0.1)
    assert np.abs(noise).max() > 3.5
    for lag in (1, 2, 250):
        assert abs((noise[:, lag:] * noise[:, :-lag]).mean()) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.01


def test_names():
    assert {"fabric", "metal", "wood", "blister", "board", "connector", "gasket", "screw"} <= set(product_names())
    assert DEFAULT_PRODUCT in product_names()
    structural = "scratch contamination crack dent discolouration hole thread interruption".split()
    logical = {name: ["missing", "misplaced", "extra"] for name in ("gasket", "board", "blister", "connector")}
    for name in ("board", "blister", "connector"):
        logical[name] = [*logical[name], "swapped"]
    logical["connector"] = [*logical["connector"], "wrong_count"]
    for name in product_names():
        names = defect_names(name)
        edge = ["broken_edge"] if name not in ("fabric", "metal", "wood") else []
        assert sorted(names) == sorted(structural + edge + logical.get(name, []))
        assert [DEFECTS[defect].logical for defect in names] == sorted(DEFECTS[defect].logical for defect in names)


@pytest.mark.parametrize("product", product_names())
def test_scenes_are_float32_planes_and_painting_draws_no_chance(product):
    canvas = synthesis.scene.Canvas(64, 80)
    item = PRODUCTS[product](canvas, np.random.default_rng(0))
    scene, again = item.scene, item.paint(item.parts)
    assert scene.albedo.shape == (3, 64, 80)
    for name in ("albedo", "height", "gloss", "surface"):
        layer = getattr(scene, name)
        assert layer.dtype == np.float32 and layer.shape[-2:] == (64, 80), name
        assert np.array_equal(layer, getattr(again, name)), name


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (80, 147), (131, 64)], ids=str)
@pytest.mark.parametrize("product, defect", PAIRS)
def test_every_defect_is_exactly_its_mask(product, defect, size):
    shot = render(product, defect, size=size, seed=11, severity=0.8)
    assert shot.image.shape == shot.good_twin.shape == (*size, 3) and shot.image.dtype == np.uint8
    assert shot.mask.shape == size and shot.mask.dtype == bool
    assert 0.0005 < shot.mask.mean() < 0.35
    changed = difference(shot)
    assert not changed[~shot.mask].any()
    # Noise is the same on both sides, so that only rounding can eat into the stated change. The masks of misplaced
    # and swapped parts hold both places whole, also where old and new share a colour.
    assert (changed[shot.mask] >= round(TOLERANCE * 255) - 1).mean() > (
        0.85 if defect in ("misplaced", "swapped") else 0.999
    )
    assert np.array_equal(shot.good_twin, render(product, size=size, seed=11).image)


@pytest.mark.parametrize("product", product_names())
def test_same_seed_same_bytes_and_another_seed_another_image(product):
    first, again, other = (render(product, "scratch", size=SMALL, seed=seed) for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes() and first.mask.tobytes() == again.mask.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("product", product_names())
def test_good_images_vary_but_little(product):
    shots = np.stack([render(product, size=SMALL, seed=seed).image for seed in range(6)]).astype(float)
    assert not render(product, size=SMALL).mask.any()
    blurred = ndimage.gaussian_filter(shots, (0, 6, 6, 0))
    assert 0.5 < blurred.std(axis=0).mean() < 20
    # Neither black nor burnt out: a saturated pixel could hide a defect.
    assert ((shots == 0) | (shots == 255)).mean() < 0.01 and shots.std() > 5


@pytest.mark.parametrize("product, defect", PAIRS)
def test_severity_is_monotone(product, defect):
    shots = [render(product, defect, size=(128, 128), seed=5, severity=level) for level in (0.02, 0.3, 0.6, 1.0)]
    totals = [difference(shot).sum() for shot in shots]
    inside = [difference(shot)[shot.mask].mean() if shot.mask.any() else 0.0 for shot in shots]
    assert totals == sorted(totals) and totals[0] < 0.3 * totals[-1]
    assert inside[0] < inside[1] < inside[-1] and inside[-1] > 8


def test_a_wrong_count_is_evenly_spaced_and_of_whole_parts():
    canvas = synthesis.scene.Canvas(96, 96)
    item = PRODUCTS["connector"](canvas, np.random.default_rng(0))
    assert item.arrange(0) == item.parts
    for more in (-1, 1):
        pins = [part for part in item.arrange(more) if part.kind == "pin"]
        gaps = np.diff([part.x for part in pins])
        assert len(pins) == 8 + more and gaps.std() < 0.1 * gaps.mean() and {part.kept for part in pins} == {1.0}
    shot = render("connector", "wrong_count", seed=1)
    assert np.flatnonzero(shot.mask.any(axis=1)).max() < 128  # the wires below are as they were


def test_swapped_parts_are_of_two_kinds_and_of_like_size():
    for product in ("board", "blister", "connector"):
        item = PRODUCTS[product](synthesis.scene.Canvas(96, 96), np.random.default_rng(0))
        for one, other in synthesis.logical._pairs(item):
            assert one.kind != other.kind and 0.6 < one.width / other.width < 1.6, product


def test_an_extra_part_lies_where_there_is_room():
    canvas = synthesis.scene.Canvas(128, 128)
    for seed in range(4):
        item = PRODUCTS["gasket"](canvas, np.random.default_rng(seed))
        scene = DEFECTS["extra"].apply(item, np.random.default_rng(seed), 1.0)
        opened = (item.scene.surface > 0.5) & (scene.surface < 0.5)
        assert ndimage.label(opened)[1] == 1 and opened.sum() > 0.5 * item.footprint(item.parts[0]).sum()


def test_misplaced_mask_covers_the_old_and_the_new_place():
    canvas = synthesis.scene.Canvas(128, 128)
    item = PRODUCTS["board"](canvas, np.random.default_rng(0))
    scene = DEFECTS["misplaced"].apply(item, np.random.default_rng(1), 1.0)
    hidden = [part for part in item.parts if item.footprint(part)[~scene.claimed].sum() == 0]
    assert len(hidden) == 1
    old = item.footprint(hidden[0])
    new = scene.claimed & ~old
    assert 0.5 * old.sum() < new.sum() < 1.5 * old.sum()


@pytest.mark.parametrize("product", ["gasket", "board", "blister", "connector"])
def test_missing_at_full_severity_leaves_nothing_of_the_part(product):
    canvas = synthesis.scene.Canvas(96, 96)
    item = PRODUCTS[product](canvas, np.random.default_rng(0))
    for part in item.parts:
        rest = tuple(other for other in item.parts if other is not part)
        gone = item.paint(tuple(replace(other, kept=0.0) if other is part else other for other in item.parts))
        assert np.allclose(gone.albedo, item.paint(rest).albedo, atol=0.02)
        assert np.abs(gone.albedo - item.scene.albedo).max() > 0.1


def test_a_new_product_and_a_new_defect_are_one_function_each(monkeypatch):
    def plate(canvas, rng):
        grey = np.full(canvas.shape, 0.5, np.float32)
        scene = synthesis.scene.Scene(
            np.stack([grey] * 3), 0 * grey, 0 * grey, 0 * grey + 1, synthesis.scene.colour(1, 1, 1)
        )
        return synthesis.scene.Item(canvas, lambda parts: scene)

    def bleached(item, rng, severity):
        return replace(item.scene, albedo=item.scene.albedo * (1 + 0.5 * severity))

    monkeypatch.setitem(PRODUCTS, "plate", plate)
    monkeypatch.setitem(DEFECTS, "bleached", synthesis.defects.Defect(bleached, False, synthesis.defects.anything))
    assert {"scratch", "dent", "bleached"} < set(defect_names("plate")) and "missing" not in defect_names("plate")
    assert render("plate", "bleached", size=(64, 64)).mask.all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gaskt",), r"product 'gaskt': known are .*board.*Did you mean 'gasket'\?"),
        (("metal", "scrach"), r"defect 'scrach' of metal.*Did you mean 'scratch'\?"),
        (("metal", "missing"), r"defect 'missing' of metal: known are .*good, .*scratch"),
        (("metal", "scratch", {"severity": 0}), r"severity is 0; .*above 0"),
        (("metal", "scratch", {"severity": 1.01}), r"severity is 1.01; .*at most 1"),
        (("metal", "scratch", {"severity": float("nan")}), r"severity is nan"),
        (("metal", "good", {"size": (64, 63)}), r"size \(64, 63\): .*at least 64"),
        (("metal", "good", {"size": 256}), r"size 256: .*height and width"),
        (("metal", "good", {"seed": -1}), r"seed is -1"),
    ],
    ids=lambda value: None,
)
def test_render_refuses(arguments, message):
    names = [value for value in arguments if isinstance(value, str)]
    settings = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises((SynthesisError, ImageError), match=message):
        render(*names, **settings)
