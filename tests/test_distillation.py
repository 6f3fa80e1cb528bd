"""Distillation: it learns, resumes bit for bit, ships a checked teacher, and refuses what cannot work."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import mean_squared_error, r2_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effad_lib import distillation
from effad_lib.backbones import load_backbone
from effad_lib.distillation import (
    DistillationSettings,
    Views,
    distil,
    load_teacher,
)
from effad_lib.distillation.processes import Processes
from effad_lib.distillation.targets import prefetched
from effad_lib.distillation.teachers import curve
from effad_lib.images import ImageError, NaturalImages
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Photographs and backbone weights for a distillation of seconds."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for index in range(8):
        coarse = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((150, 140), Image.Resampling.BICUBIC).save(
            folder / "photographs" / f"{index}.png"
        )
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet18.safetensors")
    return folder


@pytest.fixture
def settings(given, tmp_path):
    def settings(name: str = "run", **changes) -> DistillationSettings:
        values = {
            "run_folder": str(tmp_path / name),
            "size": "XS",
            "backbone": "resnet18",
            "backbone_weights": str(given / "resnet18.safetensors"),
            "images": str(given / "photographs"),
            "image_size": [64, 64],
            "padding": False,
            "crop_scale": [0.2, 0.8],
            "steps": 6,
            "batch_size": 2,
            "statistics_images": 8,
            "schedule": "cosine",
            "initialisation": "fitted",
            "fit_views": 8,
            "learning_rate": 1e-3,
            **changes,
        }
        return DistillationSettings(**values)

    return settings


def test_the_loss_falls_and_the_teacher_loads(settings):
    run = distil(settings(steps=41, held_out=2))
    losses = run.metrics["losses"]
    assert len(losses) == 5 and losses[-1] < losses[0]
    card = json.loads((run.folder / "teacher.json").read_text())
    assert card["losses"] == [round(loss, 4) for loss in losses]
    assert curve([1.0, 2.0, 3.0, 4.0, 6.0], most=3) == [1.5, 3.5, 6.0]
    assert len(card["backbone_sha256"]) == len(card["photographs_sha256"]) == 64
    assert card["network"] == "PDN-XS" and card["photographs"] == 6 and 0 < card["held_out_loss"] < 1.5
    explained = torch.tensor(card["explained_variance"])
    assert explained.shape == (384,) and explained.max() <= 1
    assert card["settings"]["backbone_weights"] == "resnet18.safetensors", "no path of this machine in the card"
    teacher, _ = load_teacher(run.folder / "teacher.safetensors")
    assert teacher(torch.rand(1, 3, 64, 64)).shape == (1, 384, 8, 8)
    assert load_file(run.folder / "teacher.safetensors")["head.weight"].dtype == torch.float16
    logged = EventAccumulator(str(run.folder / "tensorboard"))
    logged.Reload()
    curves = {tag: [event.value for event in logged.Scalars(tag)] for tag in logged.Tags()["scalars"]}
    assert curves["distillation/loss"] == pytest.approx(losses) and all(
        curves["distillation/seconds_waited_for_images"]
    )
    assert run.done and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_explained_variance_is_that_of_scikit_learn(settings, given):
    made = settings(steps=1, held_out=3, statistics_images=4)
    run = distil(made)
    photographs = NaturalImages(made.images)
    views = Views(made, photographs, load_backbone("resnet18", made.backbone_weights))
    distiller = distillation.loop.Distiller(made, run, views, torch.device("cpu"), Processes())
    loss, explained = distiller.judge(photographs)
    generator = torch.Generator().manual_seed(2)
    pairs = [views.draw(2, generator, torch.device("cpu")) for _ in range(8)]
    wanted = [((targets - distiller.mean) / distiller.std).movedim(1, -1).flatten(0, 2) for _, targets in pairs]
    answers = [distiller.pdn(images).detach().movedim(1, -1).flatten(0, 2) for images, _ in pairs]
    wanted, answers = torch.cat(wanted).numpy(), torch.cat(answers).numpy()
    assert loss == pytest.approx(mean_squared_error(wanted, answers), rel=1e-4)
    assert np.allclose(explained, r2_score(wanted, answers, multioutput="raw_values"), atol=2e-3)


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_resumed_distillation_equals_an_undisturbed_one_bit_for_bit(settings, monkeypatch, optimiser):
    whole = distil(settings("whole", optimiser=optimiser))

    class Stop(Exception):
        pass

    saved = Run.save_checkpoint

    def save_and_stop(self, name, state):
        saved(self, name, state)
        raise Stop

    stopping = settings("stopped", checkpoint_seconds=0.0, optimiser=optimiser)
    monkeypatch.setattr(Run, "save_checkpoint", save_and_stop)
    for step in range(1, 4):
        with pytest.raises(Stop):
            distil(stopping)
        assert Run(stopping.run_folder).load_checkpoint()["step"] == step
    monkeypatch.undo()
    resumed = distil(stopping)
    one, other = (load_file(run.folder / "teacher.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.metrics["losses"] == resumed.metrics["losses"]


def torchrun(settings: DistillationSettings, processes: int) -> subprocess.CompletedProcess:
    """Distil from the command line in several processes, as on a machine with several GPUs."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = shlex.split(settings.as_options(leave_out=()))
    return subprocess.run(
        [sys.executable, *launch, "-m", "effad_lib.cli", "distill", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_two_processes_distil_what_one_does(settings, given, tmp_path, optimiser):
    """Each takes half of every batch; a photograph that one of them cannot read does not part their ways."""
    shutil.copytree(given / "photographs", tmp_path / "photographs")
    (tmp_path / "photographs" / "3.png").write_bytes(b"not an image")
    photographs = str(tmp_path / "photographs")
    changes = {"batch_size": 4, "steps": 5, "images": photographs, "device": "cpu", "optimiser": optimiser}
    with pytest.warns(UserWarning, match="left out"):
        alone = distil(settings("alone", **changes))
    shared = settings("shared", checkpoint_seconds=0.0, **changes)
    done = torchrun(shared, 2)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(run.folder / "teacher.safetensors") for run in (alone, Run(shared.run_folder)))
    for name in one:
        torch.testing.assert_close(one[name].float(), other[name].float(), rtol=1e-2, atol=2e-3)
    cards = [json.loads((run.folder / "teacher.json").read_text()) for run in (alone, Run(shared.run_folder))]
    assert [card["photographs"] for card in cards] == [7, 7]
    assert Run(shared.run_folder).metrics["losses"] == pytest.approx(alone.metrics["losses"], rel=1e-3)


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_follows_float32(settings, precision, optimiser):
    exact = distil(settings("exact", steps=3, optimiser=optimiser))
    mixed = distil(settings("mixed", steps=3, optimiser=optimiser, precision=precision))
    one, other = (load_file(run.folder / "teacher.safetensors") for run in (exact, mixed))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name in one:
        torch.testing.assert_close(one[name].float(), other[name].float(), rtol=0, atol=2e-2)
    start = distil(settings("start", steps=1, learning_rate=1e-12, optimiser=optimiser))
    begun, moved, mixed_moved = (
        torch.cat([weight.flatten() for weight in run.load_checkpoint()["pdn"].values()])
        for run in (start, exact, mixed)
    )
    likeness = torch.cosine_similarity(moved - begun, mixed_moved - begun, dim=0)
    # The scaler of float16 leaves out the first steps, until its scale fits.
    assert likeness > (0.95 if precision == "bfloat16" else 0.5), "both go the same way"


def test_a_batch_that_cannot_be_shared_equally_is_refused(settings, monkeypatch):
    pair = contextlib.nullcontext((Processes(0, 2), torch.device("cpu")))
    monkeypatch.setattr(distillation.loop, "joined", lambda device: pair)
    with pytest.raises(SettingsError, match="2 processes cannot share it equally"):
        distil(settings(batch_size=3))


def test_unreadable_photographs_are_left_out(settings, given, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for path in (given / "photographs").glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "0.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"0\.png"):
        run = distil(settings(images=str(folder), steps=10))
    card = run.folder / "teacher.json"
    kept = json.loads(card.read_text())
    assert (kept["photographs"], kept["unreadable"]) == (7, 1)
    # Stopped after the last step and before the card was written, it still knows what could not be read.
    card.unlink()
    (run.folder / "metrics.json").unlink()
    distil(settings(images=str(folder), steps=10))
    assert json.loads(card.read_text())["photographs"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "resnet50"}, "unknown backbone"),
        ({"size": "XXL"}, "unknown network size"),
        ({"image_size": [66, 64]}, "multiples of 4"),
        ({"schedule": "linear"}, "'constant' or 'cosine'"),
        ({"crop_scale": [0.5]}, "two shares"),
        ({"steps": 0}, "steps = 0"),
        ({"learning_rate": "1e-3"}, "write 1.0e-4"),
        ({"grayscale": 1.5}, "probability"),
        ({"padding": True}, "False with initialisation = 'fitted'"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimiser": "sgd"}, "one of adam, muon"),
    ],
)
def test_impossible_settings_are_named(settings, change, message):
    with pytest.raises(SettingsError, match=message):
        settings(**change)


