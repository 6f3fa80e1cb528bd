"""Tiles: one map without seams, equal to that of the whole image where a branch sees no further than 33 pixels; and a
threshold for them."""

import copy
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from effad_lib.calibration import calibrate
from effad_lib.cli import main
from effad_lib.detection import Wanted, detect
from effad_lib.detector import EfficientAD
from effad_lib.engines import load_exported
from effad_lib.evaluation import evaluate_run
from effad_lib.export import ExportSettings, export
from effad_lib.export.normals import may_choose, own_thresholds
from effad_lib.images import ImageError, find_images, packaged_photographs, read_image
from effad_lib.runs import Run
from effad_lib.settings import SettingsError
from effad_lib.tiling import BLIND, check_overlap, inspect_tiles, places


@pytest.fixture(scope="module")
def photograph():
    """200×300 pixels of a photograph."""
    coffee = next(path for path in packaged_photographs() if path.stem == "coffee")
    return read_image(coffee)[:, 60:260, 100:400]


def detector(size="S", image_size=(96, 96), padding=False):
    torch.manual_seed(1)
    made = EfficientAD(size, 8, padding, image_size).eval()
    made.quantiles.copy_(torch.tensor([[0.0, 0.01], [0.0, 0.01]]))
    made.threshold = made.pixel_threshold = 0.1
    return made


@pytest.mark.parametrize(
    "length, tile, overlap", [(96, 96, 40), (97, 96, 40), (200, 96, 40), (300, 96, 92), (1000, 64, 41)]
)
def test_tiles_cover_a_side_and_overlap_enough(length, tile, overlap):
    starts = list(places(length, tile, overlap))
    assert starts[0] == 0 and starts[-1] == length - tile and starts == sorted(set(starts))
    assert all(after - before <= tile - overlap for before, after in pairwise(starts))
    assert all(start % 4 == 0 for start in starts[:-1])


@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("size", ["S", "M", "XS"])
def test_the_student_teacher_map_is_that_of_the_whole_image(photograph, size, padding):
    model = detector(size, padding=padding)
    tiled, whole = inspect_tiles(model, photograph, 40), model.inspect(photograph[None])
    assert tiled.combined.shape == whole.combined.shape == (1, 200, 300)
    # The whole image's own border and the tiles' there are the same too.
    np.testing.assert_allclose(tiled.student_teacher, whole.student_teacher, rtol=1e-4, atol=1e-6)
    assert tiled.score == tiled.combined.max()


def test_the_autoencoder_leaves_no_seams(photograph):
    """Its maps differ from tile to tile, as it sees one at a time; blended, no step is left where one tile ends."""
    model = detector()
    overlap = 60
    tiled = inspect_tiles(model, photograph, overlap).student_autoencoder[0]
    whole = model.inspect(photograph[None]).student_autoencoder[0]
    off = tiled - whole
    assert np.abs(off).max() > 1e-6  # they do differ
    # Put together without blending, the difference jumps where tiles meet.
    hard = np.empty_like(off)
    for y in places(200, 96, overlap):
        for x in places(300, 96, overlap):
            part = model.inspect(photograph[None, :, y : y + 96, x : x + 96]).student_autoencoder[0]
            top, left = (BLIND if start else 0 for start in (y, x))
            hard[y + top : y + 96, x + left : x + 96] = part[top:, left:]
    seams = [x + BLIND for x in places(300, 96, overlap) if x]
    steps = [np.abs(np.diff(values, axis=1))[:, [seam - 1 for seam in seams]].mean() for values in (off, hard - whole)]
    assert steps[1] > 10 * steps[0]


def test_a_defect_in_an_overlap_is_as_hot_as_elsewhere(photograph):
    model = detector()
    broken = photograph.copy()
    broken[:, 70:84, 60:76] = 0
    tiled, whole = inspect_tiles(model, broken, 40), model.inspect(broken[None])
    place = np.unravel_index(tiled.student_teacher[0].argmax(), (200, 300))
    assert place == np.unravel_index(whole.student_teacher[0].argmax(), (200, 300))


def test_tiles_that_cannot_be_are_refused(small_detector, picture, tmp_path, photograph):
    for overlap in (39, 93, -1):
        with pytest.raises(SettingsError, match=rf"tile overlap = {overlap}: takes 40 to 92 pixels"):
            check_overlap(detector(), overlap)
    check_overlap(detector(), 40)
    with pytest.raises(ImageError, match="less than a tile of 96×96"):
        inspect_tiles(detector(), photograph[:, :95], 40)

    class Fixed:
        image_size, input_size = (96, 96), (480, 640)

    with pytest.raises(SettingsError, match="takes images of 480×640 only, no tiles of 96×96"):
        check_overlap(Fixed(), 40)


def test_detection_in_tiles_writes_maps_of_the_whole(small_detector, picture, tmp_path):
    model = copy.deepcopy(small_detector)
    path = picture(tmp_path / "images" / "large.png", size=(150, 170))
    picture(tmp_path / "images" / "small.png", size=(150, 60))
    model.calibration = model.calibration | {"tile_overlap": 44}
    table = detect(model, tmp_path / "images", tmp_path / "out", save_maps=True, tile_overlap=44).set_index("file")
    expected = inspect_tiles(model, read_image(path), 44)
    stored = np.load(tmp_path / "out" / "maps" / "large.png.npy", allow_pickle=False)
    np.testing.assert_array_equal(stored, expected.combined[0])
    assert table.loc["large.png", "score"] == float(expected.score[0])
    assert "small.png: 150×60 pixels are less than a tile" in table.loc["small.png", "error"]


