"""Exports: the same maps and scores as the model in torch, whole files or none, errors before the work."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.nn import functional
from trust import files

from effad_lib import export as exporting
from effad_lib.datasets import load_dataset
from effad_lib.detection import detect
from effad_lib.detector import EfficientAD
from effad_lib.engines import CARD, OUTPUTS, load_exported
from effad_lib.export import ExportError, ExportSettings, export, resize
from effad_lib.export import normals as good_images
from effad_lib.images import find_images, load_images, read_image
from effad_lib.runs import PROJECT, RunError, write_bytes
from effad_lib.settings import SettingsError


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8)


def assert_same(model, exported, images, rtol=1e-4, atol=1e-5):
    ours, theirs = model.inspect(images), exported.inspect(images)
    for name, value, other in zip(OUTPUTS, ours, theirs, strict=True):
        assert other.dtype == np.float32 and other.shape == value.shape, name
        np.testing.assert_allclose(other, value, rtol=rtol, atol=atol, err_msg=name)


# --- the same figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "image_size", "padding", "to", "batch"),
    [
        ("S", (64, 96), False, "onnx", 0),
        ("S", (64, 64), True, "openvino", 8),
        ("M", (64, 64), False, "onnx", 8),
        ("M", (64, 96), False, "openvino", 0),
        ("XS", (68, 131), False, "onnx", 1),
    ],
    ids=str,
)
def test_an_export_finds_what_the_model_finds(trained, normals, tmp_path, size, image_size, padding, to, batch):
    detector, file = trained(size, image_size, padding)
    settings = ExportSettings(to=to, batch=batch, compare=2)
    path, found = export(file, settings, normals=normals, out=tmp_path / ("m.onnx" if to == "onnx" else "m.xml"))
    exported = load_exported(path, "cpu")
    assert exported.image_size == exported.input_size == image_size and exported.batch == (batch or None)
    assert (exported.threshold, exported.pixel_threshold) == (detector.threshold, detector.pixel_threshold)
    for count in (1, 8) if batch != 1 else (1, 3):
        assert_same(detector, exported, noise(count, *image_size))
    assert not found.faults and (found.good, found.defective) == (2, 2)
    made = exported.card["export"]
    assert made["parity"]["largest_difference"]["score"] < 1e-4 and made["parity"]["tolerance"]["score"] == 0.001
    assert (
        made["opset"] == 18
        and made["versions"]["torch"] == torch.__version__.partition("+")[0]
        and len(made["sha256"]) == 64
    )
    assert {key: exported.card[key] for key in detector.card} == detector.card


def test_any_size_is_resized_inside_as_pillow_does_it_outside(any_size, normals):
    detector, path = any_size
    exported = load_exported(path, "cpu")
    assert exported.input_size is None
    for height, width in ((64, 96), (130, 97), (67, 300)):
        image = noise(2, height, width)
        image[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0  # something to score
        small = np.stack(
            [
                np.array(Image.fromarray(one.transpose(1, 2, 0)).resize((96, 64), Image.Resampling.BILINEAR))
                for one in image
            ]
        ).transpose(0, 3, 1, 2)
        ours, theirs = detector.inspect(small), exported.inspect(image)
        assert theirs.combined.shape == (2, height, width)
        np.testing.assert_allclose(theirs.score, ours.score, rtol=2e-2)
        maps = functional.interpolate(torch.from_numpy(ours.combined)[:, None], (height, width), mode="bilinear")
        np.testing.assert_allclose(theirs.combined, maps[:, 0], rtol=5e-2, atol=5e-3)


def test_resizing_is_pillows_to_one_colour_value():
    picture = noise(1, 130, 97)
    for size, most in (((64, 64), 0.005), ((99, 97), 0.005), ((130, 64), 0.005), ((99, 201), 0.5)):
        expected = np.array(
            Image.fromarray(picture[0].transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BILINEAR)
        )
        got = resize(torch.from_numpy(picture).float() / 255, size)[0].permute(1, 2, 0) * 255
        off = np.abs(got.numpy() - expected)
        assert off.max() < 1.01 and (off > 0.5).mean() < most


@pytest.mark.filterwarnings("ignore:INT8 is calibrated on 6 good images alone. Give 10 or more, --normals FOLDER")
@pytest.mark.parametrize(
    ("to", "size", "image_size"),
    [
        ("onnx", "S", (64, 96)),
        ("openvino", "S", (96, 64)),
        ("onnx", "M", (64, 64)),
        ("openvino", "M", (64, 64)),
        ("openvino", "XS", (128, 128)),
    ],
)
def test_half_and_eight_bits_are_near(trained, normals, tmp_path, to, size, image_size):
    detector, file = trained(size, image_size)
    images = load_images(find_images(normals), image_size).numpy()
    sizes = {}
    for precision in ("float16", "int8"):
        out = tmp_path / f"{precision}{exporting.SUFFIXES[to]}"
        path, found = export(file, ExportSettings(to=to, precision=precision, compare=3), normals=normals, out=out)
        exported = load_exported(path, "cpu")
        assert exported.card["export"]["precision"] == precision
        score = detector.inspect(images).score
        share, least = found.tolerance.score, abs(detector.threshold)  # what is lower is held to the threshold's share
        np.testing.assert_allclose(exported.inspect(images).score, score, rtol=share, atol=share * least)
        assert found.differences["score"][0] > 0  # these are other numbers, not float32 under another name
        assert not found.plain_int8
        assert (exported.threshold == detector.threshold) == (precision == "float16")
        sizes[precision] = (path if to == "onnx" else path.with_suffix(".bin")).stat().st_size
    whole = sum(value.numel() * 4 for value in detector.state_dict().values())
    assert sizes["float16"] < 0.8 * whole
    # The last one is INT8: both thresholds are of its own scores and maps, by the rank of its model's.
    scores, made = exported.inspect(images).score, exported.card["export"]
    np.testing.assert_allclose(exported.calibration["scores"], np.sort(scores), rtol=1e-5, atol=1e-6)
    assert exported.threshold == exported.calibration["scores"][-1]
    assert exported.pixel_threshold == exported.calibration["pixels"][-1] != detector.pixel_threshold
    assert made["thresholds_from"] == "its own scores of 6 good images" and made["calibrated_on"] == 6
    assert made["parity"]["thresholds"] == {"model": detector.threshold, "export": exported.threshold}


def test_sixteen_bits_keep_their_levels_and_no_image_is_read_in_vain(trained, tmp_path):
    """Of seven images an export to float32 reads the two that it is compared on; one of the others is broken."""
    line = tmp_path / "line"
    line.mkdir()
    for index in range(7):
        deep = np.random.default_rng(index).integers(0, 4096, (80, 100)).astype(np.uint16)
        Image.fromarray(deep).save(line / f"{index}.png")
    (line / "3.png").write_bytes(b"")
    detector = copy.deepcopy(trained()[0])
    detector.levels = (0.0, 4095.0)
    path = detector.save(tmp_path / "deep.safetensors")
    out, _ = export(path, ExportSettings(compare=2), normals=line, out=tmp_path / "m.onnx")
    exported = load_exported(out, "cpu")
    assert exported.levels == (0, 4095)
    ours, theirs = (detect(one, line, tmp_path / name) for one, name in ((detector, "ours"), (exported, "theirs")))
    np.testing.assert_allclose(theirs["score"], ours["score"], rtol=1e-3)
    assert ours["score"].notna().sum() == 6 and ours["score"].std() > 0


def test_the_file_is_plain_onnx_with_a_card(any_size):
    detector, path = any_size
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert [value.name for value in model.graph.output] == list(OUTPUTS)
    assert not any(value.data_location for value in model.graph.initializer)
    card = json.loads({entry.key: entry.value for entry in model.metadata_props}[CARD])
    assert card["threshold"] == detector.threshold and card["image_size"] == [64, 96]
    assert str(PROJECT) not in path.read_bytes().decode("latin-1")  # nothing names this machine


def test_exports_share_graphs_and_another_model_does_not(trained, normals, tmp_path, monkeypatch):
    """Each file answers as one that was made alone."""
    converted, made, graphs = exporting.to_onnx, [], {}

    def counted(detector, **options):
        made.append(options)
        return converted(detector, **options)

    monkeypatch.setattr(exporting, "to_onnx", counted)
    _, file = trained("XS", (64, 64))
    other = copy.deepcopy(trained("XS", (64, 64))[0])
    other.quantiles[0, 1] *= 2
    wanted = {
        "a.onnx": (file, ExportSettings(compare=2)),
        "b.onnx": (other.save(tmp_path / "other.safetensors"), ExportSettings(compare=2)),
        "c.onnx": (file, ExportSettings(compare=2, batch=2)),
        "d.xml": (file, ExportSettings(compare=2, to="openvino")),
    }
    for shared, count in ((graphs, 3), (None, 7)):
        for name, (model, settings) in wanted.items():
            out = tmp_path / str(shared is None) / name
            export(model, settings, normals=normals, out=out, force=True, graphs=shared)
        assert len(made) == count
    for name in wanted:
        answers = [load_exported(tmp_path / alone / name).inspect(noise(2, 64, 64)) for alone in ("False", "True")]
        assert all(np.array_equal(*pair) for pair in zip(*answers, strict=True))


# --- refused --------------------------------------------------------------------------------------------------------


def test_an_export_that_differs_is_refused_and_leaves_nothing(trained, normals, tmp_path, monkeypatch):
    _, file = trained("XS", (64, 64))
    out = tmp_path / "deep" / "m.onnx"
    converted = exporting.to_onnx

    def wrong(detector, **options):
        detector = copy.deepcopy(detector)
        detector.quantiles[0, 1] *= 1.1
        return converted(detector, **options)

    monkeypatch.setattr(exporting, "to_onnx", wrong)
    with pytest.raises(ExportError, match=r"student–teacher map differs by .*Nothing was written.*--force"):
        export(file, ExportSettings(compare=2), normals=normals, out=out)
    assert not out.parent.exists()
    path, found = export(file, ExportSettings(compare=2), normals=normals, out=out, force=True)
    assert found.faults and load_exported(path).card["export"]["parity"]["forced"]


@pytest.mark.parametrize("written", [0, 1])
def test_an_export_that_cannot_be_written_leaves_the_one_before(trained, tmp_path, monkeypatch, written):
    """Of OpenVINO's two files neither is replaced."""
    graph = exporting.to_onnx(trained()[0], input_size=(64, 64))
    model = exporting.convert(graph, ExportSettings(to="openvino"), noise(1, 64, 64))
    exporting.save(model, {}, tmp_path / "m.xml")
    before, sound = files(tmp_path), iter([True] * written)

    def full(path, data):
        if next(sound, False):
            return write_bytes(path, data)
        raise RunError(f"cannot write {path}")

    monkeypatch.setattr("effad_lib.export.files.write_bytes", full)
    with pytest.raises(RunError):
        exporting.save(model, {"another": 1}, tmp_path / "m.xml")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"to": "tensorrt"}, "to takes 'onnx' or 'openvino'"),
        ({"precision": "int4"}, "precision takes one of float32, float16, int8"),
        ({"opset": 17}, "a version of at least 18"),
        ({"batch": -1}, "a number of images, or 0"),
        ({"image_size": [64]}, "height and width"),
        ({"image_size": [64, 64], "any_size": True}, "no image_size beside it"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(values, says):
    with pytest.raises(SettingsError, match=says):
        ExportSettings.from_mapping(values)


def test_an_opset_that_is_unknown_here_is_refused_before_the_work(trained, normals, tmp_path):
    _, file = trained("XS", (64, 64))
    with pytest.raises(SettingsError, match=r"opset = 99: the latest that onnx .* knows is \d+"):
        export(file, ExportSettings(opset=99), normals=normals, out=tmp_path / "m.onnx")


def test_an_opset_that_the_runtime_cannot_run_is_refused_before_the_work(trained, normals, tmp_path, monkeypatch):
    def too_old(*_, **__):
        raise RuntimeError("opset is not supported")

    monkeypatch.setattr(onnxruntime, "InferenceSession", too_old)
    with pytest.raises(SettingsError, match=r"opset = 20: ONNX Runtime .* cannot run it"):
        export(trained()[1], ExportSettings(opset=20), normals=normals, out=tmp_path / "m.onnx")


@pytest.mark.parametrize(("to", "precision", "gone"), [("onnx", "int8", "nncf"), ("openvino", "float32", "openvino")])
def test_a_missing_package_names_the_extra(trained, tmp_path, monkeypatch, to, precision, gone):
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name, *_: None if name == gone else find(name))
    with pytest.raises(SettingsError, match=rf'{precision} for {to} needs {gone}: pip install "effad\[export\]"'):
        export(tmp_path / "none", ExportSettings(to=to, precision=precision))


