"""A watched folder: each file once, half-written ones waited for, whole results whenever it is killed."""

import copy
import csv
import errno
import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from effad_lib import reading, watching
from effad_lib.cli import main
from effad_lib.detection import Wanted, detect
from effad_lib.detector import EfficientAD
from effad_lib.execution.lock import LockError
from effad_lib.images import ImageError
from effad_lib.runs import RunError
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
    return {
        path.relative_to(out / "results").as_posix(): json.loads(path.read_text())
        for path in sorted(out.rglob("*.json"))
    }


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


def test_a_file_that_the_system_keeps_back_is_told_once_and_judged_when_it_lets_go(
    small_detector, picture, tmp_path, looks, monkeypatch
):
    opened, kept = reading.Image.open, []

    def refusing(path, **options):
        if len(kept) < 3:
            kept.append(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, **options)

    picture(tmp_path / "in" / "a.png")
    monkeypatch.setattr(reading.Image, "open", refusing)
    looks(*[nothing] * 6)
    said = []
    assert watch(small_detector, tmp_path / "in", tmp_path / "out", patience=0, report=said.append) == 1
    assert len(said) == 2 and "Permission denied" in said[0] and said[1].startswith("a.png: ") and len(kept) == 3


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


# --- what would end it at night -------------------------------------------------------------------------------------


def test_a_name_that_is_no_text_is_told_once_and_the_rest_judged(small_detector, picture, tmp_path, looks):
    images, out = tmp_path / "in", tmp_path / "out"
    content = picture(images / "a.png").read_bytes()
    bad, said = os.fsencode(images) + b"/\xe4.png", []

    def drop():
        with open(bad, "wb") as file:
            file.write(content)
        picture(images / "z.png", seed=1)

    looks(nothing, drop, nothing, nothing, nothing)
    assert watch(small_detector, images, out, report=said.append) == 2
    assert list(results(out)) == ["a.png.json", "z.png.json"]
    told = [line for line in said if "passed by" in line]
    assert len(told) == 1 and "the name b'\\xe4.png' is not UTF-8. Rename the file." in told[0]
    assert (out / "scores.csv").is_file()


def test_a_folder_whose_name_is_no_text_is_told_too(small_detector, picture, tmp_path, looks):
    picture(tmp_path / "in" / "a.png")
    os.mkdir(os.fsencode(tmp_path / "in") + b"/\xe4")
    said = []
    looks(nothing, nothing)
    assert watch(small_detector, tmp_path / "in", tmp_path / "out", report=said.append) == 1
    assert sum("is not UTF-8. Rename the folder." in line for line in said) == 1


