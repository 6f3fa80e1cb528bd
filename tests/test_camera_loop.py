"""README's camera loop, which needs nothing of this project, decides as `detect` does."""

import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from effad_lib.calibration import calibrate
from effad_lib.detection import detect
from effad_lib.detector import EfficientAD
from effad_lib.export import ExportSettings, export
from effad_lib.images import find_images, load_images, packaged_photographs
from effad_lib.runs import PROJECT

LEVELS = (0, 4095)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function that runs README's program on a model and images, in a folder where nothing of the project is."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    (source,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "camera_loop" in code]
    assert len(source.splitlines()) <= 35 and not re.search("effad_lib|torch", source)
    folder = tmp_path_factory.mktemp("machine")
    (folder / "camera_loop.py").write_text(source)
    return lambda path, *files: subprocess.run(
        [sys.executable, "camera_loop.py", path, *files], cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Six parts of one photograph of 96×120 pixels, in `colour`, and in `deep` as 16-bit grey that reaches 4,800."""
    folder = tmp_path_factory.mktemp("frames")
    coffee = next(path for path in packaged_photographs() if path.stem == "coffee")
    for kind in ("colour", "deep"):
        (folder / kind).mkdir()
    with Image.open(coffee) as photograph:
        for index in range(6):
            part = photograph.crop((40 * index, 30 * index, 40 * index + 120, 30 * index + 96))
            part.save(folder / "colour" / f"{index}.png")
            grey = np.linspace(0, 1, 120) * 4800 * np.asarray(part.convert("L"), dtype=float) / 255
            Image.fromarray(grey.astype(np.uint16)).save(folder / "deep" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def exported(frames, tmp_path_factory):
    """A function that exports a detector with random weights, calibrated on frames of a kind; returns it and the file.

    One for deep frames knows their levels.
    """

    @cache
    def make(kind, **how):
        torch.manual_seed(0)
        detector, folder = EfficientAD("XS", 8, image_size=(64, 64)), tmp_path_factory.mktemp("exported")
        detector.levels = LEVELS if kind == "deep" else None
        calibrate(detector, load_images(find_images(frames / kind), (64, 64), levels=detector.levels))
        model = detector.save(folder / "model.safetensors", {"data": kind})
        settings = ExportSettings(compare=1, **how)
        return detector, export(model, settings, normals=frames / kind, out=folder / "model.onnx")[0]

    return make


@pytest.mark.parametrize("kind, how", [("colour", {}), ("colour", {"any_size": True}), ("deep", {})])
def test_it_decides_as_detect_does(program, exported, frames, tmp_path, kind, how):
    detector, path = exported(kind, **how)
    files = find_images(frames / kind)
    ran = program(path, *files)
    assert ran.returncode == 0, ran.stderr
    said, table = ran.stdout.splitlines(), detect(detector, frames / kind, tmp_path / "out").set_index("file")
    assert len(said) == len(files) == 6
    for line, image in zip(said, files, strict=True):
        row = table.loc[image.name]
        assert line.startswith(f"{image}: ")
        assert float(re.search(r"score (\S+),", line)[1]) == pytest.approx(row["score"], abs=0.005)
        if abs(row["score"] - detector.threshold) > 0.02 * detector.threshold:  # that of an image is the threshold
            assert f": {row['decision']}, " in line


def test_what_it_cannot_judge_it_refuses(program, exported, frames):
    """16 bits without levels, which Pillow would turn white, and a file for batches, which ends in ONNX Runtime."""
    deep, colour = frames / "deep" / "0.png", frames / "colour" / "0.png"
    ran = program(exported("colour")[1], colour, deep)
    assert ran.returncode == 1 and len(ran.stdout.splitlines()) == 1
    assert ran.stderr == f"{deep} has 16 bits, the model knows 8: train it with --levels BLACK WHITE\n"
    path = exported("colour", batch=8)[1]
    ran = program(path, colour)
    assert ran.returncode == 1 and not ran.stdout
    assert ran.stderr == f"{path} takes 8 images at once, this loop has one: export without --batch\n"
