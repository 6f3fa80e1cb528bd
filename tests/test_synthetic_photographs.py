"""Defects on one's own photographs: where the mask says, as a data set, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from effad_lib import datasets, synthesis
from effad_lib.images import ImageError
from effad_lib.synthesis import (
    SynthesisError,
    SynthesisSettings,
    damage,
    draw,
    photograph_defects,
    render,
    synthesize,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of gaskets, as if photographed, in two formats."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(15):
        picture = Image.fromarray(render("gasket", size=(80, 96), seed=index).image)
        picture.save(folder / f"piece_{index}.{'png' if index % 2 else 'bmp'}")
    return folder


def test_photographs_are_damaged_exactly_where_the_mask_says():
    picture = render("gasket", size=(128, 160), seed=2).image
    object_alone = synthesis.photographs.photograph(picture).scene.surface > 0
    assert 0.1 < object_alone.mean() < 0.6
    for defect in photograph_defects(picture):
        faint, strong = (damage(picture, defect, seed=4, severity=severity) for severity in (0.1, 1.0))
        for shot in (faint, strong):
            assert np.array_equal(shot.good_twin, picture)
            assert np.array_equal(shot.image[~shot.mask], picture[~shot.mask])
        change = [np.abs(shot.image.astype(int) - picture).sum() for shot in (faint, strong)]
        assert change[0] < 0.5 * change[1] and 0.0005 < strong.mask.mean() < 0.25, defect
        assert strong.mask[object_alone].sum() > 0.5 * strong.mask.sum(), defect
        assert np.array_equal(strong.image, damage(picture, defect, seed=4).image)
        assert not np.array_equal(strong.image, damage(picture, defect, seed=5).image)


def test_what_is_grey_stays_grey():
    grey = np.repeat(render("metal", size=(96, 96), seed=1).image[..., :1], 3, axis=2)
    for defect in photograph_defects(grey):
        shot = damage(grey, defect, seed=2)
        assert shot.mask.any() and not np.ptp(shot.image, axis=2).any(), defect


@pytest.mark.parametrize("ground, piece", [(200, 0), (0, 200), (255, 20)])
@pytest.mark.filterwarnings("error")
def test_black_and_white_photographs_get_defects_too(ground, piece):
    picture = np.full((96, 96, 3), ground, np.uint8)
    picture[20:76, 24:72] = piece
    for defect in photograph_defects(picture):
        # On what is even, a worn or displaced texture and a piece of the same hardly show.
        least = 1 if defect in ("interruption", "cut_paste") else 10
        assert max(damage(picture, defect, seed=seed).mask.sum() for seed in range(3)) >= least, defect


def test_what_is_painted_over_a_noisy_photograph_is_as_noisy(rng):
    clean = np.full((128, 128, 3), 128, np.uint8)
    noisy = np.clip(clean + rng.normal(0, 6, clean.shape), 0, 255).astype(np.uint8)
    assert "broken_edge" not in photograph_defects(noisy)  # nothing stands out: the surface is everywhere
    roughness = []
    for picture in (clean, noisy):
        shot = damage(picture, "contamination", seed=1)
        rough = np.abs(np.diff(shot.image.astype(int), axis=1)).mean(axis=2)
        roughness.append(np.median(rough[shot.mask[:, 1:]]))
    assert roughness[1] > roughness[0] + 3


def test_a_data_set_of_photographs(tmp_path, photographs):
    wanted = SynthesisSettings(
        photographs=str(photographs), data_root=str(tmp_path), test_good=2, test_per_defect=3, seed=1, workers=2
    )
    folder = synthesize(wanted)
    assert folder == tmp_path / "photographs"
    manifest = json.loads((folder / "manifest.json").read_text())
    defects = manifest["settings"]["defects"]
    assert {"texture_blend", "cut_paste", "thread", "contamination", "scratch", "broken_edge"} <= set(defects)
    split = datasets.load_dataset("synthetic", root=tmp_path, category="photographs")
    assert len(split.train) + len(split.validation) == 13 and len(split.test) == 2 + 3 * len(defects)
    assert split.has_masks
    tested = {record["source"] for record in manifest["images"] if record["path"].startswith("test/")}
    trained = {record["source"] for record in manifest["images"] if record["path"].startswith("train/")}
    assert len(tested) == 2 and len(trained) == 13 and not tested & trained
    for record in manifest["images"]:
        if record["defect"] == "good":
            assert (folder / record["path"]).read_bytes() == (photographs / record["source"]).read_bytes()
    assert synthesize(wanted) == folder
    assert draw(wanted).images.shape == (15 + 3 * len(defects), 3, 80, 96)


def even_photographs(folder, value):
    folder.mkdir()
    for index in range(15):
        Image.new("RGB", (64, 64 + index), (value,) * 3).save(folder / f"{index:02}.png")
    return {"photographs": str(folder), "data_root": str(folder.parent), "test_good": 2}


@pytest.mark.parametrize("value", [0, 255])
def test_a_data_set_of_even_photographs_has_no_empty_mask(tmp_path, value):
    """A piece of black in another place is no defect, and one of white shows in some places only."""
    synthesize(SynthesisSettings(**even_photographs(tmp_path / "even", value), test_per_defect=2))
    split = datasets.load_dataset("synthetic", root=tmp_path, category="photographs")
    datasets.verify(split)
    assert ("cut_paste" in {sample.defect for sample in split.test}) == (value > 0)


def test_a_defect_that_does_not_show_is_drawn_again(tmp_path):
    given = even_photographs(tmp_path / "even", 255) | {"severity": [0.4, 0.4], "defects": ["cut_paste"]}
    wanted = SynthesisSettings(**given, test_per_defect=8)
    planned = {shot.path: shot.seed for shot in wanted.plan() if shot.defect != "good"}
    records = [record for record in draw(wanted).records if record["defect"] != "good"]
    assert all(record["mask_pixels"] for record in records)
    again = [record for record in records if record["seed"] != planned[record["path"]]]
    assert 0 < len(again) < 8
    for record in again:
        picture = np.asarray(Image.open(tmp_path / "even" / record["source"]))
        assert not damage(picture, "cut_paste", seed=planned[record["path"]], severity=0.4).mask.any()
        assert damage(picture, "cut_paste", seed=record["seed"], severity=0.4).mask.sum() == record["mask_pixels"]
    faint = draw(wanted, [shot for shot in wanted.plan() if shot.path == again[0]["path"]])
    assert faint.records[0]["seed"] == planned[again[0]["path"]] and not faint.masks.any(), "these shots as they are"


@pytest.mark.parametrize("photographed", [False, True])
def test_a_defect_that_never_shows_is_named(tmp_path, photographed):
    given, on = {"product": "metal", "data_root": str(tmp_path)}, ""
    few = {"image_size": [64, 64], "train": 1, "test_good": 1, "test_per_defect": 1}
    if photographed:
        given, on = even_photographs(tmp_path / "even", 128), r" on \d\d\.png"
    wanted = SynthesisSettings(**given | few | {"defects": ["dent"], "severity": [1e-4, 1e-4]})
    says = rf"test/dent/000\.png: 'dent' with severity 0\.0001 does not show{on}, in 100 places\. Leave it out"
    with pytest.raises(SynthesisError, match=says):
        synthesize(wanted)
    assert not wanted.folder.exists()


def test_other_photographs_in_the_same_folder_are_other_data(tmp_path, photographs):
    folder = tmp_path / "mine"
    shutil.copytree(photographs, folder)
    wanted = {"photographs": str(folder), "data_root": str(tmp_path / "out"), "test_good": 2, "test_per_defect": 1}
    synthesize(SynthesisSettings(**wanted))
    Image.fromarray(render("gasket", size=(96, 80), seed=99).image).save(folder / "piece_0.bmp")
    with pytest.raises(SynthesisError, match="photographs_sha256"):
        synthesize(SynthesisSettings(**wanted))
    with pytest.raises(SynthesisError, match=r"photographs of 2 sizes.*use shots"):
        _ = draw(SynthesisSettings(**wanted)).images
    for inside in (folder, folder / "deeper", tmp_path):
        with pytest.raises(SynthesisError, match="would mix with the photographs"):
            there = {"photographs": str(folder if inside != tmp_path else tmp_path / "photographs" / "raw")}
            if inside == tmp_path:
                shutil.copytree(photographs, tmp_path / "photographs" / "raw")
            synthesize(SynthesisSettings(**wanted | there | {"data_root": str(inside)}))
    Image.new("RGB", (50, 50)).save(folder / "piece_small.png")
    with pytest.raises(SynthesisError, match=r"piece_small\.png: too small"):
        synthesize(SynthesisSettings(**wanted))
    (folder / "piece_small.png").write_bytes(b"junk")
    with pytest.raises(ImageError, match=r"piece_small\.png: cannot be read"):
        synthesize(SynthesisSettings(**wanted))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"test_good": 3}, r"test_good = 3: 15 photographs are in .*13 are left to train on"),
        ({"test_good": 0}, r"test_good = 0: .*At least one"),
        ({"defects": ["misplaced"]}, r"defect 'misplaced' of the photographs.*known are .*scratch"),
        ({"photographs": "no/such/folder"}, "there is no such folder"),
    ],
)
def test_photographs_are_refused_before_anything_is_written(tmp_path, photographs, values, message):
    values = {"photographs": str(photographs), "test_good": 2, "data_root": str(tmp_path)} | values
    with pytest.raises(ValueError, match=message):
        synthesize(SynthesisSettings(**values))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "picture, defect, message",
    [
        (np.zeros((64, 64), np.uint8), "scratch", r"uint8 \(64, 64\); it must be an array uint8 \[H, W, 3\]"),
        (np.zeros((64, 64, 3)), "scratch", r"float64"),
        ("photo.png", "scratch", r"the photograph is str"),
        (np.zeros((32, 64, 3), np.uint8), "scratch", "at least 64"),
        (np.zeros((64, 64, 3), np.uint8), "scrach", r"'scrach' of this photograph.*'scratch'"),
    ],
    ids=lambda value: None,
)
def test_damage_refuses(picture, defect, message):
    with pytest.raises((SynthesisError, ImageError), match=message):
        damage(picture, defect)