def test_held_out_photographs_that_cannot_be_read_are_told_before_the_first_step(settings, given, tmp_path):
    shutil.copytree(given / "photographs", tmp_path / "photographs")
    held_out = NaturalImages(given / "photographs").part(
        torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()[:1]
    )
    (tmp_path / "photographs" / held_out.paths[0].name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ImageError, match="can be read"):
        distil(settings(images=str(tmp_path / "photographs"), held_out=1))
    assert not (tmp_path / "run").exists()


def test_reading_ahead_changes_nothing(settings, monkeypatch):
    """What an accelerator gets ahead of its use is what a CPU reads when it wants it, after a resume too."""
    plain = distil(settings("plain"))
    monkeypatch.setattr(
        distillation.loop, "prefetched", lambda draw, make, count, ahead: prefetched(draw, make, count, ahead=3)
    )
    ahead = settings("ahead", checkpoint_seconds=0.0)
    saved = Run.save_checkpoint

    def save_and_stop(self, name, state):
        saved(self, name, state)
        raise InterruptedError

    with monkeypatch.context() as stopping, pytest.raises(InterruptedError):
        stopping.setattr(Run, "save_checkpoint", save_and_stop)
        distil(ahead)
    one, other = (load_file(run.folder / "teacher.safetensors") for run in (plain, distil(ahead)))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_folders_and_held_out_sets_that_cannot_work(settings, tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        distil(settings(images=str(tmp_path / "absent")))
    with pytest.raises(SettingsError, match="only 8 photographs"):
        distil(settings(held_out=8))


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 3), (1e9, None)])
@pytest.mark.parametrize(
    ("part", "says"),
    [("loss", r"loss is not finite at step 4, on (/.*\.(jpg|png)(, )?){2}"), ("optimiser", "after step [46]")],
)
def test_what_is_not_finite_is_never_saved(settings, monkeypatch, seconds, kept, part, says):
    train_step = distillation.loop.Distiller.train_step

    def broken_step(self, large):
        loss = train_step(self, large)
        if self.step == 3 and part == "optimiser":
            self.optimisers[0].state[self.pdn.head.bias]["exp_avg_sq"].fill_(float("inf"))
        return loss * float("nan") if self.step == 3 and part == "loss" else loss

    monkeypatch.setattr(distillation.loop.Distiller, "train_step", broken_step)
    with pytest.raises(RunError, match=rf"{says}\. .* lower learning_rate \(now 0\.001\)"):
        distil(made := settings(checkpoint_seconds=seconds))
    assert (Run(made.run_folder).load_checkpoint() or {"step": None})["step"] == kept


