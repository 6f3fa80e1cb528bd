"""A trained detector as one file for ONNX Runtime or OpenVINO, compared with the model in torch before it is kept."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effad_lib.detector import EfficientAD
from effad_lib.engines import CARD, SEAL, load_exported, seal_of
from effad_lib.evaluation import data_of
from effad_lib.export.graph import Deployed, in_half, resize, to_onnx
from effad_lib.export.parity import TOLERANCES, Parity, compare, tolerance_of, with_defects
from effad_lib.export.quantisation import quantise
from effad_lib.images import Size, check_size, find_images, load_images, read_image
from effad_lib.reading import fitted
from effad_lib.runs import Run, RunError, write_bytes
from effad_lib.settings import Settings, SettingsError

__all__ = [
    "LEAST_OPSET",
    "SUFFIXES",
    "TOLERANCES",
    "Deployed",
    "ExportError",
    "ExportSettings",
    "Parity",
    "compare",
    "convert",
    "export",
    "in_half",
    "quantise",
    "record",
    "resize",
    "save",
    "to_onnx",
    "tolerance_of",
    "with_defects",
]

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}

LEAST_OPSET = 18
"""What torch's exporter writes; later ones are made from it."""

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
"""Packages that an export needs and a detector does not."""


class ExportError(RuntimeError):
    """An export that differs too much from its model; the message says by how much and what to do."""


@dataclass(frozen=True)
class ExportSettings(Settings):
    """How a detector is exported."""

    to: str = "onnx"  # onnx or openvino
    precision: str = "float32"  # float32, float16 or int8; a score may differ by 0.1 %, 2 % or 25 %
    batch: int = 0  # images at a time; 0 takes any number
    image_size: list[int] = ()  # height and width of the images, if not the model's: they are resized inside
    any_size: bool = False  # take images of any size from 64 pixels up and resize them inside
    opset: int = LEAST_OPSET  # version of ONNX' operators, 18 or later
    compare: int = 16  # good images to compare on, and as many with a synthetic defect

    def check(self) -> None:
        self.require(self.to in SUFFIXES, "to", "'onnx' or 'openvino'")
        self.require(self.precision in TOLERANCES, "precision", f"one of {', '.join(TOLERANCES)}")
        self.require(self.batch >= 0, "batch", "a number of images, or 0 for any")
        self.require(len(self.image_size) in (0, 2), "image_size", "height and width, or [] for the model's")
        if self.image_size:
            check_size(self.image_size)
            self.require(not self.any_size, "any_size", "no image_size beside it")
        self.require(self.opset >= LEAST_OPSET, "opset", f"a version of at least {LEAST_OPSET}")
        self.require(self.compare >= 1, "compare", "a number of at least 1")

    def input_size(self, detector: EfficientAD) -> Size | None:
        """Return the size of the images that the export takes, None for any."""
        return None if self.any_size else tuple(self.image_size) or detector.image_size


def export(
    source: str | Path,
    settings: ExportSettings,
    *,
    normals: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> tuple[Path, Parity]:
    """Export the model of a run, or a `model.safetensors`, and return the file and how far it is from the model.

    `normals` is a folder of good images that were not in training, to compare on and to calibrate INT8 with; None takes
    those that the run held out. The file is `out`, or `export/model_<precision>` beside the model; OpenVINO keeps the
    weights in a `.bin` beside its `.xml`. It holds the model's card and what it was made with and how it compared.
    Raises `SettingsError`, `RunError` or `ImageError` before the work starts, and `ExportError` if the export differs
    by more than its tolerance and `force` is not given: nothing is written then.
    """
    _check_packages(settings)
    _check_opset(settings)
    path = _model_of(Path(source))
    target = Path(out) if out else path.parent / "export" / f"model_{settings.precision}{SUFFIXES[settings.to]}"
    if target.suffix != SUFFIXES[settings.to]:
        raise SettingsError(f"{target}: a file for {settings.to} ends in {SUFFIXES[settings.to]}.")
    detector = EfficientAD.load(path)
    if detector.threshold is None:
        raise SettingsError(f"{path} has no threshold: calibrate it on held-out good images first.")
    files = _normals(Path(source), normals)
    input_size = settings.input_size(detector)
    size, levels = input_size or detector.image_size, detector.levels
    images = load_images(files, size, levels=levels, description="reading good images").numpy()
    good = [fitted(read_image(file, levels=levels), input_size) for file in _spread(files, settings.compare)]
    defective = with_defects(good)

    graph = to_onnx(
        detector,
        half=settings.precision == "float16",
        batch=settings.batch,
        input_size=input_size,
        opset=settings.opset,
    )
    model = convert(graph, settings, images)
    made_from = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    card = detector.card_now() | {"export": record(settings, input_size) | made_from}
    limits = tolerance_of(settings.precision, input_size != detector.image_size)
    with tempfile.TemporaryDirectory() as folder:
        exported = load_exported(save(model, card, Path(folder) / target.name), "cpu")
        found = compare(detector, exported, good, defective, limits)
    if found.faults and not force:
        raise ExportError(
            f"this export is too far from its model: {'; '.join(found.faults)}. Nothing was written. Choose another "
            f"precision, give more good images (--normals) for INT8, or keep it as it is: --force.\n{found.as_text()}"
        )
    card["export"]["parity"] = found.as_card() | {"runtime": exported.runtime, "forced": bool(found.faults)}
    return save(model, card, target), found


def convert(graph: Any, settings: ExportSettings, images: np.ndarray) -> Any:
    """Return a graph of `to_onnx` as a model of the wanted kind and precision; the graph itself stays as it is.

    `images` uint8 [N, 3, H, W] are good ones of the size that the graph takes, which INT8 is calibrated on.
    """
    model = _to_openvino(graph) if settings.to == "openvino" else copy.deepcopy(graph)
    if settings.precision != "int8":
        return model
    # Of good images alone the ranges would clip a defect: on solar cells scores were up to 33 % off, not 3 %.
    seen = np.concatenate([images, np.stack(with_defects(images, seed=1000))])
    return quantise(model, seen.astype(np.float32) / 255, settings.to, settings.batch)


def _model_of(source: Path) -> Path:
    """Return the model of a run folder, or the file itself."""
    if source.is_dir():
        return Run(source.resolve()).model
    return source


def _normals(source: Path, normals: str | Path | None) -> Sequence[Path]:
    """Return good images that were held out from training. Raises `SettingsError` if none are known."""
    if normals is not None:
        return find_images(normals)
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    try:
        return [sample.image for sample in data_of(Run(folder)).validation]
    except (RunError, ValueError) as error:
        raise SettingsError(
            f"{source}: the good images that it held out from training are not at hand ({error}). An export is "
            f"compared with its model on such images, and INT8 is calibrated on them: name a folder, --normals FOLDER."
        ) from error


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[place] for place in places]


