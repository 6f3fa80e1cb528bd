"""Detection: the results of each image where its name says, and one bad file that stops nothing."""

import copy
import csv
import errno
import os
import re
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from effad_lib import detection, plots, runs
from effad_lib.detection import detect
from effad_lib.detector import EfficientAD
from effad_lib.images import ImageError, read_image, to_float
from effad_lib.runs import RunError
from effad_lib.settings import SettingsError
from effad_lib.watching import watch


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_each_image_gets_its_picture_score_and_map(small_detector, picture, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    path = picture(images / "line 1" / "deep" / "a.png")
    picture(images / "b.jpg", size=(64, 64), seed=1)
    table = detect(small_detector, images, out, save_maps=True, save_masks=True)

    assert files(out) == [
        "heatmaps/b.jpg.png",
        "heatmaps/line 1/deep/a.png.png",
        "maps/b.jpg.npy",
        "maps/line 1/deep/a.png.npy",
        "masks/b.jpg.png",
        "masks/line 1/deep/a.png.png",
        "scores.csv",
    ]
    small = to_float(torch.from_numpy(read_image(path, (64, 64)))[None])
    with torch.no_grad():
        expected = small_detector(small)
    row = table.set_index("file").loc["line 1/deep/a.png"]
    assert row["score"] == pytest.approx(float(expected.score), rel=1e-5)
    assert row["threshold"] == small_detector.threshold
    stored = np.load(out / "maps" / "line 1" / "deep" / "a.png.npy", allow_pickle=False)
    assert stored.dtype == np.float32 and stored.shape == (80, 96)
    resized = functional.interpolate(expected.combined, (80, 96), mode="bilinear")[0, 0]
    np.testing.assert_allclose(stored, resized.numpy(), rtol=1e-4, atol=1e-5)
    marked = np.asarray(Image.open(out / "masks" / "line 1" / "deep" / "a.png.png"))
    assert np.array_equal(marked, np.where(stored > small_detector.pixel_threshold, 255, 0))
    assert row["marked"] == pytest.approx((marked > 0).mean())
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["b.jpg", "line 1/deep/a.png"]
    assert list(rows[0]) == ["file", "score", "threshold", "decision", "marked", "error"]


def test_the_decision_is_a_score_above_the_threshold(small_detector, picture, tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    score = detect(small_detector, path, tmp_path / "out")["score"][0]
    for threshold, decision in ((score - 1e-3, "defective"), (score + 1e-3, "good"), (score, "good")):
        monkeypatch.setattr(small_detector, "threshold", threshold)
        assert detect(small_detector, path, tmp_path / "out")["decision"][0] == decision


@pytest.mark.parametrize(
    ("aspects", "tile_overlap", "warned"),
    [([1.0, 1.0], None, ["80×96", "128×64", "64×128"]), ([0.5, 2.0], None, []), (None, None, []), ([1.0, 1.0], 40, [])],
    ids=["other shapes", "known shapes", "a card of before", "tiles"],
)
def test_images_that_are_squeezed_otherwise_than_in_training_are_warned_of_once_a_size(
    small_detector, picture, tmp_path, monkeypatch, aspects, tile_overlap, warned
):
    monkeypatch.setattr(small_detector, "card", {} if aspects is None else {"aspects": aspects})
    sizes = [(96, 80), (96, 80), (64, 128), (128, 64), (128, 64), (100, 98)]
    for k, size in enumerate(sizes if tile_overlap is None else [(96, 80)]):
        picture(tmp_path / "images" / f"{k}.png", size=size)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        detect(small_detector, tmp_path / "images", tmp_path / "out", heatmaps="none", tile_overlap=tile_overlap)
    said = [str(one.message) for one in found if "pixels look otherwise" in str(one.message)]
    assert len(said) == len(warned) and all(any(size in one for one in said) for size in warned), said


def test_all_pictures_have_one_scale_and_the_truth_where_given(small_detector, picture, tmp_path, monkeypatch):
    drawn, draw = [], plots.heatmap_panel

    def panel(image, heat, mask, **options):
        drawn.append((options["scale"], options["threshold"], mask))
        assert np.array_equal(options["marked"], heat > small_detector.pixel_threshold)
        return draw(image, heat, mask, **options)

    monkeypatch.setattr(plots, "heatmap_panel", panel)
    for name, seed in (("good/0", 0), ("crack/0", 1)):
        picture(tmp_path / "test" / f"{name}.png", seed=seed)
    truth = np.zeros((80, 96), np.uint8)
    truth[10:20, 30:40] = 255
    (tmp_path / "masks" / "crack").mkdir(parents=True)
    Image.fromarray(truth).save(tmp_path / "masks" / "crack" / "0_mask.png")

    detect(small_detector, tmp_path / "test", tmp_path / "out", masks=tmp_path / "masks")
    (scale, threshold, mask), (other_scale, _, none) = drawn
    assert scale == other_scale and scale[0] == 0 < scale[1]
    assert threshold == small_detector.threshold
    assert none is None and np.array_equal(mask, truth > 0)


def test_heatmaps_are_drawn_of_those_that_are_wanted_and_old_ones_go(small_detector, picture, tmp_path, monkeypatch):
    images, out = tmp_path / "images", tmp_path / "out"
    for index in range(3):
        picture(images / f"{index}.png", seed=index)
    scores = detect(small_detector, images, out)["score"]
    assert files(out) == [*(f"heatmaps/{index}.png.png" for index in range(3)), "scores.csv"]
    monkeypatch.setattr(small_detector, "threshold", float(np.sort(scores)[1]))
    detect(small_detector, images, out, heatmaps="defective")
    assert files(out) == [f"heatmaps/{scores.idxmax()}.png.png", "scores.csv"]
    detect(small_detector, images, out, heatmaps="none")
    assert files(out) == ["scores.csv"]
    with pytest.raises(SettingsError, match=r"heatmaps = 'some': known are all, defective, none\."):
        detect(small_detector, images, out, heatmaps="some")


def test_a_model_takes_so_many_threads(model, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(detection, "load_exported", lambda path, device, threads: asked.append((path.name, threads)))
    for path in (model, "m.onnx"):
        detection.open_model(path, "cpu", threads=3)
    detection.open_model(model, "cpu")
    assert asked == [3, ("m.onnx", 3)]
    with pytest.raises(SettingsError, match=r"threads = -1: threads takes a number"):
        detection.open_model(model, threads=-1)


def test_a_bad_file_is_left_out_and_the_rest_done(small_detector, picture, tmp_path, capsys):
    images = tmp_path / "images"
    picture(images / "a.png")
    (images / "b.png").write_bytes(b"no image at all")
    picture(images / "c.tif", mode="CMYK")
    Image.fromarray(np.zeros((80, 80), np.uint16)).save(images / "d.png")
    picture(images / "e.png", mode="L")
    table = detect(small_detector, images, tmp_path / "out").set_index("file")
    assert list(table.index[table["error"] == ""]) == ["a.png", "e.png"]
    assert table.loc["c.tif", "error"].endswith("Save it as 8-bit RGB or 8-bit grey first.")
    assert np.isnan(table.loc["b.png", "score"]) and table.loc["b.png", "decision"] == ""
    assert files(tmp_path / "out") == ["heatmaps/a.png.png", "heatmaps/e.png.png", "scores.csv"]
    said = capsys.readouterr().err
    assert all(f"left out: {images / name}" in said for name in ("b.png", "c.tif", "d.png"))


def test_a_mask_of_another_size_is_named(small_detector, picture, tmp_path):
    path, mask = picture(tmp_path / "a.png"), tmp_path / "mask.png"
    Image.new("L", (10, 10)).save(mask)
    table = detect(small_detector, path, tmp_path / "out", masks=mask)
    assert "mask of (10, 10), its image has (80, 96)" in table["error"][0]


def test_masks_that_fit_no_image_are_an_error(small_detector, picture, tmp_path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "masks" / "z_mask.png", mode="L")
    with pytest.raises(ImageError, match=r"none of its 1 masks.*a_mask.png"):
        detect(small_detector, tmp_path / "images", tmp_path / "out", masks=tmp_path / "masks")


@pytest.mark.parametrize("name", ["..png", "$x_1$ {.png", 'ä ö, "q".png', "-rf.png"])
def test_odd_names_stay_inside(small_detector, picture, tmp_path, name):
    path = picture(tmp_path / "images" / "x.png").rename(tmp_path / "images" / name)
    table = detect(small_detector, path, tmp_path / "out", save_maps=True)
    assert table["error"].tolist() == [""]
    assert files(tmp_path / "out") == sorted([f"heatmaps/{name}.png", f"maps/{name}.npy", "scores.csv"])


def test_a_path_with_dots_gives_the_name_only(small_detector, picture, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    detect(small_detector, tmp_path / "sub" / ".." / "a.png", tmp_path / "sub" / "out")
    assert files(tmp_path / "sub" / "out") == ["heatmaps/a.png.png", "scores.csv"]


def test_links_lead_neither_in_nor_out(small_detector, picture, tmp_path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "sub" / "b.png", seed=1)
    picture(tmp_path / "elsewhere" / "secret.png", seed=2)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (tmp_path / "out" / "heatmaps").mkdir(parents=True)
    (tmp_path / "out" / "heatmaps" / "sub").symlink_to(tmp_path / "elsewhere")
    table = detect(small_detector, tmp_path / "images", tmp_path / "out").set_index("file")
    assert list(table.index) == ["a.png", "sub/b.png"]
    assert "would lie outside" in table.loc["sub/b.png", "error"]
    assert files(tmp_path / "elsewhere") == ["secret.png"]


def test_results_below_the_folder_are_no_images(small_detector, picture, tmp_path):
    picture(tmp_path / "a.png")
    for _ in range(2):
        table = detect(small_detector, tmp_path, tmp_path / "out")
        assert table["file"].tolist() == ["a.png"]


def test_a_folder_without_images(small_detector, tmp_path):
    with pytest.raises(ImageError, match="no image below this folder"):
        detect(small_detector, tmp_path, tmp_path / "out")
    with pytest.raises(ImageError, match="no such image or folder"):
        detect(small_detector, tmp_path / "nothing.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_decide(picture, tmp_path):
    path = picture(tmp_path / "a.png")
    broken = EfficientAD("XS", channels=8, image_size=(64, 64))
    with pytest.raises(SettingsError, match="no threshold"):
        detect(broken, path, tmp_path / "out")
    broken.threshold = broken.pixel_threshold = 1.0
    broken.teacher_mean.fill_(float("nan"))
    with pytest.raises(SettingsError, match=r"a.png is not finite"):
        detect(broken, path, tmp_path / "out")


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_decides_nothing(small_detector, picture, tmp_path, monkeypatch, score):
    """An export computes it apart from the map, and whoever makes one can let it be anything."""
    inspect = small_detector.inspect
    bad = np.array([score], np.float32)
    monkeypatch.setattr(small_detector, "inspect", lambda images: inspect(images)._replace(score=bad))
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    for work in (detect, watch):
        with pytest.raises(SettingsError, match=r"the score of .*a\.png is not finite"):
            work(small_detector, tmp_path / "in", tmp_path / work.__name__)
    assert files(tmp_path / "detect") == ["scores.csv"] and not list((tmp_path / "watch").rglob("*.json"))


def test_a_full_disk_keeps_the_old_results(small_detector, picture, tmp_path, monkeypatch):
    path, out = picture(tmp_path / "a.png"), tmp_path / "out"
    detect(small_detector, path, out)
    before = {name: (out / name).read_bytes() for name in files(out)}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs.files.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        detect(small_detector, path, out)
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_a_name_that_is_too_long_for_results_is_left_out_and_the_rest_done(small_detector, picture, tmp_path, capsys):
    long = "b" * 236 + ".png"  # which a file may have, but not one that ends in .png.png
    for name in ("a.png", long, "c.png"):
        picture(tmp_path / "images" / name)
    table = detect(small_detector, tmp_path / "images", tmp_path / "out").set_index("file")
    assert table["error"][["a.png", "c.png"]].tolist() == ["", ""] and np.isnan(table["score"][long])
    assert re.search(r"cannot write .*bbb\.png\.png: File name too long. Shorten the name.$", table["error"][long])
    assert files(tmp_path / "out") == ["heatmaps/a.png.png", "heatmaps/c.png.png", "scores.csv"]
    assert f"left out: {table['error'][long]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RunError("the share is gone"), "the share is gone"),
        (SettingsError("diverged"), "diverged"),
        (TypeError("a fault of ours"), "a fault of ours"),
        (KeyboardInterrupt("at once"), "at once"),  # outside the main thread, where signals cannot wait
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, BaseException) else "",
)
def test_what_stops_it_keeps_the_scores_so_far(small_detector, picture, tmp_path, monkeypatch, error, says):
    for index in range(3):
        picture(tmp_path / "images" / f"{index}.png", seed=index)
    done = detection.detect_one

    def failing(detector, path, *rest):
        if path.name == "2.png":
            raise error
        return done(detector, path, *rest)

    monkeypatch.setattr(detection, "detect_one", failing)
    with pytest.raises(type(error), match=says):
        detect(small_detector, tmp_path / "images", tmp_path / "out")
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["0.png", "1.png"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: ...")])
def test_an_image_for_which_memory_is_short_is_left_out_and_the_rest_judged(
    small_detector, picture, tmp_path, monkeypatch, error
):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    judged, counts = detection.inspect_one, iter((1, 2))

    def short(*given):
        if next(counts) == 1:
            raise error
        return judged(*given)

    monkeypatch.setattr(detection, "inspect_one", short)
    table = detect(small_detector, tmp_path / "images", tmp_path / "out").set_index("file")
    assert "a.png: not enough memory for 80×96 pixels" in table["error"]["a.png"] and table["error"]["b.png"] == ""


def test_what_cannot_be_written_is_said_before_any_image_is_judged(small_detector, picture, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(detection, "detect_one", lambda *_: pytest.fail("judged"))
    with pytest.raises(RunError, match="cannot write"):
        detect(small_detector, picture(tmp_path / "a.png"), tmp_path / "out", heatmaps="none")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_it_finish_its_image(small_detector, picture, tmp_path, monkeypatch, number):
    for index in range(3):
        picture(tmp_path / "images" / f"{index}.png", seed=index)
    done = detection.detect_one

    def signalled(detector, path, *rest):
        if path.name == "1.png":
            os.kill(os.getpid(), number)
        return done(detector, path, *rest)

    monkeypatch.setattr(detection, "detect_one", signalled)
    with pytest.raises(KeyboardInterrupt, match="2 of 3 images are done"):
        detect(small_detector, tmp_path / "images", tmp_path / "out")
    assert files(tmp_path / "out") == ["heatmaps/0.png.png", "heatmaps/1.png.png", "scores.csv"]
    with open(tmp_path / "out" / "scores.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["0.png", "1.png"]


def test_no_figure_is_left_open(small_detector, picture, tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        detect(small_detector, picture(tmp_path / "a.png"), tmp_path / "out")
    assert plt.get_fignums() == before


def test_a_model_without_pixel_threshold_marks_nothing_and_says_how_to_get_one(small_detector, picture, tmp_path):
    old = copy.deepcopy(small_detector)
    old.pixel_threshold = None
    picture(tmp_path / "images" / "a.png")
    with pytest.raises(SettingsError, match=r"no pixel threshold.*effad threshold MODEL --normals"):
        detect(old, tmp_path / "images", tmp_path / "out", save_masks=True)
    with pytest.warns(UserWarning, match="no pixels are marked: .*effad threshold MODEL --normals"):
        table = detect(old, tmp_path / "images", tmp_path / "out")
    assert table["marked"].isna().all() and not (tmp_path / "out" / "masks").exists()


@pytest.mark.parametrize("size", [(64, 64), (150, 97), (40, 200), (30, 20), (65, 64)])
def test_maps_are_resized_as_torch_does_it(rng, size):
    heat = rng.standard_normal((64, 64)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(heat)[None, None], size, mode="bilinear")[0, 0].numpy()
    resized = detection.resize_map(heat, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, rtol=1e-4, atol=1e-5)
