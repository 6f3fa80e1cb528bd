"""Settings of a training: what each does, what none can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from effad_lib.benchmark import trainer_of
from effad_lib.images import ImageError
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError
from effad_lib.training import TrainingSettings, step_factor


@pytest.mark.parametrize(("size", "head", "autoencoder"), [("S", 1, 1), ("XS", 8, 0.5)])
def test_every_part_learns_at_the_rate_of_its_size(size, head, autoencoder):
    """Adam's first step moves each weight by the learning rate, whatever its gradient."""
    with trainer_of(size, (64, 64), learning_rate=1e-3, device="cpu") as trainer:
        detector = trainer.detector
        times = {"student.trunk": 1, "student.head": head, "autoencoder": autoencoder}
        before = {part: [*map(torch.clone, detector.get_submodule(part).parameters())] for part in times}
        trainer.train_step(next(trainer.draws()))
    for part, weights in before.items():
        pairs = zip(weights, detector.get_submodule(part).parameters(), strict=True)
        moved = [(now - weight).abs().max().item() / 1e-3 for weight, now in pairs]
        assert max(moved) == pytest.approx(times[part], rel=0.01), part
        assert min(moved) > 0.9 * times[part], "less only where a gradient is nearly zero"


def test_photographs_in_packages_are_cropped_and_a_folder_is_shown_as_in_the_paper():
    assert TrainingSettings().penalty_crops == (0.05, 0.5)
    assert TrainingSettings(penalty_images="photographs").penalty_crops is None
    assert TrainingSettings(penalty_images="photographs", penalty_crop_scale=[0.1, 0.2]).penalty_crops == (0.1, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"image_size": [63, 64]}, "at least 64"),
        ({"learning_rate": "1e-4"}, "write 1.0e-4"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"warm_up": 1.0}, "warm_up = 1.0: .* takes a share from 0 to below 1"),
        ({"hard_quantile": 1.0}, "hard_quantile"),
        ({"penalty_crop_scale": [0.5, 0.1]}, "penalty_crop_scale"),
        ({"precision": "fp8"}, "bfloat16"),
        ({"device": "tpu"}, "not available"),
        ({"weight_penalty": -1.0}, "weight_penalty"),
        ({"size": "L"}, "unknown network size"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate = 1.0: .* takes a share from 0 to below 1"),
        ({"confidence": 1.0}, "confidence = 1.0: .* takes a probability between 0 and 1"),
    ],
)
def test_impossible_settings_name_field_value_and_remedy(change, message):
    with pytest.raises((SettingsError, ImageError), match=message):
        TrainingSettings(**change)


def test_schedules():
    assert step_factor(66_499, 70_000, "step", 0.2) == 1.0 and step_factor(66_500, 70_000, "step", 0.2) == 0.1
    assert step_factor(0, 100, "cosine", 0.05) == pytest.approx(0.2)
    assert step_factor(5, 100, "cosine", 0.05) == 1.0 and step_factor(99, 100, "cosine", 0.05) < 0.01
    assert step_factor(0, 100, "cosine", 0.2) == pytest.approx(0.05) and step_factor(20, 100, "cosine", 0.2) == 1.0
    assert step_factor(0, 100, "cosine", 0.0) == 1.0  # none


def test_runs_from_before_a_setting_was_there_go_on(tmp_path):
    settings = TrainingSettings(run_folder=str(tmp_path / "run"), schedule="cosine")
    run = Run(tmp_path / "run")
    run.start(settings)
    made = yaml.safe_load((run.folder / "parameters.yaml").read_text())
    del made["levels"], made["warm_up"]
    (run.folder / "parameters.yaml").write_text(yaml.safe_dump(made))
    run.check(settings)
    with pytest.raises(RunError, match=r"levels: \[\] there, \[0.0, 4095.0\] now"):
        run.check(replace(settings, levels=[0, 4095]))
    with pytest.raises(RunError, match=r"warm_up: 0.05 there, 0.2 now"):
        run.check(replace(settings, warm_up=0.2))
