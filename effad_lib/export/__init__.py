"""A trained detector as one file for ONNX Runtime or OpenVINO, compared with the model in torch before it is kept."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from effad_lib.calibration import source_of
from effad_lib.detector import EfficientAD
from effad_lib.engines import MOST_AT_ONCE, Exported, load_exported
from effad_lib.export.files import check_place, save, to_openvino
from effad_lib.export.graph import Deployed, in_half, resize, to_onnx
from effad_lib.export.normals import find_normals, may_choose, own_thresholds, read_normals, spread, to_calibrate_on
from effad_lib.export.parity import TOLERANCES, Parity, compare, tolerance_of, with_defects
from effad_lib.export.quantisation import SENSITIVE, quantise
from effad_lib.images import Size, check_size, load_images
from effad_lib.runs import Run, check_writable, within
from effad_lib.settings import Settings, SettingsError
from effad_lib.tiling import check_overlap

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
        self.require(
            0 <= self.batch <= MOST_AT_ONCE, "batch", f"a number of images, or 0 for any; {MOST_AT_ONCE} at most"
        )
        self.require(len(self.image_size) in (0, 2), "image_size", "height and width, or [] for the model's")
        if self.image_size:
            check_size(self.image_size)
            self.require(not self.any_size, "any_size", "no image_size beside it")
        self.require(self.opset >= LEAST_OPSET, "opset", f"a version of at least {LEAST_OPSET}")
        self.require(self.compare >= 1, "compare", "a number of at least 1")

    def input_size(self, detector: EfficientAD) -> Size | None:
        """Return the size of the images that the export takes, None for any."""
        return None if self.any_size else tuple(self.image_size) or detector.image_size

    @property
    def file_name(self) -> str:
        """The name of the file by default: what differs from the default is in it, so that none replaces another."""
        parts = [
            "any_size" if self.any_size else "",
            "x".join(map(str, self.image_size)),
            f"batch{self.batch}" if self.batch else "",
            f"opset{self.opset}" if self.opset != LEAST_OPSET else "",
        ]
        return "_".join(["model", self.precision, *filter(None, parts)]) + SUFFIXES[self.to]


def export(
    source: str | Path,
    settings: ExportSettings,
    *,
    normals: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    graphs: dict[tuple, Any] | None = None,
) -> tuple[Path, Parity]:
    """Export the model of a run, or a `model.safetensors`, and return the file and how far it is from the model.

    `normals` is a folder of good images that were not in training, to compare on and to calibrate INT8 with; None takes
    those that the run held out. INT8 gets thresholds by its own scores of all of them, see `may_choose`, others keep
    the model's. Where INT8 differs too much, the teacher's second convolution is left in float32, if that is enough.
    The file is `out`, or `file_name` in `export/` beside the model; OpenVINO keeps the weights in a `.bin` beside its
    `.xml`. It holds the model's card, what it was made with, whence its thresholds are and how it compared. Several
    exports may share `graphs`, a dictionary that is empty at first: one that an earlier export made is not made again.
    Raises `SettingsError`, `RunError` or `ImageError` before the work starts, and `ExportError` if the export differs
    by more than its tolerance and `force` is not given: nothing is written then.
    """
    _check_packages(settings)
    _check_opset(settings)
    path = _model_of(Path(source))
    target = Path(out) if out else within(path.parent, f"export/{settings.file_name}")
    if target.suffix != SUFFIXES[settings.to]:
        raise SettingsError(f"{target}: a file for {settings.to} ends in {SUFFIXES[settings.to]}.")
    check_place(target)
    detector = EfficientAD.load(path)
    if detector.threshold is None:
        raise SettingsError(f"{path} has no threshold: calibrate it on held-out good images first.")
    if settings.precision == "int8" and "tile_overlap" in detector.calibration:  # by which it gets its own thresholds
        check_overlap(detector, detector.calibration["tile_overlap"])
    check_writable(target)
    files = find_normals(Path(source), normals)
    input_size, levels = settings.input_size(detector), detector.levels
    compared = spread(files, settings.compare)
    seen = to_calibrate_on(files, compared) if settings.precision == "int8" else []
    named = source_of(normals) if seen and normals else ""
    own = bool(seen) and may_choose(detector, files, named, input_size)
    size = input_size or detector.image_size
    images = load_images(seen, size, levels=levels, description="reading good images").numpy() if seen else None
    good = read_normals(compared, input_size, levels)
    defective = with_defects(good)

    digest, half = hashlib.sha256(path.read_bytes()).hexdigest(), settings.precision == "float16"
    key = (digest, half, settings.batch, input_size, settings.opset)
    graphs = {} if graphs is None else graphs
    if key not in graphs:
        graphs[key] = to_onnx(detector, half=half, batch=settings.batch, input_size=input_size, opset=settings.opset)
    made = record(settings, input_size) | {"sha256": digest}
    tiled = " in tiles" * ("tile_overlap" in detector.calibration)
    made["thresholds_from"] = f"its own scores of {len(files)} good images{tiled}" if own else "the model"
    if seen:
        made |= {"calibrated_on": len(seen), "of_them_compared": len(set(seen) & set(compared))}
    card = detector.card_now() | {"export": made}
    limits = tolerance_of(settings.precision, input_size != detector.image_size)

    def attempt(spared: str = "") -> tuple[Any, Exported, Parity]:
        """Return the model, the same from its file with its own thresholds, and how that compares."""
        model = convert(graphs[key], settings, images, spared)
        with tempfile.TemporaryDirectory() as folder:
            exported = load_exported(save(model, card, Path(folder) / target.name), "cpu")
            if own:
                own_thresholds(exported, detector, files, named)
            return model, exported, compare(detector, exported, good, defective, limits)

    model, exported, found = attempt()
    faults = "; ".join(found.faults)
    if faults and seen:
        better = attempt(SENSITIVE)
        if better[2].faults:
            faults += f". With the teacher's second convolution in float32: {'; '.join(better[2].faults)}"
        else:
            model, exported, found = better
            found, faults = replace(found, plain_int8=faults), ""
    if faults and not force:
        raise ExportError(
            f"this export is too far from its model: {faults}. Nothing was written. Choose another "
            f"precision, give more good images (--normals) for INT8, or keep it as it is: --force.\n{found.as_text()}"
        )
    card |= {name: getattr(exported, name) for name in ("threshold", "pixel_threshold", "calibration")}
    made["parity"] = found.as_card() | {"runtime": exported.runtime, "forced": bool(faults)}
    return save(model, card, target), found


def convert(graph: Any, settings: ExportSettings, images: np.ndarray | None = None, spared: str = "") -> Any:
    """Return a graph of `to_onnx` as a model of the wanted kind and precision; the graph itself stays as it is.

    `images` uint8 [N, 3, H, W] are good ones of the size that the graph takes, which INT8 alone needs, to calibrate on;
    it leaves the convolution with the kernel `spared` in float32.
    """
    model = to_openvino(graph) if settings.to == "openvino" else copy.deepcopy(graph)
    if settings.precision != "int8":
        return model
    # Of good images alone the ranges would clip a defect: on solar cells scores were up to 33 % off, not 3 %.
    seen = np.concatenate([images, np.stack(with_defects(images, seed=1000))])
    return quantise(model, seen, settings.to, settings.batch, spared)


def _model_of(source: Path) -> Path:
    """Return the model of a run folder, or the file itself."""
    if source.is_dir():
        return Run(source.resolve()).model
    return source


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
        to_openvino(probe)
        return
    import onnxruntime

    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SettingsError(
            f"opset = {settings.opset}: ONNX Runtime {onnxruntime.__version__} cannot run it. Take {LEAST_OPSET}."
        ) from error
