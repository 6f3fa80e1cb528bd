"""Evaluation with a fake detector whose maps are the image's own colours, so that every number is known."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from scipy.integrate import trapezoid
from sklearn.metrics import f1_score, roc_auc_score

from effad_lib import metrics
from effad_lib.datasets import DatasetError, Sample, Saturation
from effad_lib.detector import AnomalyMaps
from effad_lib.evaluation import (
    EvaluationError,
    blind_scores,
    brightness_scores,
    evaluate,
    load_maps,
    tiff_files,
    unnormalised_scores,
    worst_mistakes,
)
from effad_lib.images import ImageError, read_image, read_mask


class Brightness(torch.nn.Module):
    """Red is the student-teacher map, green the autoencoder map, three times their mean the combined one."""

    def __init__(self, image_size=(64, 64), threshold=None, spoil=None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))
        self.image_size, self.threshold, self.spoil = image_size, threshold, spoil
        self.batches = []

    def forward(self, images):
        assert images.dtype == torch.float32 and images.max() <= 1
        assert not self.training and torch.is_inference_mode_enabled()
        self.batches.append(len(images))
        red, green = images[:, :1], images[:, 1:2]
        if self.spoil is not None:
            red = torch.where(red > self.spoil, torch.nan, red)
        return AnomalyMaps((red + green) / 2 * self.scale, red, green)


def write_sample(folder, name, level, defect="good", size=(64, 64), mask=True):
    """A dark image with one pixel of `level` (0..255), if defective also a square of it in a corner."""
    pixels = np.full((*size, 3), 20, np.uint8)
    pixels[-1, -1] = level
    truth = np.zeros(size, np.uint8)
    if defect != "good":
        pixels[: size[0] // 4, : size[1] // 4] = level
        truth[: size[0] // 4, : size[1] // 4] = 255
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if defect == "good" or not mask:
        return Sample(folder / f"{name}.png", None, int(defect != "good"), defect)
    Image.fromarray(truth).save(folder / f"{name}_mask.png")
    return Sample(folder / f"{name}.png", folder / f"{name}_mask.png", 1, defect)


@pytest.fixture
def samples(tmp_path):
    return (
        write_sample(tmp_path, "a", 50),
        write_sample(tmp_path, "b", 120, size=(96, 128)),
        write_sample(tmp_path, "c", 200, "dent"),
        write_sample(tmp_path, "d", 100, "dent", size=(96, 128)),
        write_sample(tmp_path, "e", 255, "hole"),
    )


def test_scores_maps_and_metrics(samples):
    detector = Brightness()
    found = evaluate(detector, samples, batch_size=2)
    assert detector.batches == [2, 2, 1] and detector.training
    assert found.samples == samples and found.skipped == () and found.notes == []
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.maps.combined.shape == (5, 64, 64) and found.maps.combined.dtype == np.float32
    assert found.scores[[0, 2, 4]] == pytest.approx(3 * np.array([50, 200, 255]) / 255)
    assert found.scores[4] > 1  # not clamped
    assert found.maps.student_teacher[2, 0, 0] == pytest.approx(200 / 255)
    result = found.metrics()
    image, pixel = ["image_auroc", "image_ap", "image_f1_max"], ["pixel_auroc", "pixel_ap", "pixel_f1_max"]
    assert list(result) == [*image, *pixel, "au_pro", "au_pro_05"]
    assert result["image_auroc"] == pytest.approx(roc_auc_score(found.labels, found.scores))
    truth = np.concatenate([found.mask(i).ravel() for i in range(5)])
    heat = np.concatenate([found.heat(i).ravel() for i in range(5)])
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, heat))
    both = [[get(i) for i in range(5)] for get in (found.heat, found.mask)]
    alone = metrics.sweep(*both)
    assert result["au_pro"] == alone.au_pro(0.3) and result["au_pro_05"] == alone.au_pro(0.05) < result["au_pro"]
    assert result["pixel_ap"] == alone.ap and result["pixel_f1_max"] == alone.f1_max[0]


def test_maps_and_masks_are_compared_at_the_original_size(samples):
    found = evaluate(Brightness(), samples)
    assert found.sizes[1] == (96, 128)
    assert found.heat(3).shape == found.mask(3).shape == (96, 128)
    assert found.mask(3)[:24, :32].all() and found.mask(3).sum() == 24 * 32
    assert found.mask(1).shape == (96, 128) and not found.mask(1).any()
    # Bilinear, pixel centres aligned at half: far from edges the square keeps its value and its place.
    assert found.heat(3)[:20, :27] == pytest.approx(3 * 100 / 255)
    assert found.heat(3)[28:90, 37:120] == pytest.approx(3 * 20 / 255)
    assert np.array_equal(found.heat(0), found.maps.combined[0])


def test_rectangular_detector(samples):
    assert evaluate(Brightness((64, 96)), samples).maps.combined.shape == (5, 64, 96)


def test_by_defect(samples):
    table = evaluate(Brightness(threshold=1.2), samples).by_defect()
    assert table.index.tolist() == ["dent", "hole"]
    assert table["images"].tolist() == [2, 1]
    assert table["misses"].tolist() == [1, 0]
    assert table.loc["hole", "image_auroc"] == 1 and table.loc["hole", "au_pro"] == pytest.approx(1, abs=1e-3)
    assert table.loc["dent", "mean_score"] == pytest.approx(3 * 150 / 255)
    assert evaluate(Brightness(), samples).by_defect()["misses"].isna().all()


def test_a_missing_mask_leaves_out_the_pixel_metrics(samples, tmp_path):
    found = evaluate(Brightness(), (*samples, write_sample(tmp_path, "f", 180, "hole", mask=False)))
    result = found.metrics()
    assert result["pixel_auroc"] is None and result["au_pro"] is None and result["image_auroc"] is not None
    assert found.mask(5) is None
    assert found.notes == ["1 defective images have no mask: no pixel AU-ROC, AP, F1-max and AU-PRO."]
    table = found.by_defect()
    assert np.isnan(table.loc["hole", "au_pro"]) and table.loc["dent", "au_pro"] > 0


def test_only_good_or_only_defective_images(samples):
    good = evaluate(Brightness(), samples[:2])
    assert set(good.metrics().values()) == {None}
    assert any("No defective image among 2" in note for note in good.notes)
    assert len(good.by_defect()) == 0
    bad = evaluate(Brightness(), samples[2:])
    assert bad.metrics()["image_auroc"] is None and bad.metrics()["au_pro"] > 0.5
    assert bad.notes == ["No good image among 3: no image AU-ROC, AP and F1-max."]


def test_masks_without_a_defective_or_a_normal_pixel_are_told(samples):
    for level, kind in ((1, "normal"), (255, "defective")):  # 254 is the highest value of the mask, 1 its lowest
        pixels = np.full((64, 64), 1, np.uint8)
        pixels[:4] = 254
        Image.fromarray(pixels).save(samples[2].mask)
        found = evaluate(Brightness(), [replace(samples[2], mask_level=level)])
        assert found.metrics()["au_pro"] is None
        assert found.notes[-1] == f"No {kind} pixel: no pixel AU-ROC, AP, F1-max and AU-PRO."


def test_each_defect_is_judged_as_if_there_were_no_others(samples):
    table = evaluate(Brightness(), samples).by_defect()
    for defect, index in (("dent", [0, 1, 2, 3]), ("hole", [0, 1, 4])):
        alone = evaluate(Brightness(), [samples[k] for k in index]).metrics()
        assert table.loc[defect, ["image_auroc", "au_pro"]].tolist() == [alone["image_auroc"], alone["au_pro"]]


def test_decisions_count_what_lies_above_each_threshold(samples):
    samples = (write_sample(samples[0].image.parent, "loud", 130), *samples[:1], *samples[2:])
    detector = Brightness(threshold=1.3)
    detector.pixel_threshold = 1.25
    found = evaluate(detector, samples)  # good 130 and 50, dents 200 and 100, hole 255; times 3 / 255
    assert found.confusion().to_numpy().tolist() == [[1, 1], [1, 2]]
    table = found.decisions()
    assert table.index.tolist() == ["image", "pixel", "image, F1-max", "pixel, F1-max"]
    assert table.loc["image"].tolist() == pytest.approx([1.3, 1 / 2, 2 / 3, 2 / 3])
    heat = np.concatenate([found.heat(k).ravel() for k in range(5)]) > 1.25
    truth = np.concatenate([found.mask(k).ravel() for k in range(5)])
    expected = [1.25, heat[~truth].mean(), heat[truth].mean(), f1_score(truth, heat)]
    assert table.loc["pixel"].tolist() == pytest.approx(expected)
    for kind in ("image", "pixel"):
        assert table.loc[f"{kind}, F1-max", "f1"] == pytest.approx(found.metrics()[f"{kind}_f1_max"])
    undecided = evaluate(Brightness(), samples)
    assert undecided.decisions().loc[["image", "pixel"]].isna().all(axis=None) and not len(undecided.confusion())
    good, bad = evaluate(detector, samples[:2]).decisions(), evaluate(detector, samples[2:]).decisions()
    assert good.loc["image", "false_alarms"] == 0.5 and 0 < good.loc["pixel", "false_alarms"] < 1
    assert bad.loc["image", "found"] == pytest.approx(2 / 3) and np.isnan(bad.loc["image", "false_alarms"])
    assert good[["found", "f1"]].isna().all(axis=None) and np.isnan(bad.loc["image", "f1"])


def write_regions(folder, values, size=(64, 64)):
    """A folder of masks, one for each region: in a row, 16 × 8 pixels each, of these pixel values."""
    folder.mkdir()
    for index, value in enumerate(values):
        mask = np.zeros(size, np.uint8)
        mask[:16, 8 * index : 8 * index + 8] = value
        Image.fromarray(mask).save(folder / f"{index:03d}.png")
    return folder


def official_spro(heats, regions, limit):
    """MVTec LOCO's rule, threshold by threshold, on the good images and those of one kind: areas are added up.

    heats: maps of these images; regions: for each its list of (mask, pixels that saturate it), empty for a good one.
    """
    points = [(0.0, 0.0)]
    for threshold in sorted({value for heat in heats for value in heat.ravel()}, reverse=True):
        false, true, spros = 0, 0, []
        for heat, defects in zip(heats, regions, strict=True):
            found, good = heat >= threshold, np.ones(heat.shape, bool)
            for mask, saturation in defects:
                spros.append(min((found & mask).sum() / saturation, 1.0))
                good &= ~mask
            false, true = false + (found & good).sum(), true + (~found & good).sum()
        points.append((false / (false + true), np.mean(spros)))
    fpr, spro = np.array(points).T
    x, y = np.append(fpr[fpr <= limit], limit), np.append(spro[fpr <= limit], np.interp(limit, fpr, spro))
    return trapezoid(y, x) / limit


def test_saturation_makes_the_metrics_of_mvtec_loco(samples, tmp_path):
    logical = write_sample(tmp_path, "f", 20, "logical_anomalies", mask=False)
    structural = write_sample(tmp_path, "g", 240, "structural_anomalies", mask=False)
    noise = np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(logical.image)  # false positives that are none for the other kind
    logical = replace(logical, mask=write_regions(tmp_path / "f", [255, 254]), mask_level=1)
    structural = replace(structural, mask=write_regions(tmp_path / "g", [255]), mask_level=1)
    saturation = {255: Saturation("screw", 0.5, True), 254: Saturation("nut", 40, False)}
    found = evaluate(Brightness(), [*samples[:2], logical, structural], saturation=saturation)
    assert found.mask(2).sum() == 2 * 128 and found.mask(3).sum() == 128
    result = found.metrics()
    kinds = ["logical", "structural", "mean"]
    assert list(result)[8:] == ["au_spro_05", *[f"{m}_{k}" for m in ("image_auroc", "au_spro_05") for k in kinds]]
    files = [[], [], [("f/000.png", 64), ("f/001.png", 40)], [("g/000.png", 64)]]
    regions = [[(read_mask(tmp_path / name, (64, 64), 1), count) for name, count in some] for some in files]
    official = {
        kind: official_spro([found.heat(k) for k in images], [regions[k] for k in images], 0.05)
        for kind, images in {"_logical": (0, 1, 2), "_structural": (0, 1, 3), "": range(4)}.items()
    }
    assert {kind: result[f"au_spro_05{kind}"] for kind in official} == pytest.approx(official)
    assert result["au_spro_05_mean"] == pytest.approx((official["_logical"] + official["_structural"]) / 2)
    assert found.by_defect()["au_spro_05"].tolist() == pytest.approx([official["_logical"], official["_structural"]])
    assert result["image_auroc_logical"] == roc_auc_score([0, 0, 1], found.scores[:3])
    assert result["image_auroc_mean"] == np.mean([result["image_auroc_logical"], result["image_auroc_structural"]])
    assert found.notes == []
    alone = evaluate(Brightness(), [*samples[:2], logical], saturation=saturation)
    assert alone.metrics()["au_spro_05_logical"] == result["au_spro_05_logical"]
    assert alone.metrics()["au_spro_05_mean"] is alone.metrics()["image_auroc_mean"] is None
    assert alone.notes == ["No structural_anomalies among the images: no means over the two kinds."]
    with pytest.raises(DatasetError, match=r"f: pixel value 254 has no saturation threshold, only 255"):
        evaluate(Brightness(), [*samples[:2], logical], saturation={255: saturation[255]}).metrics()


def test_maps_are_written_where_the_evaluation_code_of_mvtec_reads_them(samples, tmp_path):
    (tmp_path / "set" / "test" / "dent").mkdir(parents=True)
    inside = write_sample(tmp_path / "set" / "test" / "dent", "000", 200, "dent", size=(80, 72))
    found = evaluate(Brightness(), [inside, samples[0]])
    found.save_tiffs(tmp_path / "maps")
    written = tifffile.imread(tmp_path / "maps" / "test" / "dent" / "000.tiff")
    assert written.dtype == np.float32 and np.array_equal(written, found.heat(0)) and written.shape == (80, 72)
    assert (tmp_path / "maps" / "test" / "good" / "a.tiff").is_file()
    with pytest.raises(EvaluationError, match=r"2 images would have their map in test/good/a\.tiff"):
        evaluate(Brightness(), [samples[0], samples[0]]).save_tiffs(tmp_path / "twice")
    before = inside.image.read_bytes()
    with pytest.raises(EvaluationError, match=f"{tmp_path}/set/test holds the images themselves"):
        evaluate(Brightness(), [inside]).save_tiffs(tmp_path / "set")
    assert not list((tmp_path / "set").rglob("*.tiff")) and inside.image.read_bytes() == before


@pytest.mark.parametrize(
    ("image", "defect", "place"),
    [
        ("/data/screw/test/dent/a/0.png", "dent", "test/dent/a/0.tiff"),
        ("/test/can/test_public/bad/0.png", "bad", "test_public/bad/0.tiff"),
        ("/test/screw/test/test/0.png", "test", "test/test/0.tiff"),  # above the data set, and the defect
        ("/test/test/good/0.png", "good", "test/good/0.tiff"),
        ("/test/mine/broken/0.png", "dent", "test/dent/0.tiff"),
        ("/test/01/test/ok/0.bmp", "good", "test/good/0.tiff"),  # BTAD
    ],
)
def test_a_map_keeps_its_path_below_the_test_folder_whatever_else_is_called_test(image, defect, place):
    assert tiff_files([Sample(Path(image), None, int(defect != "good"), defect)], "maps") == [Path("maps") / place]


def test_unreadable_images_are_reported_and_skipped(samples, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = Sample(tmp_path / "broken.png", None, 1, "dent")
    with pytest.warns(UserWarning, match=r"1 images skipped: .*broken\.png"):
        found = evaluate(Brightness(), (samples[0], broken, *samples[1:]))
    assert found.samples == samples and len(found.scores) == 5
    assert "broken.png" in found.skipped[0] and found.notes == ["1 unreadable images were skipped."]
    assert found.metrics() == evaluate(Brightness(), samples).metrics()
    with pytest.raises(ValueError, match=r"nothing to evaluate: none of 1 can be read.*broken\.png"):
        evaluate(Brightness(), [broken])
    with pytest.raises(ValueError, match="nothing to evaluate: no samples"):
        evaluate(Brightness(), [])


def test_a_wrong_mask_stops_before_the_first_image_is_scored(samples, tmp_path):
    detector = Brightness()
    wrong = Sample(samples[2].image, samples[3].mask, 1, "dent")
    with pytest.raises(ImageError, match=r"d_mask\.png"):
        evaluate(detector, (*samples, wrong))
    assert detector.batches == []


def test_a_map_with_nan_names_the_image(samples):
    with pytest.raises(ValueError, match=r"e\.png.*NaN"):
        evaluate(Brightness(spoil=0.9), samples)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(Brightness(), samples, batch_size=0)


def test_save_and_load(samples, tmp_path):
    found = evaluate(Brightness(threshold=1.2), samples)
    found.save(tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    branches = ["student_teacher", "student_autoencoder"]
    assert table.columns.tolist() == ["file", "label", "defect", "score", "decision", *branches]
    for name in branches:
        assert table[name].to_numpy() == pytest.approx(getattr(found.maps, name).max(axis=(1, 2)))
    assert table["decision"].tolist() == [0, 0, 1, 0, 1]
    assert np.array_equal(table["score"], found.scores)  # written without rounding
    assert table["file"][4].endswith("e.png")
    assert sorted(path.name for path in (tmp_path / "out" / "maps").iterdir()) == [f"{k:05d}.npz" for k in range(5)]
    for index in range(5):
        maps = load_maps(tmp_path / "out", index)
        assert maps.combined == pytest.approx(found.maps.combined[index], rel=1e-3)
        assert maps.student_autoencoder == pytest.approx(found.maps.student_autoencoder[index], rel=1e-3)
    evaluate(Brightness(), samples).save(tmp_path / "undecided")
    assert pd.read_csv(tmp_path / "undecided" / "scores.csv")["decision"].isna().all()


def test_worst_mistakes():
    scores = np.array([0.1, 0.9, 0.4, 0.2, 0.5, 0.7])
    labels = np.array([1, 0, 1, 0, 1, 0])
    misses, false_alarms = worst_mistakes(scores, labels, threshold=0.5)
    assert misses.tolist() == [0, 2, 4] and false_alarms.tolist() == [1, 5]
    misses, false_alarms = worst_mistakes(scores, labels, threshold=0.7, count=1)
    assert misses.tolist() == [0] and false_alarms.tolist() == [1]


def test_each_branch_is_judged_by_the_maxima_of_its_own_map(samples):
    found = evaluate(Brightness(), samples)  # good, good, dent, dent, hole
    for name, maxima in (("student_teacher", (2, 4, 3, 5, 1)), ("student_autoencoder", (1, 2, 3, 4, 5))):
        values = getattr(found.maps, name)
        values[:] = 0
        values[np.arange(5), [3, 60, 7, 20, 33], 40] = maxima
    table = found.by_branch()
    assert table.columns.tolist() == ["combined", "student_teacher", "student_autoencoder"]
    assert table.index.tolist() == ["dent", "hole", "all"]
    assert table["student_teacher"].tolist() == pytest.approx([0.75, 0, 0.5])
    assert table["student_autoencoder"].tolist() == [1, 1, 1]
    assert table.loc["all", "combined"] == found.metrics()["image_auroc"]


def test_pro_curve_is_the_one_that_au_pro_measures(samples, tmp_path):
    found = evaluate(Brightness(), samples)
    fpr, overlap = found.pro_curve()
    inside = fpr <= 0.3
    x, y = np.append(fpr[inside], 0.3), np.append(overlap[inside], np.interp(0.3, fpr, overlap))
    assert trapezoid(y, x) / 0.3 == pytest.approx(found.metrics()["au_pro"])
    unmasked = (*samples, write_sample(tmp_path, "f", 180, "hole", mask=False))
    assert evaluate(Brightness(), unmasked).pro_curve() is None


def test_brightness_counts_deviations_from_the_normal_images(tmp_path):
    grey = {name: tmp_path / f"{name}.png" for name in (90, 110, 130, 70)}
    for level, path in grey.items():
        Image.new("RGB", (70, 80), (level, level, level)).save(path)
    normal = [Sample(grey[90], None, 0, "good"), Sample(grey[110], None, 0, "good")]
    tested = [Sample(grey[130], None, 1, "x"), Sample(grey[70], None, 1, "x"), normal[0]]
    assert brightness_scores(tested, normal) == pytest.approx([3, 3, 1])
    assert np.isfinite(brightness_scores(tested, normal[:1])).all()  # no deviation to divide by


def test_a_blind_student_answers_with_the_teachers_mean(small_detector, samples):
    blind = copy.deepcopy(small_detector)
    with torch.no_grad():
        for weight in blind.student.parameters():
            weight.zero_()
    images = np.stack([read_image(sample.image, blind.image_size) for sample in samples])
    with torch.inference_mode():
        expected = blind.raw_maps(torch.from_numpy(images) / 255)[0].flatten(1).max(dim=1).values
    assert blind_scores(small_detector, samples, batch_size=2) == pytest.approx(expected.numpy(), rel=1e-4)


def test_without_quantiles_the_raw_maps_are_averaged(small_detector, samples):
    detector = copy.deepcopy(small_detector)
    detector.quantiles.copy_(torch.tensor([[0.1, 0.3], [0.2, 0.9]]))
    found = evaluate(detector, samples[::2])
    images = torch.stack([torch.from_numpy(read_image(sample.image, (64, 64))) for sample in samples[::2]]) / 255
    detector.quantiles.copy_(torch.tensor([[0.0, 0.1], [0.0, 0.1]]))  # leaves the raw maps as they are
    with torch.inference_mode():
        expected = detector(images).score
    detector.quantiles.copy_(torch.tensor([[0.1, 0.3], [0.2, 0.9]]))
    assert unnormalised_scores(detector, found) == pytest.approx(expected.numpy(), rel=1e-4)
    assert found.scores != pytest.approx(expected.numpy(), rel=1e-2)
