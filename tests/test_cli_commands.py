"""The commands: each from its options to what it writes, prints and ends with."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from commands import failure
from PIL import Image
from safetensors.torch import save_file
from trust import files

from effad_lib import evaluation, reports
from effad_lib.cli import main
from effad_lib.detector import EfficientAD
from effad_lib.networks import PDN
from effad_lib.runs import Run
from effad_lib.training import TrainingSettings


@pytest.fixture
def teacher(tmp_path):
    """A random XS teacher of 8 channels with its card."""
    path = tmp_path / "teachers" / "pdn_xs.safetensors"
    path.parent.mkdir()
    torch.manual_seed(0)
    save_file({name: value.contiguous() for name, value in PDN("XS", 8).state_dict().items()}, path)
    card = {"network": "PDN-XS", "size": "XS", "channels": 8, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(card))
    return path


@pytest.fixture
def product(tmp_path, picture):
    """A data set of 14 good images and two test images with a mask, in the layout of MVTec AD."""
    folder = tmp_path / "product"
    for index in range(14):
        picture(folder / "train" / "good" / f"{index:03}.png", size=(64, 64), seed=index)
    picture(folder / "test" / "good" / "000.png", size=(64, 64), seed=20)
    picture(folder / "test" / "hole" / "000.png", size=(64, 64), seed=21)
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    (folder / "ground_truth" / "hole").mkdir(parents=True)
    Image.fromarray(mask).save(folder / "ground_truth" / "hole" / "000_mask.png")
    return folder


def test_run_passes_its_options_on(monkeypatch, tmp_path):
    from effad_lib import batch

    calls = []
    monkeypatch.setattr(batch, "run_profile", lambda *positional, **named: calls.append((positional, named)))
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == 0
    assert main(["run", "--profile", "smoke", "--force", "--runs", "other"]) == 0
    assert calls == [
        (("quick",), {"runs": "runs", "force": False}),  # in the project's folder, wherever one is
        (("smoke",), {"runs": tmp_path.resolve() / "other", "force": True}),
    ]


def test_synthesize_writes_a_data_set(tmp_path, capsys):
    arguments = "--image-size 64 64 --train 2 --test-good 1 --test-per-defect 1 --severity 0.5 1.0 --seed 3"
    assert main(["synthesize", "board", str(tmp_path), *arguments.split()]) == 0
    folder = tmp_path / "board"
    manifest = json.loads((folder / "manifest.json").read_text())
    asked = manifest["settings"]
    assert (asked["image_size"], asked["seed"], asked["severity"]) == ([64, 64], 3, [0.5, 1.0])
    assert len(list((folder / "train" / "good").iterdir())) == 2
    assert str(folder) in capsys.readouterr().out
    assert "another data set" in failure(capsys, "synthesize", "board", tmp_path)


def test_damage_makes_a_data_set_of_photographs(product, tmp_path, capsys):
    photographs = product / "train" / "good"
    assert main(["damage", str(photographs), str(tmp_path), *"--test-good 1 --test-per-defect 1".split()]) == 0
    manifest = json.loads((tmp_path / "photographs" / "manifest.json").read_text())
    assert {"scratch", "cut_paste"} <= set(manifest["settings"]["defects"])
    assert str(tmp_path / "photographs") in capsys.readouterr().out
    assert "test_good = 40" in failure(capsys, "damage", photographs, tmp_path / "other")


def test_images_of_16_bits_go_all_the_way_with_levels(teacher, product, tmp_path, capsys):
    for path in product.rglob("*.png"):
        if "ground_truth" not in path.parts:
            deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
            Image.fromarray(deep).save(path)
    run = tmp_path / "run"
    settings = f"--dataset folder --data-root {product} --run-folder {run} --teacher {teacher} --size XS"
    arguments = [*settings.split(), *"--image-size 64 64 --steps 2 --device cpu".split()]
    assert "with the values of black and white, such as --levels 0 4095" in failure(capsys, "train", *arguments)
    shutil.rmtree(run)
    assert main(["train", *arguments, "--levels", "0", "4080"]) == 0
    assert main(["evaluate", str(run)]) == 0
    model = EfficientAD.load(run / "model.safetensors")
    assert model.levels == (0, 4080)
    for test in ("good", "hole"):
        deep = np.asarray(Image.open(product / "test" / test / "000.png"))
        expected = model.inspect(np.repeat((deep // 16).astype(np.uint8)[None, None], 3, axis=1)).score[0]
        main(["detect", str(run / "model.safetensors"), str(product / "test" / test), "--out", str(tmp_path / test)])
        row = (tmp_path / test / "scores.csv").read_text().splitlines()[1].split(",")
        assert float(row[1]) == pytest.approx(float(expected), rel=1e-5)


def test_train_evaluate_and_detect(teacher, product, tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    settings = f"--dataset folder --data-root {product} --run-folder {run} --teacher {teacher} --size XS"
    arguments = [*settings.split(), *"--image-size 64 64 --steps 2 --validate-every 1 --device cpu".split()]
    assert main(["train", *arguments]) == 0
    assert yaml.safe_load((run / "parameters.yaml").read_text())["steps"] == 2
    assert str(run / "model.safetensors") in capsys.readouterr().out

    assert main(["evaluate", str(run)]) == 0
    metrics = Run(run).metrics
    assert metrics["data"] == "folder/product" and metrics["seconds"] > 0
    assert {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "au_pro"} < metrics.keys()
    assert f"{metrics['au_pro']:.3f}" in capsys.readouterr().out
    assert (run / "scores.csv").is_file()

    truth = ["--masks", product / "ground_truth", "--out", out, "--save-maps"]
    assert main(["detect", *map(str, [run / "model.safetensors", product / "test", *truth])]) == 0
    assert "2 images" in capsys.readouterr().out
    assert (out / "heatmaps" / "hole" / "000.png.png").is_file()
    detected = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()[1:]]
    evaluated = [line.split(",") for line in (run / "scores.csv").read_text().splitlines()[1:]]
    assert [float(row[1]) for row in detected] == pytest.approx([float(row[3]) for row in evaluated], rel=1e-4)

    assert main(["gallery", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "gallery" / "index.html")
    assert len(list((run / "gallery").glob("*.jpg"))) == 2
    assert "Measure it: effad evaluate" in failure(capsys, "gallery", str(tmp_path / "nothing"))

    # The same folder again with other settings is refused, and the model stays.
    before = (run / "model.safetensors").read_bytes()
    assert "steps: 2 there, 3 now" in failure(capsys, "train", *arguments, "--steps", "3")
    assert (run / "model.safetensors").read_bytes() == before


def test_probe_judges_teachers_and_records_it_in_their_cards(teacher, product, capsys):
    arguments = f"{teacher} --on folder={product} --image-size 64 64 --bank 100 --device cpu --record"
    assert main(["probe", *arguments.split()]) == 0
    header, detection, localisation, path = capsys.readouterr().out.splitlines()
    assert header.split() == ["untrained", "PDN-XS", "teacher", str(teacher)]
    assert detection.startswith("image AU-ROC folder/product") and localisation.split()[:2] == [
        "AU-PRO",
        "folder/product",
    ]
    card = json.loads(teacher.with_suffix(".json").read_text())
    assert path == str(teacher.with_suffix(".json")) and card["channels"] == 8, "the rest of the card stays"
    assert card["probe"]["bank"] == 100 and card["probe"]["image_size"] == [64, 64]
    shown = [float(value) for line in (detection, localisation) for value in line.split()[-2:]]
    kept = [row[kind] for row in card["probe"]["found"] for kind in ("untrained", "teacher")]
    assert kept == pytest.approx(shown, abs=1e-3)
    teacher.with_suffix(".json").unlink()
    assert "it has no card pdn_xs.json" in failure(capsys, "probe", *arguments.split())


def test_a_checkpoint_of_another_size_is_named(teacher, product, tmp_path, capsys):
    run = tmp_path / "run"
    other = EfficientAD("XS", channels=4, image_size=(64, 64))
    networks = {name: getattr(other, name).state_dict() for name in ("student", "autoencoder")}
    Run(run).save_checkpoint("last", {**networks, "step": 1})
    before = (run / "checkpoints" / "last.pt").read_bytes()
    settings = f"--dataset folder --data-root {product} --run-folder {run} --teacher {teacher} --size XS"
    said = failure(capsys, "train", *settings.split(), *"--image-size 64 64 --steps 2 --device cpu".split())
    assert "its checkpoint is not of size XS with 8 channels" in said
    assert (run / "checkpoints" / "last.pt").read_bytes() == before


def test_training_without_enough_images(teacher, picture, tmp_path, capsys):
    for index in range(9):
        picture(tmp_path / "few" / f"{index}.png", seed=index)
    settings = f"--dataset folder --data-root {tmp_path / 'few'} --run-folder {tmp_path / 'run'} --teacher {teacher}"
    assert "10 are needed" in failure(capsys, "train", *settings.split(), "--size", "XS")
    assert not (tmp_path / "run").exists()


def test_evaluate_without_test_images(model, teacher, product, tmp_path, capsys):
    shutil.rmtree(product / "test")
    run = tmp_path / "run"
    Run(run).start(TrainingSettings(dataset="folder", data_root=str(product), size="XS", image_size=[64, 64]))
    shutil.copy(model, run / "model.safetensors")
    assert "has no test images" in failure(capsys, "evaluate", run)
    assert not Run(run).done


@pytest.fixture
def trained(model, product, tmp_path):
    """A function that makes a run folder as a training on the product leaves it."""

    def make(name, **settings):
        run = Run(tmp_path / name)
        settings = {"data_root": str(product), "size": "XS", "image_size": [64, 64]} | settings
        run.start(TrainingSettings(dataset="folder", run_folder=str(run.folder), **settings))
        shutil.copy(model, run.model)
        return run

    return make


def test_all_runs_are_checked_before_the_first_is_evaluated(trained, tmp_path, capsys):
    first = trained("a/run")
    assert "not the folder of a finished training" in failure(capsys, "evaluate", first.folder, tmp_path / "not_a_run")
    assert not first.done


def test_maps_of_several_runs_lie_below_the_names_of_their_runs(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports, "figures", lambda *_: ())  # which take seconds to draw
    runs = [trained("a/one"), trained("a/two", seed=1), trained("b/one", seed=2)]
    one, two, other = (run.folder for run in runs)
    out = tmp_path / "tiffs"
    said = failure(capsys, "evaluate", one, two, other, "--save-tiffs", out)
    assert f"{one} and {other} would both have their maps in {out / 'one' / 'product'}" in said
    assert not out.exists() and not any(run.done for run in runs)
    assert main(["evaluate", str(one), str(two), "--device", "cpu", "--save-tiffs", str(out)]) == 0
    assert main(["evaluate", str(other), "--device", "cpu", "--save-tiffs", str(out)]) == 0
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.tiff")}
    below = [f"product/test/{defect}/000.tiff" for defect in ("good", "hole")]
    assert written == {folder + file for folder in ("one/", "two/", "") for file in below}


def test_a_place_for_maps_is_checked_before_any_image_is_scored(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = trained("run")
    for place in (tmp_path / "file", "/proc/maps_of_ours"):
        assert "cannot write" in failure(capsys, "evaluate", run.folder, "--save-tiffs", place) and not run.done


@pytest.mark.parametrize("name", ["maps", "scores.csv", "metrics.json"])
def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(trained, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(reports, "figures", lambda *_: ())  # which take seconds to draw
    run = trained("run")
    assert main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    if name == "maps":
        shutil.rmtree(run.folder / name)
        (run.folder / name).write_text("")
    else:
        (run.folder / name).unlink()
        (run.folder / name).mkdir()
    (run.folder / ".lock").unlink()
    before = files(run.folder)
    monkeypatch.setattr(evaluation, "evaluate", None)  # not asked: it is told before any image is scored
    assert re.search(f"cannot write .*{name}", failure(capsys, "evaluate", run.folder))
    (run.folder / ".lock").unlink()
    assert files(run.folder) == before


def test_maps_with_the_same_place_are_refused_before_any_image_is_scored(trained, product, picture, tmp_path, capsys):
    picture(product / "test" / "good" / "000.jpg", size=(64, 64))
    run = trained("run")
    said = failure(capsys, "evaluate", run.folder, "--save-tiffs", tmp_path / "tiffs")
    assert "2 images would have their map in test/good/000.tiff" in said and not run.done


def test_detect_says_by_its_exit_code_whether_all_was_read(model, picture, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    good = picture(images / "a.png")
    assert main(["detect", str(model), str(good), "--out", str(out)]) == 0
    (images / "b.png").write_bytes(b"")
    assert main(["detect", str(model), str(images), "--out", str(out)]) == 1
    assert "1 images" in capsys.readouterr().out
    good.unlink()
    assert "none of 1 images could be read" in failure(capsys, "detect", model, images, "--out", out)


def test_detect_refuses_what_is_no_model(picture, tmp_path, capsys):
    fake = tmp_path / "model.safetensors"
    fake.write_bytes(b"\x80\x04nothing")
    assert "not a whole effad model" in failure(capsys, "detect", fake, picture(tmp_path / "a.png"))
    save_file({"x": torch.zeros(2)}, fake)
    assert "not a whole effad model" in failure(capsys, "detect", fake, tmp_path / "a.png")


def test_a_sweep_ends_with_the_list_of_what_failed(tmp_path, capsys):
    """Notebook 04 finds no training in the folder of a run that has none."""
    path = tmp_path / "mine.yaml"
    path.write_text("notebooks: [04_evaluation]\nparameters: {device: cpu}\ncases: {none: }\n")
    assert main(["sweep", str(path), "--runs", str(tmp_path / "runs"), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^none failed: 04_evaluation.ipynb, cell \d+: RunError: .*finished training", said, re.MULTILINE)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert main(["sweep", str(path), "--runs", str(tmp_path / "runs"), "--dry-run"]) == 0
    assert "mine: 1 runs, 1 failed" in capsys.readouterr().out


def test_a_faulty_sweep_is_one_line(tmp_path, capsys):
    assert "unknown sweep 'quikc'" in failure(capsys, "sweep", "quikc")
    (tmp_path / "mine.yaml").write_text("{notebooks: [03_training], grid: {learning_rate: [1e-4]}}")
    assert "write 1.0e-4" in failure(capsys, "sweep", tmp_path / "mine.yaml")
    assert "Did you mean" in failure(capsys, "sweep", "quick", "--dry-runn")