def test_resume_with_other_settings_is_refused(settings):
    distil(settings())
    with pytest.raises(RunError, match="learning_rate"):
        distil(settings(learning_rate=2e-3))


LEARNED_WRONG = (  # changes of the state of an optimiser
    lambda kept: kept["param_groups"][0].update(betas="x"),
    lambda kept: kept["param_groups"][0].update(weight_decay=0.5),
    lambda kept: kept["state"][0].update(exp_avg=torch.zeros(3)),
    lambda kept: kept["state"][0]["step"].fill_(5),
)


def altered(states, change):
    """States of optimisers of which the first is changed."""
    states = copy.deepcopy(states)
    change(states[0])
    return states


def test_checkpoints_with_altered_values_are_refused(settings):
    run = distil(made := settings())
    (run.folder / "metrics.json").unlink()
    state = run.load_checkpoint()
    wrong = {"step": ["1", 1.5, True, 7, -1, 5], "seconds": ["x"], "recent": [3, ["a"]], "losses": [[], "x", ["x"]]}
    wrong |= {"unreadable": [3, [8], ["a"]]}
    wrong["optimisers"] = [altered(state["optimisers"], change) for change in LEARNED_WRONG]
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        run.save_checkpoint("last", state | {name: value})
        with pytest.raises(RunError, match=r"was altered .ValueError: .* = .* takes .*Delete the run's checkpoints"):
            distil(made)


def test_resume_on_other_photographs_is_refused(settings, given, tmp_path):
    distil(settings())
    shutil.copytree(given / "photographs", tmp_path / "photographs")
    (tmp_path / "photographs" / "0.png").rename(tmp_path / "photographs" / "other.png")
    with pytest.raises(RunError, match="photographs: "):
        distil(settings(images=str(tmp_path / "photographs")))


def test_altered_or_unfit_teachers_are_refused(settings, tmp_path):
    run = distil(settings())
    path, card = run.folder / "teacher.safetensors", run.folder / "teacher.json"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\x00\x01"[good[-1] == 0 :][:1])
    with pytest.raises(SettingsError, match="SHA-256"):
        load_teacher(path)
    path.write_bytes(good)
    card.write_text(json.dumps(json.loads(card.read_text()) | {"size": "S"}))
    with pytest.raises(SettingsError, match=r"layer trunk\.\d\.\w+ needs shape"):
        load_teacher(path)
    with pytest.raises(SettingsError, match="Shipped teachers"):
        load_teacher("L")
    with pytest.raises(SettingsError, match=r"there is no .*absent\.pth"):
        load_teacher(tmp_path / "absent.pth")


def test_muon_learns_more_from_the_same_steps(settings):
    few = {"steps": 30, "held_out": 2, "learning_rate": 2e-3}
    adam, orthogonalised = (distil(settings(name, optimiser=name, **few)) for name in ("adam", "muon"))
    assert orthogonalised.metrics["losses"][-1] < adam.metrics["losses"][-1] < adam.metrics["losses"][0]
