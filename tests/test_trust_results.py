"""What runs, sweeps and people leave in folders, altered: told by name, judged anew, or passed over."""

from __future__ import annotations

import json
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest
import yaml
from trust import BROKEN, command_refused, files, refused

from effad_lib import watching
from effad_lib.batch import as_text, results
from effad_lib.cli import main
from effad_lib.execution import last_step
from effad_lib.images import ImageError
from effad_lib.provenance import provenance_of
from effad_lib.reports import across, beside_published
from effad_lib.runs import Run
from effad_lib.viewer import Notes, of_run

# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_metrics_are_named(run, kind):
    (run / "metrics.json").write_bytes(BROKEN[kind])
    for work in (lambda: Run(run).metrics, lambda: results([run]), lambda: across([run])):
        refused(work, r"metrics\.json (is not JSON|holds \w+ where names with values should be).*Restore or delete it")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_provenance_and_sources_are_named(run, kind):
    (run / "provenance.json").write_bytes(BROKEN[kind])
    (run / "sources.json").write_bytes(BROKEN[kind])
    refused(lambda: Run(run).sources, r"sources\.json .*Restore or delete it")
    refused(lambda: provenance_of(run), r"provenance\.json .*Restore or delete it")


PARAMETERS = {  # of a run, as text or as a change of what it says; and what is said
    "empty": ("", "takes names, each with its value"),
    "words": ("parameters", "takes names, each with its value"),
    "a list": ("- a", "takes names, each with its value"),
    "numbers as names": ("1: 2", "takes names, each with its value"),
    "no YAML": ("{", "is not YAML"),
    "a call": ("!!python/object/apply:os.system ['x']", "is not YAML"),
    "a billion laughs": ("a: &a [1, *a]", "an alias stands for what it is part of"),
    "half a character": ('dataset: "\\ud800"', "is not YAML"),
    "no data set": ({"dataset": None}, "has no dataset: it is not that of a training"),
    "no seed": ({"seed": None}, "has no seed"),
    "data set as number": ({"dataset": 3}, "dataset takes str, not int"),
    "data set as list": ({"dataset": ["folder"]}, "dataset takes str, not list"),
    "an unknown data set": ({"dataset": "foldr"}, "unknown data set 'foldr'.*Did you mean 'folder'"),
    "seed as text": ({"seed": "0"}, "seed takes int, not str"),
    "a seed below 0": ({"seed": -1}, "seed = -1"),
    "share as text": ({"validation_share": "a tenth"}, "validation_share takes float"),
    "a share of two": ({"validation_share": 2.0}, "validation_share = 2.0"),
    "root as number": ({"data_root": 7}, "data_root takes str, not int"),
    "root that is gone": ({"data_root": "nowhere/x"}, "no folder at root"),
    "root with a null byte": ({"data_root": "a\0b"}, "no path that can be followed"),
    "category as list": ({"category": []}, "category takes str, not list"),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_of_a_run_that_make_no_sense(run, capsys, kind):
    change, says = PARAMETERS[kind]
    path, before = run / "parameters.yaml", files(run)
    if isinstance(change, dict):
        made = yaml.safe_load(path.read_text()) | change
        change = yaml.safe_dump({name: value for name, value in made.items() if value is not None})
    path.write_text(change)
    for command in ("evaluate", "gallery"):
        command_refused(capsys, [command, run], says)
    command_refused(capsys, ["export", run], f"not at hand .*{says}")
    assert files(run) == before | {"parameters.yaml": change.encode()}


METRICS = {  # a value of metrics.json, and what is said
    "data as number": ({"data": 3}, "data = 3, which takes a name"),
    "data as list": ({"data": ["a"]}, "data = .'a'., which takes a name"),
    "no data": ({"data": None}, "data = None, which takes a name"),
    "size true": ({"size": True}, "size = True, which takes the name of a network"),
    "AU-ROC as text": ({"image_auroc": "high"}, "image_auroc = 'high', which takes a share from 0 to 1, or null"),
    "AU-ROC true": ({"image_auroc": True}, "image_auroc = True, which takes a share"),
    "AU-ROC of two": ({"image_auroc": 2.0}, "image_auroc = 2.0, which takes a share"),
    "AU-ROC below zero": ({"image_auroc": -0.5}, "image_auroc = -0.5, which takes a share"),
    "AP as names": ({"image_ap": {"a": {}}}, "image_ap = .*, which takes a share"),
    "AU-PRO as list": ({"au_pro": [[0.9]]}, "au_pro = .*, which takes a share"),
    "a mean as text": ({"au_spro_05_mean": "0.9"}, "au_spro_05_mean = '0.9', which takes a share"),
    "seconds as text": ({"seconds": "<b>"}, "seconds = '<b>', which takes seconds, or null"),
    "more seconds than a life has": ({"seconds": 1e308}, "seconds = 1e.308, which takes seconds"),
    "half a step": ({"steps": 0.5}, "steps = 0.5, which takes a whole number"),
    "latency as text": ({"latency_ms": "1"}, "latency_ms = '1', which takes a number"),
    "a device as number": ({"latency_on": 1}, "latency_on = 1, which takes the name of a device"),
    "losses of words": ({"losses": ["x"]}, "losses = .'x'., which takes numbers"),
    "a long word": ({"image_auroc": "x" * 10**6}, r"image_auroc = 'x{76}\.\.\., which takes"),
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_that_make_no_sense(run, capsys, kind):
    change, says = METRICS[kind]
    path = run / "metrics.json"
    path.write_text(json.dumps({"data": "mine", "size": "XS"} | json.loads(path.read_text()) | change))
    for work in (
        lambda: Run(run).metrics,
        lambda: results([run]),
        lambda: across([run]),
        lambda: beside_published([run]),
    ):
        refused(work, rf"metrics\.json has .*{says}.*Restore or delete it")


@pytest.mark.parametrize("missing", ["image_auroc", "data", "size"])
def test_metrics_without_what_an_evaluation_has(run, missing):
    path = run / "metrics.json"
    found = {"data": "mine", "size": "XS"} | json.loads(path.read_text())
    del found[missing]
    path.write_text(json.dumps(found))
    refused(lambda: across([run]), rf"holds no evaluation: no {missing} in its metrics\.json. Make one: effad evaluate")


def test_metrics_of_any_name_and_of_sizes_of_ones_own_are_shown_and_control_nothing(run):
    path = run / "metrics.json"
    found = json.loads(path.read_text()) | {"data": "mvtec_ad/\x1b[2J", "size": "XXL", "weight": ["of", {"mine": True}]}
    path.write_text(json.dumps(found))
    made = yaml.safe_load((run / "parameters.yaml").read_text())
    (run / "parameters.yaml").write_text(yaml.safe_dump(made | {"size": "XXL"}))
    for text in (as_text(results([run])), beside_published([run])):
        assert r"mvtec_ad/\x1b[2J" in text and "\x1b" not in text and "nan" not in text
    assert "Published" not in text and "cannot be told: unknown network size 'XXL'" in text


@pytest.mark.parametrize("content", [{"teacher": 3}, {"teacher": None}, {"teacher": ["a"]}])
def test_sources_that_are_no_hashes(run, content):
    (run / "sources.json").write_text(json.dumps(content))
    refused(lambda: Run(run).sources, r"sources\.json takes names, each with a hash. Restore or delete it")


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in PARAMETERS
        if kind not in ("an unknown data set", "a seed below 0", "a share of two", "root that is gone")
    ],
)
def test_parameters_of_a_run_that_is_compared(run, kind):
    change, says = PARAMETERS[kind]
    path = run / "parameters.yaml"
    if isinstance(change, dict):
        made = yaml.safe_load(path.read_text()) | change
        change = yaml.safe_dump({name: value for name, value in made.items() if value is not None})
    path.write_text(change)
    (run / "metrics.json").write_text(json.dumps({"data": "mine", "size": "XS", "image_auroc": 0.9}))
    refused(lambda: beside_published([run]), says)


