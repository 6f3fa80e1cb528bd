"""INT8 exports: which layers stay in float32, what they are calibrated on, whose thresholds they get."""

import copy

import numpy as np
import onnx
import openvino
import pytest
import torch

from effad_lib import export as exporting
from effad_lib.calibration import calibrate, rank
from effad_lib.engines import load_exported
from effad_lib.export import ExportError, ExportSettings, export
from effad_lib.export import normals as good_images
from effad_lib.export.quantisation import convolutions
from effad_lib.images import find_images, load_images, read_image
from effad_lib.settings import SettingsError


@pytest.mark.filterwarnings("ignore:INT8 is calibrated on 6 good images alone. Give 10 or more, --normals FOLDER")
@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("remedy", [True, False])
def test_a_teacher_that_eight_bits_would_spoil_keeps_its_second_convolution(
    trained, normals, tmp_path, monkeypatch, to, remedy
):
    """Two input channels of that layer are equal and their large weights cancel: in eight bits the others are lost.

    Where float32 there is not enough, `--force` keeps the plain model, which is quicker.
    """
    detector = copy.deepcopy(trained()[0])
    first, second = detector.teacher.trunk[0], detector.teacher.trunk[3]
    with torch.no_grad():
        first.weight[1], first.bias[1] = first.weight[0], first.bias[0]
        second.weight[:, 0] += 3
        second.weight[:, 1] -= 3
    calibrate(detector, load_images(find_images(normals), (64, 64)))
    file, out = detector.save(tmp_path / "m.safetensors"), tmp_path / f"m{exporting.SUFFIXES[to]}"
    settings = ExportSettings(to=to, precision="int8", compare=2)
    quantised, saved = exporting.quantise, []
    monkeypatch.setattr(exporting, "quantise", lambda *given: saved.append(given[-1]) or quantised(*given))
    if not remedy:
        monkeypatch.setattr(exporting, "SENSITIVE", "detector.student.trunk.3.weight")
        with pytest.raises(
            ExportError, match=r"student–teacher map differs.*in float32: .*student–teacher map differs"
        ):
            export(file, settings, normals=normals, out=out)
        assert not out.exists()
    path, found = export(file, settings, normals=normals, out=out, force=not remedy)
    assert saved == ["", exporting.SENSITIVE] * (1 if remedy else 2)
    spared = _in_float(path)
    assert (exporting.SENSITIVE in spared) == remedy and len(spared) == 3 + remedy
    exported = load_exported(path, "cpu")
    parity = exported.card["export"]["parity"]
    assert parity["forced"] == bool(found.faults) == (not remedy) and parity["plain_int8"] == found.plain_int8
    assert found.plain_int8.startswith("combined map differs by") == remedy
    assert ("second convolution is left in float32; else: combined map differs" in found.as_text()) == remedy
    images = load_images(find_images(normals), (64, 64)).numpy()
    maps = [one.inspect(images).student_teacher for one in (detector, exported)]
    assert (np.abs(maps[1] - maps[0]) < 0.5 * np.maximum(maps[0], 0.1)).all() == remedy
    assert found.differences["score"][0] > 0  # the others are in eight bits
    whole = sum(value.numel() * 4 for value in detector.state_dict().values())
    assert (path if to == "onnx" else path.with_suffix(".bin")).stat().st_size < 0.6 * whole


def _in_float(path):
    """The names of the kernels that an export keeps as they are: of the others a product stands before the layer."""
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        whole = {value.name for value in graph.initializer}
        return [node.input[1] for node in graph.node if node.op_type == "Conv" and node.input[1] in whole]
    nodes = openvino.Core().read_model(path).get_ordered_ops()
    kernels = [node.input_value(1).get_node() for node in nodes if node.get_type_name().endswith("Convolution")]
    return [kernel.get_friendly_name() for kernel in kernels if kernel.get_type_name() == "Constant"]


@pytest.mark.parametrize("size", ["XS", "S", "M"])
def test_the_sensitive_kernel_is_the_teachers_second_in_both_kinds_of_graph(trained, size):
    graph = exporting.to_onnx(trained(size)[0], input_size=(64, 64))
    for to in ("onnx", "openvino"):
        kernels = [kernel for _, kernel, _ in convolutions(exporting.convert(graph, ExportSettings(to=to)), to)]
        ofs = [kernel for kernel in kernels if kernel.startswith("detector.teacher.")]
        assert kernels.count(exporting.SENSITIVE) == 1 and ofs.index(exporting.SENSITIVE) == 1
        assert len(kernels) == len(set(kernels)) == {"XS": 23, "S": 22, "M": 26}[size]


@pytest.mark.parametrize("least", [6, 7])
def test_thresholds_are_an_exports_own_where_the_images_are_enough(any_size, normals, least):
    detector, path = any_size
    exported, files, detector = load_exported(path, "cpu"), find_images(normals), copy.deepcopy(detector)
    before = exported.threshold, exported.pixel_threshold
    exported.threshold = exported.pixel_threshold = 9.0
    detector.calibration |= {"normals": least, "false_alarm_rate": 0.5, "confidence": 0.6}
    if least > len(files):
        with pytest.warns(UserWarning, match="keeps its model's thresholds, chosen on 7 good images; here are 6"):
            assert not good_images.may_choose(detector, files, "line", None)
        return
    assert good_images.may_choose(detector, files, "line", None)
    good_images.own_thresholds(exported, detector, files, "line")
    scores = sorted(float(exported.inspect(read_image(file)[None]).score[0]) for file in files)
    place = rank(6, 0.5, 0.6)
    assert place < 6 and exported.threshold == pytest.approx(scores[place - 1], rel=1e-5) != before[0]
    assert exported.pixel_threshold == exported.calibration["pixels"][place - 1] != before[1]
    assert exported.calibration["rank"] == place and exported.calibration["source"] == "line"


def test_eight_bits_are_calibrated_on_other_images_than_they_are_compared_on():
    for count, compared, expected, shared in ((1000, 16, 150, 0), (30, 16, 14, 0), (20, 16, 20, 16), (26, 16, 10, 0)):
        files = [f"{index}.png" for index in range(count)]
        shown = good_images.spread(files, compared)
        chosen = good_images.to_calibrate_on(files, shown)
        assert (len(set(chosen)), len(set(chosen) & set(shown))) == (expected, shared)
    with pytest.warns(UserWarning, match="on 9 good images alone. Give 10 or more, --normals FOLDER"):
        assert len(good_images.to_calibrate_on(files[:9], files[:2])) == 9
    with pytest.raises(SettingsError, match=r"one good image says nothing of others\. Give 10 or more"):
        good_images.to_calibrate_on(files[:1], files[:1])


@pytest.mark.filterwarnings("ignore:INT8 is calibrated on 6 good images alone. Give 10 or more, --normals FOLDER")
def test_an_export_for_which_they_are_too_few_keeps_its_models_thresholds(trained, normals, tmp_path):
    detector = copy.deepcopy(trained()[0])
    images = load_images(find_images(normals), (64, 64))
    calibrate(detector, torch.cat([images, images[:1]]))
    file = detector.save(tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="keeps its model's thresholds, chosen on 7 good images; here are 6") as told:
        path, _ = export(file, ExportSettings(precision="int8", compare=2), normals=normals, out=tmp_path / "m.onnx")
    assert [warning.filename for warning in told if "keeps its" in str(warning.message)] == [__file__]
    exported = load_exported(path, "cpu")
    assert (exported.threshold, exported.pixel_threshold) == (detector.threshold, detector.pixel_threshold)
    assert exported.card["export"]["thresholds_from"] == "the model"
