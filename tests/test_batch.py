"""Profiles: everything checked before anything runs, finished steps kept."""

import hashlib
import json
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import save_file

from effad_lib import batch, distillation
from effad_lib.batch import departures, load_profile, notebook_parameters, run_profile
from effad_lib.networks import PDN
from effad_lib.profiles import ProfileError
from effad_lib.runs import PROJECT, Run, RunError, resolve
from effad_lib.settings import SettingsError
from effad_lib.training import TrainingSettings

LOGGING = """
from pathlib import Path
folder = Path(run_folder)
with open(folder / "log.txt", "a") as log:
    print(run_folder, number, rate, sizes, text, file=log)
"""


@pytest.fixture
def notebooks(tmp_path):
    """A function that writes notebooks (name → parameters cell, further cells) and profiles into a folder."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)

    def write(profile: str = "", **cells: tuple[str, ...]) -> Path:
        for name, (parameters, *rest) in cells.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in rest])
            notebook.cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, folder / f"{name}.ipynb")
        if profile:
            (folder / "profiles" / "mine.yaml").write_text(profile, encoding="utf-8")
        return folder

    return write


PARAMETERS = """# The parameters
run_folder = "runs/logging"
number = 3
rate: float = 1e-3  # a comment
sizes = [64, 64]
shares = []
text = "a"
flag = False
"""


@pytest.fixture
def teachers(tmp_path, monkeypatch):
    """Random teachers of sizes S, M and XS where the shipped ones are looked for, as Algorithm 3 would make them."""

    def write(backbone="wide_resnet101_2", photographs=1_281_167, channels=8):
        for size in ("S", "M", "XS"):
            path = tmp_path / "teachers" / f"pdn_{size.lower()}.safetensors"
            path.parent.mkdir(exist_ok=True)
            torch.manual_seed(0)
            save_file({name: value.contiguous() for name, value in PDN(size, channels).state_dict().items()}, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            card = {"size": size, "channels": channels, "sha256": digest, "photographs": photographs}
            card["settings"] = {"backbone": backbone, "steps": 60_000}
            path.with_suffix(".json").write_text(json.dumps(card))

    monkeypatch.setattr(distillation.teachers, "TEACHERS", tmp_path / "teachers")
    write()
    return write


def test_the_parameters_cell_is_read_without_running_it(notebooks):
    folder = notebooks(one=(PARAMETERS, "number = 5"))
    assert notebook_parameters(folder / "one.ipynb") == {
        "run_folder": "runs/logging",
        "number": 3,
        "rate": 1e-3,
        "sizes": [64, 64],
        "shares": [],
        "text": "a",
        "flag": False,
    }
    notebooks(two=("import os\nfolder = os.getcwd()",))
    with pytest.raises(ProfileError, match=r"two.ipynb: folder is not a plain value"):
        notebook_parameters(folder / "two.ipynb")


def test_a_step_knows_its_folder_and_all_parameters(notebooks, tmp_path):
    profile = "- {notebook: one, run: first, parameters: {number: 4, rate: 1, shares: [0.5, 1], text: '{runs}/data'}}"
    (step,) = load_profile("mine", runs=tmp_path / "runs", notebooks=notebooks(profile, one=(PARAMETERS,)))
    runs = tmp_path.resolve() / "runs" / "mine"
    assert step.output == runs / "first" / "one.ipynb"
    assert step.parameters["run_folder"] == str(runs / "first")
    assert step.parameters["text"] == f"{runs}/data"
    settings = step.settings.as_dict()
    assert (settings["number"], settings["rate"], settings["shares"]) == (4, 1.0, [0.5, 1.0])
    assert settings["sizes"] == [64, 64]


def test_paths_inside_the_project_name_no_machine(notebooks):
    folder = notebooks("- {notebook: one, run: first}", one=(PARAMETERS,))
    (step,) = load_profile("mine", notebooks=folder)
    assert step.parameters == {"run_folder": "runs/mine/first"}
    assert resolve(step.parameters["run_folder"]) == PROJECT / "runs" / "mine" / "first"


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("a: 1", "takes a list of steps"),
        ("", "takes a list of steps"),
        ("- [", "is not YAML"),
        ("- one", r"step 1 \(one\): 'one': takes notebook, run"),
        ("- {notebook: one, run: x, parameter: {}}", "unknown entry 'parameter'.*Did you mean 'parameters'"),
        ("- {notebook: oone, run: x}", r"step 1 \(oone\): unknown notebook 'oone'.*Did you mean 'one'"),
        ("- {notebook: ../one, run: x}", "unknown notebook"),
        ("- {run: x}", "unknown notebook None"),
        ("- {notebook: one}", "run = None: takes the name of a folder"),
        ("- {notebook: one, run: ../x}", "takes the name of a folder"),
        ("- {notebook: one, run: ..}", "takes the name of a folder"),
        ("- {notebook: one, run: x, parameters: [1]}", "takes names and values"),
        ("- {notebook: one, run: x, parameters: {run_folder: y}}", "no run_folder"),
        ("- {notebook: one, run: x}\n- {notebook: one, run: x}", "step 2: one is in run 'x' twice"),
        ("- {notebook: one, run: x, parameters: {numbr: 1}}", "unknown parameter 'numbr'.*Did you mean 'number'"),
        ("- {notebook: one, run: x, parameters: {rate: 1e-4}}", "rate = '1e-4'.*write 1.0e-4"),
        ("- {notebook: one, run: x, parameters: {number: 1.5}}", "number takes int, not float"),
        ("- {notebook: one, run: x, parameters: {flag: 1}}", "flag takes bool, not int"),
        ("- {notebook: one, run: x, parameters: {sizes: 64}}", "sizes takes a list of int"),
        ("- {notebook: one, run: x, parameters: {sizes: [64, '64']}}", "sizes takes int, not str"),
        ("- {notebook: one, run: x, parameters: {text: 1}}", "text takes str, not int"),
    ],
)
def test_a_faulty_profile_is_refused_before_anything_runs(notebooks, tmp_path, profile, says):
    folder = notebooks(one=(PARAMETERS, LOGGING))
    (folder / "profiles" / "mine.yaml").write_text(profile)
    with pytest.raises(ProfileError, match=says):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_profile_lists_the_known(notebooks, tmp_path):
    with pytest.raises(ProfileError, match=r"unknown profile 'mien'.*known are mine. Did you mean 'mine'"):
        run_profile("mien", runs=tmp_path, notebooks=notebooks("- {notebook: one, run: x}"))


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("steps: 0", "steps = 0"),
        ("learning_rate: 1e-4", "write 1.0e-4"),
        ("size: L", "unknown network size 'L'"),
        ("image_size: [32, 64]", "image size"),
        ("schedule: cosinus", "schedule takes"),
        ("{dataset: elpv, category: mini}", "unknown category 'mini'.*Did you mean 'mono'"),
        ("stepps: 5", "unknown parameter 'stepps'"),
    ],
)
def test_impossible_settings_of_a_training_are_found_early(notebooks, teachers, tmp_path, parameters, says):
    names = "steps learning_rate size image_size schedule dataset category".split()
    cell = "\n".join(f"{name} = {value!r}" for name, value in TrainingSettings().as_dict().items() if name in names)
    profile = "- {notebook: one, run: a}\n- {notebook: 03_training, run: b, parameters: %s}"
    profile %= parameters if parameters.startswith("{") else f"{{{parameters}}}"
    folder = notebooks(profile, **{"one": (PARAMETERS, LOGGING), "03_training": (cell,)})
    with pytest.raises(ProfileError, match=says) as error:
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert "mine.yaml, step 2 (03_training)" in str(error.value)
    assert not (tmp_path / "runs").exists()


# --- departures -----------------------------------------------------------------------------------------------------


def test_the_papers_settings_depart_by_their_penalty_images_only(teachers):
    found = departures(TrainingSettings(dataset="elpv", category="mono", seed=3, device="cpu", cache_gb=0.0))
    assert list(found) == ["penalty_images"]
    paper, here = found["penalty_images"]
    assert paper == "ImageNet" and "photographs inside installed packages" in here
    assert list(departures(TrainingSettings(size="M"))) == ["penalty_images"]
    assert departures(TrainingSettings(penalty_images="/a/b/photos"))["penalty_images"] == ("ImageNet", "photos")


def test_departures_are_computed_from_settings_and_card(teachers):
    teachers(backbone="efficientnet_lite2", photographs=1000)
    own = {"size": "XS", "steps": 500, "batch_size": 2, "image_size": [64, 96], "weight_penalty": 0.0}
    found = departures(TrainingSettings(**own, schedule="cosine", optimiser="muon"))
    assert found["steps"] == (70_000, 500) and found["batch_size"] == (1, 2)
    assert found["image_size"] == ([256, 256], [64, 96])
    assert found["size"] == ("S", "XS") and found["weight_penalty"] == (1.0, 0.0)
    assert found["schedule"] == ("step", "cosine") and found["optimiser"] == ("adam", "muon")
    assert found["teacher"] == ("Algorithm 3 on ImageNet", "backbone efficientnet_lite2, 1000 photographs")


def test_every_training_setting_is_the_papers_or_ours():
    """A setting that is added and does not say which it is would silently count as the paper's."""
    names = set(TrainingSettings().as_dict())
    papers = (
        "size padding image_size steps batch_size optimiser learning_rate weight_decay schedule initialisation "
        "hard_quantile weight_hard weight_penalty weight_autoencoder weight_student_autoencoder penalty_crop_scale "
        "validation_share patience checkpoint precision"
    )
    assert names == batch.OURS | set(papers.split())
    assert not batch.OURS & set(papers.split())


