"""Settings and options that nothing can be done with: refused in one line, before any file is written."""

from __future__ import annotations

import pytest
from trust import command_refused, refused

from effad_lib.distillation import DistillationSettings
from effad_lib.documents import short
from effad_lib.evaluation import EvaluationSettings
from effad_lib.export import ExportSettings
from effad_lib.latency import LatencySettings
from effad_lib.sweeps import SweepSettings
from effad_lib.synthesis import SynthesisSettings
from effad_lib.training import TrainingSettings
from effad_lib.viewer import ViewerSettings

INFINITE, NAN, HUGE = float("inf"), float("nan"), 2**64 - 1

SETTINGS = [
    (TrainingSettings, {"stepps": 1}, "unknown parameter 'stepps'.*Did you mean 'steps'"),
    (TrainingSettings, {"__dict__": {}}, "unknown parameter '__dict__'"),
    (TrainingSettings, {"steps": -1}, "steps = -1: steps takes a whole number of at least 1"),
    (TrainingSettings, {"steps": 1.5}, "steps takes int, not float"),
    (TrainingSettings, {"steps": "many"}, "steps takes int, not str"),
    (TrainingSettings, {"batch_size": 0}, "batch_size takes a whole number of at least 1"),
    (TrainingSettings, {"validate_every": 0}, "validate_every takes"),
    (TrainingSettings, {"checkpoint_every": 0}, "checkpoint_every takes"),
    (TrainingSettings, {"learning_rate": 0.0}, "learning_rate takes a number between 0 and 1"),
    (TrainingSettings, {"learning_rate": NAN}, "learning_rate = nan: learning_rate takes a finite number"),
    (TrainingSettings, {"learning_rate": INFINITE}, "learning_rate = inf: learning_rate takes a finite number"),
    (TrainingSettings, {"weight_decay": -0.1}, "weight_decay takes"),
    (TrainingSettings, {"weight_hard": INFINITE}, "weight_hard takes a finite number"),
    (TrainingSettings, {"weight_autoencoder": -1.0}, "weight_autoencoder takes"),
    (TrainingSettings, {"weight_student_autoencoder": NAN}, "weight_student_autoencoder takes a finite number"),
    (TrainingSettings, {"image_size": [64]}, "takes height and width"),
    (TrainingSettings, {"image_size": [64, HUGE]}, "at most 16,384"),
    (TrainingSettings, {"image_size": []}, "takes height and width"),
    (TrainingSettings, {"levels": [4095, 0]}, "the first the lower one"),
    (TrainingSettings, {"levels": [0.0, INFINITE]}, "levels takes a finite number"),
    (TrainingSettings, {"levels": [0, 1, 2]}, "takes the values of black and of white"),
    (TrainingSettings, {"penalty_crop_scale": [0.0, 1.0]}, "penalty_crop_scale takes"),
    (TrainingSettings, {"penalty_crop_scale": [0.5, INFINITE]}, "penalty_crop_scale takes"),
    (TrainingSettings, {"validation_share": 0.0}, "validation_share takes a share between"),
    (TrainingSettings, {"validation_share": 1.0}, "validation_share takes a share between"),
    (TrainingSettings, {"false_alarm_rate": -0.1}, "false_alarm_rate takes"),
    (TrainingSettings, {"confidence": 0.0}, "confidence takes"),
    (TrainingSettings, {"patience": -1}, "patience takes"),
    (TrainingSettings, {"ablation_steps": -1}, "ablation_steps takes"),
    (TrainingSettings, {"checkpoint": "first"}, "checkpoint takes 'last' or 'best'"),
    (TrainingSettings, {"cache_gb": NAN}, "cache_gb takes a finite number"),
    (TrainingSettings, {"cache_gb": INFINITE}, "cache_gb takes a finite number"),
    (TrainingSettings, {"cache_gb": -1.0}, "cache_gb takes"),
    (TrainingSettings, {"seed": -1}, "seed takes a whole number from 0"),
    (TrainingSettings, {"seed": HUGE}, "seed takes a whole number from 0 to below 2"),
    (TrainingSettings, {"seed": 10**30}, "seed takes no whole number of more than 64 bits"),
    (TrainingSettings, {"learning_rate": 10**400}, "learning_rate takes no whole number of more than 64 bits"),
    (TrainingSettings, {"learning_rate": True}, "learning_rate takes float, not bool"),
    (TrainingSettings, {"levels": [0, 10**400]}, "levels takes no whole number of more than 64 bits"),
    (TrainingSettings, {"image_size": [64, -(10**5000)]}, "image_size takes no whole number of more than 64 bits"),
    (TrainingSettings, {"data_root": "/data/\udcff"}, "data_root takes text that UTF-8 can encode"),
    (TrainingSettings, {"padding": [10**5000]}, "padding takes bool, not list"),
    (TrainingSettings, {"device": f"cuda:{'9' * 5000}"}, "not available here"),
    (TrainingSettings, {"device": "cuda:²"}, "not available here"),
    (TrainingSettings, {"device": "cuda:-1"}, "not available here"),
    (TrainingSettings, {"device": "cpu:x"}, "not available here"),
    (TrainingSettings, {"size": ""}, "unknown network size ''"),
    (DistillationSettings, {"channels": 0}, "channels takes"),
    (DistillationSettings, {"channels": HUGE}, "channels takes"),
    (DistillationSettings, {"ridge": INFINITE}, "ridge takes"),
    (DistillationSettings, {"ridge": 0.0}, "ridge takes"),
    (DistillationSettings, {"seed": HUGE}, "seed takes"),
    (DistillationSettings, {"held_out": -1}, "held_out takes"),
    (DistillationSettings, {"statistics_images": 1}, "statistics_images takes"),
    (DistillationSettings, {"fit_views": 0}, "fit_views takes"),
    (DistillationSettings, {"crop_scale": [0.9, 0.1]}, "crop_scale takes"),
    (DistillationSettings, {"checkpoint_seconds": NAN}, "checkpoint_seconds takes a finite number"),
    (DistillationSettings, {"checkpoint_seconds": INFINITE}, "checkpoint_seconds takes a finite number"),
    (DistillationSettings, {"checkpoint_seconds": -1.0}, "checkpoint_seconds takes"),
    (DistillationSettings, {"backbone": "../resnet18"}, "unknown backbone"),
    (SynthesisSettings, {"product": "../board"}, "unknown product"),
    (SynthesisSettings, {"train": -1}, "train takes a whole number"),
    (SynthesisSettings, {"train": 10**12}, "images: a data set takes 200,000 at most. Make train"),
    (SynthesisSettings, {"severity": [0.5]}, "severity takes two numbers"),
    (SynthesisSettings, {"severity": [INFINITE, INFINITE]}, "severity"),
    (SynthesisSettings, {"severity": [0.9, 0.1]}, "severity takes the lowest first"),
    (SynthesisSettings, {"defects": ["scratch", "scratch"]}, "defects takes each name once"),
    (SynthesisSettings, {"defects": ["scrach"]}, "unknown defect 'scrach'"),
    (SynthesisSettings, {"image_size": [HUGE, HUGE]}, "at most 16,384"),
    (SynthesisSettings, {"seed": -1}, "seed"),
    (EvaluationSettings, {"least_image_auroc": 2.0}, "least_image_auroc takes"),
    (EvaluationSettings, {"least_image_auroc": "high"}, "takes float, not str"),
    (EvaluationSettings, {"run_folder": ["a"]}, "run_folder takes str, not list"),
    (ExportSettings, {"batch": -1}, "batch takes"),
    (ExportSettings, {"batch": 10**12}, "batch takes a number of images, or 0 for any; 4096 at most"),
    (ExportSettings, {"image_size": [64, 10**9]}, "at most 16,384"),
    (ExportSettings, {"compare": 0}, "compare takes"),
    (ExportSettings, {"opset": 0}, "opset takes"),
    (SweepSettings, {"gpu_minutes": INFINITE}, "gpu_minutes takes"),
    (SweepSettings, {"threads": -1}, "threads takes"),
    (SweepSettings, {"only": 3}, "only takes str, not int"),
    (ViewerSettings, {"device": "screen"}, "not available here"),
    (ViewerSettings, {"image": "x"}, "unknown parameter 'image'.*Did you mean 'images'"),
    (LatencySettings, {"runfolder": "x"}, "unknown parameter 'runfolder'.*Did you mean 'run_folder'"),
]


