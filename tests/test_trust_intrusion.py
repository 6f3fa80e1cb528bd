"""Nobody gets in: what is sent to somebody (runs, sweeps, images and their names) executes and injects nothing.

Models, teachers and checkpoints that hold code are in test_trust_models.py and test_trust_teachers.py, documents in
test_trust_yaml.py. Archives are unpacked by nobody but the user: the last tests of this file see to it.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
import shutil
import socket

import numpy as np
import pytest
import yaml
from trust import command_refused, files, refused

from effad_lib.cli import main
from effad_lib.consent import NAMED, allow, check_named
from effad_lib.datasets import LOADERS, load_dataset
from effad_lib.evaluation import data_of, evaluate_run, finish_run
from effad_lib.execution import process
from effad_lib.execution.lock import Lock
from effad_lib.runs import PROJECT, Run, partial_of
from effad_lib.sweeps import load_sweep
from effad_lib.viewer import of_run, view_images, view_maps

CODE = """
from pathlib import Path
from effad_lib.datasets import load_dataset, register
Path(__file__).with_name("executed").touch()

@register("sent")
def sent(root, category, seed, validation_share):
    return load_dataset("folder", root=root, seed=seed, validation_share=validation_share)
"""


@pytest.fixture
def nothing_named(monkeypatch):
    """As in a new shell; what a test names or registers is forgotten."""
    monkeypatch.setenv(NAMED, "")
    before = dict(LOADERS)
    yield
    LOADERS.clear()
    LOADERS.update(before)


@pytest.fixture
def run(evaluated_run, tmp_path, nothing_named):
    """A copy of the evaluated run, as if its data set were the code that lies in it."""
    shutil.copytree(evaluated_run, tmp_path / "run")
    (tmp_path / "run" / "sent.py").write_text(CODE)
    made = yaml.safe_load((evaluated_run / "parameters.yaml").read_text())
    made["dataset"] = f"{tmp_path / 'run' / 'sent.py'}:sent"
    (tmp_path / "run" / "parameters.yaml").write_text(yaml.safe_dump(made))
    return tmp_path / "run"


# --- code in a run, a sweep or a profile ----------------------------------------------------------------------------


def test_the_data_set_of_a_run_is_executed_only_if_the_user_names_its_file(run, capsys):
    before, file = files(run), run / "sent.py"
    says = f"is code, {re.escape(str(file))}, which was named by a file and not by you.*--data-file {file}"
    for command in (["evaluate", run], ["gallery", run], ["export", run]):
        command_refused(capsys, command, says)
    for work in (lambda: data_of(Run(run)), lambda: of_run(run, "cpu")):
        refused(work, says)
    assert files(run) == before
    assert main(["gallery", str(run), "--data-file", str(file)]) == 0
    assert (run / "executed").is_file()


def test_who_names_the_file_in_a_command_or_a_call_may_go_on_with_the_run(run):
    allow(run / "sent.py")
    assert data_of(Run(run)).name and (run / "executed").is_file()
    os.environ[NAMED] = ""
    load_dataset(f"{run / 'sent.py'}:sent", root=yaml.safe_load((run / "parameters.yaml").read_text())["data_root"])
    assert data_of(Run(run)).name


@pytest.mark.parametrize("spelling", ["{}/./sent.py:sent", "{}/x/../sent.py:sent", "{}/sent.py:sent.py:sent"])
def test_other_spellings_of_a_path_are_asked_for_too(run, spelling):
    refused(lambda: check_named(spelling.format(run)), "is code")
    assert not (run / "executed").exists()


def test_a_file_of_the_same_name_elsewhere_is_another_file(run, tmp_path):
    (tmp_path / "mine").mkdir()
    allow(tmp_path / "mine" / "sent.py")
    refused(lambda: data_of(Run(run)), "is code")


def test_processes_that_are_started_know_what_was_named(run, tmp_path, monkeypatch):
    allow(run / "sent.py")
    told = process.order("x", [process.Task(tmp_path / "a.ipynb", tmp_path, {}, {})], {})
    monkeypatch.setenv(NAMED, "")
    refused(lambda: data_of(Run(run)), "is code")
    monkeypatch.setenv(NAMED, told["data_files"])
    assert data_of(Run(run)).train
    assert json.loads(json.dumps(told)) == told


def test_a_sweep_that_names_code_is_not_even_listed(run, capsys, monkeypatch):
    path = run.parent / "sent.yaml"
    names = {"notebooks": ["03_training"], "parameters": {"dataset": f"{run / 'sent.py'}:sent"}}
    path.write_text(yaml.safe_dump(names))
    for more in ([], ["--dry-run"]):
        command_refused(capsys, ["sweep", path, "--runs", run.parent / "runs", *more], "is code, .*sent.py")
    assert not (run / "executed").exists() and not (run.parent / "runs").exists()
    allow(run / "sent.py")
    assert len(load_sweep(str(path), runs=run.parent / "runs").runs) == 1


# --- places that a file chooses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maps", "figures", "gallery", "checkpoints", "export"])
@pytest.mark.parametrize("command", ["evaluate", "gallery", "export"])
def test_a_run_whose_folder_is_a_link_writes_and_deletes_nothing_there(evaluated_run, tmp_path, capsys, name, command):
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(evaluated_run, run)
    shutil.rmtree(run / name, ignore_errors=True)
    mine.mkdir()
    (mine / "00009.npz").write_text("years of work")
    (run / name).symlink_to(mine)
    command_refused(capsys, [command, run], rf"{name} is a link that leads out of its folder")
    assert files(mine) == {"00009.npz": b"years of work"}


@pytest.fixture
def sent(model, picture, tmp_path):
    """A folder that was sent, with a model, images and maps in it, and beside it one of the user's own."""
    folder, mine = tmp_path / "sent", tmp_path / "mine"
    for index in range(12):
        picture(folder / "images" / f"{index}.png", seed=index)
        np.save(folder / f"{index}.npy", np.eye(80, 96, dtype=np.float32))
    for place in (folder, mine):
        place.mkdir(exist_ok=True)
        shutil.copy(model, place / "model.safetensors")
    return folder