def test_without_a_teacher_there_is_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation.teachers, "TEACHERS", tmp_path)
    with pytest.raises(SettingsError, match="Others are made by `effad distill`"):
        departures(TrainingSettings())


def test_a_folder_with_another_training_is_found_before_anything_runs(notebooks, teachers, tmp_path):
    cell = "\n".join(
        f"{n} = {list(v) if isinstance(v, tuple) else v!r}" for n, v in TrainingSettings().as_dict().items()
    )
    profile = "- {notebook: one, run: a}\n- {notebook: 03_training, run: b, parameters: {size: XS}}"
    folder = notebooks(profile, one=(PARAMETERS, LOGGING), **{"03_training": (cell,)})
    *_, training = load_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    run = Run(training.folder)
    run.start(training.settings, training.made_from)
    training.check()
    notebooks(profile.replace("XS", "XS, steps: 5"))
    with pytest.raises(RunError, match=r"steps: 70000 there, 5 now.*--profile mine --force"):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    notebooks(profile)
    teachers(channels=16)
    with pytest.raises(RunError, match=r"teacher: \w{12} there, \w{12} now"):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert log(tmp_path, "a") == 0


# --- running --------------------------------------------------------------------------------------------------------


def log(tmp_path, run):
    path = tmp_path / "runs" / "mine" / run / "log.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


