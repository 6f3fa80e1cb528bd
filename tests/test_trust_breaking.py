"""Killed anywhere, or on a disk that is full or read only: nothing half-written is left, and it ends as undisturbed."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from breaking import KILLS, NO_DISK, Ended, Fault, Job, check_same, contents, run, start
from counting import notebook
from safetensors.torch import save_file
from trust import fixed

from effad_lib.cli import main
from effad_lib.runs import PROJECT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks for processes in /proc"),
]

NAMES = ["train", "distill", "synthesize", "damage", "evaluate", "export", "openvino", "detect", "watch", "sweep"]
NAMES += ["gallery"]


def training(data: Path) -> list[str]:
    settings = f"--dataset folder --data-root {data} --size XS --image-size 64 64 --steps 40 --validate-every 10"
    return f"train --run-folder {{folder}} {settings} --checkpoint-every 4 --device cpu".split()


TRAINS = """from effad_lib.datasets import load_dataset
from effad_lib.evaluation import evaluate_run, finish_run
from effad_lib.training import TrainingSettings, train

settings = TrainingSettings.from_notebook(globals())
names = ("category", "seed", "validation_share")
split = load_dataset(dataset, root=data_root, **{name: getattr(settings, name) for name in names})
train(settings, split)"""

MEASURES = """detector, split, found = evaluate_run(run_folder, device)
finish_run(run_folder, detector, found)"""


def two_trainings(data: Path, folder: Path) -> Job:
    """A sweep of two seeds, each trained and measured by a notebook that does nothing else."""
    shipped = json.loads((PROJECT / "notebooks" / "03_training.ipynb").read_text(encoding="utf-8"))["cells"]
    parameters = next("".join(cell["source"]) for cell in shipped if cell["metadata"].get("tags") == ["parameters"])
    notebook(folder / "03_training.ipynb", parameters, TRAINS, MEASURES)
    values = {"dataset": "folder", "category": "", "data_root": str(data), "image_size": [64, 64], "device": "cpu"}
    values |= {"steps": 20, "validate_every": 10, "checkpoint_every": 4}
    sweep = {"notebooks": ["03_training"], "parameters": values, "seeds": [0, 1]}
    (folder / "two.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return Job(f"sweep {folder / 'two.yaml'} --runs {{folder}} --workers 2 --threads 1".split(), notebooks=folder)


@pytest.fixture(scope="module")
def trained(stripes_with_dents, tmp_path_factory):
    """The run folder of a training, to be measured, exported and used."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([argument.format(folder=folder) for argument in training(stripes_with_dents)]) == 0
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "resnet18.safetensors"
    save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module", params=NAMES)
def job(request, stripes_with_dents) -> Job:
    """The job of a name, small enough to be begun anew again and again."""
    name, data, asked = request.param, stripes_with_dents, request.getfixturevalue
    if name == "train":
        return Job(training(data))
    if name == "distill":
        settings = "--size XS --channels 16 --image-size 64 64 --backbone resnet18 --statistics-images 16 --steps 40"
        given = f"--images {data / 'train'} --backbone-weights {asked('backbone')} --checkpoint-seconds 0.01"
        return Job(f"distill --run-folder {{folder}} {settings} {given} --batch-size 2 --device cpu".split())
    if name == "synthesize":
        counts = "--train 24 --test-good 6 --test-per-defect 2 --image-size 64 64 --workers 2"
        return Job(f"synthesize gasket {{folder}} {counts}".split())
    if name == "damage":
        photographs = data / "train" / "good"
        return Job(f"damage {photographs} {{folder}} --test-good 3 --test-per-defect 2 --workers 2".split())
    if name == "sweep":
        return two_trainings(data, asked("tmp_path_factory").mktemp("notebooks"))
    run_folder = asked("trained")
    if name == "evaluate":
        return Job("evaluate {folder} --device cpu".split(), given=run_folder)
    if name == "gallery":
        return Job(["gallery", str(asked("evaluated")), "--out", "{folder}/gallery"])
    if name in ("export", "openvino"):
        kind, suffix = ("onnx", ".onnx") if name == "export" else ("openvino", ".xml")
        return Job(f"export {run_folder} --to {kind} --compare 2 --out {{folder}}/model{suffix}".split())
    model = run_folder / "model.safetensors"
    detect = f"detect {model} {data / 'test'} --out {{folder}} --save-maps --save-masks --device cpu".split()
    if name == "detect":
        return Job(detect)
    return Job([*detect, "--watch"], until=lambda folder: len(list(folder.rglob("results/*/*.json"))) == 8)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The training, measured."""
    job = Job("evaluate {folder} --device cpu".split(), given=trained)
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    job.prepare(folder)
    assert run(job, folder).code == 0
    return folder


@dataclass(frozen=True)
class Undisturbed:
    """How a job ends when nothing happens, what all files in its folder say then, and how many bytes they are."""

    ended: Ended
    contents: dict[str, Any]
    size: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a job works, again and again: some files name it."""
    return tmp_path_factory.mktemp("work") / "out"