def test_models_and_places_that_cannot_be_are_refused(trained, normals, tmp_path):
    _, file = trained("XS", (64, 64))
    with pytest.raises(SettingsError, match="no such file"):
        export(tmp_path / "none.safetensors", ExportSettings(), normals=normals)
    with pytest.raises(SettingsError, match=r"held out from training are not at hand.*--normals FOLDER"):
        export(file, ExportSettings(precision="int8"))
    with pytest.raises(SettingsError, match=r"a file for openvino ends in \.xml"):
        export(file, ExportSettings(to="openvino"), normals=normals, out=tmp_path / "m.onnx")
    raw = EfficientAD("XS", 8, image_size=(64, 64)).save(tmp_path / "raw.safetensors")
    with pytest.raises(SettingsError, match="has no threshold"):
        export(raw, ExportSettings(), normals=normals)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(trained, normals, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "to_onnx", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.onnx").mkdir()
    for place, why in (("file/m.onnx", "Not a directory"), ("taken.onnx", "Is a directory")):
        with pytest.raises(RunError, match=rf"cannot write .*{place}: {why}.* Choose another folder"):
            export(trained()[1], ExportSettings(), normals=normals, out=tmp_path / place)


def test_weights_of_something_else_are_not_replaced(trained, normals, tmp_path):
    """The user named the .xml alone; of an export, also one that was killed when it took its place, they are."""
    target, weights = tmp_path / "data.xml", tmp_path / "data.bin"
    settings, file = ExportSettings(to="openvino", compare=2), trained()[1]
    weights.write_bytes(b"measurements")
    for other in (None, "<data/>"):
        if other:
            target.write_text(other)
        with pytest.raises(RunError, match=r"data\.bin is not of an export, and the weights of .*data\.xml would rep"):
            export(file, settings, normals=normals, out=target)
        assert weights.read_bytes() == b"measurements"
    weights.unlink()
    export(file, settings, normals=normals, out=target)
    export(file, settings, normals=normals, out=target)
    target.rename(tmp_path / ".data.xml.new")  # as a process leaves them that is killed between the two
    export(file, settings, normals=normals, out=target)
    assert load_exported(target, "cpu").threshold == trained()[0].threshold


def test_no_export_takes_the_place_of_another():
    ways = [{}, {"any_size": True}, {"batch": 8}, {"image_size": [480, 640]}, {"opset": 20}, {"to": "openvino"}]
    ways += [{"precision": "int8", "batch": 1, "opset": 19}]
    assert [ExportSettings(**way).file_name for way in ways] == [
        "model_float32.onnx",
        "model_float32_any_size.onnx",
        "model_float32_batch8.onnx",
        "model_float32_480x640.onnx",
        "model_float32_opset20.onnx",
        "model_float32.xml",
        "model_int8_batch1_opset19.onnx",
    ]


def test_images_of_another_size_than_a_fixed_export_are_named(trained, normals, tmp_path):
    _, file = trained("XS", (64, 64))
    settings = ExportSettings(image_size=[80, 100], batch=2, compare=2)
    exported = load_exported(export(file, settings, normals=normals, out=tmp_path / "m.onnx")[0], "cpu")
    assert exported.inspect(noise(3, 80, 100)).combined.shape == (3, 80, 100)
    with pytest.raises(SettingsError, match=r"\(1, 3, 64, 64\): this export takes .* 80×100.*--any-size"):
        exported.inspect(noise(1, 64, 64))
    assert read_image(find_images(normals)[0]).shape == (3, 96, 120)


def test_images_that_were_trained_on_are_not_taken_for_held_out_ones(start, stripes):
    """With more images the draw of those to hold out is another one."""
    _, run = start("run", data_root=str(stripes))
    held_out = good_images.find_normals(run.folder, None)
    assert list(held_out) == [sample.image for sample in load_dataset("folder", root=stripes).validation]
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(stripes / "train" / "good" / "one_more.png")
    with pytest.raises(
        SettingsError, match=r"not at hand \(the training images of .* are others than .*--normals FOLDER"
    ):
        good_images.find_normals(run.folder, None)
