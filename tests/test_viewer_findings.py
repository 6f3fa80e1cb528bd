"""What there is to look at: a run, a folder of images, a folder of maps; and what is broken is named, not fatal."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from effad_lib.datasets import DatasetError
from effad_lib.detector import EfficientAD
from effad_lib.evaluation import MAP_NAMES, load_maps
from effad_lib.images import ImageError, read_image, read_mask, to_float
from effad_lib.runs import RunError
from effad_lib.settings import SettingsError
from effad_lib.viewer import State, of_images, of_maps, of_run
from effad_lib.viewer.findings import UNKNOWN
from effad_lib.viewer.rendering import Layers, panel


def shown(findings):
    return [sample.image.name for sample in findings.samples]


def test_a_run_tells_what_its_evaluation_found(evaluated_run):
    findings = of_run(evaluated_run)
    table, detector = pd.read_csv(evaluated_run / "scores.csv"), EfficientAD.load(evaluated_run / "model.safetensors")
    assert findings.names == table["file"].tolist() and len(findings) == 6 and findings.title == "folder/data"
    assert findings.labels.tolist() == table["label"].tolist() == [1, 1, 0, 0, 0, 1]
    assert findings.defects == ["dent", "dent", "good", "good", "good", "hole"]
    assert np.array_equal(findings.scores, table["score"])
    assert np.array_equal(findings.branches, table[["student_teacher", "student_autoencoder"]])
    assert findings.threshold == detector.threshold and findings.pixel_threshold == detector.pixel_threshold
    assert findings.scale == (0, 0.2) and findings.waiting == [] and findings.has_branches
    assert findings.rule == "score 3 of 3 held-out normal images, from the lowest: one false alarm in 4 is expected"
    findings.calibration = findings.calibration | {"tile_overlap": 40}
    assert findings.rule.startswith("score 3 of 3 held-out normal images in tiles, from the lowest: ")
    assert findings.notes == evaluated_run / "notes.csv" and not findings.notes.exists()


def test_a_picture_has_image_truth_and_the_maps_of_its_row(evaluated_run):
    findings = of_run(evaluated_run)
    for index in (2, 5):
        sample, picture = findings.samples[index], findings.picture(index)
        assert np.array_equal(picture.image, np.asarray(Image.open(sample.image)))
        assert picture.truth.dtype == bool and picture.truth.shape == (80, 96)
        for name in MAP_NAMES:
            assert np.array_equal(picture.maps[name], getattr(load_maps(evaluated_run, index), name))
        assert picture.maps["combined"].max() == pytest.approx(findings.scores[index], rel=1e-3)
    assert np.array_equal(picture.truth, read_mask(sample.mask)) and picture.truth.sum() == 20 * 30
    assert not findings.picture(2).truth.any()


def test_a_defective_image_without_a_mask_has_no_truth(run):
    shutil.rmtree(run.with_name("data") / "ground_truth")
    findings = of_run(run)
    assert findings.labels[0] == 1 and findings.picture(0).truth is None and not findings.picture(2).truth.any()


def test_the_rule_says_what_the_threshold_was_chosen_from(evaluated_run):
    findings = of_run(evaluated_run)
    findings.calibration = {"rank": 399, "normals": 400, "false_alarm_rate": 0.01, "confidence": 0.95}
    assert findings.rule.endswith("at most 1 % false alarms, with 95 % confidence") and "399 of 400" in findings.rule
    findings.calibration = {"normals": 3}
    assert "does not say" in findings.rule
    findings.threshold = None
    assert findings.rule == ""


def test_a_run_that_is_not_evaluated_or_by_another_version_is_refused_with_the_remedy(run):
    (run / "metrics.json").rename(run / "away")
    with pytest.raises(RunError, match=rf"{run} holds no finished evaluation\. Measure it: effad evaluate"):
        of_run(run)
    (run / "away").rename(run / "metrics.json")
    table = pd.read_csv(run / "scores.csv")
    (run / "scores.csv").unlink()
    with pytest.raises(RunError, match="holds no finished evaluation"):
        of_run(run)
    table.drop(columns=["student_teacher"]).to_csv(run / "scores.csv", index=False)
    with pytest.raises(RunError, match=r"scores\.csv: columns file, .*another version.*effad evaluate"):
        of_run(run)


def test_maps_are_not_shown_for_another_image_when_somebody_has_sorted_the_scores(run):
    table = pd.read_csv(run / "scores.csv")
    table.sort_values("score", ascending=False).to_csv(run / "scores.csv", index=False)
    findings = of_run(run)
    moved = next(k for k, name in enumerate(findings.names) if name != table["file"][k])
    with pytest.raises(ImageError, match=r"not those of its score: .*scores\.csv was changed since\. Measure it"):
        findings.picture(moved)


def test_images_that_are_gone_are_named(run):
    (run.with_name("data") / "test" / "good" / "1.png").unlink()
    with pytest.raises(RunError, match=r"1 of its images are not in folder/data any more, .*good/1\.png\. Measure it"):
        of_run(run)
    shutil.rmtree(run.with_name("data"))
    with pytest.raises(DatasetError, match="no folder at root"):
        of_run(run)


BROKEN = {"missing": None, "text": b"no maps", "empty": b"", "cut off": b"", "without a map": {"combined": np.eye(4)}}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_maps_of_a_run_name_the_image_and_spare_the_others(run, kind):
    file, content = run / "maps" / "00001.npz", BROKEN[kind]
    if content is None:
        file.unlink()
    elif isinstance(content, dict):
        np.savez(file, **content)
    else:
        file.write_bytes(file.read_bytes()[:900] if kind == "cut off" else content)
    findings = of_run(run)
    assert findings.picture(0).image.shape == (80, 96, 3)
    with pytest.raises(ImageError, match=r"the maps of .*dent/1\.png cannot be read .*effad evaluate"):
        findings.picture(1)


def test_a_further_image_is_scored_and_stands_at_the_end(evaluated_run, picture, tmp_path):
    findings = of_run(evaluated_run)
    path = picture(tmp_path / "mine.jpg", seed=3)
    assert findings.add(path, "mine.jpg") == 6
    image = to_float(torch.from_numpy(read_image(path, (64, 64)))[None].contiguous())
    with torch.inference_mode():
        expected = findings.detector(image)
    assert findings.scores[6] == pytest.approx(float(expected.score), rel=1e-5) and len(findings) == 7
    assert findings.branches[6, 1] == pytest.approx(float(expected.student_autoencoder.max()), rel=1e-5)
    assert findings.labels[6] == UNKNOWN and findings.defects[6] == "" and findings.names[6] == "mine.jpg"
    added = findings.picture(6)
    assert added.truth is None and np.array_equal(added.maps["combined"], expected.combined[0, 0].numpy())
    assert findings.picture(5).truth.any()  # the others keep their maps
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"mine\.jpg"):
        findings.add(path, "again")
    sizes = {len(part) for part in (findings, findings.names, findings.labels, findings.scores, findings.branches)}
    assert sizes == {7}


def test_images_wait_for_their_score_and_one_broken_stops_nothing(model, small_detector, picture, tmp_path):
    images = picture(tmp_path / "images" / "a.png", seed=1).parent
    (images / "b.png").write_bytes(b"no image")
    picture(images / "deep" / "c.png", seed=2)
    findings = of_images(model, images)
    assert shown(findings) == ["a.png", "b.png", "c.png"] and findings.waiting == [0, 1, 2]
    assert findings.labels.tolist() == [UNKNOWN] * 3 and findings.defects == [""] * 3
    for index in findings.waiting:
        findings.score(index)
    assert findings.waiting == [] and np.isnan(findings.scores[1]) and list(findings.errors) == [1]
    assert "b.png" in findings.errors[1] and np.isfinite(findings.branches[[0, 2]]).all()
    with torch.inference_mode():
        expected = small_detector(to_float(torch.from_numpy(read_image(images / "deep" / "c.png", (64, 64)))[None]))
    assert findings.scores[2] == pytest.approx(float(expected.score), rel=1e-5)
    assert findings.picture(0).truth is None and findings.notes == model.with_name("notes.csv")
    with pytest.raises(ImageError, match=r"b\.png"):
        findings.picture(1)


def test_folders_tell_the_truth_if_one_is_called_good(model, picture, tmp_path):
    for name in ("good/0.png", "crack/0.png", "good/1.png", "loose.png"):
        picture(tmp_path / "set" / name)
    findings = of_images(model, tmp_path / "set")
    assert findings.defects == ["crack", "good", "good", ""] and findings.labels.tolist() == [1, 0, 0, UNKNOWN]
    assert findings.picture(0).truth is None and not findings.picture(1).truth.any()
    shutil.rmtree(tmp_path / "set" / "good")
    assert of_images(model, tmp_path / "set").labels.tolist() == [UNKNOWN] * 2


@pytest.mark.parametrize("sorted_by_truth", [True, False])
def test_masks_tell_the_truth_of_their_images(model, picture, tmp_path, sorted_by_truth):
    for name in ("good/0.png", "crack/0.jpg") if sorted_by_truth else ("1/0.png", "crack/0.jpg"):
        picture(tmp_path / "set" / name)
    truth = np.zeros((80, 96), np.uint8)
    truth[5:10, 20:40] = 255
    (tmp_path / "masks" / "crack").mkdir(parents=True)
    Image.fromarray(truth).save(tmp_path / "masks" / "crack" / "0_mask.png")
    findings = of_images(model, tmp_path / "set", tmp_path / "masks")
    crack = shown(findings).index("0.jpg")
    assert findings.labels[crack] == 1 and findings.labels[1 - crack] == (0 if sorted_by_truth else UNKNOWN)
    assert findings.defects[crack] == ("crack" if sorted_by_truth else "defective")
    assert np.array_equal(findings.picture(crack).truth, truth > 0)


def test_no_images_and_no_model_are_errors(model, picture, tmp_path):
    with pytest.raises(ImageError, match="no image below this folder"):
        of_images(model, tmp_path)
    with pytest.raises(SettingsError, match="not a whole effad model"):
        of_images(picture(tmp_path / "a.png"), tmp_path)


@pytest.fixture
def mapped(picture, tmp_path):
    """A folder of three images, and one of their maps, a name of each kind, with 0 and 1, 2 and 4 as extremes."""
    heats = {}
    for k, (name, file) in enumerate((("a.jpg", "a.jpg.npy"), ("sub/b.png", "sub/b.npy"), ("sub/c.png", "sub/c.tiff"))):
        picture(tmp_path / "images" / name, seed=k)
        heat = np.zeros((10 + k, 12), np.float32)
        heat[k, 5] = heats[name] = 2.0**k
        (tmp_path / "maps" / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".npy"):
            np.save(tmp_path / "maps" / file, heat)
        else:
            Image.fromarray(heat).save(tmp_path / "maps" / file)
    return tmp_path / "maps", tmp_path / "images"


def test_maps_of_any_method_are_seen_beside_their_images(mapped):
    findings = of_maps(*mapped)
    assert shown(findings) == ["a.jpg", "b.png", "c.png"] and findings.scores.tolist() == [1, 2, 4]
    for index, place in enumerate([(0, 5), (1, 5), (2, 5)]):
        maps = findings.picture(index).maps
        assert list(maps) == ["combined"] and maps["combined"].dtype == np.float32
        assert np.unravel_index(maps["combined"].argmax(), maps["combined"].shape) == place
    assert findings.threshold is None and findings.rule == "" and not findings.has_branches
    assert findings.scale == (0, pytest.approx(np.quantile([1, 2, 4], 0.99)))
    assert np.isnan(findings.branches).all() and findings.waiting == []
    assert findings.notes == mapped[0] / "notes.csv"
    with pytest.raises(RunError, match="only maps are at hand"):
        findings.add(mapped[1] / "a.jpg", "a.jpg")


def test_the_full_name_goes_before_the_stem_and_all_numbers_are_taken(mapped):
    maps, images = mapped
    np.save(maps / "a.npy", np.full((4, 4), 9.0))
    np.save(maps / "sub" / "b.npy", np.full((1, 4, 6, 1), 7, np.int64))
    findings = of_maps(maps, images)
    assert findings.scores.tolist() == [1, 7, 4] and findings.maps(1)["combined"].shape == (4, 6)


def test_the_scale_of_maps_is_that_of_a_model_or_holds_even_constant_ones(mapped, model, small_detector):
    (maps, images), own = mapped, small_detector
    findings = of_maps(maps, images, model=model)
    assert (findings.threshold, findings.pixel_threshold) == (own.threshold, own.pixel_threshold)
    assert findings.scale == (0, 2 * max(own.threshold, 0.1)) and findings.scores.tolist() == [1, 2, 4]
    for value in (-2.0, 1e30, -1e30, 2**62):
        for file in ("a.jpg.npy", "sub/b.npy", "sub/c.npy"):
            np.save(maps / file, np.full((4, 4), value))
        findings = of_maps(maps, images)
        assert np.float32(findings.scale[0]) == np.float32(value) < np.float32(findings.scale[1])
        for scaling in ("run", "image"):
            seen = State(map="combined", scaling=scaling)
            assert panel("heatmap", Layers(findings.picture(0), seen), seen, findings.scale).size


def test_images_without_a_map_are_left_out_with_a_warning(mapped, picture):
    maps, images = mapped
    (maps / "sub" / "b.npy").unlink()
    with pytest.warns(UserWarning, match="1 of 3 images have no map and are left out"):
        findings = of_maps(maps, images)
    assert shown(findings) == ["a.jpg", "c.png"] and findings.maps(1)["combined"].max() == 4
    shutil.rmtree(maps / "sub")
    (maps / "a.jpg.npy").unlink()
    with pytest.raises(ImageError, match=r"no map of any of 3 images\. That of a\.jpg would be a\.jpg\.npy"):
        of_maps(maps, images)


def test_links_that_lead_out_of_the_folder_are_no_maps(mapped, tmp_path):
    maps, images = mapped
    (maps / "a.jpg.npy").symlink_to((maps / "a.jpg.npy").rename(tmp_path / "secret.npy"))
    with pytest.warns(UserWarning, match="1 of 3 images have no map"):
        assert shown(of_maps(maps, images)) == ["b.png", "c.png"]


REFUSED = {
    "NaN": (np.full((4, 4), np.nan), "holds NaN or infinite"),
    "infinite": (np.full((4, 4), 1e300), "holds NaN or infinite"),
    "three dimensions": (np.zeros((4, 4, 3)), r"float64 \(4, 4, 3\) is no anomaly map"),
    "one value": (np.zeros((1, 1)), "is no anomaly map"),
    "complex numbers": (np.zeros((4, 4), complex), "complex128 .* is no anomaly map"),
    "text": (b"0.1, 0.2\n", "cannot be read as an anomaly map"),
    "a pickle": (pickle.dumps(np.zeros((4, 4))), "cannot be read as an anomaly map"),
    "objects": (np.array([[{}, 1], [2, 3]], dtype=object), "cannot be read as an anomaly map"),
    "an empty file": (b"", "cannot be read as an anomaly map"),
    "no values": (np.zeros((0, 4)), "is no anomaly map"),
    "an archive": (np.zeros((4, 4)), "one array of numbers"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_map_is_refused_by_name(mapped, kind):
    (maps, images), (content, message) = mapped, REFUSED[kind]
    with open(maps / "sub" / "b.npy", "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content) if kind != "an archive" else np.savez(file, combined=content)
    with pytest.raises(ImageError, match=rf"b\.npy.*{message}"):
        of_maps(maps, images)
    np.save(maps / "sub" / "b.npy", np.eye(4))
    findings = of_maps(maps, images)
    (maps / "sub" / "c.tiff").write_bytes(b"broken since")
    with pytest.raises(ImageError, match=r"c\.tiff: cannot be read as an anomaly map"):
        findings.picture(2)
    assert findings.picture(1).maps["combined"].max() == 1