def test_a_model_that_was_sent_is_exported_beside_it_alone(sent, capsys):
    (sent / "export").symlink_to(sent.parent / "mine")
    before = files(sent.parent / "mine")
    command = ["export", sent / "model.safetensors", "--normals", sent / "images", "--compare", 2]
    command_refused(capsys, command, r"sent/export/model_float32\.onnx would lie outside .*sent\. Remove the link")
    assert files(sent.parent / "mine") == before


@pytest.mark.parametrize("command", ["threshold", "export"])
def test_a_model_that_is_a_link_is_not_written_for(sent, capsys, command):
    """Neither in its place, which is the user's own model, nor beside that."""
    model, before = sent / "model.safetensors", files(sent.parent / "mine")
    model.unlink()
    model.symlink_to(sent.parent / "mine" / "model.safetensors")
    command = [command, model, "--normals", sent / "images"]
    command += ["--compare", 2] if command[0] == "export" else []
    command_refused(capsys, command, f"{model} is a link to {sent.parent}/mine/model.safetensors. Name that file")
    new = sent / f"new{'.onnx' if command[0] == 'export' else '.safetensors'}"
    assert main([str(part) for part in [*command, "--out", new]]) == 0
    assert files(sent.parent / "mine") == before and new.is_file()


def test_views_are_saved_beside_the_notes_alone(sent):
    (sent / "views").symlink_to(sent.parent / "mine")
    before = files(sent.parent / "mine")
    for viewer in (view_images(sent / "model.safetensors", sent / "images"), view_maps(sent, sent / "images")):
        refused(viewer.save, "sent/views/.*png would lie outside .*sent. Remove the link")
        viewer.controls["save"].click()
    assert files(sent.parent / "mine") == before


def test_maps_that_are_not_of_an_evaluation_stay(evaluated_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    for name in ("mine.npz", "00099.npz"):
        (run / "maps" / name).write_text("")
    detector, _, found = evaluate_run(run, "cpu")
    finish_run(run, detector, found)
    assert (run / "maps" / "mine.npz").exists() and not (run / "maps" / "00099.npz").exists()


@pytest.mark.parametrize("name", ["watch.lock", "run.log", ".lock"])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "mine.txt")
    refused(lambda: Lock(tmp_path / name).take(), f"cannot write .*{name}")
    if name == process.LOG:
        with pytest.raises(OSError, match=name):
            process.start({"folder": str(tmp_path)}, {})
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["report.html", "figures/scores.png"])
def test_a_link_under_the_name_of_a_half_written_file_is_not_followed(evaluated_run, tmp_path, name):
    """Whoever sends a run can guess the number of the process that will write into it."""
    run, mine = tmp_path / "run", tmp_path / "mine.txt"
    shutil.copytree(evaluated_run, run)
    mine.write_text("years of work")
    mine.chmod(0o600)
    half = partial_of(run / name)
    half.parent.mkdir(exist_ok=True)
    half.symlink_to(mine)
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert (mine.read_text(), mine.stat().st_mode & 0o777) == ("years of work", 0o600)
    assert (run / name).is_file() and not (run / name).is_symlink() and not half.is_symlink()


