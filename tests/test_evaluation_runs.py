"""A run is evaluated on its own data set: refused if it cannot be, metrics written last."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from trust import files

from effad_lib import runs
from effad_lib.datasets import DatasetError
from effad_lib.evaluation import EvaluationSettings, evaluate_run, finish_run, result
from effad_lib.images import read_image
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError


@pytest.fixture
def finished(model, picture, tmp_path):
    """A run folder as training leaves it, and its data set of random pictures."""
    for name in [*(f"train/good/{k}.png" for k in range(14)), "test/good/0.png", "test/dent/0.png", "test/dent/1.png"]:
        picture(tmp_path / "data" / name, seed=len(name) + ord(name[-5]))
    made = {"dataset": "folder", "data_root": str(tmp_path / "data"), "category": "", "seed": 1}
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "parameters.yaml").write_text(yaml.safe_dump(made | {"validation_share": 0.2, "steps": 3}))
    run.model.write_bytes(model.read_bytes())
    return run


def test_a_run_is_evaluated_on_its_own_split_and_finished_last(finished):
    detector, split, found = evaluate_run(finished.folder, "cpu")
    assert (len(split.train), len(split.validation)) == (11, 3)
    assert found.samples == split.test and found.labels.tolist() == [1, 1, 0]
    assert found.threshold == detector.threshold and not finished.done
    image = torch.from_numpy(read_image(split.test[0].image, detector.image_size))[None] / 255
    with torch.inference_mode():
        assert found.scores[0] == pytest.approx(float(detector(image).score), rel=1e-4)

    written = finish_run(finished.folder, detector, found)
    assert finished.metrics == written
    assert list(written) == [
        "data",
        *found.metrics(),
        "image_auroc_unnormalised",
        "latency_ms",
        "latency_on",
        "seconds",
        "steps",
        "size",
    ]
    assert written["latency_ms"] > 0 and "CPU" in written["latency_on"]
    assert written["data"] == "random images" and written["size"] == "XS" and written["au_pro"] is None
    assert len(pd.read_csv(finished.folder / "scores.csv")) == len(list((finished.folder / "maps").iterdir())) == 3


@pytest.mark.parametrize("full", ["maps/00000.npz", "maps/00002.npz", "scores.csv", "metrics.json"])
def test_on_a_full_disk_an_earlier_evaluation_stays(finished, monkeypatch, full):
    detector, _, found = evaluate_run(finished.folder, "cpu")
    finish_run(finished.folder, detector, found)
    before, write = files(finished.folder), runs.write_bytes
    del before[".lock"]

    def fill(path, data):
        if Path(path).as_posix().endswith(full):
            raise RunError(f"cannot write {path}: the disk is full")
        return write(path, data)

    for module in (runs.files, result):
        monkeypatch.setattr(module, "write_bytes", fill)
    with pytest.raises(RunError, match=f"cannot write {finished.folder}/.*{full}: the disk is full"):
        finish_run(finished.folder, detector, found)
    assert {name: data for name, data in files(finished.folder).items() if name != ".lock"} == before


@pytest.mark.parametrize("moved", range(5))
def test_killed_between_two_evaluations_a_run_is_not_done(finished, monkeypatch, moved):
    """Of the new one three maps, the table and its figures are moved, one after the other."""
    detector, _, found = evaluate_run(finished.folder, "cpu")
    finish_run(finished.folder, detector, found)
    replace, left = Path.replace, iter([True] * moved)

    def move(path, target):
        if path.parent != target.parent and not next(left, False):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        finish_run(finished.folder, detector, found)
    assert not finished.done
    monkeypatch.undo()
    assert finish_run(finished.folder, detector, found)["au_pro"] is None and finished.done


def test_a_folder_that_refuses_an_evaluation_is_named_in_one_line(finished):
    detector, _, found = evaluate_run(finished.folder, "cpu")
    (finished.folder / "maps").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*metrics\.json: File exists"):
        finish_run(finished.folder, detector, found)


def test_a_folder_without_training_or_test_images_is_refused(finished, tmp_path):
    with pytest.raises(RunError, match=r"elsewhere is not the folder of a finished training.*effad train"):
        evaluate_run(tmp_path / "elsewhere")
    for path in (tmp_path / "data" / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(RunError, match="folder/data has no test images"):
        evaluate_run(finished.folder)


@pytest.mark.parametrize("value", [0, 1])
def test_a_run_with_an_empty_mask_is_refused_as_by_the_training(finished, tmp_path, value):
    for name, marked in (("0", 255), ("1", value)):
        mask = tmp_path / "data" / "ground_truth" / "dent" / f"{name}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((80, 96), marked, np.uint8)).save(mask)
    with pytest.raises(DatasetError, match=r"1 of 2 samples are faulty(.|\n)*1_mask\.png: an empty mask"):
        evaluate_run(finished.folder, "cpu")


def test_settings_are_checked():
    with pytest.raises(SettingsError, match=r"least_image_auroc = 95\.0.*between 0 and 1"):
        EvaluationSettings(least_image_auroc=95)
    with pytest.raises(SettingsError, match="device = 'gpu'"):
        EvaluationSettings(device="gpu")
    with pytest.raises(SettingsError, match=r"unknown parameter 'run_foldr'.*Did you mean 'run_folder'"):
        EvaluationSettings.from_mapping({"run_foldr": "runs/a"})
