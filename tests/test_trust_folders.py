"""Folders as people and machines leave them: odd names are names, links and permissions lead nowhere else."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from trust import command_refused, files, refused

from effad_lib import designs, probing
from effad_lib.cli import main
from effad_lib.datasets import load_dataset
from effad_lib.datasets.split import listed
from effad_lib.documents import read_json
from effad_lib.execution.lock import Lock
from effad_lib.images import find_images, read_image
from effad_lib.reading import image_entries
from effad_lib.runs import printable, resolve

NAMES = {
    "spaces": "  two  spaces ",
    "quotes": """it's a "quote" `here`""",
    "a new line": "first\nsecond",
    "a carriage return": "first\rsecond",
    "Unicode": "größe_尺寸_📷_é",
    "letters that write to the left": "\u202egnp.exe",
    "dots": "..x..",
    "three dots": "...png",
    "commas and semicolons": "a,b;c\td",
    "dollars": r"$x_{ $$ \frac",
    "percent": "100%20%s%n",
    "braces": "{0} {run} {{",
    "an option": "--out=elsewhere",
    "a formula": '=HYPERLINK("x","y")',
    "a sum": "+1+1",
    "markup": "<img src=x onerror=alert(1)>",
    "an entity": "&lt;b&gt;",
    "a shell": "$(touch x);`touch x`|x",
    "backslashes": "..\\..\\x",
    "control letters": "a\x1b[2Jb\x07",
    "200 letters": "x" * 200,
}


def plain(name):
    """A name that may be that of a folder: not hidden."""
    return name.lstrip(".") or "x"


@pytest.mark.parametrize("kind", NAMES)
def test_odd_names_of_folders_and_images_are_read(tmp_path, picture, kind):
    name, root = plain(NAMES[kind]), tmp_path / f"root {plain(NAMES[kind])}"
    for k in range(13):
        picture(root / "train" / "good" / name / f"{name}{k:02}.png", size=(64, 64), seed=k)
    picture(root / "test" / name / f"{name}.png", size=(64, 64))
    picture(root / "ground_truth" / name / f"{name}_mask.png", size=(64, 64), mode="L")
    split = load_dataset("folder", root=root)
    assert (len(split.train), len(split.validation), len(split.test)) == (10, 3, 1) and split.has_masks
    assert split.name == f"folder/{root.name}" and split.test[0].defect == name
    assert all(sample.image.is_file() for sample in (*split.train, *split.validation, *split.test))


def test_odd_names_go_through_detect_and_stay_inside(model, picture, tmp_path):
    """Names come back from the table as they are; where a spreadsheet would calculate, a ' stands before them."""
    images, out = tmp_path / "images", tmp_path / "out"
    names = {f"{plain(name)}.png" for name in NAMES.values()}
    for name in names:
        picture(images / name, size=(64, 64))
    before = files(images)
    assert main(["detect", str(model), str(images), "--out", str(out), "--save-masks", "--device", "cpu"]) == 0
    table = pd.read_csv(out / "scores.csv", keep_default_na=False)
    assert {file.removeprefix("'") for file in table["file"]} == names
    assert not table["file"].str.match(r"[=+\-@]").any() and (table["file"].str[0] == "'").sum() == 3
    written = {f"{kind}/{name}.png" for kind in ("heatmaps", "masks") for name in names}
    assert set(files(tmp_path)) == {f"out/{name}" for name in (*written, "scores.csv")} | {f"images/{n}" for n in names}
    assert files(images) == before