def test_a_run_that_was_sent_renders_nothing(evaluated_run, tmp_path, capsys):
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(evaluated_run, run)
    made = yaml.safe_load((run / "parameters.yaml").read_text())
    made |= {"dataset": "synthetic", "category": "gasket", "data_root": str(mine)}
    (run / "parameters.yaml").write_text(yaml.safe_dump(made))
    for command in ("evaluate", "export"):
        command_refused(capsys, [command, run], rf"no .*manifest.*effad synthesize gasket {mine}")
    assert not mine.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"notebooks": ["01_data_synthesis"], "parameters": {"data_root": "{mine}", "overwrite": True}},
        {"notebooks": ["01_data_synthesis"], "parameters": {"data_root": "effad_lib", "overwrite": True}},
        {"notebooks": ["01_data_synthesis"], "parameters": {"data_root": "{runs}/../../../../mine"}},
        {"notebooks": ["03_training"], "parameters": {"dataset": "synthetic", "data_root": "{mine}"}},
        {"notebooks": ["06_sweeps"], "parameters": {"runs": "{mine}", "force": True}},
        {"notebooks": ["06_sweeps"], "parameters": {"sweep": "quick", "force": True}},  # runs/sweeps of the project
        {"notebooks": ["01_data_synthesis"], "parameters": {"product": "gasket", "overwrite": True}},
        {"notebooks": ["01_data_synthesis"], "parameters": {"data_root": "data/mine", "overwrite": True}},
    ],
)
def test_a_sweep_chooses_no_folder_elsewhere(content, tmp_path, capsys):
    text = yaml.safe_dump(content).replace("{mine}", str(tmp_path / "mine"))
    (tmp_path / "sent.yaml").write_text(text)
    for more in ([], ["--dry-run"]):
        command = ["sweep", tmp_path / "sent.yaml", "--runs", tmp_path / "runs", *more]
        command_refused(capsys, command, "(data_root|runs) = .*which a file may only ask for in {runs}")
    assert not (tmp_path / "mine").exists() and not (tmp_path / "runs").exists()


def test_a_sweep_calls_no_scheduler_of_its_own_choice(tmp_path, capsys):
    """Dask unpickles what the scheduler answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        parameters = {"runs": "{runs}/x", "scheduler": f"tcp://127.0.0.1:{server.getsockname()[1]}"}
        (tmp_path / "sent.yaml").write_text(yaml.safe_dump({"notebooks": ["06_sweeps"], "parameters": parameters}))
        for more in ([], ["--dry-run"]):
            command = ["sweep", tmp_path / "sent.yaml", "--runs", tmp_path / "runs", *more]
            command_refused(capsys, command, "scheduler = 'tcp:.*no file may name it.*--scheduler tcp:")
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has called
    assert not (tmp_path / "runs").exists()


# --- names in pages and tables --------------------------------------------------------------------------------------

MARKUP = "<img src=x onerror=alert(1)>"
MATHS = r"$\frac{$ a_{ $"
FORMULA = '=HYPERLINK("http:..x","y")'


def test_names_are_text_in_reports_galleries_tables_and_figures(evaluated_run, tmp_path, nothing_named):
    data, run = tmp_path / f"data {MARKUP} {MATHS}", tmp_path / "run"
    shutil.copytree(evaluated_run.with_name("data"), data)
    shutil.copytree(evaluated_run, run)
    for old, new in (("dent", f"{MARKUP} & {MATHS}"), ("hole", FORMULA)):
        for part in ("test", "ground_truth"):
            (data / part / old).rename(data / part / new)
    image = data / "test" / "good" / "0.png"
    image.rename(image.with_name(f"'{MARKUP}\"{MATHS}.png"))
    made = yaml.safe_load((run / "parameters.yaml").read_text()) | {"data_root": str(data)}
    (run / "parameters.yaml").write_text(yaml.safe_dump(made))
    outside = {path for path in tmp_path.iterdir()}
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert main(["gallery", str(run)]) == 0
    pages = [(run / name).read_text(encoding="utf-8") for name in ("report.html", "gallery/index.html")]
    for page in pages:
        assert "<img src=x" not in page and html.escape(MARKUP) in page
    assert [page.count("<script") for page in pages] == [0, 1]
    assert (run / "figures" / "scores.png").is_file()
    assert not re.search(r"(^|,)\"?[=+@]", (run / "scores.csv").read_text(), re.MULTILINE)
    assert {path for path in tmp_path.iterdir()} == outside


# --- what the library does not do at all ----------------------------------------------------------------------------

SOURCES = sorted((PROJECT / "effad_lib").rglob("*.py"))

MODULES = frozenset("pickle cPickle dill joblib cloudpickle marshal shelve tarfile gzip bz2 lzma runpy code".split())
BUILTINS = frozenset("eval exec compile __import__".split())
METHODS = frozenset("unpack_archive extractall system popen unsafe_load full_load".split())


def called(node: ast.Call) -> str:
    """The dotted name of what is called."""
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT / "effad_lib").as_posix())
def test_nothing_is_unpacked_unpickled_or_evaluated(path):
    """Data sets are unpacked by the user alone; a file of code is executed at one place, which asks `consent`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip  # noqa: E501
    imported |= {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & MODULES
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = called(node), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in BUILTINS and name.rpartition(".")[2] not in METHODS, name
        assert name != "torch.load" or given.get("weights_only") == "True"
        assert name != "np.load" or given.get("allow_pickle") == "False"
        assert not name.startswith("yaml.") or name in ("yaml.SafeLoader", "yaml.safe_dump")
        assert given.get("shell", "False") == "False"
        if name == "Image.open" and path.name != "photographs.py":  # whose pictures are those of installed packages
            assert "formats" in given
        if name.endswith("exec_module"):
            assert path.name in ("split.py", "benchmark.py")  # the latter executes the project's own tests/literal.py