PROFILE = """
- {notebook: one, run: a, parameters: {number: 7, sizes: [64, 96]}}
- {notebook: two, run: a}
- {notebook: one, run: b}
"""


def test_steps_run_once_and_again_when_they_change(notebooks, tmp_path, capsys):
    fails = "if number == 3: raise ValueError('number 3 is not for me')"
    folder = notebooks(PROFILE, one=(PARAMETERS, fails, LOGGING), two=(PARAMETERS, LOGGING))

    # The third step fails: an error that names cell, error and notebook; the first two are kept.
    with pytest.raises(RunError, match=r"b/one.ipynb: cell \d failed with ValueError: number 3 is not for me"):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert (log(tmp_path, "a"), log(tmp_path, "b")) == (2, 0)
    first = (tmp_path / "runs" / "mine" / "a" / "log.txt").read_text().splitlines()[0]
    assert first == f"{tmp_path.resolve()}/runs/mine/a 7 0.001 [64, 96] a"
    executed = nbformat.read(tmp_path / "runs" / "mine" / "b" / "one.ipynb", 4)
    assert "effad" not in executed.metadata

    # With that repaired it alone runs; what is done is said to be.
    notebooks(PROFILE.replace("run: b", "run: b, parameters: {number: 4}"))
    capsys.readouterr()
    run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert (log(tmp_path, "a"), log(tmp_path, "b")) == (2, 1)
    assert capsys.readouterr().out.count("done before") == 2

    # Another second step runs again, and nothing before it; outputs and metadata of the source do not matter.
    notebooks(two=(PARAMETERS, LOGGING, "1 + 1"))
    source = nbformat.read(folder / "one.ipynb", 4)
    source.cells[1].metadata["note"], source.cells[1].execution_count = "opened", 3
    nbformat.write(source, folder / "one.ipynb")
    run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert (log(tmp_path, "a"), log(tmp_path, "b")) == (3, 1)