SCORES = {  # of a run, and what is said
    "empty": ("", "cannot be read"),
    "no text": (b"\xff\xfe\x80", "cannot be read"),
    "an open quote": ('file,score\n"a', "cannot be read|written by another version"),
    "other columns": ("a,b\n1,2\n", "columns a, b, written by another version"),
    "rows of other lengths": ("file,score\na,1\nb,1,2,3\n", "cannot be read|written by another version"),
    "text for a score": ("file,score,student_teacher,student_autoencoder\nx,high,1,1\n", "no finite numbers"),
    "NaN for a score": ("file,score,student_teacher,student_autoencoder\nx,nan,1,1\n", "no finite numbers"),
    "an infinite score": ("file,score,student_teacher,student_autoencoder\nx,1,inf,1\n", "no finite numbers"),
    "no score": ("file,score,student_teacher,student_autoencoder\nx,,1,1\n", "no finite numbers"),
    "another image": ("file,score,student_teacher,student_autoencoder\n../x,1,1,1\n", "1 of its images are not in"),
    "an image elsewhere": ("file,score,student_teacher,student_autoencoder\n/etc/passwd,1,1,1\n", "images are not in"),
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_a_run_that_make_no_sense(run, capsys, kind):
    content, says = SCORES[kind]
    (run / "scores.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    command_refused(capsys, ["gallery", run, "--out", run / "gallery"], rf"{says}.*Measure it: effad evaluate")
    assert not (run / "gallery").exists()


def archive(path, compressed=False, **arrays):
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def test_an_image_with_a_carriage_return_in_its_name_is_measured_and_seen(run):
    image = next((run.parent / "data" / "test" / "good").iterdir())
    image.rename(image.with_name("a\rb.png"))
    for command in (["evaluate", str(run), "--device", "cpu"], ["gallery", str(run)]):
        assert main(command) == 0
    assert len(list((run / "gallery").glob("*.jpg"))) == 6


MAPS = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "words": lambda path: path.write_text("maps"),
    "one map missing": lambda path: archive(path, combined=np.zeros((4, 4))),
    "NaN": lambda path: archive(path, **dict.fromkeys(NAMES, np.full((4, 4), np.nan))),
    "one dimension": lambda path: archive(path, **dict.fromkeys(NAMES, np.zeros(4))),
    "text": lambda path: archive(path, **dict.fromkeys(NAMES, np.full((4, 4), "a"))),
    "objects": lambda path: archive(path, **dict.fromkeys(NAMES, np.full((4, 4), {}, dtype=object))),
    "a bomb": lambda path: archive(path, compressed=True, **dict.fromkeys(NAMES, np.zeros((2000, 2000)))),
    "a header of more than there is": lambda path: headed(path),
}
NAMES = ("combined", "student_teacher", "student_autoencoder")


def headed(path):
    """An archive whose arrays say that they are of 10^14 values."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000), }"
    head = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
    with zipfile.ZipFile(path, "w") as stored:
        for name in NAMES:
            stored.writestr(f"{name}.npy", head + bytes(64))


@pytest.mark.parametrize("kind", MAPS)
def test_maps_of_a_run_that_are_none(run, kind):
    MAPS[kind](run / "maps" / "00000.npz")
    findings = of_run(run, "cpu")
    assert "Measure it: effad evaluate" in refused(lambda: findings.picture(0), "the maps of .* cannot be read")
    assert findings.picture(1).maps["combined"].shape == (64, 64), "the others can be seen"


def test_only_an_image_is_lost_to_the_gallery_whose_maps_are_broken(run):
    (run / "maps" / "00000.npz").write_bytes(b"")
    assert main(["gallery", str(run)]) == 0
    assert len(list((run / "gallery").glob("*.jpg"))) == 5
    assert (run / "gallery" / "index.html").read_text().count('class="lost"') == 1


@pytest.mark.parametrize(
    "content", [b"", b"step\n", b"step,validation\nx,y\n", b"\xff", b"step,validation\n5,nan\n", b"a,b\n1,2"]
)
def test_a_history_that_is_none_is_no_progress(tmp_path, content):
    (tmp_path / "history.csv").write_bytes(content)
    assert last_step(tmp_path / "history.csv") in (0, 1, 5)


@pytest.mark.parametrize("name", ["metrics.json", "sources.json"])
def test_a_file_in_json_that_would_fill_the_memory_is_not_read(run, name):
    with open(run / name, "wb") as file:
        file.truncate(2**40)
    refused(lambda: (Run(run).metrics, Run(run).sources), rf"{name} is longer than 67,108,864 bytes\. Restore or")


# --- notes ----------------------------------------------------------------------------------------------------------


def test_notes_in_which_an_image_is_twice_lose_neither(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("file,verdict,note,changed\na.png,good,first,\na.png,defective,second,\n")
    refused(lambda: Notes(path), r"a\.png is there twice. Join the two rows")
    assert path.read_text().count("a.png") == 2


# --- a watched folder -----------------------------------------------------------------------------------------------

RESULT = {"file": "a.png", "score": 1.0, "threshold": 2.0, "decision": "good", "marked": 0.0, "error": "", "size": 1, "changed": 1}  # fmt: skip  # noqa: E501

RESULTS = {
    **BROKEN,
    "no score": json.dumps({name: value for name, value in RESULT.items() if name != "score"}).encode(),
    "score as text": json.dumps(RESULT | {"score": "high"}).encode(),
    "a huge score": json.dumps(RESULT | {"score": 10**400}).encode(),
    "score true": json.dumps(RESULT | {"score": True}).encode(),
    "name as number": json.dumps(RESULT | {"file": 3}).encode(),
    "size as text": json.dumps(RESULT | {"size": "1"}).encode(),
    "no time": json.dumps({name: value for name, value in RESULT.items() if name != "changed"}).encode(),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_broken_result_is_judged_anew_and_one_of_an_image_that_is_gone_is_told(
    small_detector, picture, tmp_path, monkeypatch, kind
):
    looks = iter(range(3))
    over = threading.Event()

    class Interrupt:
        def __enter__(self):
            return over.is_set

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(watching, "_wait", lambda *_: over.set() if next(looks, None) is None else None)
    monkeypatch.setattr(watching, "finish_step_on_interrupt", Interrupt)
    picture(tmp_path / "in" / "a.png")
    for name in ("a.png", "gone.png"):
        path = tmp_path / "out" / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RESULTS[kind])
    with pytest.warns(UserWarning, match=r"gone\.png\.json: no result of this program, left out of scores\.csv"):
        assert watching.watch(small_detector, tmp_path / "in", tmp_path / "out", report=lambda _: None) == 1
    assert pd.read_csv(tmp_path / "out" / "scores.csv")["file"].tolist() == ["a.png"]


# --- maps of others -------------------------------------------------------------------------------------------------


def test_a_map_that_says_it_is_larger_than_the_memory(picture, tmp_path):
    from effad_lib.viewer import of_maps

    picture(tmp_path / "images" / "a.png")
    (tmp_path / "maps").mkdir()
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000, 10000000), }"
    (tmp_path / "maps" / "a.png.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with pytest.raises(ImageError, match=r"a\.png\.npy: cannot be read as an anomaly map"):
        of_maps(tmp_path / "maps", tmp_path / "images")
