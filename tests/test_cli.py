"""The command line: what it prints, how it ends, and that it is quick to help."""

import re
import subprocess
import sys

import pytest
from commands import failure

from effad_lib import __version__, cli
from effad_lib.cli import COMMANDS, main
from effad_lib.cli.options import given, settings_options
from effad_lib.distillation import DistillationSettings
from effad_lib.images import ImageError
from effad_lib.memory import OutOfMemory
from effad_lib.runs import PROJECT, Run, RunError
from effad_lib.training import TrainingSettings


def test_help_waits_for_nothing_heavy():
    script = (
        "import sys; from effad_lib.cli import main\ntry: main(['--help'])\nexcept SystemExit as e: print(e.code)\n"
    )
    script += "print([name for name in ('torch', 'pandas', 'numpy', 'matplotlib') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    *text, code, heavy = said.stdout.splitlines()
    assert (code, heavy) == ("0", "[]")
    assert all(re.search(rf"^ +{command}\b", "\n".join(text), re.MULTILINE) for command in COMMANDS)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"effad {__version__}\n"


@pytest.mark.parametrize(("command", "settings"), [("train", TrainingSettings), ("distill", DistillationSettings)])
def test_every_setting_is_an_option_with_its_comment_and_default(capsys, command, settings):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in settings().as_dict():
        assert f"--{name.replace('_', '-')}" in said
    assert {"train": "(paper), or", "distill": "half cosine to zero"}[command] in said
    assert "(default: 256 256)" in said


def test_values_of_every_type_arrive(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    arguments = "train --learning-rate 1e-3 --image-size 64 96 --padding --steps 5 --penalty-crop-scale --teacher t/x"
    options = cli.parse([*arguments.split(), "--data-root", str(tmp_path), "--run-folder", "runs/here"])
    found = given(options, settings_options(TrainingSettings))
    assert found == {
        "learning_rate": 1e-3,
        "image_size": [64, 96],
        "padding": True,
        "steps": 5,
        "penalty_crop_scale": [],
        "teacher": "t/x",
        "data_root": str(tmp_path.resolve()),
        "run_folder": "runs/here",
    }
    assert given(cli.parse(["train", "--teacher", "xs"]), settings_options(TrainingSettings)) == {"teacher": "xs"}
    assert given(cli.parse(["train", "--no-padding"]), settings_options(TrainingSettings)) == {"padding": False}


def test_paths_are_seen_from_where_one_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = cli.parse(["train", "--data-root", "mine", "--teacher", "t.pth"])
    here = tmp_path.resolve()
    wanted = {"data_root": str(here / "mine"), "teacher": str(here / "t.pth")}
    assert given(options, settings_options(TrainingSettings)) == wanted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (
            ["train", "--learing-rate", "1"],
            r"unknown argument --learing-rate: known are .*Did you mean '--learning-rate'",
        ),
        (["train", "--learn", "1"], "unknown argument --learn"),
        (["train", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["train", "--steps", "0"], "steps = 0: steps takes a whole number of at least 1"),
        (["train", "--learning-rate", "nan"], "learning_rate = nan"),
        (["train", "--size", "L"], "unknown network size 'L'"),
        (["train", "--image-size", "32", "64"], "at least 64 pixels"),
        (["train", "--dataset", "mvtec"], "unknown data set 'mvtec'.*Did you mean 'mvtec_ad'"),
        (["train", "--dataset", "elpv", "--category", "momo"], "unknown category 'momo'.*Did you mean 'mono'"),
        (["train", "--device", "gpu"], "device = 'gpu': not available here"),
        (["train", "--recipe", "cpus"], "unknown recipe 'cpus': known are cpu, paper. Did you mean 'cpu'"),
        (["distill", "--size", "XL"], "unknown network size 'XL'"),
        (["distill", "--backbone", "resnet81"], "resnet81"),
        (["distill", "--recipe", "gpu"], "unknown recipe 'gpu': known are cpu, paper"),
        (["probe", "nothing.pth"], r"there is no .*nothing\.pth"),
        (["probe", "M"], "teacher 'M'.*Others are made by `effad distill`"),
        (["probe", "XS", "--image-size", "32", "32"], "at least 64 pixels"),
        (["probe", "XS", "--backbone", "resnet81"], "resnet81"),
        (["probe", "XS", "--on", "elpv/momo"], "unknown category 'momo'.*Did you mean 'mono'"),
        (["probe", "XS", "--on", "mvtec_ad/screw=nowhere"], "MVTec AD was not found in .*nowhere"),
        (["synthesize", "bored", "x"], "bored.*board"),
        (["synthesize", "board", "x", "--severity", "0", "2"], "severity"),
        (["run", "--profile", "quik"], "unknown profile 'quik'.*Did you mean 'quick'"),
        (["evaluate", "nowhere"], "not the folder of a finished training"),
        (["detect", "nowhere.safetensors", "x.png"], "there is no such file"),
        (["detect", "--save", "a", "b"], "unknown argument --save"),
        (["threshold", "nowhere.safetensors"], "there is no such file"),
        (["threshold", "x.safetensors", "--false-alarm-rate", "5"], "false_alarm_rate = 5.0: .* from 0 to below 1"),
        (["threshold", "x.safetensors", "--confidence", "95"], "confidence = 95.0: .* between 0 and 1"),
    ],
)
def test_faults_are_one_line(capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert re.search(says, failure(capsys, *arguments), re.DOTALL)
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setitem(COMMANDS, "run", (cli.notebooks.run_options, broken))
    with pytest.raises(ValueError, match="a bug"):
        main(["run"])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RunError("cannot write x: No space left on device"), 2, "effad: cannot write x: No space left on device"),
        (ImageError("x.png: bad"), 2, "effad: x.png: bad"),
        (PermissionError(13, "Permission denied", "/x"), 2, "Permission denied: '/x'"),
        (KeyboardInterrupt("stopped after step 7; started again, the run continues there"), 130, "after step 7"),
        (MemoryError(), 2, "effad: out of memory: ask for less at a time"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "effad: out of memory"),
        (OutOfMemory("runs/a: out of memory with batch_size = 9."), 2, "effad: runs/a: out of memory with"),
        (KeyboardInterrupt(), 130, "what was finished before is kept"),
    ],
)
def test_how_commands_end(monkeypatch, capsys, error, code, says):
    def ending(*_):
        raise error

    monkeypatch.setitem(COMMANDS, "run", (cli.notebooks.run_options, ending))
    assert says in failure(capsys, "run", code=code)