@pytest.mark.parametrize("heatmaps", ["all", "none"])
def test_a_folder_that_is_called_like_a_result_keeps_no_other_image_from_being_judged(
    model, picture, tmp_path, capsys, heatmaps
):
    for name in ("a.png", "a.png.png/b.png", "c.png"):
        picture(tmp_path / "in" / name)
    out = tmp_path / "out"
    (out / "heatmaps" / "c.png.png").mkdir(parents=True)
    arguments = ["detect", str(model), str(tmp_path / "in"), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--heatmaps", heatmaps]) == (heatmaps == "all")
    errors = pd.read_csv(out / "scores.csv", keep_default_na=False).set_index("file")["error"]
    said = dict.fromkeys(("a.png.png/b.png", "c.png"), "no file and folder have one name") if heatmaps == "all" else {}
    assert all(said.get(name, "") in error and bool(error) == (name in said) for name, error in errors.items())


ODD = "a\x1b[2J\rb\u202e\u2028"
SHOWN = r"a\\x1b\[2J\\rb\\u202e\\u2028"


def test_names_cannot_control_a_terminal(model, picture, tmp_path, capsys):
    picture(tmp_path / "in" / "größe_尺寸_📷.png")
    (tmp_path / "in" / f"{ODD}\n.png").write_bytes(b"")
    arguments = ["detect", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 1
    assert re.search(rf"left out: .*/{SHOWN}\\n\.png: cannot be read", capsys.readouterr().err)
    command_refused(capsys, ["detect", model, tmp_path / ODD], f"/{SHOWN}: there is no such image or folder")
    assert printable("größe_尺寸_📷 \u00a0\u3000") == "größe_尺寸_📷 \u00a0\u3000"


def test_names_in_tables_and_cards_cannot_control_a_terminal_either(
    small_detector, picture, tmp_path, capsys, monkeypatch
):
    table = pd.DataFrame({"layers": [""], ODD: [1.0]}, index=[ODD])
    for room, work in ((designs, "explore"), (probing, "compare")):
        monkeypatch.setattr(room, work, lambda *_, **__: table)
    monkeypatch.setattr("effad_lib.cli.teachers.as_split", lambda *_: None)
    monkeypatch.setattr("effad_lib.cli.designs.as_split", lambda *_: None)
    odd = copy.deepcopy(small_detector)
    odd.calibration["source"] = ODD
    path = odd.save(tmp_path / "m.safetensors")
    for command in (["probe", "XS", "--device", "cpu"], ["designs", "--out", tmp_path / "d"], ["threshold", path]):
        assert main([str(part) for part in command]) == 0
        said = capsys.readouterr().out
        assert re.search(SHOWN, said) and not re.search("[\x1b\r\u202e\u2028]", said)


def test_a_place_for_a_model_is_checked_before_images_are_measured(model, picture, tmp_path, capsys, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "taken.safetensors").mkdir()
    monkeypatch.setattr("effad_lib.calibration.measure_normals", lambda *_, **__: pytest.fail("work was done"))
    command = ["threshold", model, "--normals", tmp_path / "in", "--out", tmp_path / "taken.safetensors"]
    command_refused(capsys, command, "cannot write .*Is a directory.* Choose another folder")


def test_lines_of_a_message_stay_lines_and_names_in_them_cannot_add_any(tmp_path, capsys):
    said = command_refused(capsys, ["train", "--dataset", "folder", "--data-root", tmp_path / "a"], "no folder at root")
    assert "\n    train/good/000.png" in said
    assert listed(["a\nb", "c"]) == "\n    a\\nb\n    c"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_text_is_named_before_any_work(model, picture, tmp_path, capsys):
    picture(tmp_path / "a.png")
    with open(os.fsencode(tmp_path) + b"/b\xff.png", "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    command_refused(capsys, ["detect", model, tmp_path], r"the name b'b\\xff\.png' is not UTF-8. Rename the file")
    refused(lambda: load_dataset("folder", root=tmp_path), "is not UTF-8")
    image, out = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png"), tmp_path / "out"
    command_refused(capsys, ["detect", model, image, "--out", out], r"the name b'b\\xff\.png' is not UTF-8")
    assert not out.exists()


def test_a_folder_whose_name_is_no_text_is_judged_and_its_errors_are_told(model, picture, tmp_path):
    folder, out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in\xff")), tmp_path / "out"
    picture(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    assert main(["detect", str(model), str(folder), "--out", str(out), "--device", "cpu"]) == 1
    assert pd.read_csv(out / "scores.csv")["error"].str.contains(r"in\\udcff/b\.png: cannot be read").tolist()[1]


def test_names_go_to_an_output_that_takes_no_other_letters(model, picture, tmp_path):
    out = os.fsencode(tmp_path) + b"/out\xff"
    arguments = ["-m", "effad_lib.cli", "detect", model, picture(tmp_path / "a.png"), "--out", out]
    strict = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, *arguments, "--heatmaps", "none"], capture_output=True, env=strict)
    assert not done.returncode and done.stdout.endswith(b"out\\udcff\n")


def test_closed_standard_streams_keep_no_command_from_its_work(model, picture, tmp_path):
    command = [sys.executable, "-m", "effad_lib.cli", "detect", model, picture(tmp_path / "a.png")]
    for number, streams in enumerate(("2>&-", ">&- 2>&- <&-")):
        out = tmp_path / str(number)
        subprocess.run(["sh", "-c", f'"$@" {streams}', "sh", *command, "--out", out, "--heatmaps", "none"], check=True)
        assert len(pd.read_csv(out / "scores.csv")) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such names")
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_whose_name_is_no_text_is_named_before_any_work(model, picture, tmp_path, capsys, monkeypatch, linked):
    """It would stand in the card of the model, which nobody could read any more."""
    folder, own = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")), tmp_path / "own.safetensors"
    for index in range(14):
        picture(folder / f"{index}.png", seed=index)
    shutil.copy(model, own)
    before = own.read_bytes()
    if linked:
        (tmp_path / "line").symlink_to(folder)
    given, says = tmp_path / "line" if linked else folder, r"the name b'd\\xff' is not UTF-8. Rename the folder"
    monkeypatch.setattr("effad_lib.export.to_onnx", lambda *_, **__: pytest.fail("work was done"))
    command_refused(capsys, ["threshold", own, "--normals", given], says)
    command_refused(capsys, ["threshold", own, "--normals", given, "--tile-overlap", 40], says)
    command_refused(capsys, ["export", own, "--normals", given, "--precision", "int8"], says)
    refused(lambda: load_dataset("folder", root=given), "the name 'folder/d.udcff' of a data set is no text in UTF-8")
    assert own.read_bytes() == before


ROOTS = {  # how the folder comes to be, and what is said of it
    "nothing": (lambda path: None, "no folder at root"),
    "empty": (lambda path: path.mkdir(), "no image below this folder"),
    "a file": (lambda path: path.write_text("x"), "no folder at root"),
    "a link to nowhere": (lambda path: path.symlink_to(path.with_name("nowhere")), "no folder at root"),
    "a link to itself": (lambda path: path.symlink_to(path), "no folder at root|no path that can be followed"),
    "two links in a circle": (
        lambda path: (path.symlink_to(path.with_name("b")), path.with_name("b").symlink_to(path)),
        "no folder at root|no path that can be followed",
    ),
    "hidden images": (lambda path: (path.mkdir(), (path / ".a.png").write_bytes(b"")), "no image below this folder"),
    "other files": (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), "no image below this folder"),
    "folders called like images": (lambda path: (path / "a.png").mkdir(parents=True), "no image below this folder"),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_folders_without_images_are_told(tmp_path, capsys, kind):
    make, says = ROOTS[kind]
    make(tmp_path / "a")
    command_refused(capsys, ["train", "--dataset", "folder", "--data-root", tmp_path / "a"], says)
    refused(lambda: load_dataset("folder", root=tmp_path / "a"), says)


@pytest.mark.parametrize("path", ["a\0b", "~nobody_of_this_name/x", "x/" * 3000, "x" * 300], ids=str.__len__)
def test_what_is_no_path_is_told(path):
    """Some of these a system follows to nowhere, others it cannot follow at all."""
    with contextlib.suppress(OSError):
        refused(lambda: load_dataset("folder", root=path), "no path that can be followed|no folder at root")


def test_a_null_byte_is_no_path():
    refused(lambda: resolve("a\0b"), "no path that can be followed: embedded null")


@pytest.fixture
def deep(tmp_path, picture):
    """An image and beside it 1,500 folders in each other, more than pytest could take away."""
    picture(tmp_path / "in" / "a.png")
    paths = [f"{tmp_path}/in{'/d' * depth}" for depth in range(1, 1_501)]
    for path in paths:
        os.mkdir(path)
    yield tmp_path / "in"
    for path in reversed(paths):
        os.rmdir(path)


def test_folders_too_deep_in_each_other_are_named(deep, model, tmp_path, capsys):
    says = "/d/d: folders are more than 100 deep in each other. Move their images up"
    refused(lambda: find_images(deep), says)
    refused(lambda: load_dataset("folder", root=deep), says)
    command_refused(capsys, ["detect", model, deep, "--out", tmp_path / "out", "--device", "cpu"], says)
    faults = []
    assert [entry.name for entry in image_entries(deep, None, faults.append)] == ["a.png"] and len(faults) == 1


def test_a_hundred_folders_in_each_other_are_read(tmp_path, picture):
    kept = picture(tmp_path.joinpath(*["d"] * 100, "a.png"))
    assert find_images(tmp_path) == [kept]


def test_a_folder_whose_path_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    refused(lambda: find_images(tmp_path), "cannot be listed .File name too long.. Shorten its path")


def test_links_in_a_circle_are_passed_by(tmp_path, picture):
    kept = picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "up.png").symlink_to(tmp_path.parent)
    assert find_images(tmp_path) == [kept]


ENDLESS = {  # what is put in the place of a file, and has no end or keeps a reader waiting
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_files_without_an_end_are_named_or_passed_by(evaluated_run, tmp_path, picture, capsys, kind):
    """A data set or a run that was sent may hold any kind of file."""
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    for name, command, says in (
        ("maps/00000.npz", ["gallery", run], ""),  # a gallery leaves out that image and says so
        ("metrics.json", ["export", run, "--to", "onnx"], ""),  # which is not asked for it
        ("parameters.yaml", ["evaluate", run, "--device", "cpu"], "parameters.yaml|not the folder of a finished"),
    ):
        (run / name).unlink()
        ENDLESS[kind](run / name)
        assert main([str(part) for part in command]) in ((0, 1) if not says else (2, 1))
        assert re.search(says, capsys.readouterr().err)
    ENDLESS[kind](tmp_path / "config.json")
    refused(lambda: read_json(tmp_path / "config.json"), "config.json cannot be read: it is no plain file")


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_lies_among_masks_and_is_none_changes_nothing(tmp_path, picture, kind):
    for k in range(13):
        picture(tmp_path / "train" / "good" / f"{k}.png", seed=k)
    picture(tmp_path / "test" / "hole" / "0.png")
    picture(tmp_path / "ground_truth" / "hole" / "0" / "0.png")
    before = load_dataset("folder", root=tmp_path).fingerprint
    ENDLESS[kind](tmp_path / "ground_truth" / "hole" / "0" / "1.png")
    (tmp_path / "ground_truth" / "hole" / "0" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "ground_truth" / "hole" / "0" / "notes.txt").write_bytes(b"x")
    assert load_dataset("folder", root=tmp_path).fingerprint == before


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_lock_without_an_end_is_refused(tmp_path, kind):
    ENDLESS[kind](tmp_path / ".lock")
    lock = Lock(tmp_path / ".lock")
    assert lock.owner is None and not lock.is_held
    refused(lock.take, r"cannot write .*\.lock")


def test_what_was_made_of_images_is_no_image_to_train_on(evaluated_run, model, picture, tmp_path):
    """Runs, detections and galleries may lie among the good images that they were made of."""
    for k in range(13):
        picture(tmp_path / "more" / f"{k}.png", seed=k)
    before = load_dataset("folder", root=tmp_path)
    shutil.copytree(evaluated_run, tmp_path / "runs" / "one")
    assert main(["gallery", str(evaluated_run), "--out", str(tmp_path / "gallery")]) == 0
    assert main(["detect", str(model), str(tmp_path / "more"), "--out", str(tmp_path / "detections")]) == 0
    assert len(find_images(tmp_path)) > 13 + 3
    assert load_dataset("folder", root=tmp_path) == before
    picture(tmp_path / "theirs" / "0.png", seed=99)  # beside files of others with the same names
    for name in ("metrics.json", "parameters.yaml", "scores.csv", "index.html"):
        (tmp_path / "theirs" / name).write_text("file,price\n")
    now = load_dataset("folder", root=tmp_path)
    assert {one.image for one in (*now.train, *now.validation)} == {
        tmp_path / "theirs" / "0.png",
        *(one.image for one in (*before.train, *before.validation)),
    }


@contextlib.contextmanager
def unprivileged():
    """A folder that a user without privileges may enter, while the tests are such a user, also where they run as root.

    The folders of pytest are closed to others.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = os.geteuid() == 0
        try:
            if root:
                os.chown(folder, 65534, -1)
                os.seteuid(65534)
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            for path in Path(folder).rglob("*"):
                os.chmod(path, 0o755)


def test_folders_and_images_without_permission_are_named(picture):
    with unprivileged() as folder:
        path = picture(folder / "closed" / "a.png")
        path.chmod(0)
        refused(lambda: read_image(path), r"a\.png: cannot be read as an image .*Permission denied")
        path.parent.chmod(0)
        refused(lambda: find_images(folder), r"closed: the folder cannot be listed \(Permission denied\)")
        refused(lambda: load_dataset("folder", root=folder), "cannot be listed")
        path.parent.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_named(small_detector, picture):
    from effad_lib.detection import detect

    with unprivileged() as folder:
        path = picture(folder / "a.png")
        (folder / "out").mkdir()
        (folder / "out").chmod(0o500)
        refused(lambda: detect(small_detector, path, folder / "out"), "cannot write .*Permission denied")
        (folder / "file").write_text("x")
        refused(lambda: detect(small_detector, path, folder / "file"), "cannot write .*Not a directory|File exists")
        assert (folder / "file").read_text() == "x" and not list((folder / "out").iterdir())