def test_force_starts_from_empty_folders_and_earlier_steps_renew_later_ones(notebooks, tmp_path):
    profile = "- {notebook: one, run: a}\n- {notebook: two, run: a}"
    folder = notebooks(profile, one=(PARAMETERS, LOGGING), two=(PARAMETERS, LOGGING))
    run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    notebooks(profile.replace("run: a}\n", "run: a, parameters: {number: 4}}\n"))
    run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert log(tmp_path, "a") == 4
    (tmp_path / "runs" / "mine" / "other").mkdir()
    run_profile("mine", runs=tmp_path / "runs", notebooks=folder, force=True)
    assert log(tmp_path, "a") == 2
    assert (tmp_path / "runs" / "mine" / "other").is_dir()
    executed = nbformat.read(tmp_path / "runs" / "mine" / "a" / "one.ipynb", 4)
    assert executed.metadata["effad"]["parameters"]["number"] == 4


def test_ctrl_c_reaches_the_kernel_and_the_step_is_not_done(notebooks, tmp_path):
    """A training in the kernel gets the interrupt, so that it can save its checkpoint before the kernel ends."""
    import os
    import signal
    import threading

    waits = """
import signal, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (Path(run_folder) / "saved").write_text("checkpoint"))
(Path(run_folder) / "started").write_text("")
for _ in range(600):
    time.sleep(0.1)
    if (Path(run_folder) / "saved").exists():
        raise KeyboardInterrupt
"""
    folder = notebooks("- {notebook: one, run: a}", one=(PARAMETERS, waits))
    run = tmp_path / "runs" / "mine" / "a"

    def press():
        for _ in range(1200):
            if (run / "started").exists():
                time.sleep(0.5)
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped in one\. What was finished before is kept"):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    thread.join()
    assert (run / "saved").read_text() == "checkpoint"
    (step,) = load_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert not step.done


def test_without_papermill_the_remedy_is_named(notebooks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    folder = notebooks("- {notebook: one, run: a}", one=(PARAMETERS, LOGGING))
    with pytest.raises(RunError, match=r"pip install .*effad\[notebooks\]"):
        run_profile("mine", runs=tmp_path / "runs", notebooks=folder)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metadata": {"papermill": {"exception": null}}}'])
def test_a_notebook_that_was_not_finished_is_not_done(notebooks, tmp_path, content):
    folder = notebooks("- {notebook: one, run: a}", one=(PARAMETERS,))
    (step,) = load_profile("mine", runs=tmp_path, notebooks=folder)
    step.folder.mkdir(parents=True)
    step.output.write_text(content)
    assert not step.done


# --- the real profiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["quick", "paper", "smoke"])
def test_the_profiles_fit_the_notebooks(profile, tmp_path):
    steps = load_profile(profile, runs=tmp_path)
    trained = [step for step in steps if isinstance(step.settings, TrainingSettings)]
    assert [step.settings.dataset for step in trained] == ["synthetic", "elpv"]
    if profile == "paper":
        # As the paper trains; only the teacher and the penalty's photographs may be others.
        assert all(departures(step.settings).keys() <= {"teacher", "penalty_images"} for step in trained)


@pytest.mark.slow
def test_the_smallest_profile_from_end_to_end(tmp_path, capsys):
    table = run_profile("smoke", runs=tmp_path)
    assert table["data"].tolist() == ["synthetic/board", "elpv/mono"]
    synthetic, cells = table.to_dict("records")
    assert 0 <= synthetic["au_pro"] <= 1 and cells["au_pro"] is None
    for folder in table["run_folder"]:
        assert Run(folder).done and Run(folder).model.is_file()
    said = capsys.readouterr().out
    assert "Departures of smoke/synthetic from the paper" in said and "–" in said
    assert all(step.done for step in load_profile("smoke", runs=tmp_path))