def test_a_folder_that_is_called_like_the_result_of_an_image_is_told(small_detector, picture, tmp_path, looks):
    images, out, said = tmp_path / "in", tmp_path / "out", []
    for name in ("a.png", "a.png.json/b.png", "c.png.json/d.png"):
        picture(images / name)
    looks(nothing, lambda: picture(images / "c.png"), nothing, nothing)
    assert watch(small_detector, images, out, report=said.append) == 2
    told = [line for line in said if "want this name" in line]
    assert len(told) == 2 and "a.png.json/b.png.json: an image and a folder" in told[0] and "c.png.json: " in told[1]
    with open(out / "scores.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["a.png", "c.png.json/d.png"]


def test_below_a_folder_whose_name_is_no_text_a_broken_file_is_judged_once(small_detector, tmp_path, looks):
    images, out = os.fsdecode(os.fsencode(tmp_path) + b"/\xe4"), tmp_path / "out"
    os.mkdir(images)
    with open(os.path.join(images, "a.png"), "wb"):
        pass
    for count in (1, 0):
        looks(nothing, nothing)
        assert watch(small_detector, images, out, patience=0, report=lambda _: None) == count
    assert "udce4/a.png: cannot be read" in results(out)["a.png.json"]["error"]


def test_a_folder_that_is_taken_away_while_it_is_listed_does_no_harm(
    small_detector, picture, tmp_path, looks, monkeypatch
):
    images, said = tmp_path / "in", []
    picture(images / "a.png")
    (images / "sub").mkdir()
    scan = os.scandir

    def gone(folder):
        if str(folder).endswith("sub") and os.path.isdir(folder):
            os.rmdir(folder)
        return scan(folder)

    monkeypatch.setattr(reading.os, "scandir", gone)
    looks(nothing, nothing)
    assert watch(small_detector, images, tmp_path / "out", report=said.append) == 1
    assert not (images / "sub").exists() and len(said) == 1 and said[0].startswith("a.png: ")


def test_while_the_folder_itself_is_gone_it_is_told_once_and_waited_for(small_detector, picture, tmp_path, looks):
    images, away, said = tmp_path / "in", tmp_path / "away", []
    picture(images / "a.png")

    def back():
        away.rename(images)
        picture(images / "b.png", seed=1)

    looks(nothing, lambda: images.rename(away), nothing, nothing, back, nothing, nothing)
    assert watch(small_detector, images, tmp_path / "out", report=said.append) == 2
    assert [line.partition(":")[0] for line in said] == ["a.png", "passed by until it is mended", "b.png"]
    assert f"{images}: the folder cannot be listed (No such file or directory). Bring it back." in said[1]


def test_names_that_are_told_cannot_control_a_terminal(small_detector, picture, tmp_path, looks):
    picture(tmp_path / "in" / "a\x1b[2J\r.png")
    said = []
    looks(nothing, nothing, nothing)
    assert watch(small_detector, tmp_path / "in", tmp_path / "out", report=said.append) == 1
    watching.Faults(said.append).tell(ImageError("b\x1b.png"))
    assert said[0].startswith(r"a\x1b[2J\r.png: ") and said[1].endswith(r": b\x1b.png") and len(said) == 2


def test_a_fault_that_comes_again_is_told_again():
    said = []
    faults = watching.Faults(said.append)
    for there in (True, True, False, True):
        faults.look_again()
        if there:
            faults.tell(ImageError("gone"))
    assert said == ["passed by until it is mended: gone"] * 2


def test_a_link_in_place_of_the_results_is_refused_before_any_work(model, picture, tmp_path, capsys):
    picture(tmp_path / "in" / "a.png")
    for name in ("elsewhere", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "results").symlink_to(tmp_path / "elsewhere")
    command = ["detect", model, tmp_path / "in", "--out", tmp_path / "out", "--watch", "--device", "cpu"]
    assert main(list(map(str, command))) == 2
    assert "would lie outside" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "out" / "scores.csv").exists()


def test_a_link_among_the_results_is_told_once_and_the_rest_judged(small_detector, picture, tmp_path, looks):
    out, said = tmp_path / "out", []
    picture(tmp_path / "in" / "sub" / "a.png")
    picture(tmp_path / "in" / "z.png", seed=1)
    (tmp_path / "elsewhere").mkdir()
    (out / "results").mkdir(parents=True)
    (out / "results" / "sub").symlink_to(tmp_path / "elsewhere")
    looks(nothing, nothing)
    assert watch(small_detector, tmp_path / "in", out, report=said.append) == 1
    assert len(said) == 2 and "would lie outside" in said[0] and said[1].startswith("z.png: ")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_by_default_defective_images_alone_get_a_heatmap(small_detector, picture, tmp_path, monkeypatch, looks):
    images, out = tmp_path / "in", tmp_path / "out"
    for index in range(3):
        picture(images / f"{index}.png", seed=index)
    scores = detect(small_detector, images, tmp_path / "plain")["score"]
    monkeypatch.setattr(small_detector, "threshold", float(scores.median()))
    looks(nothing, nothing)
    assert watch(small_detector, images, out) == 3
    assert [path.name for path in (out / "heatmaps").iterdir()] == [f"{scores.idxmax()}.png.png"]


def test_a_name_that_is_too_long_for_results_gets_one_with_the_error_and_is_done(
    small_detector, picture, tmp_path, looks
):
    images, out, long = tmp_path / "in", tmp_path / "out", "a" * 236 + ".png"
    for name in (long, "b.png"):
        picture(images / "sub" / name)
    looks(nothing, nothing)
    assert watch(small_detector, images, out, Wanted(heatmaps="all"), patience=0) == 2
    with open(out / "scores.csv", newline="") as file:
        errors = {row["file"]: row["error"] for row in csv.DictReader(file)}
    assert errors["sub/b.png"] == "" and "File name too long. Shorten the name." in errors[f"sub/{long}"]
    looks(nothing, nothing)
    assert watch(small_detector, images, out, Wanted(heatmaps="all"), patience=0) == 0


# --- whose results they are -----------------------------------------------------------------------------------------


