"""Models and exports that are broken, altered or made to harm: refused when they are opened."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from trust import Malicious, command_refused, files, refused

from effad_lib.detection import open_model
from effad_lib.detector import EfficientAD
from effad_lib.engines import CARD, load_exported
from effad_lib.export import ExportSettings, convert, record, to_onnx
from effad_lib.export import save as save_export

NAN, INFINITE = float("nan"), float("inf")


# --- models ---------------------------------------------------------------------------------------------------------

CALIBRATION = {"normals": 1, "scores": [1], "pixels": [1], "rank": 1, "false_alarm_rate": 0, "confidence": 0.95}

CARDS = {  # change of a model's card (None takes a field away), and what is said
    "no size": ({"size": None}, "its card has no size"),
    "no threshold": ({"threshold": None}, "its card has no threshold"),
    "another size": ({"size": "S"}, "Error.s. in loading state_dict"),
    "an unknown size": ({"size": "L"}, "unknown network size 'L'"),
    "size as number": ({"size": 3}, "size = 3, which takes the name of a network"),
    "size as path": ({"size": "../../S"}, "unknown network size"),
    "channels as text": ({"channels": "8"}, "channels = '8', which takes a whole number"),
    "no channels": ({"channels": 0}, "channels = 0, which takes"),
    "other channels": ({"channels": 16}, "its card has 16 channels, its weights 8"),
    "a billion channels": ({"channels": 10**9}, "its card has 1000000000 channels, its weights 8"),
    "channels true": ({"channels": True}, "channels = True, which takes"),
    "padding as number": ({"padding": 1}, "padding = 1, which takes true or false"),
    "image size of one": ({"image_size": [64]}, "takes height and width"),
    "image size as text": ({"image_size": "64x64"}, "image_size = '64x64', which takes height and width"),
    "image size of text": ({"image_size": ["64", "64"]}, "takes height and width"),
    "tiny images": ({"image_size": [8, 8]}, "at least 64 pixels"),
    "huge images": ({"image_size": [10**9, 10**9]}, "at most 16,384"),
    "threshold NaN": ({"threshold": NAN}, "its card is not JSON: it holds NaN"),
    "threshold infinite": ({"threshold": INFINITE}, "it holds Infinity"),
    "a huge threshold": ({"threshold": 10**400}, "the whole number 10000000000000000000… has more than 64 bits"),
    "a huge pixel threshold": ({"pixel_threshold": -(2**64)}, "has more than 64 bits"),
    "huge levels": ({"levels": [0, 10**400]}, "has more than 64 bits"),
    "a huge calibration": ({"calibration": {"normals": 1, "scores": [10**400], "pixels": [1]}}, "more than 64 bits"),
    "threshold as text": ({"threshold": "0.5"}, "threshold = '0.5', which takes a number"),
    "threshold true": ({"threshold": True}, "threshold = True, which takes"),
    "pixel threshold as list": ({"pixel_threshold": [0.5]}, r"pixel_threshold = \[0.5\], which takes"),
    "levels turned round": ({"levels": [5, 1]}, "takes the values of black and of white"),
    "levels as number": ({"levels": 4095}, "levels = 4095, which takes two numbers"),
    "levels of text": ({"levels": ["a", "b"]}, "levels = .*which takes two numbers"),
    "aspects as number": ({"aspects": 1.5}, "aspects = 1.5, which takes the lowest"),
    "aspects turned round": ({"aspects": [2, 1]}, "aspects = .*which takes the lowest"),
    "an aspect of zero": ({"aspects": [0, 1]}, "aspects = .*which takes the lowest"),
    "calibration as list": ({"calibration": [1]}, "calibration = .*which takes scores"),
    "calibration without scores": ({"calibration": {"normals": 3}}, "calibration = .*which takes scores"),
    "calibration of fewer": ({"calibration": {"normals": 3, "scores": [1], "pixels": [1]}}, "calibration = "),
    "calibration in tiles of text": (
        {"calibration": {"normals": 1, "scores": [1], "pixels": [1], "tile_overlap": "64"}}, "calibration = "
    ),
    "calibration not sorted": ({"calibration": {"normals": 2, "scores": [2, 1], "pixels": [1, 2]}}, "calibration = "),
    "a threshold beyond float32": ({"threshold": 1e308}, r"threshold = 1e\+308, which takes a number that float32"),
    "a pixel threshold beyond float32": ({"pixel_threshold": -1e39}, "pixel_threshold = .*float32 holds, or null"),
    "scores beyond float32": ({"calibration": {"normals": 1, "scores": [1e39], "pixels": [1]}}, "calibration = "),
    "a rank beyond": ({"calibration": CALIBRATION | {"rank": 2}}, "calibration = .*a rank among them"),
    "half a rank": ({"calibration": CALIBRATION | {"rank": 0.5}}, "calibration = "),
    "a rank without confidence": ({"calibration": CALIBRATION | {"confidence": None}}, "calibration = .*its rule"),
    "a rank alone": ({"calibration": {"normals": 1, "scores": [1], "pixels": [1], "rank": 1}}, "calibration = "),
    "a source as number": ({"calibration": CALIBRATION | {"source": 3}}, "calibration = "),
}  # fmt: skip

WEIGHTS = {  # change of a model's weights, and what is said
    "NaN in the student": (lambda w: w["student.head.weight"].view(-1)[:1].fill_(NAN), "student.head.weight holds NaN"),
    "whole numbers": (lambda w: w.update({k: v.long() for k, v in w.items()}), "torch.int64, where floats should"),
    "infinite in the mean": (lambda w: w["teacher_mean"].fill_(INFINITE), "teacher_mean holds NaN or infinite"),
    "NaN among the quantiles": (lambda w: w["quantiles"].fill_(NAN), "quantiles holds NaN"),
    "a layer missing": (lambda w: w.pop("student.head.bias"), "not a whole.*student.head.bias"),
    "a layer too many": (lambda w: w.update(more=torch.zeros(1)), "not a whole effad model"),
    "no mean": (lambda w: w.pop("teacher_mean"), "not a whole effad model"),
    "another shape": (lambda w: w.update({"student.head.bias": torch.zeros(3)}), "not a whole.*student.head.bias"),
    "no weights": (lambda w: w.clear(), "not a whole effad model"),
}  # fmt: skip

RAW = {  # the bytes of a model changed, and what is said
    "empty": lambda data: b"",
    "eight bytes": lambda data: data[:8],
    "cut in its header": lambda data: data[:200],
    "cut in its weights": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a header of 2^60 bytes": lambda data: (2**60).to_bytes(8, "little") + data[8:],
    "a header that is no JSON": lambda data: data[:8] + b"x" * (len(data) - 8),
    "a pickle": lambda data: pickle.dumps({"a": 1}),
    "a zip": lambda data: b"PK\x03\x04" + bytes(100),
}


UNSAVED = {  # what a detector is about to be saved with, and what is said
    "a source that is no text": (
        {"calibration": {"normals": 1, "scores": [1.0], "pixels": [1.0], "source": "\udcff"}}, "surrogates"),
    "a threshold that is NaN": ({"threshold": NAN}, "it holds NaN"),
    "an infinite pixel threshold": ({"pixel_threshold": INFINITE}, "it holds Infinity"),
    "levels turned round": ({"levels": (5.0, 1.0)}, "takes the values of black and of white"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSAVED)
def test_what_could_not_be_loaded_again_is_not_saved(model, tmp_path, kind):
    """The model that is there stays."""
    (values, says), path = UNSAVED[kind], tmp_path / "model.safetensors"
    shutil.copy(model, path)
    before, detector = files(tmp_path), EfficientAD.load(path)
    for name, value in values.items():
        setattr(detector, name, value)
    refused(lambda: detector.save(path), rf"model .*{path.name}: it would be saved with what no model takes.*{says}")
    assert files(tmp_path) == before


@pytest.fixture
def parts(model):
    """Weights and card of the small model, to be changed."""
    with safe_open(model, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, json.loads(file.metadata()["effad_card"])


def refused_as_model(path, says, picture, tmp_path, capsys):
    """No entrance takes the file, and nothing is written."""
    image = picture(tmp_path / "a.png")
    before = files(tmp_path)
    refused(lambda: EfficientAD.load(path), says)
    command_refused(capsys, ["detect", path, image, "--out", tmp_path / "out", "--device", "cpu"], says)
    command_refused(capsys, ["threshold", path, "--device", "cpu"], says)
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", CARDS)
def test_cards_of_models_that_make_no_sense(parts, picture, tmp_path, capsys, kind):
    (weights, card), (change, says) = parts, CARDS[kind]
    lost = [name for name, value in change.items() if value is None]
    card = {name: value for name, value in (card | change).items() if name not in lost}
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(weights, {"effad_card": json.dumps(card)}))
    refused_as_model(path, f"not a whole effad model.*{says}", picture, tmp_path, capsys)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"size": "XS"', "[" * 100_000, '"XS"', "NaN"])
def test_cards_that_are_no_names_with_values(parts, tmp_path, text):
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(parts[0], {"effad_card": text}))
    refused(lambda: EfficientAD.load(path), "not a whole effad model .its card")
    path.write_bytes(save(parts[0]))
    refused(lambda: EfficientAD.load(path), "not a whole effad model .'effad_card'")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_models_that_do_not_fit(parts, picture, tmp_path, capsys, kind):
    (weights, card), (change, says) = parts, WEIGHTS[kind]
    change(weights)
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(weights, {"effad_card": json.dumps(card)}))
    refused_as_model(path, says, picture, tmp_path, capsys)


@pytest.mark.parametrize("kind", RAW)
def test_files_that_are_no_models(model, picture, tmp_path, capsys, kind):
    path = tmp_path / "m.safetensors"
    path.write_bytes(RAW[kind](model.read_bytes()))
    refused_as_model(path, "not a whole effad model", picture, tmp_path, capsys)


def test_a_model_that_is_a_pickle_with_code_executes_nothing(picture, tmp_path, capsys):
    path, trace = tmp_path / "m.safetensors", tmp_path / "executed"
    torch.save({"effad_card": Malicious(trace)}, path)
    refused_as_model(path, "not a whole effad model", picture, tmp_path, capsys)
    assert not trace.exists()


# --- exports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model):
    """The small model for ONNX Runtime and for OpenVINO, by the ending of the file."""
    folder = tmp_path_factory.mktemp("exported")
    detector, made = EfficientAD.load(model), {}
    graph = to_onnx(detector, input_size=(64, 64))  # takes seconds: one for both
    for to, name in (("onnx", "m.onnx"), ("openvino", "m.xml")):
        settings = ExportSettings(to=to)
        card = detector.card_now() | {"export": record(settings, (64, 64))}
        made[Path(name).suffix] = save_export(convert(graph, settings), card, folder / to / name)
    return made


@pytest.fixture
def own(exported, tmp_path):
    """A function that copies an export, with what is beside it."""

    def copy(ending):
        shutil.copytree(exported[ending].parent, tmp_path / "own", dirs_exist_ok=True)
        return tmp_path / "own" / exported[ending].name

    return copy


def test_whole_exports_are_opened(own):
    for ending in (".onnx", ".xml"):
        assert load_exported(own(ending), "cpu").threshold is not None


LAUGHS = '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><net>&b;</net>'
FOREIGN = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><net>&a;</net>'

EXPORTS = {  # change of a file of this ending
    "empty .onnx": (".onnx", lambda path: path.write_bytes(b"")),
    "cut .onnx": (".onnx", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    "one byte short .onnx": (".onnx", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "words as .onnx": (".onnx", lambda path: path.write_text("model")),
    "pickle as .onnx": (".onnx", lambda path: path.write_bytes(pickle.dumps([1]))),
    "empty .xml": (".xml", lambda path: path.write_text("")),
    "cut .xml": (".xml", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
    "no .bin": (".xml", lambda path: path.with_suffix(".bin").unlink()),
    "empty .bin": (".xml", lambda path: path.with_suffix(".bin").write_bytes(b"")),
    "cut .bin": (".xml", lambda path: os.truncate(path.with_suffix(".bin"), 999)),
    "entities without end in .xml": (".xml", lambda path: path.write_text(LAUGHS)),
    "another file's content in .xml": (".xml", lambda path: path.write_text(FOREIGN)),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPORTS)
def test_exports_that_are_not_whole(own, picture, tmp_path, capsys, kind):
    ending, change = EXPORTS[kind]
    change(path := own(ending))
    arguments = ["detect", path, picture(tmp_path / "a.png"), "--out", tmp_path / "out"]
    said = command_refused(capsys, arguments, "not a whole effad export")
    assert "root:" not in said and not (tmp_path / "out").exists()


def unsealed(path):
    """An export's graph without card, and its card without the seal, as whoever alters them would have them."""
    graph = onnx.load(path)
    card = json.loads(next(entry.value for entry in graph.metadata_props if entry.key == CARD))
    del card["seal"], graph.metadata_props[:]
    return graph, card


