"""Synthetic products: determinism, exact masks, severity, the written layout, refusals."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from effad_lib import synthesis
from effad_lib.synthesis import (
    DEFAULT_PRODUCT,
    DEFECTS,
    PRODUCTS,
    TOLERANCE,
    SynthesisError,
    SynthesisSettings,
    defect_names,
    product_names,
    render,
    synthesize,
    write_dataset,
)

PAIRS = [(product, defect) for product in product_names() for defect in defect_names(product)]
SMALL = (96, 96)


def difference(shot):
    """Largest change of a colour channel, int [H, W]."""
    return np.abs(shot.image.astype(int) - shot.good_twin).max(axis=2)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names():
    assert {"gasket", "metal", "fabric", "board"} <= set(product_names())
    assert DEFAULT_PRODUCT in product_names()
    for name in product_names():
        assert {"scratch", "contamination"} <= set(defect_names(name))
        assert ({"misplaced", "missing"} <= set(defect_names(name))) == (name in ("gasket", "board"))


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (80, 147), (131, 64)], ids=str)
@pytest.mark.parametrize("product, defect", PAIRS)
def test_every_defect_is_exactly_its_mask(product, defect, size):
    shot = render(product, defect, size=size, seed=11, severity=0.8)
    assert shot.image.shape == shot.good_twin.shape == (*size, 3) and shot.image.dtype == np.uint8
    assert shot.mask.shape == size and shot.mask.dtype == bool
    assert 0.0005 < shot.mask.mean() < 0.35
    changed = difference(shot)
    assert not changed[~shot.mask].any()
    # Noise is the same on both sides, so that only rounding can eat into the stated change. A misplaced part may
    # share a colour with what it uncovers or covers; its mask holds both places whole.
    assert (changed[shot.mask] >= round(TOLERANCE * 255) - 1).mean() > (0.85 if defect == "misplaced" else 0.999)
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


def test_misplaced_mask_covers_the_old_and_the_new_place():
    canvas = synthesis.scene.Canvas(128, 128)
    item = PRODUCTS["board"](canvas, np.random.default_rng(0))
    scene = DEFECTS["misplaced"].apply(item, np.random.default_rng(1), 1.0)
    hidden = [part for part in item.parts if item.footprint(part)[~scene.claimed].sum() == 0]
    assert len(hidden) == 1
    old = item.footprint(hidden[0])
    new = scene.claimed & ~old
    assert 0.5 * old.sum() < new.sum() < 1.5 * old.sum()


@pytest.mark.parametrize("product", ["gasket", "board"])
def test_missing_at_full_severity_leaves_nothing_of_the_part(product):
    canvas = synthesis.scene.Canvas(96, 96)
    item = PRODUCTS[product](canvas, np.random.default_rng(0))
    for part in item.parts:
        rest = tuple(other for other in item.parts if other is not part)
        gone = item.paint(tuple(replace(other, kept=0.0) if other is part else other for other in item.parts))
        assert np.allclose(gone.albedo, item.paint(rest).albedo, atol=0.02)
        assert np.abs(gone.albedo - item.scene.albedo).max() > 0.1


def test_layout_and_manifest(tmp_path):
    size, counts = (64, 80), {"train": 3, "test_good": 2, "test_per_defect": 2}
    folder = write_dataset("gasket", tmp_path / "deep" / "gasket", size=size, severity=(0.3, 0.9), seed=7, **counts)
    found = files(folder)
    expected = {f"train/good/{i:03d}.png" for i in range(3)} | {f"test/good/{i:03d}.png" for i in range(2)}
    for defect in defect_names("gasket"):
        expected |= {f"test/{defect}/{i:03d}.png" for i in range(2)}
        expected |= {f"ground_truth/{defect}/{i:03d}_mask.png" for i in range(2)}
    assert set(found) == expected | {"manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["gasket"]

    manifest = json.loads(found["manifest.json"])
    assert manifest["product"] == "gasket" and manifest["seed"] == 7 and manifest["size"] == [64, 80]
    assert len(manifest["images"]) == 3 + 2 + 4 * 2
    assert len({record["seed"] for record in manifest["images"]}) == len(manifest["images"])
    for record in manifest["images"]:
        level = record.get("severity", 1.0)
        shot = render("gasket", record["defect"], size=size, seed=record["seed"], severity=level)
        assert np.array_equal(np.asarray(Image.open(folder / record["path"])), shot.image)
        if record["defect"] == "good":
            continue
        assert 0.3 <= level <= 0.9
        name = record["path"].replace("test/", "ground_truth/").replace(".png", "_mask.png")
        mask = np.asarray(Image.open(folder / name))
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        assert np.array_equal(mask == 255, shot.mask) and record["mask_pixels"] == shot.mask.sum()


def test_an_image_depends_on_its_own_number_only(tmp_path):
    few = files(write_dataset("metal", tmp_path / "few", size=(64, 64), train=1, test_good=1, test_per_defect=1))
    many = files(write_dataset("metal", tmp_path / "many", size=(64, 64), train=3, test_good=2, test_per_defect=2))
    pictures = set(few) - {"manifest.json"}
    assert pictures < set(many) and all(few[name] == many[name] for name in pictures)
    assert few["train/good/000.png"] != few["test/good/000.png"]
    other = files(
        write_dataset("metal", tmp_path / "other", size=(64, 64), train=1, test_good=0, test_per_defect=0, seed=1)
    )
    assert other["train/good/000.png"] != few["train/good/000.png"]


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path):
    counts = {"size": (64, 64), "test_good": 0, "test_per_defect": 0}
    folder = tmp_path / "set"
    folder.mkdir()
    write_dataset("metal", folder, train=2, **counts)
    before = files(folder)
    with pytest.raises(SynthesisError, match=r"set is not empty.*overwrite=True"):
        write_dataset("metal", folder, train=1, **counts)
    assert files(folder) == before
    write_dataset("metal", folder, train=1, overwrite=True, **counts)
    assert set(files(folder)) == {"train/good/000.png", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(SynthesisError, match=r"precious has no manifest.json"):
        write_dataset("metal", precious, train=1, overwrite=True, **counts)
    with pytest.raises(SynthesisError, match="is a file"):
        write_dataset("metal", precious / "thesis.txt", train=1, overwrite=True, **counts)
    assert (precious / "thesis.txt").read_text() == "mine"


def test_settings_write_once_and_keep_what_is_there(tmp_path):
    settings = SynthesisSettings(
        product="metal", data_root=str(tmp_path), image_size=[64, 80], train=2, test_good=1, test_per_defect=1, seed=3
    )
    folder = synthesize(settings)
    assert folder == tmp_path / "metal"
    counts = {"train": 2, "test_good": 1, "test_per_defect": 1}
    direct = write_dataset("metal", tmp_path / "direct", size=(64, 80), seed=3, **counts)
    assert files(folder) == files(direct)

    (folder / "train/good/000.png").write_bytes(b"kept")
    assert synthesize(settings) == folder and (folder / "train/good/000.png").read_bytes() == b"kept"
    with pytest.raises(SynthesisError, match=r"another data set \(train: 2 there, 3 now\).*overwrite = True"):
        synthesize(replace(settings, train=3))
    assert (folder / "train/good/000.png").read_bytes() == b"kept"
    synthesize(replace(settings, train=3, overwrite=True))
    assert len(list((folder / "train/good").iterdir())) == 3


def test_default_settings_are_the_defaults_of_writing():
    arguments = {name: given.default for name, given in inspect.signature(write_dataset).parameters.items()}
    settings = SynthesisSettings().as_dict()
    assert settings["product"] == DEFAULT_PRODUCT and tuple(settings["image_size"]) == arguments["size"]
    assert tuple(settings["severity"]) == arguments["severity"]
    for name in ("train", "test_good", "test_per_defect", "seed", "overwrite"):
        assert settings[name] == arguments[name]


@pytest.mark.parametrize(
    "wrong", [{"product": "bord"}, {"image_size": [32, 64]}, {"severity": [0.9, 0.1]}, {"seed": -1}]
)
def test_settings_are_refused_before_anything_is_drawn(wrong):
    with pytest.raises(SynthesisError):
        SynthesisSettings(**wrong)


def test_a_broken_off_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of paint")

    monkeypatch.setitem(DEFECTS, "scratch", replace(DEFECTS["scratch"], apply=fail))
    with pytest.raises(RuntimeError, match="out of paint"):
        write_dataset("metal", tmp_path / "set", size=(64, 64), train=1, test_good=0, test_per_defect=1)
    assert list(tmp_path.iterdir()) == []


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
    assert defect_names("plate") == ["scratch", "contamination", "bleached"]
    assert render("plate", "bleached", size=(64, 64)).mask.all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gaskt",), r"product 'gaskt'.*Did you mean 'gasket'\?.*Known: .*board"),
        (("metal", "scrach"), r"defect 'scrach' of metal.*Did you mean 'scratch'\?"),
        (("metal", "missing"), r"defect 'missing' of metal.*Known: good, scratch, contamination"),
        (("metal", "scratch", {"severity": 0}), r"severity is 0; .*above 0"),
        (("metal", "scratch", {"severity": 1.01}), r"severity is 1.01; .*at most 1"),
        (("metal", "scratch", {"severity": float("nan")}), r"severity is nan"),
        (("metal", "good", {"size": (64, 63)}), r"size is \(64, 63\); .*at least 64"),
        (("metal", "good", {"size": 256}), r"size is 256; .*\(height, width\)"),
        (("metal", "good", {"seed": -1}), r"seed is -1"),
    ],
    ids=lambda value: None,
)
def test_render_refuses(arguments, message):
    names = [value for value in arguments if isinstance(value, str)]
    settings = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises(SynthesisError, match=message):
        render(*names, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train": -1}, r"train is -1"),
        ({"test_per_defect": 1.5}, r"test_per_defect is 1.5"),
        ({"severity": 0.5}, r"severity is 0.5; .*\(lowest, highest\)"),
        ({"severity": (0.9, 0.5)}, r"lowest must not be above"),
        ({"severity": (0.0, 0.5)}, r"severity is 0.0"),
        ({"size": (32, 32)}, r"size is \(32, 32\)"),
    ],
)
def test_write_dataset_refuses_before_it_writes(tmp_path, settings, message):
    with pytest.raises(SynthesisError, match=message):
        write_dataset("metal", tmp_path / "set", **settings)
    assert list(tmp_path.iterdir()) == []