def record(settings: ExportSettings, input_size: Size | None) -> dict[str, Any]:
    """Return how and with what an export is made, for its card."""
    packages = ("torch", *NEEDED[settings.to], *(("nncf",) if settings.precision == "int8" else ()))
    return {
        "to": settings.to,
        "precision": settings.precision,
        "batch": settings.batch or None,
        "input_size": input_size and list(input_size),
        "opset": settings.opset,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


# --- checks before the work -----------------------------------------------------------------------------------------


def _check_packages(settings: ExportSettings) -> None:
    """Raise `SettingsError` if a package is missing, saying which extra has it."""
    needed = NEEDED[settings.to] + (("nncf",) if settings.precision == "int8" else ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        what = f"{settings.precision} for {settings.to}"
        raise SettingsError(f'{what} needs {" and ".join(missing)}: pip install "effad[export]"')


def _check_opset(settings: ExportSettings) -> None:
    """Raise `SettingsError` for an opset that is unknown here, or that the runtime here would not run."""
    import onnx
    from onnx import TensorProto, helper

    latest = onnx.defs.onnx_opset_version()
    if settings.opset > latest:
        raise SettingsError(f"opset = {settings.opset}: the latest that onnx {onnx.__version__} knows is {latest}.")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [values[0]], [values[1]])
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", settings.opset)], ir_version=10)
    if settings.to == "openvino":
        _to_openvino(probe)
        return
    import onnxruntime

    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SettingsError(
            f"opset = {settings.opset}: ONNX Runtime {onnxruntime.__version__} cannot run it. Take {LEAST_OPSET}."
        ) from error


# --- files ----------------------------------------------------------------------------------------------------------


def _to_openvino(model: Any) -> Any:
    """Return an ONNX model as one of OpenVINO."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return openvino.convert_model(path)


def _sealed(head: bytes, *weights: bytes) -> bytes:
    """Return a file that states the hash of itself and its weights where it held another."""
    return SEAL.sub(b"effad sha256 " + seal_of(head, *weights)[1], head, count=1)


def save(model: Any, card: dict[str, Any], target: Path) -> Path:
    """Write a model with its card, whole or not at all; an earlier one stays until the whole new one is written."""
    text = json.dumps(card | {"seal": f"effad sha256 {'0' * 64}"}, allow_nan=False)
    if target.suffix == ".onnx":
        del model.metadata_props[:]
        model.metadata_props.add(key=CARD, value=text)
        return write_bytes(target, _sealed(model.SerializeToString()))
    import openvino

    model.set_rt_info(text, [CARD])
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.xml"
        openvino.save_model(model, whole, compress_to_fp16=False)
        weights = whole.with_suffix(".bin").read_bytes()
        written = {target.with_suffix(".bin"): weights, target: _sealed(whole.read_bytes(), weights)}
        halves = {path: path.with_name(f".{path.name}.new") for path in written}
        try:
            for path, new in halves.items():
                write_bytes(new, written[path])
            # Never the one beside another's other half: without its .xml a .bin is nothing.
            target.unlink(missing_ok=True)
            for path, new in halves.items():
                new.replace(path)
        finally:
            for new in halves.values():
                new.unlink(missing_ok=True)
    return target
