"""Teachers and checkpoints that are broken, altered or made to harm: refused when they are opened."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from trust import Malicious, command_refused, refused

from effad_lib.backbones import file_sha256, load_backbone
from effad_lib.checkpoints import restore_scaler
from effad_lib.datasets import load_dataset
from effad_lib.distillation import load_teacher
from effad_lib.networks import PDN
from effad_lib.runs import Run
from effad_lib.training import TrainingSettings, train

NAN, INFINITE = float("nan"), float("inf")

# --- teachers -------------------------------------------------------------------------------------------------------


def layers(channels=8):
    torch.manual_seed(0)
    return {name: value.contiguous() for name, value in PDN("XS", channels).state_dict().items()}


TEACHER_CARDS = {
    "no JSON": ("{", "is not JSON"),
    "nothing": ("", "is not JSON"),
    "a list": ("[]", "holds list where names with values should be"),
    "NaN": ('{"size": NaN}', "it holds NaN"),
    "deep": ("[" * 100_000, "is not JSON"),
    "no size": ({"size": None}, "size = None, which takes the name of a network"),
    "size as number": ({"size": 1}, "size = 1, which takes the name of a network"),
    "an unknown size": ({"size": "XXL"}, "unknown network size 'XXL'"),
    "another size": ({"size": "S"}, "is no layer of PDN-S|needs shape"),
    "channels as text": ({"channels": "8"}, "channels = '8', which takes a whole number of at least 1"),
    "channels missing": ('{"size": "XS", "sha256": ""}', "has no channels"),
    "photographs as text": ({"photographs": "many"}, "photographs = 'many', which takes a whole number"),
    "settings as list": ({"settings": ["steps"]}, "settings = .'steps'., which takes names with values"),
    "a billion channels": ({"channels": 10**9}, "its card has 1000000000 channels, its weights 8"),
    "channels true": ({"channels": True}, "channels = True, which takes a whole number"),
    "no hash": ({"sha256": None}, "sha256 = None, which takes a hash"),
    "another hash": ({"sha256": "0" * 64}, "its SHA-256 is .*, the card says 0000"),
}

TEACHERS = {
    "NaN": (lambda: layers() | {"head.bias": torch.full((8,), NAN)}, "head.bias holds NaN"),
    "infinite": (lambda: layers() | {"head.bias": torch.full((8,), INFINITE)}, "head.bias holds NaN or infinite"),
    "a layer too many": (lambda: layers() | {"more": torch.zeros(1)}, "more is no layer of PDN-XS"),
    "a layer missing": (lambda: {"head.bias": layers()["head.bias"]}, "needs shape .*, the file has nothing"),
    "another shape": (lambda: layers() | {"trunk.0.bias": torch.zeros(3)}, r"trunk.0.bias needs shape \(48,\)"),
    "nothing": (dict, "its card has 8 channels, its weights 0"),
    "truths": (lambda: layers() | {"head.bias": torch.ones(8) > 0}, "head.bias holds torch.bool, where floats should"),
    "whole numbers": (lambda: {name: value.long() for name, value in layers().items()}, "holds torch.int64, where"),
}  # fmt: skip


@pytest.fixture
def teacher(tmp_path):
    """A function that writes a teacher with a card that fits it, or is changed."""

    def write(weights, change=None):
        path = tmp_path / "teacher.safetensors"
        save_file(weights, path)
        card = {"network": "PDN-XS", "size": "XS", "channels": 8, "sha256": file_sha256(path)}
        card = json.dumps(card | (change or {})) if not isinstance(change, str) else change
        path.with_suffix(".json").write_text(card)
        return path

    return write


@pytest.mark.parametrize("kind", TEACHER_CARDS)
def test_cards_of_teachers_that_make_no_sense(teacher, tmp_path, capsys, kind):
    change, says = TEACHER_CARDS[kind]
    path = teacher(layers(), change)
    refused(lambda: load_teacher(path), says)
    command_refused(capsys, ["train", "--teacher", path, "--dataset", "elpv", "--size", "XS"], says)
    command_refused(capsys, ["probe", path, "--record", "--device", "cpu"], says)


@pytest.mark.parametrize("kind", TEACHERS)
def test_weights_of_teachers_that_do_not_fit(teacher, kind):
    weights, says = TEACHERS[kind]
    refused(lambda: load_teacher(teacher(weights())), says)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["empty", "cut", "words", "tensor", "code"])
def test_files_that_are_no_teachers(tmp_path, ending, kind):
    path, trace = tmp_path / f"teacher{ending}", tmp_path / "executed"
    torch.save(
        {"empty": {}, "code": {"a.weight": Malicious(trace)}, "tensor": torch.zeros(3)}.get(kind, layers()), path
    )
    if kind in ("empty", "cut", "words"):
        path.write_bytes({"empty": b"", "words": b"weights"}.get(kind, path.read_bytes()[:-500]))
    says = refused(lambda: load_teacher(path), "not a safetensors file or a plain state dict|not a plain state dict")
    assert "weights_only" not in says and "\n" not in says, "torch advises to execute the file"
    assert not trace.exists()


def stretched():
    """Seven times the memory of any machine from one number."""
    return torch.zeros(1).expand(10**12)


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8)


ODD_TENSORS = {  # made when they are asked for, and what is said
    "stretched": (lambda: {"more": stretched()}, "its tensors have more numbers than it holds"),
    "one many times": (lambda: dict.fromkeys("abcdefgh", torch.zeros(10**5)) | {"c": torch.ones(10**5)[:]}, ""),
    "views of one": (lambda: {str(k): x[k:] for x in [torch.zeros(10**5)] for k in range(9)}, "its tensors have more"),
    "sparse": (lambda: {"more": torch.eye(3).to_sparse()}, "one of its tensors is sparse_coo"),
    "quantised": (lambda: {"more": quantised()}, "one of its tensors is quantised"),
    "complex": (lambda: {"more": torch.ones(3, dtype=torch.complex64)}, "one of its tensors is complex"),
    "nowhere": (lambda: {"more": torch.ones(3, device="meta")}, "one of its tensors is without numbers"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that quantised tensors will go
def test_tensors_that_no_file_of_weights_has(interrupted, tmp_path, kind, packed):
    """A few bytes can stand for terabytes: by strides of zero, or packed."""
    (make, says), (settings, split, state) = ODD_TENSORS[kind], interrupted
    checkpoint = Run(settings.run_folder).folder / "checkpoints" / "last.pt"
    for path, content in ((tmp_path / "teacher.pth", {**layers(), **make()}), (checkpoint, {**state, **make()})):
        torch.save(content, path)
        if packed:
            with zipfile.ZipFile(path) as stored:
                parts = {name: stored.read(name) for name in stored.namelist()}
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stored:
                for name, part in parts.items():
                    stored.writestr(name, part)
    says = "it is packed" if packed else says
    refused(lambda: load_teacher(tmp_path / "teacher.pth"), says or "not the weights of a PDN")
    refused(lambda: load_backbone("resnet18", tmp_path / "teacher.pth"), says or "is missing")
    if says:
        refused(lambda: train(settings, split), f"cannot be read as a checkpoint .{says}.*Delete it to start this run")


def test_parts_of_a_file_that_lie_over_each_other(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save(layers(), path)
    with zipfile.ZipFile(path, "a") as stored:
        twice = copy.copy(max(stored.infolist(), key=lambda entry: entry.file_size))
        twice.filename = "archive/data/more"
        stored.filelist.append(twice)
        stored.NameToInfo[twice.filename] = twice
        stored.writestr("last", b"")
    refused(lambda: load_teacher(path), "its parts overlap")


def test_a_backbone_with_nan(tmp_path):
    weights = torchvision.models.resnet18(weights=None).state_dict()
    weights["layer2.0.conv1.weight"].view(-1)[5] = NAN
    save_file(weights, tmp_path / "weights.safetensors")
    says = r"weights .*: model.layer2.0.conv1.weight holds NaN or infinite values. Fetch them again"
    refused(lambda: load_backbone("resnet18", tmp_path / "weights.safetensors"), says)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def group(state):
    """The plain values with which the networks are optimised."""
    return state["optimisers"][0]["param_groups"][0]


def learned(state):
    """What the optimiser has learned of the first weight."""
    return state["optimisers"][0]["state"][0]


CHECKPOINTS = {  # change of the state of an interrupted training, and what is said
    "no step": (lambda s: s.pop("step"), "not of this version or was altered .ValueError: it has no step"),
    "no networks": (lambda s: s.pop("student"), "not of this version or was altered"),
    "networks as list": (lambda s: s.update(student=[1]), "not of this version or was altered"),
    "no optimiser": (lambda s: s.pop("optimisers"), "not of this version or was altered"),
    "another optimiser": (lambda s: s.update(optimisers=[{"state": {}, "param_groups": []}]), "not of this version"),
    "a generator of one byte": (lambda s: s.update(generator=torch.zeros(1, dtype=torch.uint8)), "not of this version"),
    "a generator of floats": (lambda s: s.update(generator=torch.zeros(5056)), "not of this version"),
    "kept as number": (lambda s: s.update(kept=3), "not of this version"),
    "NaN in the student": (lambda s: s["student"]["head.bias"].fill_(NAN), "its checkpoint holds NaN or infinite"),
    "infinite in the optimiser": (lambda s: s["optimisers"][0]["state"][0]["exp_avg"].fill_(INFINITE), "holds NaN"),
    "an infinite loss": (lambda s: s["history"][0].update(total=INFINITE), "its checkpoint holds NaN or infinite"),
    "decay as text": (lambda s: group(s).update(weight_decay="x"), "group 0 of .* weight_decay = .x., which takes"),
    "betas as text": (lambda s: group(s).update(betas="x"), r"betas = 'x', which takes \(0.9, 0.999\)"),
    "other betas": (lambda s: group(s).update(betas=(0.5, 0.999)), "betas = .0.5, 0.999., which takes"),
    "another eps": (lambda s: group(s).update(eps=1.0), "eps = 1.0, which takes 1e-08"),
    "decay as tensor": (lambda s: group(s).update(weight_decay=torch.ones(3)), "weight_decay = tensor.*takes 1e-05"),
    "amsgrad": (lambda s: group(s).update(amsgrad=True), "amsgrad = True, which takes False"),
    "other weights": (lambda s: group(s)["params"].append(0), "params = .*, which takes"),
    "groups as number": (lambda s: s["optimisers"][0].update(param_groups=3), "was altered .TypeError"),
    "nothing learned": (lambda s: s["optimisers"][0].update(state={}), "was altered .KeyError"),
    "nothing learned of one": (lambda s: s["optimisers"][0]["state"].pop(1), "was altered .KeyError"),
    "a mean as text": (lambda s: learned(s).update(exp_avg="x"), "of weight 0 .* exp_avg = 'x', which takes numbers"),
    "no mean": (lambda s: learned(s).pop("exp_avg_sq"), "of weight 0 its optimiser has no exp_avg_sq"),
    "a mean of three": (lambda s: learned(s).update(exp_avg=torch.zeros(3)), "tensor.*, which takes numbers of shape"),
    "another count": (lambda s: learned(s)["step"].fill_(99), r"step = tensor\(99.\), which takes the 1 steps"),
    "two counts": (lambda s: learned(s).update(step=torch.ones(2)), "step = tensor.*, which takes the 1 steps"),
    "step as text": (lambda s: s.update(step="1"), "step = '1', which takes a whole number from 0 to 1"),
    "half a step": (lambda s: s.update(step=0.5), "step = 0.5, which takes a whole number"),
    "step true": (lambda s: s.update(step=True), "step = True, which takes a whole number"),
    "a step too far": (lambda s: s.update(step=99), "step = 99, which takes a whole number from 0 to 1"),
    "a step below zero": (lambda s: s.update(step=-2), "step = -2, which takes a whole number from 0 to 1"),
    "seconds as text": (lambda s: s.update(seconds="x"), "seconds = 'x', which takes seconds"),
    "huge seconds": (lambda s: s.update(seconds=10**400), "seconds = 10000000.*, which takes seconds"),
    "stale as text": (lambda s: s.update(stale="x"), "stale = 'x', which takes a whole number"),
    "history as number": (lambda s: s.update(history=3), "history = 3, which takes rows of numbers"),
    "history of words": (lambda s: s.update(history=[{"step": "x"}]), "history = .*, which takes rows of numbers"),
    "history in itself": (lambda s: s["history"].append(s["history"]), "history = .*, which takes rows of numbers"),
    "kept of words": (lambda s: s.update(kept=[("a", "b")]), "kept = .*, which takes pairs of loss and step"),
    "kept of three": (lambda s: s.update(kept=[(0.5, 1, 1)]), "kept = .*, which takes pairs of loss and step"),
    "another mean": (lambda s: s.update(teacher_mean=torch.zeros(3)), "teacher_mean = .*numbers of shape"),
    "a mean for all": (lambda s: s.update(teacher_mean=torch.zeros(1, 1, 1, 1)), "teacher_mean = .*numbers of shape"),
    "other channels": (lambda s: s["student"].update({"head.bias": torch.zeros(3)}), "not of size XS with 8 channels"),
}  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The settings and data of a training that has come to its end, and its last checkpoint."""
    root = tmp_path_factory.mktemp("interrupted")
    (root / "data").mkdir()
    for k in range(13):
        pixels = np.random.default_rng(k).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{k:02}.png")
    save_file(layers(), root / "t.safetensors")
    digest = hashlib.sha256((root / "t.safetensors").read_bytes()).hexdigest()
    (root / "t.json").write_text(json.dumps({"size": "XS", "channels": 8, "sha256": digest}))
    split = load_dataset("folder", root=root / "data")
    values = {"size": "XS", "teacher": str(root / "t.safetensors"), "image_size": [64, 64], "steps": 1, "device": "cpu"}
    settings = TrainingSettings(run_folder=str(root / "run"), dataset="folder", **values)
    train(settings, split)
    Run(root / "run").model.unlink()
    return settings, split, torch.load(root / "run" / "checkpoints" / "last.pt", weights_only=True)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_that_cannot_be_continued(interrupted, kind):
    (settings, split, state), (change, says) = interrupted, CHECKPOINTS[kind]
    state = pickle.loads(pickle.dumps(state))
    change(state)
    run = Run(settings.run_folder)
    path = run.save_checkpoint("last", state)
    before = path.read_bytes()
    refused(lambda: train(settings, split), says)
    assert path.read_bytes() == before and not run.model.exists()


