"""Training: it learns, resumes bit for bit, keeps checkpoints by validation loss, refuses bad input."""

from __future__ import annotations

import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from striped import CHANNELS, SIDE, striped, weights_equal, write_teacher

from effad_lib import training
from effad_lib.detector import EfficientAD
from effad_lib.distillation import prefetched
from effad_lib.execution.lock import RUN_LOCK, Lock, LockError
from effad_lib.images import ImageError
from effad_lib.networks import PDN, initialise
from effad_lib.runs import Run
from effad_lib.settings import SettingsError
from effad_lib.training import Losses


def test_losses_fall_and_the_model_reloads_to_the_same_maps(start):
    detector, run = start("run", steps=120, validate_every=40)
    history = np.genfromtxt(run.folder / "history.csv", delimiter=",", names=True)
    assert history["step"].tolist() == [40, 80, 120]
    assert history["validation"][-1] < 0.7 * history["validation"][0]
    again = EfficientAD.load(run.model)
    image = torch.rand(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        for one, other in zip(detector(image), again(image), strict=True):
            assert torch.equal(one, other)
    assert again.threshold == detector.threshold and again.card["steps"] == 120
    assert again.card["aspects"] == [1, 1]
    assert (run.folder / "parameters.yaml").is_file() and any((run.folder / "tensorboard").iterdir())
    assert not run.done, "a training alone has no metrics yet"


def test_trained_detector_finds_what_is_not_a_stripe(start):
    detector, _ = start("run", steps=150, validate_every=50, schedule="cosine")
    good = torch.from_numpy(np.stack([striped(index) for index in range(20, 28)])).permute(0, 3, 1, 2) / 255
    bad = good.clone()
    bad[:, :, 24:40, 24:40] = bad[:, :, 24:40, 24:40].transpose(-1, -2)
    with torch.inference_mode():
        assert detector(bad).score.min() > detector(good).score.max()


@pytest.mark.parametrize(("number", "optimiser"), [(signal.SIGINT, "adam"), (signal.SIGTERM, "muon")])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(start, monkeypatch, number, optimiser):
    whole, _ = start("whole", optimiser=optimiser)
    train_step = training.Trainer.train_step

    def step_and_interrupt(self, draw):
        if self.step == 7:
            os.kill(os.getpid(), number)
        return train_step(self, draw)

    monkeypatch.setattr(training.Trainer, "train_step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt, match="step 8"):
        start("stopped", optimiser=optimiser)
    monkeypatch.undo()
    resumed, run = start("stopped", optimiser=optimiser)
    assert weights_equal(whole, resumed) and whole.threshold == resumed.threshold
    assert whole.pixel_threshold == resumed.pixel_threshold and whole.calibration == resumed.calibration
    assert [row["step"] for row in run.load_checkpoint("last")["history"]] == [4, 8, 12]


def test_reading_ahead_changes_nothing(start, monkeypatch):
    """What a graphics card gets ahead of its use is what a CPU reads when it wants it, after a resume too."""
    plain, _ = start("plain")

    def ahead(draw, make, count, *, ahead, workers):
        return prefetched(draw, make, count, ahead=3, workers=4)

    monkeypatch.setattr(training.trainer, "prefetched", ahead)
    saved = Run.save_checkpoint

    def save_and_stop(self, name, state):
        saved(self, name, state)
        if name == "last" and state["step"] == 8:
            raise InterruptedError

    with monkeypatch.context() as stopping, pytest.raises(InterruptedError):
        stopping.setattr(Run, "save_checkpoint", save_and_stop)
        start("ahead")
    resumed, _ = start("ahead")
    assert weights_equal(plain, resumed)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_training_is_the_same_but_for_rounding(start, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda features, *_: features)  # compilers draw other numbers
    plain, run = start("plain", steps=4)
    compiled, other = start("compiled", steps=4, compiled="default")
    one, two = (pd.read_csv(folder.folder / "history.csv").drop(columns="seconds") for folder in (run, other))
    np.testing.assert_allclose(one, two, rtol=1e-3)
    assert np.corrcoef(*(d.student.head.weight.detach().flatten() for d in (plain, compiled)))[0, 1] > 0.999
    with pytest.raises(SettingsError, match="compiled = 'fast': compiled takes"):
        start("wrong", compiled="fast")


def test_seed_decides(start):
    one, _ = start("one")
    same, _ = start("same")
    other, _ = start("other", seed=1)
    assert weights_equal(one, same) and not weights_equal(one, other)


def test_finished_training_is_loaded_not_repeated(start, monkeypatch):
    first, _ = start("run")
    monkeypatch.setattr(training.Trainer, "train_step", lambda self, draw: pytest.fail("trained again"))
    again, run = start("run")
    assert weights_equal(first, again)
    with Lock(run.folder / RUN_LOCK):  # while it is measured, say, by another process; or trained
        assert weights_equal(first, start("run")[0])
        run.model.unlink()
        with pytest.raises(LockError, match="run is in use by process"):
            start("run")


def test_checkpoints_are_the_best_three_by_validation_loss(start):
    _, run = start("run", steps=20, validate_every=4)
    history = np.genfromtxt(run.folder / "history.csv", delimiter=",", names=True)
    best = history["step"][np.argsort(history["validation"])][:3].astype(int)
    kept = sorted(path.stem for path in (run.folder / "checkpoints").glob("step_*.pt"))
    assert kept == sorted(f"step_{step:06d}" for step in best)
    assert run.load_checkpoint("best")["step"] == best[0]


def test_best_checkpoint_becomes_the_model_when_asked(start, monkeypatch):
    losses = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(training.Trainer, "validation_losses", lambda self: (next(losses), 0.0, 0.0))
    detector, run = start("run", checkpoint="best")
    best = run.load_checkpoint("best")
    assert best["step"] == 4
    assert torch.equal(detector.student.head.weight, best["student"]["head.weight"])


def test_a_training_out_of_patience_takes_no_further_step(start, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(training.Trainer, "validation_losses", lambda self: (next(losses), 0.0, 0.0))
    calibrate = training.calibrate
    monkeypatch.setattr(training, "calibrate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        start("run", patience=1, steps=20)
    monkeypatch.setattr(training, "calibrate", calibrate)
    detector, _ = start("run", patience=1, steps=20)
    assert detector.card["steps"] == 8


def test_patience_stops_when_the_validation_loss_does_not_improve(start, monkeypatch):
    losses = iter([1.0, 0.9, 0.95, 0.99, 0.5])
    monkeypatch.setattr(training.Trainer, "validation_losses", lambda self: (next(losses), 0.0, 0.0))
    detector, _ = start("run", steps=40, patience=2)
    assert detector.card["steps"] == 16


def test_cached_teacher_features_change_nothing(start):
    (cached, run), (uncached, other) = start("cached", seed=4), start("uncached", seed=4, cache_gb=0.0)
    losses, expected = (pd.read_csv(one.folder / "history.csv").drop(columns="seconds") for one in (run, other))
    pd.testing.assert_frame_equal(losses, expected, rtol=1e-4)
    for one, other in zip(cached.state_dict().values(), uncached.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_each_training_image_once_before_the_first_step(start, monkeypatch, capsys):
    seen, forward = [], PDN.forward

    def counted(self, images):
        if not torch.is_grad_enabled():
            seen.append(len(images))
        return forward(self, images)

    class Enough(Exception):
        """Before the first step."""

    def stop(self):
        raise Enough

    monkeypatch.setattr(PDN, "forward", counted)
    monkeypatch.setattr(training.Trainer, "loop", stop)
    images = 13  # of 16, three are held out
    for name, cache_gb in (("with", 2.0), ("without", 1e-6), ("none", 0.0)):
        seen.clear()
        with pytest.raises(Enough):
            start(name, cache_gb=cache_gb)
        assert sum(seen) == images
        assert ("features of 13 images take" in capsys.readouterr().err) == (name == "without")


TERMS = list(Losses._fields)


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_follows_float32(start, teacher, precision, optimiser):
    # Layers of unit variance, as those of a distilled teacher: the mean of a random one is so far above its deviation
    # that the three digits of bfloat16 are lost in the difference.
    sound = PDN("XS", CHANNELS)
    initialise(sound, torch.randn(8, 3, SIDE, SIDE))
    write_teacher(teacher, sound)
    exact, run = start("exact", steps=4, validate_every=1, optimiser=optimiser)
    mixed, other = start("mixed", steps=4, validate_every=1, precision=precision, optimiser=optimiser)
    assert not weights_equal(exact, mixed)
    first, second = (pd.read_csv(each.folder / "history.csv").loc[0, TERMS].to_numpy(float) for each in (run, other))
    np.testing.assert_allclose(second, first, rtol=0.02, atol=1e-3)  # from the same weights
    for one, two in zip(exact.student.parameters(), mixed.student.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-2)


def test_weights_scale_the_terms(start, monkeypatch):
    """The natural images matter if, and only if, the penalty has a weight."""

    def last_weights(name, weight, brightness):
        grey = lambda self, drawn, size, **_: torch.full((len(drawn), 3, *size), brightness)  # noqa: E731
        monkeypatch.setattr(training.NaturalImages, "views", grey)
        return start(name, weight_penalty=weight)[0]

    assert weights_equal(last_weights("a", 0.0, 0.1), last_weights("b", 0.0, 0.9))
    assert not weights_equal(last_weights("c", 1.0, 0.1), last_weights("d", 1.0, 0.9))


def test_natural_images_of_which_none_can_be_read_are_told_before_any_work(start, tmp_path, monkeypatch):
    (tmp_path / "photographs").mkdir()
    for name in "ab":
        (tmp_path / "photographs" / f"{name}.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(training, "load_images", None)
    with pytest.warns(UserWarning, match="natural image left out"), pytest.raises(ImageError, match="none of the natu"):
        start("run", penalty_images=str(tmp_path / "photographs"))
    assert not list(tmp_path.rglob("parameters.yaml"))
