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
from effad_lib.training import TrainingSettings


def test_adam_learns_all_parts_at_one_rate():
    """Its first step moves each weight by the learning rate, whatever its gradient."""
    with trainer_of("XS", (64, 64), learning_rate=1e-3, device="cpu") as trainer:
        learned = [*trainer.detector.student.parameters(), *trainer.detector.autoencoder.parameters()]
        before = [*map(torch.clone, learned)]
        trainer.train_step(next(trainer.draws()))
    moved = [(now - weight).abs().max().item() for weight, now in zip(before, learned, strict=True)]
    assert max(moved) == pytest.approx(1e-3, rel=0.01)
    assert min(moved) > 0.9e-3, "less only where a gradient is nearly zero"


def test_muon_learns_every_kernel_that_does_not_look_at_the_image_and_adam_the_rest():
    with trainer_of("XS", (64, 64), optimiser="muon", learning_rate=1e-3, device="cpu") as trainer:
        trainer.train_step(next(trainer.draws()))
        muon, adam = trainer.optimisers
        rates = {group["lr"] for optimiser in trainer.optimisers for group in optimiser.param_groups}
        held = [[w for group in one.param_groups for w in group["params"]] for one in (muon, adam)]
        learned = [*trainer.detector.student.parameters(), *trainer.detector.autoencoder.parameters()]
    assert rates == {1e-3}
    assert sorted(map(id, held[0] + held[1])) == sorted(map(id, learned))
    assert {weight.dim() for weight in held[0]} == {4} and min(weight.shape[1] for weight in held[0]) > 3
    assert [weight.shape[1] for weight in held[1] if weight.dim() == 4] == [3, 3], "the first of each network"


def test_photographs_in_packages_are_cropped_and_a_folder_is_shown_as_in_the_paper():
    assert TrainingSettings().penalty_crops == (0.05, 0.5)
    assert TrainingSettings(penalty_images="photographs").penalty_crops is None
    assert TrainingSettings(penalty_images="photographs", penalty_crop_scale=[0.1, 0.2]).penalty_crops == (0.1, 0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"image_size": [63, 64]}, "at least 64"),
        ({"optimiser": "sgd"}, "optimiser = 'sgd': .* takes one of adam, muon"),
        ({"learning_rate": "1e-4"}, "write 1.0e-4"),
        ({"schedule": "cosin"}, "'cosine'"),
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


def test_runs_from_before_a_setting_was_there_go_on(tmp_path):
    settings = TrainingSettings(run_folder=str(tmp_path / "run"), schedule="cosine")
    run = Run(tmp_path / "run")
    run.start(settings)
    made = yaml.safe_load((run.folder / "parameters.yaml").read_text())
    del made["levels"], made["optimiser"]
    (run.folder / "parameters.yaml").write_text(yaml.safe_dump(made))
    run.check(settings)
    with pytest.raises(RunError, match=r"levels: \[\] there, \[0.0, 4095.0\] now"):
        run.check(replace(settings, levels=[0, 4095]))
    with pytest.raises(RunError, match=r"optimiser: 'adam' there, 'muon' now"):
        run.check(replace(settings, optimiser="muon"))