def test_two_do_not_watch_into_the_same_folder(small_detector, picture, tmp_path, looks):
    picture(tmp_path / "in" / "a.png")
    refused = []

    def another():
        with pytest.raises(LockError, match=r"another watch is at work there: .*out is in use by process \d+") as error:
            watch(small_detector, tmp_path / "in", tmp_path / "out")
        refused.append(error)

    looks(another, nothing)
    assert watch(small_detector, tmp_path / "in", tmp_path / "out") == 1 and refused
    looks(nothing)
    assert watch(small_detector, tmp_path / "in", tmp_path / "out") == 0  # the lock was given back


def test_results_of_another_model_or_other_tiles_are_refused(small_detector, picture, tmp_path, looks):
    images, out = tmp_path / "in", tmp_path / "out"
    picture(images / "a.png", size=(300, 300))
    looks(nothing, nothing)
    assert watch(small_detector, images, out) == 1
    (result,) = results(out).values()
    assert result["model"] == small_detector.identity and result["tile_overlap"] is None
    other = copy.deepcopy(small_detector)
    other.threshold += 1
    with pytest.raises(
        RunError, match=rf"holds results of model {small_detector.identity[:12]}, .*delete .*results to"
    ):
        watch(other, images, out)
    with pytest.raises(RunError, match=r"tile overlap None; now it is .*tile overlap 56"):
        watch(small_detector, images, out, Wanted(tile_overlap=56))
    shutil.rmtree(out / "results")
    looks(nothing, nothing)
    assert watch(other, images, out) == 1
    (result,) = results(out).values()
    assert result["model"] == other.identity and result["threshold"] == other.threshold


def test_a_model_is_known_by_its_weights_and_thresholds_wherever_it_lies(small_detector, tmp_path):
    again = EfficientAD.load(small_detector.save(tmp_path / "m.safetensors", {"data": "other words"}))
    assert again.identity == small_detector.identity
    again.pixel_threshold *= 2
    assert again.identity != small_detector.identity
    again.pixel_threshold = small_detector.pixel_threshold
    again.teacher_mean += 1
    assert again.identity != small_detector.identity


def test_results_of_detect_and_of_watching_do_not_mix(small_detector, picture, tmp_path, looks):
    picture(tmp_path / "in" / "a.png")
    detect(small_detector, tmp_path / "in", tmp_path / "plain")
    before = (tmp_path / "plain" / "scores.csv").read_bytes()
    with pytest.raises(RunError, match=r"plain holds the scores.csv of a `detect` without --watch. Choose another"):
        watch(small_detector, tmp_path / "in", tmp_path / "plain")
    assert (tmp_path / "plain" / "scores.csv").read_bytes() == before
    looks(nothing, nothing)
    watch(small_detector, tmp_path / "in", tmp_path / "watched")
    with pytest.raises(RunError, match=r"watched holds the results of a watched folder. Choose another"):
        detect(small_detector, tmp_path / "in", tmp_path / "watched")


# --- as a service ---------------------------------------------------------------------------------------------------


def test_a_folder_of_many_images_is_looked_at_less_often_while_nothing_is_new(
    small_detector, picture, tmp_path, monkeypatch, looks
):
    looks(nothing, nothing, nothing)
    waits, wait = [], watching._wait
    monkeypatch.setattr(watching, "_wait", lambda *given: waits.append(given[0]) or wait(*given))
    times = iter([0, 0.1, 1, 1.1, 2, 2.1, 3, 63])  # three looks that take 0.1 s each, and one of a minute
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(times)))
    picture(tmp_path / "in" / "a.png")
    assert watch(small_detector, tmp_path / "in", tmp_path / "out", interval=0.5) == 1
    assert waits == pytest.approx([0.5, 2, 2, 5])


def test_a_look_asks_the_system_for_each_image_once(small_detector, picture, tmp_path, monkeypatch):
    """Twenty thousand images that lie there are looked at for as long as the machine runs."""
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / "in" / name)
    resolved, resolve = [], watching.Path.resolve
    monkeypatch.setattr(watching.Path, "resolve", lambda path, **how: resolved.append(path) or resolve(path, **how))
    found = dict(watching._versions(tmp_path / "in", tmp_path / "in" / "out", watching.Faults(print)))
    assert list(found) == ["a.png", "b.png", "sub/c.png"]
    assert found["b.png"].size == (tmp_path / "in" / "b.png").stat().st_size
    assert len(resolved) == 2  # the folder and that of the results
