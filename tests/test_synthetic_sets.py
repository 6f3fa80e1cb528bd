"""Synthetic data sets: the written layout, the manifest, workers, memory, one's own photographs, refusals."""

import json
import os
import shutil
import signal
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trust import files

from effad_lib import datasets, synthesis
from effad_lib.datasets.synthetic import check_rendered
from effad_lib.images import ImageError
from effad_lib.settings import SettingsError
from effad_lib.synthesis import (
    DEFECTS,
    TOLERANCE,
    SynthesisError,
    SynthesisSettings,
    defect_names,
    draw,
    render,
    synthesize,
    writer,
)

FEW = {"image_size": [64, 64], "train": 1, "test_good": 1, "test_per_defect": 1}


def settings(folder, product="metal", **values):
    return SynthesisSettings(product=product, data_root=str(folder), **values)


def test_layout_and_manifest(tmp_path):
    counts = {"train": 3, "test_good": 2, "test_per_defect": 2}
    wanted = settings(tmp_path / "deep", "gasket", image_size=[64, 80], severity=[0.3, 0.9], seed=7, **counts)
    folder = synthesize(wanted)
    found = files(folder)
    expected = {f"train/good/{i:03d}.png" for i in range(3)} | {f"test/good/{i:03d}.png" for i in range(2)}
    for defect in defect_names("gasket"):
        expected |= {f"test/{defect}/{i:03d}.png" for i in range(2)}
        expected |= {f"ground_truth/{defect}/{i:03d}_mask.png" for i in range(2)}
    assert set(found) == expected | {"manifest.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["gasket"]

    manifest = json.loads(found["manifest.json"])
    assert manifest["settings"] == {
        "product": "gasket", "defects": defect_names("gasket"), "image_size": [64, 80], **counts,
        "severity": [0.3, 0.9], "seed": 7, "drawing": synthesis.shots.DRAWING,
    }  # fmt: skip
    assert manifest["mask_tolerance"] == TOLERANCE
    assert len(manifest["images"]) == 3 + 2 + 2 * len(defect_names("gasket"))
    assert len({record["seed"] for record in manifest["images"]}) == len(manifest["images"])
    for record in manifest["images"]:
        level = record.get("severity", 1.0)
        shot = render("gasket", record["defect"], size=(64, 80), seed=record["seed"], severity=level)
        assert np.array_equal(np.asarray(Image.open(folder / record["path"])), shot.image)
        if record["defect"] == "good":
            continue
        assert 0.3 <= level <= 0.9
        name = record["path"].replace("test/", "ground_truth/").replace(".png", "_mask.png")
        mask = np.asarray(Image.open(folder / name))
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
        assert np.array_equal(mask == 255, shot.mask) and record["mask_pixels"] == shot.mask.sum()


def test_the_mvtec_reader_and_the_folder_reader_read_it(tmp_path):
    folder = synthesize(settings(tmp_path, "gasket", image_size=[64, 64], train=14, test_good=2, test_per_defect=1))
    for split in (
        datasets.load_dataset("mvtec_ad", root=tmp_path, category="gasket"),
        datasets.load_dataset("folder", root=folder),
        datasets.load_dataset("synthetic", root=tmp_path, category="gasket"),
    ):
        assert len(split.train) + len(split.validation) == 14 and split.has_masks
        assert {sample.defect for sample in split.test} == {"good", *defect_names("gasket")}


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    counts = {"image_size": [64, 64], "train": 20, "test_good": 8, "test_per_defect": 3}
    one, three = (synthesize(settings(tmp_path / str(n), "gasket", workers=n, **counts)) for n in (1, 3))
    assert files(one) == files(three)


def test_a_drawing_process_that_is_killed_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    save = writer._save
    monkeypatch.setattr(writer, "_save", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    wanted = settings(tmp_path, workers=2, **FEW | {"train": 20})
    with pytest.raises(SynthesisError, match="rendering metal: one of 2 drawing processes was ended from outside"):
        synthesize(wanted)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(writer, "_save", save)
    assert synthesize(wanted).is_dir()


def test_the_same_data_set_in_memory(tmp_path):
    wanted = settings(tmp_path, "board", defects=["missing", "scratch"], **FEW | {"train": 2})
    drawn, folder = draw(wanted), synthesize(wanted)
    assert drawn.records == json.loads((folder / "manifest.json").read_text())["images"]
    assert [record["defect"] for record in drawn.records] == ["good", "good", "good", "missing", "scratch"]
    assert drawn.images.shape == (5, 3, 64, 64) and drawn.images.dtype == np.uint8
    assert drawn.masks.shape == (5, 64, 64) and not drawn.masks[:3].any() and drawn.masks[3:].any((1, 2)).all()
    for record, image in zip(drawn.records, drawn.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / record["path"])), image.transpose(1, 2, 0))