@pytest.mark.parametrize("settings", [TrainingSettings, DistillationSettings])
def test_every_setting_is_an_option_with_a_help(settings):
    options = settings_options(settings)
    assert [option.name for option in options] == list(settings().as_dict())
    assert not [option.name for option in options if not option.help]


def test_a_recipe_is_a_start_that_options_change(monkeypatch):
    from effad_lib import distillation

    made = []
    monkeypatch.setattr(distillation, "distil", lambda settings: made.append(settings) or Run("runs/x"))
    assert main("distill --recipe cpu --steps 7 --run-folder runs/x".split()) == 0
    assert main("distill --run-folder runs/x".split()) == 0
    short, paper = made
    assert short.steps == 7 and short.run_folder == "runs/x"
    assert (short.optimiser, short.schedule, short.backbone) == ("muon", "cosine", "resnet18")
    assert paper == DistillationSettings(run_folder="runs/x"), "the default is the paper's"


def test_the_recipes_of_training_are_the_papers_and_one_for_cpus(monkeypatch):
    from effad_lib import training

    made = []
    monkeypatch.setattr(training, "train", lambda settings, split: made.append(settings))
    words = ["train", "--dataset", "elpv", "--run-folder", "runs/x"]
    assert main([*words, "--recipe", "cpu", "--steps", "7"]) == main(words) == 0
    short, paper = made
    assert (short.size, short.steps, short.hard_quantile, short.schedule) == ("XS", 7, 0.99, "cosine")
    assert paper == TrainingSettings(dataset="elpv", run_folder=paper.run_folder), "the default is the paper's"
