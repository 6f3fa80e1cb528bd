"""Numbers stay numbers: what is constant, empty, equal or too large gives finite maps or a clear error, never NaN."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from trust import refused

from effad_lib.calibration import calibrate, choose_thresholds
from effad_lib.cli import main
from effad_lib.detection import detect
from effad_lib.detector import EfficientAD
from effad_lib.distillation import channel_statistics
from effad_lib.engines import load_exported
from effad_lib.evaluation import load_maps
from effad_lib.export import ExportSettings, convert, record, save, to_onnx
from effad_lib.networks import PDN
from effad_lib.runs import Run

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BLACK, WHITE = np.zeros_like(NOISE), np.full_like(NOISE, 255)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random teacher of eight channels, of which one never answers and one is always the same."""
    torch.manual_seed(0)
    weights = {name: value.contiguous() for name, value in PDN("XS", 8).state_dict().items()}
    weights["head.weight"][0], weights["head.weight"][1] = 0, 0
    weights["head.bias"][0], weights["head.bias"][1] = 0, 3
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    save_file(weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"size": "XS", "channels": 8, "sha256": digest}))
    return path


DATA = {  # the good images, the good and the defective test image
    "black": (BLACK, BLACK, WHITE),
    "one image again and again": (NOISE, NOISE, 255 - NOISE),
    "all images the same, the defect too": (NOISE, NOISE, NOISE),
    "no defective image": (NOISE, NOISE, None),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_run_on_images_that_tell_nothing_has_finite_figures_throughout(teacher, tmp_path, capsys, kind):
    good, tested, bad = DATA[kind]
    data, run = tmp_path / "data", tmp_path / "run"
    truth = np.zeros((64, 64), np.uint8)
    truth[10:20, 10:30] = 255
    wanted = {f"train/good/{k:02}": good for k in range(13)} | {"test/good/0": tested}
    wanted |= {} if bad is None else {"test/dent/0": bad, "ground_truth/dent/0_mask": truth}
    for name, pixels in wanted.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(data / f"{name}.png")
    names = f"--dataset folder --data-root {data} --run-folder {run} --teacher {teacher} --size XS --device cpu"
    assert main(["train", *names.split(), *"--image-size 64 64 --steps 2 --validate-every 1".split()]) == 0
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    metrics = Run(run).metrics
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, (int, float)))
    assert (metrics["image_auroc"] is None) == (bad is None)
    if bad is tested:
        assert metrics["image_auroc"] == 0.5, "equal scores tell nothing"
    assert bad is not None or "No defective image among 1: no image AU-ROC" in said
    detector = EfficientAD.load(run / "model.safetensors")
    assert math.isfinite(detector.threshold) and detector.quantiles.isfinite().all()
    for index in range(1 if bad is None else 2):
        assert all(np.isfinite(values).all() for values in load_maps(run, index))
    texts = [(run / name).read_text() for name in ("report.html", "scores.csv", "history.csv", "metrics.json")]
    assert not any(re.search(r"\b(nan|inf)\b", text, re.IGNORECASE) for text in [*texts, said])


@pytest.fixture
def constant():
    """A detector that was calibrated on one constant image, so that q_a = q_b in both maps."""
    torch.manual_seed(0)
    detector = EfficientAD("XS", channels=8, image_size=(64, 64))
    for network in (detector.student, detector.teacher, detector.autoencoder):
        for parameter in network.parameters():
            parameter.data.zero_()
    calibrate(detector, torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert torch.equal(detector.quantiles[:, 0], detector.quantiles[:, 1])
    return detector


def test_maps_are_finite_where_all_normal_pixels_were_equal(constant, picture, tmp_path):
    assert constant.inspect(NOISE.transpose(2, 0, 1)[None]).score.tolist() == [0]
    torch.manual_seed(1)
    for parameter in constant.student.parameters():
        torch.nn.init.normal_(parameter)
    found = constant.inspect(NOISE.transpose(2, 0, 1)[None])
    assert np.isfinite(found.combined).all() and found.score[0] > 1e6
    table = detect(constant, picture(tmp_path / "a.png"), tmp_path / "out", save_maps=True, save_masks=True)
    assert table["decision"].tolist() == ["defective"] and np.isfinite(table["score"]).all()


def test_an_export_in_half_precision_is_finite_where_quantiles_are_equal(constant, tmp_path):
    """The smallest step between them is far below what half precision can hold."""
    settings = ExportSettings(precision="float16")
    graph = to_onnx(constant, half=True, input_size=(64, 64))
    card = constant.card_now() | {"export": record(settings, (64, 64))}
    exported = load_exported(save(convert(graph, settings, np.empty(0)), card, tmp_path / "m.onnx"), "cpu")
    assert np.isfinite(exported.inspect(np.zeros((1, 3, 64, 64), np.uint8)).combined).all()


def test_scores_beyond_half_precision_are_kept_finite(evaluated_run, small_detector, tmp_path):
    from effad_lib.evaluation import data_of, evaluate

    large = copy.deepcopy(small_detector)
    large.quantiles.fill_(-1.0)
    found = evaluate(large, data_of(Run(evaluated_run)).test)
    assert np.abs(found.scores).max() > np.finfo(np.float16).max
    found.save(tmp_path)
    assert all(np.isfinite(values).all() for values in load_maps(tmp_path, 0))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-30, 1e30, -5.0])
def test_channels_that_never_vary_have_deviation_one(value):
    mean, deviation = channel_statistics(torch.full((2, 4, 5, 5), value) for _ in range(3))
    assert mean.flatten().tolist() == pytest.approx([value] * 4) and deviation.flatten().tolist() == [1] * 4


def test_equal_scores_of_all_normal_images_are_a_threshold(constant):
    choose_thresholds(constant, 0.0, 0.95)
    assert constant.threshold == constant.pixel_threshold == 0
    refused(lambda: choose_thresholds(constant, 0.01, 0.95), "needs 299 held-out normal images, there are 3")


def test_weights_that_overflow_are_an_error_that_names_the_image(small_detector, picture, tmp_path):
    broken = copy.deepcopy(small_detector)
    broken.student.head.weight.data.fill_(1e30)
    refused(
        lambda: calibrate(broken, torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)), "normal image 0: .*holds NaN"
    )
    refused(lambda: detect(broken, picture(tmp_path / "a.png"), tmp_path / "out"), r"a\.png is not finite")
