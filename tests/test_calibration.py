"""Decision thresholds: order statistics of held-out normal images, chosen, stored and chosen again."""

import json
import re
from math import comb

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from effad_lib.calibration import MARKED, calibrate, choose_thresholds, measure_normals, rank
from effad_lib.cli import main
from effad_lib.detector import EfficientAD
from effad_lib.images import load_images, to_float
from effad_lib.runs import Run, RunError
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
    with pytest.raises(SettingsError, match=r"a false_alarm_rate of \S+e-3\d\d .* needs inf held-out normal images"):
        rank(20, 1e-320, 0.95)
    for rate, confidence, name in (
        (1.0, 0.9, "false_alarm_rate = 1.0"),
        (-0.1, 0.9, "false"),
        (0.1, 1.0, "confidence = 1"),
    ):
        with pytest.raises(SettingsError, match=name):
            rank(100, rate, confidence)


def test_by_hand():
    """Four scores, a rate of ½: of four coins fewer than r = 1, 2, 3, 4 show heads in 1, 5, 11, 15 of 16 cases."""
    assert [kept(4, place, 0.5) * 16 for place in (1, 2, 3, 4)] == [1, 5, 11, 15]
    assert rank(4, 0.5, 0.5) == 3 and rank(4, 0.5, 0.9) == 4
    with pytest.raises(SettingsError, match="needs 5 held-out"):
        rank(4, 0.5, 0.95)


@pytest.mark.parametrize("levels", [0, 20])
def test_the_promise_holds_for_drawn_scores(levels):
    """Of uniform scores a share 1 − t lies above t; of those rounded down to a few levels, which have ties, less."""
    rng, normals, rate, confidence = np.random.default_rng(0), 100, 0.1, 0.9
    place = rank(normals, rate, confidence)
    scores = rng.random((4000, normals))
    scores = np.floor(scores * levels) / levels if levels else scores
    threshold = np.sort(scores, axis=1)[:, place - 1]
    held = np.mean(1 - threshold - (1 / levels if levels else 0) <= rate + 1e-9)
    assert held >= confidence - 0.01  # two deviations of 4000 draws
    if not levels:
        assert held == pytest.approx(kept(normals, place, rate), abs=0.01)


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


def test_no_image_of_equal_ones_is_above_the_threshold():
    detector, images = detector_and_images(1)
    calibrate(detector, images.repeat(30, 1, 1, 1), false_alarm_rate=0.2)
    with torch.inference_mode():
        assert not (detector(images / 255).score > detector.threshold * (1 + 1e-5)).any()


def test_a_map_that_is_not_finite_names_its_image(picture, tmp_path, capsys, monkeypatch):
    detector, images = detector_and_images(5)
    path = detector.save(tmp_path / "model.safetensors")
    files = [picture(tmp_path / "line" / f"{index}.png", seed=index) for index in range(5)]
    raw_maps = EfficientAD.raw_maps

    def spoiling(self, batch):
        maps = raw_maps(self, batch)
        maps[1][(batch == 1).flatten(1).all(dim=1), 0, 1, 2] = torch.nan  # of white images
        return maps

    monkeypatch.setattr(EfficientAD, "raw_maps", spoiling)
    measure_normals(detector, images.split(2))
    images[3] = 255
    Image.new("RGB", (80, 80), "white").save(files[3])
    for measure, given in ((calibrate, images), (measure_normals, images.split(2))):
        with pytest.raises(RunError, match=r"^normal image 3: its anomaly map holds NaN.*lower learning_rate"):
            measure(detector, given)
    assert main(["threshold", str(path), "--normals", str(tmp_path / "line")]) == 2
    assert f"effad: {files[3]}: its anomaly map holds NaN" in capsys.readouterr().err


def test_an_impossible_wish_is_refused_before_the_maps_are_computed(monkeypatch):
    detector, images = detector_and_images(4)
    monkeypatch.setattr(detector, "raw_maps", lambda _: pytest.fail("work was done"))
    with pytest.raises(SettingsError, match="needs 29 held-out normal"):
        calibrate(detector, images, false_alarm_rate=0.1)


def test_a_model_of_before_can_be_given_thresholds(model, picture, tmp_path, capsys):
    with safe_open(model, "pt") as file:
        card = json.loads(file.metadata()["effad_card"])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    card = {name: value for name, value in card.items() if name not in ("pixel_threshold", "calibration")}
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file(weights, old, {"effad_card": json.dumps(card)})
    before, line = old.read_bytes(), tmp_path / "line"
    assert EfficientAD.load(old).threshold == EfficientAD.load(model).threshold
    assert main(["threshold", str(old)]) == 2
    assert "stores no scores of normal images" in capsys.readouterr().err
    for index in range(12):
        picture(line / f"{index}.png", seed=index)
    assert main(["threshold", str(old), "--normals", str(line), "--false-alarm-rate", "0.1"]) == 2
    assert "needs 29 held-out normal images, there are 12" in capsys.readouterr().err

    wish = ["--false-alarm-rate", "0.3", "--confidence", "0.9", "--out", str(new)]
    assert main(["threshold", str(old), "--normals", str(line), *wish]) == 0
    said, loaded = capsys.readouterr().out, EfficientAD.load(new)
    place = rank(12, 0.3, 0.9)
    assert place < 12
    assert re.search(rf"^normal images +12, line\nrank +{place} of 12\n", said)
    assert f"a share of {(13 - place) / 13:.3g} expected; at most 0.3 with confidence 0.9" in said
    assert f"{loaded.threshold:.4g}\n" in said and f"{loaded.pixel_threshold:.4g}\n" in said
    assert old.read_bytes() == before, "with --out it stays"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights.items())
    assert loaded.card["data"] == card["data"]

    images = to_float(load_images(sorted(line.iterdir()), (64, 64)))
    with torch.inference_mode():
        scores = sorted(loaded(images).score.tolist())
    assert loaded.calibration["scores"] == pytest.approx(scores, rel=1e-4)
    assert main(["threshold", str(new)]) == 0  # in place, by the stored scores: the highest
    assert "12 of 12\nfalse alarms     a share of 0.0769 expected\n" in capsys.readouterr().out
    assert EfficientAD.load(new).threshold == loaded.calibration["scores"][-1] > loaded.threshold


def test_other_thresholds_than_the_evaluated_ones_ask_for_another_evaluation(model, tmp_path, capsys):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.model.write_bytes(model.read_bytes())
    remark = f"evaluate again: effad evaluate {run.folder}\n"
    assert main(["threshold", str(run.model)]) == 0
    assert remark not in capsys.readouterr().out, "it was not evaluated yet"
    run.finish({"image_auroc": 0.5})
    assert main(["threshold", str(run.model), "--out", str(run.folder / "other.safetensors")]) == 0
    assert remark not in capsys.readouterr().out, "the run's own model stays"
    assert main(["threshold", str(run.model)]) == 0
    assert capsys.readouterr().out.endswith(remark)
