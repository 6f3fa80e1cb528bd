"""Training that cannot go on, or must not: what is said, before which work, and what stays."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from striped import CHANNELS, SIDE, weights_equal

from effad_lib import losses, training
from effad_lib.backbones import file_sha256
from effad_lib.datasets import DatasetError, load_dataset
from effad_lib.detector import EfficientAD
from effad_lib.images import ImageError
from effad_lib.memory import OutOfMemory
from effad_lib.networks import PDN
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError
from effad_lib.synthesis import SynthesisSettings, synthesize
from effad_lib.training import TrainingSettings, train


def test_resume_with_other_settings_is_refused(start):
    start("run")
    with pytest.raises(RunError, match=r"learning_rate: 0\.001 there, 0\.002 now"):
        start("run", learning_rate=2e-3)


def test_truncated_checkpoint_is_named(start, monkeypatch):
    _, run = start("run")
    run.model.unlink()
    last = run.folder / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"last\.pt cannot be read"):
        start("run")


def test_loss_that_is_not_finite_stops_at_the_checkpoint_before(start, monkeypatch, tmp_path):
    values = iter([1.0, float("nan")])
    monkeypatch.setattr(training.Trainer, "validation_losses", lambda self: (next(values), 0.0, 0.0))
    with pytest.raises(RunError, match="not finite at step 8"):
        start("run")
    assert Run(tmp_path / "run").load_checkpoint("last")["step"] == 4


def test_a_loss_that_is_not_finite_between_two_validations_names_step_and_image(start, monkeypatch, tmp_path):
    """The state after it is never saved, though a checkpoint is due before the next validation."""
    steps, hard_feature_loss = iter(range(1, 100)), losses.hard_feature_loss
    monkeypatch.setattr(
        losses, "hard_feature_loss", lambda *args: hard_feature_loss(*args) * (float("inf") if next(steps) == 6 else 1)
    )
    with pytest.raises(RunError, match=r"not finite at step 6, on \S+/train/good/\d{3}\.png\. .*now 0\.001"):
        start("run", validate_every=12)
    saved = Run(tmp_path / "run").load_checkpoint("last")
    assert saved["step"] == 4 and all(value.isfinite().all() for value in saved["student"].values())


def test_an_optimiser_that_overflows_stops_at_the_checkpoint_before(start, monkeypatch, tmp_path):
    """With finite losses and weights: Adam divides by the infinite root, so those weights only stand still."""
    train_step = training.Trainer.train_step

    def overflowing(self, draw):
        if self.step == 6:
            self.optimisers[0].state[self.detector.student.head.bias]["exp_avg_sq"].fill_(float("inf"))
        return train_step(self, draw)

    monkeypatch.setattr(training.Trainer, "train_step", overflowing)
    with pytest.raises(RunError, match=r"the optimiser's is not finite after step 8\. .* lower learning_rate"):
        start("run")
    assert [Run(tmp_path / "run").load_checkpoint(name)["step"] for name in ("last", "best")] == [4, 4]


def test_a_batch_too_large_for_the_memory_is_named_with_its_size(start, monkeypatch):
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, draw: torch.empty(2**50))
    with pytest.raises(OutOfMemory, match=r"run: out of memory .* image_size = \[64, 64\], batch_size = 1, .* smaller"):
        start("run")


def test_a_student_that_has_died_is_said_to_have(start, monkeypatch):
    detector, _ = start("alive")
    assert detector.card["dead_channels"] < 0.9
    kill = training.Trainer.train_step

    def killed(self, draw):
        terms = kill(self, draw)
        last = [layer for layer in self.detector.student.trunk if isinstance(layer, torch.nn.Conv2d)][-1]
        with torch.no_grad():
            last.bias.fill_(-1e6)
        return terms

    monkeypatch.setattr(training.Trainer, "train_step", killed)
    with pytest.warns(
        UserWarning, match=r"100 % of the student's .* it has died .* lower learning_rate \(here 0\.001\)"
    ):
        detector, _ = start("dead")
    assert detector.card["dead_channels"] == 1


def test_a_scaled_student_stays_alive_on_a_dense_weave(tmp_path):
    """With a last layer of noise to unlearn, or channels whose mean is not zero, most of the last hidden channels were
    zero for good after these steps."""
    few = {"image_size": (128, 128), "train": 20, "test_good": 1, "test_per_defect": 1}
    synthesize(SynthesisSettings(product="fabric", data_root=str(tmp_path), **few))
    settings = TrainingSettings(
        run_folder=str(tmp_path / "run"),
        size="XS",
        image_size=[128, 128],
        steps=40,
        learning_rate=5e-4,
        schedule="constant",
        initialisation="scaled",
        penalty_crop_scale=[0.05, 0.5],
    )
    detector = train(settings, load_dataset("synthetic", root=tmp_path, category="fabric"))
    assert detector.card["dead_channels"] < 0.5


def test_another_teacher_neither_continues_nor_passes_as_the_first(start, teacher):
    start("run")
    card = json.loads(teacher.with_suffix(".json").read_text())
    torch.manual_seed(5)
    save_file({name: value.contiguous() for name, value in PDN("XS", CHANNELS).state_dict().items()}, teacher)
    digest = file_sha256(teacher)
    teacher.with_suffix(".json").write_text(json.dumps(card | {"sha256": digest}))
    with pytest.raises(RunError, match=r"teacher: \w{12} there, \w{12} now"):
        start("run")


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_neither_continue_nor_pass_as_the_first(start, stripes, finished):
    """A model would be loaded that never saw them, or statistics and thresholds of two data sets mixed."""
    _, run = start("run")
    if not finished:
        run.model.unlink()
    Image.fromarray(np.full((SIDE, SIDE), 90, np.uint8)).save(stripes / "train" / "good" / "one_more.png")
    with pytest.raises(RunError, match=r"training_images: \w{12} there, \w{12} now"):
        start("run", split=load_dataset("folder", root=stripes))
    (stripes / "train" / "good" / "one_more.png").unlink()
    (stripes / "test" / "good").mkdir(parents=True)
    Image.fromarray(np.full((SIDE, SIDE), 90, np.uint8)).save(stripes / "test" / "good" / "0.png")
    start("run", split=load_dataset("folder", root=stripes))  # of which a training sees nothing


def test_a_penalty_on_other_photographs_does_not_continue(start, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((80, 80, 3), 90, np.uint8)).save(photographs / f"{name}.png")
    _, run = start("run", penalty_images=str(photographs))
    (photographs / "b.png").unlink()
    start("run", penalty_images=str(photographs))  # finished: it is only loaded
    run.model.unlink()
    with pytest.raises(RunError, match=r"penalty_images: \w{12} there, \w{12} now"):
        start("run", penalty_images=str(photographs))


def test_a_model_of_which_nobody_knows_how_it_was_trained_does_not_pass_as_this_training(start):
    _, run = start("run")
    (run.folder / "parameters.yaml").unlink()
    with pytest.raises(RunError, match=r"holds a model\.safetensors and no parameters\.yaml.*Choose another"):
        start("run", steps=16)


def test_a_mask_that_does_not_fit_is_an_error_before_any_step(start, stripes, monkeypatch):
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, draw: pytest.fail("trained"))
    for folder, name, size in (("test/cut", "0.png", SIDE), ("ground_truth/cut", "0_mask.png", 2 * SIDE)):
        (stripes / folder).mkdir(parents=True)
        Image.fromarray(np.full((size, size), 255, np.uint8)).save(stripes / folder / name)
    (stripes / "test" / "good").mkdir()
    (stripes / "test" / "good" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"1 of 1 samples are faulty\.\n.*0_mask\.png"):
        start("run", split=load_dataset("folder", root=stripes))


def test_corrupt_training_image_is_an_error_before_any_step(start, stripes, monkeypatch):
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, draw: pytest.fail("trained"))
    for path in (stripes / "train" / "good").glob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"\.png"):
        start("run")


def test_a_rate_that_too_few_images_can_keep_is_refused_before_any_step(start, monkeypatch, tmp_path):
    train_step = training.Trainer.train_step
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, draw: pytest.fail("trained"))
    with pytest.raises(SettingsError, match=r"needs 29 held-out normal images, there are 3\."):
        start("run", false_alarm_rate=0.1)
    assert not (tmp_path / "run").exists(), "the folder takes a wish that can be kept"
    monkeypatch.setattr(training.Trainer, "train_step", train_step)
    detector, run = start("run", false_alarm_rate=0.5, confidence=0.4)
    rule = {name: detector.calibration[name] for name in ("false_alarm_rate", "confidence", "normals", "rank")}
    assert rule == {"false_alarm_rate": 0.5, "confidence": 0.4, "normals": 3, "rank": 2}  # 1/8 < 0.4 ≤ 4/8
    assert detector.threshold == detector.calibration["scores"][1] == EfficientAD.load(run.model).threshold


def test_full_disk_is_reported_and_keeps_the_last_checkpoint(start, monkeypatch, tmp_path, full_disk):
    save = Run.save_checkpoint

    def fuller(self, name, state):
        with full_disk(100_000) if state["step"] > 4 else contextlib.nullcontext():
            return save(self, name, state)

    monkeypatch.setattr(Run, "save_checkpoint", fuller)
    with pytest.raises(RunError, match=r"cannot write .*\.pt: File too large"):
        start("run")
    monkeypatch.undo()
    assert Run(tmp_path / "run").load_checkpoint("last")["step"] == 4
    whole, _ = start("whole")
    resumed, _ = start("run")
    assert weights_equal(whole, resumed)


def test_teacher_of_another_size_is_refused(stripes, teacher, tmp_path):
    settings = TrainingSettings(run_folder=str(tmp_path / "run"), size="S", teacher=str(teacher), image_size=[64, 64])
    with pytest.raises(SettingsError, match="of size XS, the training of size S"):
        train(settings, load_dataset("folder", root=stripes))
    assert not (tmp_path / "run").exists()