# --- thresholds -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def textured(tmp_path_factory):
    """A model whose threshold is that of 29 single tiles, one with that of 29 images of 64×640 pixels in tiles, and
    the folder of these; at most 10 % false alarms were wished for."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("textures")
    torch.manual_seed(1)
    made = EfficientAD("XS", 8, image_size=(64, 64))
    calibrate(made, torch.from_numpy(textures(rng, 29, 64)), false_alarm_rate=0.1)
    single, tiled, line = folder / "single.safetensors", folder / "tiled.safetensors", folder / "line"
    made.save(single, {"data": "textures"})
    line.mkdir()
    for index, pixels in enumerate(textures(rng, 29, 640)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(line / f"{index:02}.png")
    wish = ["--false-alarm-rate", "0.1", "--tile-overlap", "40", "--normals", str(line), "--out", str(tiled)]
    assert main(["threshold", str(single), *wish]) == 0
    return single, tiled, line


def textures(rng, count, width):
    return rng.integers(0, 256, (count, 3, 64, width), dtype=np.uint8)


def test_a_threshold_of_tiled_images_keeps_the_promise_that_one_of_tiles_breaks(textured):
    before, model, line = EfficientAD.load(textured[0]), EfficientAD.load(textured[1]), textured[2]
    chosen = model.calibration
    assert (chosen["normals"], chosen["tile_overlap"]) == (29, 40) and model.threshold == chosen["scores"][-1]
    for file in sorted(line.iterdir())[:3]:
        score = float(inspect_tiles(model, read_image(file), 40).score[0])
        assert min(abs(np.array(chosen["scores"]) - score)) < 1e-6
    new = [float(inspect_tiles(model, one, 40).score[0]) for one in textures(np.random.default_rng(1), 40, 640)]
    assert np.mean(np.array(new) > model.threshold) <= 0.1
    assert np.mean(np.array(new) > before.threshold) > 0.25


def test_a_threshold_of_other_images_than_these_is_warned_of_once(textured, run):
    single, _, line = textured
    model = EfficientAD.load(single)
    with pytest.warns(UserWarning) as caught:
        detect(model, line / "00.png", run / "out", tile_overlap=40)
    assert len(caught) == 1
    assert "chosen on whole images and is used for tiles that overlap by 40:" in str(caught[0].message)
    assert str(caught[0].message).endswith(" effad threshold MODEL --normals FOLDER --tile-overlap 40.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Wanted().check(model)
        model.calibration["tile_overlap"] = 40
        Wanted(tile_overlap=40).check(model)
    for overlap, used in ((48, "tiles that overlap by 48"), (None, "whole ones")):
        with pytest.warns(UserWarning, match=f"in tiles that overlap by 40 pixels and is used for {used}:"):
            Wanted(tile_overlap=overlap).check(model)
    own = EfficientAD.load(Run(run).model)
    own.calibration["tile_overlap"] = 40
    own.save(Run(run).model)
    with pytest.warns(UserWarning, match="used for whole ones"):
        evaluate_run(run, "cpu")


def test_a_threshold_of_tiles_goes_into_an_export(textured, tmp_path):
    _, tiled, line = textured
    file, _ = export(tiled, ExportSettings(compare=1), normals=line, out=tmp_path / "model.onnx")
    exported, model = load_exported(file), EfficientAD.load(tiled)
    assert (exported.threshold, exported.calibration) == (model.threshold, model.calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Wanted(tile_overlap=40).check(exported)
    exported.threshold = 9.0  # as of an INT8 export, which gets its own
    good = find_images(line)
    assert may_choose(model, good, "line", None) and may_choose(model, good, "line", model.image_size)
    own_thresholds(exported, model, good, "line")
    assert exported.threshold == pytest.approx(model.threshold, rel=1e-3) and exported.calibration["tile_overlap"] == 40
    larger = (model.image_size[0] + 32, model.image_size[1])
    for source, size in (("", None), ("line", larger)):  # pieces of training images; a file that resizes them
        with pytest.warns(UserWarning, match="keeps its model's thresholds, chosen on 29 good images in tiles"):
            assert not may_choose(model, good, source, size)


def test_tiles_of_a_card_that_its_model_cannot_take_end_an_export_before_the_work(textured, tmp_path):
    model = EfficientAD.load(textured[1])
    model.calibration["tile_overlap"] = 10**6
    file = model.save(tmp_path / "m.safetensors")
    with pytest.raises(SettingsError, match="tile overlap = 1000000: takes 40 to"):
        export(file, ExportSettings(precision="int8"), normals=textured[2], out=tmp_path / "model.onnx")


def test_a_threshold_of_tiles_that_cannot_be_is_refused(textured, picture, tmp_path, capsys):
    single, _, line = textured
    before, small = single.read_bytes(), picture(tmp_path / "small" / "a.png", size=(60, 200)).parent
    for options, says in (
        (["--tile-overlap", "40"], "--tile-overlap: name the good images"),
        (["--tile-overlap", "39", "--normals", str(line)], "tile overlap = 39: takes 40 to 60 pixels"),
        (["--tile-overlap", "40", "--normals", str(small)], "a.png: 60×200 pixels are less than a tile of 64×64"),
    ):
        assert main(["threshold", str(single), *options]) == 2
        assert says in capsys.readouterr().err
    assert single.read_bytes() == before
