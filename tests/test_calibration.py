"""Decision thresholds: order statistics of held-out normal images, chosen, stored and chosen again."""

import json
from math import comb

import numpy as np
import pytest
import torch

from effad_lib.calibration import MARKED, calibrate, choose_thresholds, measure_normals, rank
from effad_lib.cli import main
from effad_lib.detector import EfficientAD
from effad_lib.runs import RunError
from effad_lib.settings import SettingsError


def kept(normals, place, rate):
    """Probability that the score at this place is exceeded by at most this share of all: a sum over what lies below."""
    return sum(comb(normals, k) * (1 - rate) ** k * rate ** (normals - k) for k in range(place))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_rank_is_the_lowest_that_keeps_the_promise(rate, confidence):
    for normals in (30, 59, 299, 500):
        if kept(normals, normals, rate) < confidence:
            with pytest.raises(SettingsError, match=f"needs .* there are {normals}"):
                rank(normals, rate, confidence)
            continue
        place = rank(normals, rate, confidence)
        assert kept(normals, place, rate) >= confidence
        assert place == 1 or kept(normals, place - 1, rate) < confidence


def test_the_error_says_how_many_normal_images_the_wish_needs():
    for rate, needed in ((0.05, 59), (0.01, 299), (0.1, 29)):  # the textbook's figures for 95 %
        with pytest.raises(SettingsError, match=rf"needs {needed} held-out .*there are {needed - 1}\."):
            rank(needed - 1, rate, 0.95)
        assert rank(needed, rate, 0.95) == needed
    assert rank(7, 0.0, 0.95) == 7
    for rate, confidence, name in (
        (1.0, 0.9, "false_alarm_rate = 1.0"),
        (-0.1, 0.9, "false"),
        (0.1, 1.0, "confidence = 1"),
    ):
        with pytest.raises(SettingsError, match=name):
            rank(100, rate, confidence)


def test_the_promise_holds_for_drawn_scores():
    rng, normals, rate, confidence = np.random.default_rng(0), 100, 0.1, 0.9
    place = rank(normals, rate, confidence)
    scores = np.sort(rng.random((4000, normals)), axis=1)[:, place - 1]  # of a uniform score 1 - t lies above t
    held = np.mean(1 - scores <= rate)
    assert held == pytest.approx(kept(normals, place, rate), abs=0.02) and held >= confidence - 0.01


def detector_and_images(count=30):
    torch.manual_seed(1)
    detector = EfficientAD("XS", channels=8, image_size=(64, 64))
    return detector, torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8)


def test_thresholds_are_the_scores_at_the_rank_and_can_be_chosen_again(tmp_path):
    detector, images = detector_and_images()
    calibrate(detector, images, batch_size=7)
    with torch.inference_mode():
        maps = detector(images / 255).combined[:, 0].numpy()
    scores = np.sort(maps.max(axis=(1, 2)))
    assert detector.calibration["scores"] == pytest.approx(scores, abs=1e-4)
    assert detector.threshold == detector.calibration["scores"][-1]
    # At most the share MARKED of a normal image is above its own value, and the threshold is the largest of these.
    assert ((maps > detector.pixel_threshold + 1e-5).mean(axis=(1, 2)) <= MARKED).all()
    assert ((maps > detector.calibration["pixels"][-2] + 1e-5).mean(axis=(1, 2)) > MARKED).sum() == 1

    path = detector.save(tmp_path / "model.safetensors", {"data": "random"})
    loaded = EfficientAD.load(path)
    assert (loaded.threshold, loaded.pixel_threshold) == (detector.threshold, detector.pixel_threshold)
    choose_thresholds(loaded, 0.2, 0.9)
    place = rank(30, 0.2, 0.9)
    assert place < 30 and loaded.threshold == detector.calibration["scores"][place - 1] < detector.threshold
    assert loaded.pixel_threshold == detector.calibration["pixels"][place - 1]
    rule = {name: loaded.calibration[name] for name in ("false_alarm_rate", "confidence", "rank", "normals")}
    assert rule == {"false_alarm_rate": 0.2, "confidence": 0.9, "rank": place, "normals": 30}
    calibrate(detector, images, false_alarm_rate=0.2, confidence=0.9)
    assert detector.threshold == pytest.approx(loaded.threshold, rel=1e-4)


def test_equal_scores_and_broken_maps():
    detector, images = detector_and_images(1)
    calibrate(detector, images.repeat(30, 1, 1, 1), false_alarm_rate=0.2)
    with torch.inference_mode():
        assert not (detector(images / 255).score > detector.threshold * (1 + 1e-5)).any()
    detector.teacher_std.fill_(torch.nan)
    with pytest.raises(RunError, match="not finite"):
        measure_normals(detector, images)
    with pytest.raises(RunError, match="not finite"):
        calibrate(detector, images)


def test_an_impossible_wish_is_refused_before_the_maps_are_computed(monkeypatch):
    detector, images = detector_and_images(4)
    monkeypatch.setattr(detector, "raw_maps", lambda _: pytest.fail("work was done"))
    with pytest.raises(SettingsError, match="needs 29 held-out normal"):
        calibrate(detector, images, false_alarm_rate=0.1)


def test_a_model_of_before_can_be_given_thresholds(model, picture, tmp_path, capsys):
    detector = EfficientAD.load(model)
    detector.calibration, detector.pixel_threshold = {}, None
    old = detector.save(tmp_path / "old.safetensors", {"data": "random"})
    assert main(["threshold", str(old)]) == 2
    assert "stores no scores of normal images" in capsys.readouterr().err
    for index in range(12):
        picture(tmp_path / "line" / f"{index}.png", seed=index)
    assert main(["threshold", str(old), "--normals", str(tmp_path / "line"), "--false-alarm-rate", "0.1"]) == 2
    assert "needs 29 held-out normal images, there are 12" in capsys.readouterr().err
    new = tmp_path / "new.safetensors"
    wish = ["--false-alarm-rate", "0.3", "--confidence", "0.9", "--out", str(new)]
    assert main(["threshold", str(old), "--normals", str(tmp_path / "line"), *wish]) == 0
    said, loaded = capsys.readouterr().out, EfficientAD.load(new)
    assert f"{loaded.threshold:.4g}" in said and "at most 0.3 of new normal images" in said
    assert loaded.calibration["source"] == "line" and loaded.calibration["normals"] == 12
    assert EfficientAD.load(old).pixel_threshold is None  # it stays
    assert main(["threshold", str(new)]) == 0  # in place, by the stored scores: the highest
    assert "one new normal image in 13" in capsys.readouterr().out
    assert EfficientAD.load(new).threshold == loaded.calibration["scores"][-1]
    assert json.loads(json.dumps(EfficientAD.load(new).card["calibration"])) == EfficientAD.load(new).calibration