@pytest.fixture(scope="module")
def undisturbed(job, folder) -> Undisturbed:
    job.prepare(folder)
    ended = run(job, folder)
    assert ended.code == 0, ended.said
    return Undisturbed(ended, contents(folder), size_of(folder))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_killed_anywhere_it_goes_on_and_ends_as_undisturbed(job, undisturbed, folder, request):
    """At a random moment, or with a random file half or wholly written; all that is seen then is whole."""
    name = request.node.callspec.params["job"]
    rng, kills = random.Random(name), 0
    job.prepare(folder)
    while True:
        fault, moment = Fault(), None
        if kills < KILLS and (kills + NAMES.index(name)) % 2:
            moment = rng.uniform(0, undisturbed.ended.seconds)
        elif kills < KILLS:
            fault = Fault(rng.randint(1, undisturbed.ended.files), rng.random() < 0.5)
        again = run(job, folder, fault, moment)
        if again.code == -signal.SIGKILL:
            kills += 1
            contents(folder)
            continue
        assert again.code == 0, again.said
        check_same(contents(folder), undisturbed.contents)
        if kills == KILLS:
            return
        job.prepare(folder)


def test_a_disk_that_becomes_read_only_is_one_clear_error(job, undisturbed, folder, request):
    if job.notebooks:
        pytest.skip("the fault reaches one process, and a sweep has many")
    rng = random.Random(request.node.name)
    for _ in range(KILLS):
        job.prepare(folder)
        fault = Fault(rng.randint(1, undisturbed.ended.files), cut=True, read_only=True)
        check_refused(run(job, folder, fault), os.strerror(errno.EROFS))
        assert not list(folder.rglob("*.partial"))
        contents(folder)
        check_goes_on(job, folder, undisturbed)


@pytest.mark.parametrize("job", ["train", "distill", "evaluate", "detect", "gallery"], indirect=True)
def test_a_folder_that_becomes_immutable_is_one_clear_error(job, undisturbed, folder):
    """By the system itself, in the middle of the work; what was finished before stays whole."""
    job.prepare(folder)
    if not (fixed("-R", "+i", folder) and fixed("-R", "-i", folder)):
        pytest.skip("only root makes folders immutable, on file systems that know it")
    first, said = start(job, folder, Fault(file=1 + undisturbed.ended.files // 2, stop=True))
    wait_until_stopped(first)
    try:
        assert fixed("-R", "+i", folder)
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    finally:
        assert fixed("-R", "-i", folder)
    check_refused(Ended(first.exitcode, said.read_text(), 0.0), os.strerror(errno.EPERM))
    contents(folder)
    check_goes_on(job, folder, undisturbed)


def test_a_disk_that_fills_up_is_one_clear_error(job, undisturbed, folder, request):
    """A real disk, of which every writer hears, also those of other libraries."""
    rng = random.Random(request.node.name)
    job.prepare(folder)
    given = size_of(folder)
    for _ in range(KILLS):
        job.prepare(folder)
        size = given + int(rng.uniform(0.05, 0.8) * (undisturbed.size - given))
        full = run(job, folder, Fault(disk=size))
        if full.code == NO_DISK:
            pytest.skip("this user may not make a disk")
        check_refused(full, os.strerror(errno.ENOSPC))
        shutil.rmtree(folder)
        folder.with_name("left").rename(folder)
        contents(folder)
        check_goes_on(job, folder, undisturbed)


@pytest.mark.parametrize("job", ["train", "distill", "evaluate"], indirect=True)
def test_of_two_at_once_in_a_run_folder_the_second_is_refused(job, undisturbed, folder):
    """The first is stopped in the middle of its work, then killed: what is started next goes on at once."""
    job.prepare(folder)
    first, _ = start(job, folder, Fault(file=4, stop=True))
    wait_until_stopped(first)
    before = contents(folder)
    check_refused(run(job, folder), f"{folder} is in use by process {first.pid} on")
    check_same(contents(folder), before)
    first.kill()
    first.join()
    check_goes_on(job, folder, undisturbed)


def wait_until_stopped(process) -> None:
    """Until a process has met the fault that stops it."""
    until = time.monotonic() + 120
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until and process.is_alive()
        time.sleep(0.02)


def check_refused(ended: Ended, says: str) -> None:
    """An error is one line of ours with what the system says, and nothing of Python's."""
    errors = [line for line in ended.said.splitlines() if line.startswith("effad: ")]
    assert ended.code == 2 and len(errors) == 1 and says in errors[0], ended
    assert "Traceback" not in ended.said and "Exception" not in ended.said, ended.said


def check_goes_on(job: Job, folder: Path, undisturbed: Undisturbed) -> None:
    """Started again on a sound disk, it ends as if nothing had been."""
    again = run(job, folder)
    assert again.code == 0, again.said
    check_same(contents(folder), undisturbed.contents)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=lambda end: end.name)
def test_a_watch_killed_at_any_moment_nothing_is_lost_and_nothing_twice(model, picture, tmp_path, end):
    """Twice killed, once stopped by Ctrl-C or as a service is: every image has one whole result."""
    images, out = tmp_path / "in", tmp_path / "out"
    for index in range(12):
        picture(images / f"{index:02}.png", size=(64, 64), seed=index)
    command = [sys.executable, "-m", "effad_lib.cli", "detect", str(model), str(images), "--out", str(out), "--watch"]
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

    def done():
        return len(list((out / "results").glob("*.json")))

    said = []
    for wanted in (3, 7, 12):
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
        limit = time.monotonic() + 120
        while done() < wanted and time.monotonic() < limit:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(end if wanted == 12 else signal.SIGKILL)
        said.append(process.communicate(timeout=60)[0])
        for path in (out / "results").glob("*.json"):
            assert json.loads(path.read_text())["error"] == ""
    assert process.returncode == 0 and "images judged" in said[-1]
    judged = [line.partition(":")[0] for text in said for line in text.splitlines() if ", score " in line]
    assert len(judged) == len(set(judged)) and done() == 12  # at most the one in hand was not yet told
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{index:02}.png" for index in range(12)]
    assert np.isfinite([float(row["score"]) for row in rows]).all()