@pytest.mark.parametrize(
    ("settings", "values", "says"),
    SETTINGS,
    ids=[f"{kind.__name__} {short(values)}" for kind, values, _ in SETTINGS],
)
def test_settings_that_no_work_can_have(settings, values, says):
    """The same from a notebook, into which papermill puts any name and any value."""
    refused(lambda: settings.from_mapping(values), says)
    if not any(name.startswith("_") for name in values):  # which belong to Python
        refused(lambda: settings.from_notebook({"In": [], "_": 3, **values}), says)


COMMANDS = {
    "train --steps 1e3": "--steps: invalid int value: '1e3'",
    "train --seed -1": "seed = -1",
    "train --seed 99999999999999999999": "seed takes no whole number of more than 64 bits",
    "train --levels 0 inf": "levels takes a finite number",
    "train --run-folder=": "run_folder = '': run_folder takes the name of a folder",
    "train --image-size 64 20000": "at most 16,384",
    "train --image-size": "takes height and width",
    "train --dataset folder": "no folder at root ''",
    "train --dataset nowhere.py:x": "there is no file .*nowhere.py",
    "train --dataset .py:": "there is no file",
    "train --dataset folder --data-root ~nobody_of_this_name": "no path that can be followed",
    "train --dataset mvtec_ad --data-root nowhere": "MVTec AD was not found in .*nowhere",
    "train --dataset synthetic --category ../x": "unknown product '../x'",
    "train --dataset visa --data-root nowhere": "VisA was not found",
    "train --dataset elpv --validation-share 1.5": "validation_share takes a share between",
    "train --teacher nowhere.pth --dataset elpv": "there is no .*nowhere.pth",
    "train --penalty-images nowhere --dataset elpv --size XS --steps 1 --run-folder run": "no such folder",
    "distill --images nowhere --run-folder run": "no such folder",
    "distill --channels 10000000000": "channels takes",
    "distill --held-out 10000 --run-folder run": "only 14 photographs are inside the installed packages",
    "synthesize board x --train -1": "train takes a whole number",
    "synthesize board x --image-size 10 10": "at least 64 pixels",
    "synthesize board x --defects scrach": "unknown defect 'scrach'",
    "damage nowhere x": "no such folder",
    "evaluate": "required: RUN",
    "evaluate ~nobody_of_this_name/run": "no path that can be followed",
    "evaluate . nowhere": "not the folder of a finished training",
    "evaluate . --device tpu": "not the folder of a finished training|not available",
    "gallery .": "holds no finished evaluation",
    "gallery nowhere --out .": "holds no finished evaluation",
    "threshold nowhere.safetensors --false-alarm-rate nan": "false_alarm_rate = nan",
    "threshold . --normals .": "there is no such file",
    "threshold m.safetensors --out photograph.png": r"--out photograph\.png: a model's file ends in \.safetensors",
    "export nowhere": "there is no such file",
    "export . --to tensorrt": "to takes 'onnx' or 'openvino'",
    "export . --out model.bin": r"ends in \.onnx",
    "detect m.onnx x.png --threads 10000000000": "threads takes a number up to 1024",
    "bench --threads 99999999999": "threads takes a number up to 1024",
    "bench --sizes XS --image-size 64 64 --seconds 1e-9 --out /dev/null/x": "cannot write /dev/null/x/training.csv",
    "sweep quick --threads 99999999999": "threads takes a number up to 1024",
    "detect nowhere.onnx x.png": "there is no such file",
    "detect nowhere.xml x.png": "there is no such file",
    "detect . x.png": "there is no such file",
    "detect ~nobody_of_this_name/m.safetensors x.png": "no path that can be followed",
    "detect m.safetensors x.png --tile-overlap half": "invalid int value: 'half'",
    "probe": "required: TEACHER",
    "probe XS --on": "expected at least one argument",
    "probe XS --on =": "unknown data set ''",
    "probe XS --on folder=nowhere": "no folder at root",
    "probe XS --seed 99999999999999999999 --on elpv": "seed = 99999999999999999999: takes a whole number",
    "probe XS --image-size 64 99999 --on elpv": "at most 16,384",
    "sweep quick --workers -1": "workers takes",
    "sweep quick --gpu-minutes 20": "gpu_source takes",
    "sweep quick --only zzz --dry-run": "no run of quick.yaml has such a name",
    "run --data-file ~nobody_of_this_name/x.py": "no path that can be followed",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_that_cannot_work_end_in_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFAD_DATA_FILES", "")
    command_refused(capsys, line.split(), COMMANDS[line])
    if "run-folder" not in line:
        assert not list(tmp_path.iterdir())


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch, capsys):
    """As a script gives that has lost a value."""
    monkeypatch.chdir(tmp_path)
    command_refused(capsys, ["detect", "m.safetensors", ""], "IMAGE_OR_FOLDER is empty")
    command_refused(capsys, ["detect", "m.safetensors", "x", "--out", ""], "--out is empty")
    command_refused(capsys, ["damage", "", "x"], "'' names no file and no folder")