UNFIT = {  # what the card says of an export's making, and what is said
    "batch as text": ({"batch": "x"}, r"the export in its card has batch = 'x', which takes null, or 1 to 4096 images"),
    "no batch": ({"batch": 0}, "has batch = 0, which"),
    "a batch below zero": ({"batch": -1}, "has batch = -1, which"),
    "half a batch": ({"batch": 0.5}, "has batch = 0.5, which"),
    "a billion at once": ({"batch": 10**9}, "has batch = 1000000000, which"),
    "images of another size": ({"input_size": [128, 128]}, "Got: 128 Expected: 64|128"),
    "size as number": ({"input_size": 64}, "has input_size = 64, which takes null, or height and width"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_exports_that_their_card_does_not_fit(own, kind):
    change, says = UNFIT[kind]
    graph, card = unsealed(path := own(".onnx"))
    graph.metadata_props.add(key=CARD, value=json.dumps(card | {"export": card["export"] | change}))
    onnx.save(graph, path)
    refused(lambda: load_exported(path, "cpu"), f"not a whole effad export .*(?:{says})")


@pytest.mark.parametrize("wide", [False, True])
def test_an_export_that_lacks_a_map_or_has_one_of_another_size_is_refused(own, wide):
    graph, card = unsealed(path := own(".onnx"))
    graph.metadata_props.add(key=CARD, value=json.dumps(card))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = ["lost" if name == "combined" else name for name in names]
    if wide:
        graph.graph.node.append(onnx.helper.make_node("Concat", ["lost", "lost"], ["combined"], axis=3))
        graph.graph.output[0].type.tensor_type.ClearField("shape")
    else:
        graph.graph.output[0].name = "lost"
    onnx.save(graph, path)
    says = r"it returns \[\(1, 64, 128\)" if wide else "Invalid output name: ?combined"
    refused(lambda: load_exported(path, "cpu"), f"not a whole effad export .*cannot be judged: .*{says}")


@pytest.mark.parametrize(
    "kind", ["no card", *(kind for kind in CARDS if "channels" not in kind and "size" not in kind)]
)
def test_cards_of_exports_are_checked_as_those_of_models(own, kind):
    path = own(".onnx")
    graph, card = unsealed(path)
    if kind != "no card":
        change, says = CARDS[kind]
        card = {name: value for name, value in (card | change).items() if value is not None}
        graph.metadata_props.add(key=CARD, value=json.dumps(card))
    onnx.save(graph, path)
    refused(lambda: load_exported(path, "cpu"), "not a whole effad export" + (f".*{says}" if kind != "no card" else ""))


def test_weights_of_an_export_are_taken_from_no_other_folder(own, tmp_path):
    """ONNX may keep weights in other files: one that leads out of the model's folder is not followed."""
    path = own(".onnx")
    graph = onnx.load(path)
    weights = graph.graph.initializer[0]
    (tmp_path / "secret").write_bytes(bytes(len(weights.raw_data) or 4096))
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret")
    path.write_bytes(graph.SerializeToString().replace(b"effad sha256", b"another hash"))
    refused(lambda: load_exported(path, "cpu"), "not a whole effad export")


def test_weights_of_another_export_or_altered_ones_are_named(own, model, tmp_path):
    path = own(".xml")
    beside = path.with_suffix(".bin")
    weights = beside.read_bytes()
    detector = EfficientAD.load(model)
    detector.student.load_state_dict({name: value + 0.01 for name, value in detector.student.state_dict().items()})
    graph = to_onnx(detector, input_size=(64, 64))
    other = save_export(convert(graph, ExportSettings(to="openvino")), {}, tmp_path / "other.xml").with_suffix(".bin")
    assert len(other.read_bytes()) == len(weights)  # so OpenVINO would take it
    altered = weights[:400] + bytes([weights[400] ^ 1]) + weights[401:]
    for wrong in (b"", weights[: len(weights) // 2], weights + b"x", other.read_bytes(), altered):
        beside.write_bytes(wrong)
        refused(lambda: load_exported(path, "cpu"), r"m\.xml and .*m\.bin: not a whole effad export, as the hash")
    beside.unlink()
    refused(lambda: load_exported(path, "cpu"), r"m\.bin is not beside it. Copy both")
    beside.write_bytes(weights)
    assert load_exported(path, "cpu").runtime.startswith("OpenVINO")


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_an_altered_export_is_refused_and_one_of_before_seals_is_opened(own, ending):
    path = own(ending)
    whole, threshold = path.read_bytes(), load_exported(path, "cpu").threshold
    places = [re.search(rb"threshold\D+\d\.\d", whole).end()]  # a digit of it
    if ending == ".onnx":
        places.append(whole.index(onnx.load(path).graph.initializer[0].raw_data))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(lambda: load_exported(path, "cpu"), "not a whole effad export, as the hash in its card says: altered")
    path.write_bytes(whole.replace(b"effad sha256", b"another hash"))
    assert load_exported(path, "cpu").threshold == threshold


def test_of_a_runtimes_message_the_last_line_is_shown(own):
    path = own(".xml")
    path.write_bytes(path.read_bytes().replace(b"effad sha256", b"another hash"))
    os.truncate(path.with_suffix(".bin"), 100)
    refused(lambda: load_exported(path, "cpu"), r"runtime can use \(Incorrect weights in bin file!\)")


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_threads_that_cannot_be(own, ending):
    refused(lambda: load_exported(own(ending), "cpu", -1), "threads = -1: threads takes a number up to 1024, or 0")


@pytest.mark.parametrize("name", ["m.pt", "m.onnx.gz", "m", "m.ONNX", "m.bin"])
def test_endings_that_are_no_models(own, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"x")
    refused(lambda: open_model(path, "cpu"), "not a whole effad model")
    refused(lambda: load_exported(path), "unknown ending")