def test_an_image_depends_on_its_own_number_only(tmp_path):
    few = files(synthesize(settings(tmp_path / "few", **FEW)))
    many = files(synthesize(settings(tmp_path / "many", **FEW | {"train": 3, "test_good": 2, "test_per_defect": 2})))
    pictures = set(few) - {"manifest.json"}
    assert pictures < set(many) and all(few[name] == many[name] for name in pictures)
    assert few["train/good/000.png"] != few["test/good/000.png"]
    other = files(synthesize(settings(tmp_path / "other", seed=1, **FEW)))
    assert other["train/good/000.png"] != few["train/good/000.png"]


def test_what_is_there_is_kept_and_replaced_only_on_demand(tmp_path):
    wanted = settings(tmp_path, seed=3, **FEW | {"train": 2})
    folder = synthesize(wanted)
    assert folder == tmp_path / "metal"
    (folder / "train/good/000.png").write_bytes(b"kept")
    for same in (wanted, replace(wanted, workers=2), replace(wanted, overwrite=True)):
        assert synthesize(same) == folder and (folder / "train/good/000.png").read_bytes() == b"kept"
    with pytest.raises(SynthesisError, match=r"another data set \(train: 2 there, 3 now\).*overwrite = True"):
        synthesize(replace(wanted, train=3))
    assert (folder / "train/good/000.png").read_bytes() == b"kept"
    synthesize(replace(wanted, train=3, overwrite=True))
    assert len(list((folder / "train/good").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metal"]


def test_a_folder_with_anything_else_in_it_is_never_replaced(tmp_path):
    (tmp_path / "metal").mkdir()
    synthesize(settings(tmp_path, **FEW))  # empty: nothing is lost
    (tmp_path / "fabric").mkdir()
    (tmp_path / "fabric/thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(SynthesisError, match="fabric is no synthetic data set"):
            synthesize(settings(tmp_path, "fabric", overwrite=overwrite, **FEW))
    (tmp_path / "fabric/manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "metal/notes.txt").write_text("mine")
    assert synthesize(settings(tmp_path, **FEW)) == tmp_path / "metal"  # nothing to replace
    for product, reason in (
        ("fabric", "manifest.json is missing or not whole"),
        ("metal", "notes.txt does not belong"),
    ):
        with pytest.raises(SynthesisError, match=reason):
            synthesize(settings(tmp_path, product, overwrite=True, seed=5, **FEW))
    assert (tmp_path / "metal/notes.txt").read_text() == "mine"
    with pytest.raises(SynthesisError, match=r"cannot be written.*another data_root"):
        synthesize(settings(tmp_path / "fabric/thesis.txt", **FEW))
    assert (tmp_path / "fabric/thesis.txt").read_text() == "mine"


def test_what_somebody_puts_there_meanwhile_stays(tmp_path, monkeypatch):
    scratch = DEFECTS["scratch"]

    def meddle(*arguments):
        (tmp_path / "metal").mkdir()
        (tmp_path / "metal/mine.txt").write_text("mine")
        return scratch.apply(*arguments)

    monkeypatch.setitem(DEFECTS, "scratch", replace(scratch, apply=meddle))
    with pytest.raises(SynthesisError, match="left alone"):
        synthesize(settings(tmp_path, defects=["scratch"], **FEW))
    assert [path.name for path in tmp_path.rglob("*")] == ["metal", "mine.txt"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_data_set_that_another_process_has_put_there_meanwhile_stays(tmp_path, monkeypatch, seed):
    scratch, wanted = DEFECTS["scratch"], settings(tmp_path / "mine", defects=["scratch"], **FEW)
    theirs = synthesize(replace(wanted, data_root=str(tmp_path / "theirs"), seed=seed))

    def meddle(*arguments):
        if not wanted.folder.exists():
            shutil.copytree(theirs, wanted.folder)
            inodes.add((wanted.folder / "manifest.json").stat().st_ino)
        return scratch.apply(*arguments)

    inodes = set()
    monkeypatch.setitem(DEFECTS, "scratch", replace(scratch, apply=meddle))
    with (
        nullcontext() if seed == 0 else pytest.raises(SynthesisError, match=r"another data set \(seed: 1 there, 0 now")
    ):
        synthesize(wanted)
    assert {(wanted.folder / "manifest.json").stat().st_ino} == inodes
    assert files(tmp_path / "mine") == {f"metal/{name}": data for name, data in files(theirs).items()}


def test_a_broken_off_writing_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of paint")

    wanted = settings(tmp_path, **FEW)
    before = files(synthesize(wanted))
    monkeypatch.setitem(DEFECTS, "scratch", replace(DEFECTS["scratch"], apply=fail))
    with pytest.raises(RuntimeError, match="out of paint"):
        synthesize(replace(wanted, seed=1, overwrite=True))
    assert files(tmp_path / "metal") == before and [path.name for path in tmp_path.iterdir()] == ["metal"]


def replaced_until_killed(wanted):
    """Begin to replace a data set in a process that is killed when it has moved the old one away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        if not (child := os.fork()):
            rename = Path.rename
            Path.rename = lambda path, target: (rename(path, target), os.kill(os.getpid(), signal.SIGKILL))
            try:
                synthesize(wanted)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("then", ["read", "keep", "ask", "look", "replace"])
def test_a_data_set_that_was_being_replaced_when_all_died_comes_back(tmp_path, then):
    wanted = settings(tmp_path, "gasket", workers=1, **FEW | {"train": 14})
    before = files(synthesize(wanted))
    other = replace(wanted, seed=1, overwrite=True)
    replaced_until_killed(other)
    assert not (tmp_path / "gasket").exists()
    if then == "read":
        split = datasets.load_dataset("synthetic", root=tmp_path, category="gasket")
        assert len(split.train) + len(split.validation) == 14
    elif then == "keep":
        synthesize(wanted)
    elif then == "look":
        check_rendered(tmp_path, "gasket")
    elif then == "ask":
        with pytest.raises(SynthesisError, match="holds another data set"):
            synthesize(replace(other, overwrite=False))
    else:
        synthesize(other)
        assert json.loads((tmp_path / "gasket" / "manifest.json").read_text())["settings"]["seed"] == 1
        return
    assert files(tmp_path / "gasket") == before


def test_links_are_not_replaced(tmp_path):
    """Neither the link to a data set elsewhere nor one in it is the data set's own."""
    wanted = settings(tmp_path / "here", **FEW)
    other = replace(wanted, seed=1, overwrite=True)
    (tmp_path / "mine").mkdir()
    (synthesize(wanted) / "more").symlink_to(tmp_path / "mine")
    with pytest.raises(SynthesisError, match="metal/more does not belong to one"):
        synthesize(other)
    (tmp_path / "here" / "metal" / "more").unlink()
    (tmp_path / "here" / "metal").rename(tmp_path / "there")
    (tmp_path / "here" / "metal").symlink_to(tmp_path / "there")
    before = files(tmp_path)
    assert synthesize(wanted) == tmp_path / "here" / "metal"
    with pytest.raises(SynthesisError, match="metal is a link, so it is not replaced"):
        synthesize(other)
    assert files(tmp_path) == before and (tmp_path / "here" / "metal").is_symlink()


def test_what_killed_processes_left_half_written_goes_after_an_hour(tmp_path):
    """That of a process that may be alive stays, and so does what is not ours."""
    old, young, other = (tmp_path / name for name in (".metal.1.partial", ".metal.2.partial", ".wood.3.partial"))
    for work in (old, young, other):
        (work / "train" / "good").mkdir(parents=True)
        (work / "train" / "good" / "000.png").write_bytes(b"half")
    for work in (old, other):
        for path in (*work.rglob("*"), work):
            os.utime(path, (0, 0))
    synthesize(settings(tmp_path, **FEW))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metal.2.partial", ".wood.3.partial", "metal"]
    (tmp_path / ".wood.3.partial").rename(tmp_path / ".metal.old.4.partial")  # moved away by who was killed then
    synthesize(settings(tmp_path, seed=1, overwrite=True, **FEW))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metal.2.partial", "metal"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"product": "bord"}, "'bord'.*Did you mean 'board'"),
        ({"defects": ["scrach"]}, r"'scrach' of metal.*Did you mean 'scratch'"),
        ({"defects": ["missing"]}, r"'missing' of metal"),
        ({"defects": ["dent", "dent"]}, "each name once"),
        ({"image_size": [32, 64]}, r"size \(32, 64\)|size \[32, 64\]"),
        ({"severity": [0.9, 0.1]}, "the lowest first"),
        ({"severity": [0.5]}, "two numbers"),
        ({"severity": [0.0, 0.5]}, "severity is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"train": -1}, "train = -1"),
        ({"test_per_defect": 1.5}, "test_per_defect = 1.5"),
        ({"workers": -1}, "workers = -1"),
    ],
    ids=lambda value: None,
)
def test_settings_are_refused_before_anything_is_drawn(wrong, message):
    with pytest.raises((SynthesisError, ImageError, SettingsError), match=message):
        SynthesisSettings(**{"product": "metal"} | wrong)
