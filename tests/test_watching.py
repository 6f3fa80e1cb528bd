"""A watched folder: each file once, half-written ones waited for, whole results whenever it is killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from effad_lib import watching
from effad_lib.cli import main
from effad_lib.detection import Wanted, detect
from effad_lib.images import ImageError
from effad_lib.runs import PROJECT
from effad_lib.settings import SettingsError
from effad_lib.watching import watch


@pytest.fixture
def looks(monkeypatch):
    """A function that makes `watch` call `between[k]()` after its k-th look and end after the last."""

    def script(*between):
        calls = iter(between)
        over = threading.Event()

        def wait(seconds, interrupted):
            step = next(calls, None)
            over.set() if step is None else step()

        class Interrupt:
            def __enter__(self):
                return over.is_set

            def __exit__(self, *_):
                return False

        monkeypatch.setattr(watching, "_wait", wait)
        monkeypatch.setattr(watching, "finish_step_on_interrupt", Interrupt)

    return script


def nothing():
    """Look again."""


def results(out):
    return {path.relative_to(out / "results").as_posix(): json.loads(path.read_text()) for path in out.rglob("*.json")}


def test_each_image_is_judged_once_as_detect_judges_it(small_detector, picture, tmp_path, looks):
    images, out = tmp_path / "in", tmp_path / "in" / "out"
    picture(images / "a.png")
    said = []
    looks(nothing, lambda: picture(images / "line" / "b.png", seed=1), nothing, nothing, nothing)
    assert watch(small_detector, images, out, Wanted(save_maps=True), report=said.append) == 2
    found = results(out)
    assert list(found) == ["a.png.json", "line/b.png.json"]
    assert len(said) == 2 and said[0].startswith("a.png: ") and "score" in said[0]
    table = detect(small_detector, images, tmp_path / "plain").set_index("file")
    for name in ("a.png", "line/b.png"):
        for field in ("score", "threshold", "decision", "marked"):
            assert found[f"{name}.json"][field] == table.loc[name, field]
    assert (out / "maps" / "line" / "b.png.npy").is_file() and (out / "heatmaps" / "a.png.png").is_file()
    with open(out / "scores.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.png", "line/b.png"]
    looks(nothing, nothing)
    assert watch(small_detector, images, out, report=said.append) == 0  # a restart finds nothing new
    picture(images / "a.png", seed=9)
    looks(nothing, nothing)
    assert watch(small_detector, images, out, report=said.append) == 1  # another file of the same name
    assert results(out)["a.png.json"]["score"] != found["a.png.json"]["score"]


def test_half_written_files_are_waited_for(small_detector, picture, tmp_path, looks):
    whole = picture(tmp_path / "whole.png").read_bytes()
    path, out = tmp_path / "in" / "a.png", tmp_path / "out"
    path.parent.mkdir()

    def write(size):
        path.write_bytes(whole[:size])
        assert not results(out)

    looks(
        lambda: write(0),
        lambda: write(100),
        nothing,
        nothing,
        lambda: write(len(whole) // 2),
        lambda: write(None),
        nothing,
    )
    assert watch(small_detector, path.parent, out) == 1
    assert results(out)["a.png.json"]["error"] == ""


def test_a_file_that_stays_broken_is_named_and_may_be_replaced(small_detector, picture, tmp_path, looks):
    path, out = tmp_path / "in" / "a.png", tmp_path / "out"
    path.parent.mkdir()
    path.write_bytes(b"never an image")
    looks(nothing, nothing)
    assert watch(small_detector, path.parent, out, patience=0) == 1
    assert "cannot be read as an image" in results(out)["a.png.json"]["error"]
    looks(nothing, nothing)
    assert watch(small_detector, path.parent, out, patience=0) == 0
    picture(path)
    looks(nothing, nothing)
    assert watch(small_detector, path.parent, out, patience=0) == 1 and not results(out)["a.png.json"]["error"]


def test_files_that_are_taken_away_do_no_harm(small_detector, picture, tmp_path, looks, monkeypatch):
    path = picture(tmp_path / "in" / "a.png")
    seen = []
    monkeypatch.setattr(
        watching, "detect_one", lambda *_: seen.append(path.unlink()) or (_ for _ in ()).throw(ImageError("x"))
    )
    looks(nothing, nothing)
    assert watch(small_detector, path.parent, tmp_path / "out", patience=0) == 0 and len(seen) == 1


def test_what_cannot_be_watched_is_refused(small_detector, tmp_path, model, capsys):
    with pytest.raises(ImageError, match="no such folder to watch"):
        watch(small_detector, tmp_path / "none", tmp_path / "out")
    with pytest.raises(SettingsError, match="tile overlap"):
        watch(small_detector, tmp_path, tmp_path / "out", Wanted(tile_overlap=1))
    assert main(["detect", str(model), str(tmp_path), "--watch", "--masks", str(tmp_path)]) == 2
    assert "Leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_and_nothing_twice(model, picture, tmp_path):
    """Twice killed, once stopped: every image has one whole result."""
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
        process.send_signal(signal.SIGINT if wanted == 12 else signal.SIGKILL)
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