def test_the_rate_of_the_last_step_and_how_a_device_computes_do_not_matter(interrupted):
    settings, split, state = interrupted
    state = pickle.loads(pickle.dumps(state))
    group(state).update(lr="x", fused=None, foreach=True)
    run = Run(settings.run_folder)
    run.save_checkpoint("last", state)
    train(settings, split)
    run.model.unlink()


SCALERS = {  # change of the state of a scaler, and what is said
    "scale as text": ({"scale": "x"}, "its scaler has scale = 'x', which takes a number above 0"),
    "no scale": ({"scale": 0.0}, "scale = 0.0, which takes a number above 0"),
    "other growth": ({"growth_factor": 3.0}, "growth_factor = 3.0, which takes 2.0"),
    "other backoff": ({"backoff_factor": "x"}, "backoff_factor = 'x', which takes 0.5"),
    "interval true": ({"growth_interval": True}, "growth_interval = True, which takes 2000"),
    "tracker below zero": ({"_growth_tracker": -1}, "_growth_tracker = -1, which takes a whole number of steps"),
}


@pytest.mark.parametrize("kind", SCALERS)
def test_a_scaler_that_was_altered_is_refused(kind):
    change, says = SCALERS[kind]
    scaler = torch.amp.GradScaler("cpu")
    whole = scaler.state_dict() | {"scale": 1024.0, "_growth_tracker": 7}
    with pytest.raises(ValueError, match=says):
        restore_scaler(scaler, whole | change)
    assert scaler.state_dict()["scale"] == 65536.0
    restore_scaler(scaler, {})  # of another precision
    restore_scaler(scaler, whole)
    assert scaler.state_dict() == whole


@pytest.mark.parametrize("kind", ["empty", "words", "cut", "list", "code"])
def test_files_that_are_no_checkpoints(interrupted, tmp_path, kind):
    settings, split, state = interrupted
    path, trace = Run(settings.run_folder).save_checkpoint("last", state), tmp_path / "executed"
    contents = {"empty": b"", "words": b"checkpoint", "cut": path.read_bytes()[:-1000]}
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        torch.save([1] if kind == "list" else {**state, "step": Malicious(trace)}, path)
    refused(lambda: train(settings, split), "cannot be read as a checkpoint.*Delete it to start this run anew")
    assert not trace.exists()


def test_a_list_that_holds_itself_many_times_over(interrupted):
    """Two entries, each with two of the next, sixty deep: a walk through all of them would never end."""
    settings, split, state = interrupted
    more = [0.5]
    for _ in range(60):
        more = [more, more]
    run = Run(settings.run_folder)
    run.save_checkpoint("last", {**state, "more": more})
    train(settings, split)
    run.model.unlink()
    more[0] = more[1] = [NAN]
    run.save_checkpoint("last", {**state, "more": more})
    refused(lambda: train(settings, split), "holds NaN or infinite values")
