"""Exported detectors: a file of `effad export` behind the interface that `EfficientAD` has too, without torch."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from effad_lib.cards import read_card
from effad_lib.documents import Takes, fault, is_whole
from effad_lib.reading import Levels, Size, check_levels, check_size
from effad_lib.settings import SettingsError, check_threads, nearest

OUTPUTS = ("combined", "student_teacher", "student_autoencoder", "score")
"""What an exported model returns, in this order."""

CARD = "effad_card"
"""Under this name an exported file holds its card, as JSON."""

SEAL = re.compile(rb"effad sha256 ([0-9a-f]{64})")
"""In its card an exported file states the hash of itself and of the weights beside it, see `seal_of`."""

MOST_AT_ONCE = 4096
"""Images at a time that an export may take: fewer than these are filled up to so many."""

MADE: Takes = {
    "batch": (lambda value: value is None or is_whole(value, 1, MOST_AT_ONCE), f"null, or 1 to {MOST_AT_ONCE} images"),
    "input_size": (lambda value: value is None or isinstance(value, list), "null, or height and width"),
}
"""What an exported file's card says of its making, as far as that is needed to use it."""

EXTRA = 'pip install "effad[export]", or {} alone where there is no torch.'


class Inspection(NamedTuple):
    """What a detector finds on N images: maps float32 [N, H, W] at the images' size, scores float32 [N].

    The score is the largest value of the combined map at the network's size, not clamped.
    """

    combined: np.ndarray
    student_teacher: np.ndarray
    student_autoencoder: np.ndarray
    score: np.ndarray


class Inspector(Protocol):
    """Whatever can judge images: an `EfficientAD` or an `Exported` one.

    `image_size` is the size that the networks work at; `input_size` the one to which an image is brought before, None
    where the model itself resizes whatever it gets; `levels` are those of 16-bit images, see `read_image`;
    `calibration` is what the thresholds were chosen from; `identity` is a SHA-256 of all that its decisions depend on,
    thresholds included.
    """

    card: dict[str, Any]
    image_size: Size
    input_size: Size | None
    levels: Levels | None
    threshold: float | None
    pixel_threshold: float | None
    calibration: dict[str, Any]
    identity: str

    def inspect(self, images: np.ndarray) -> Inspection:
        """Return maps and scores of images uint8 [N, 3, H, W]."""


class Exported(ABC):
    """A detector out of one exported file; see `load_exported`. `threads` of the CPU, 0 leaves it to the runtime.

    `runtime` and `device` say what runs it: of the latter the runtime's own name in small letters.
    """

    runtime: str
    device: str
    identity: str

    def __init__(self, path: Path, device: str, threads: int) -> None:
        check_threads(threads)
        self.identity = identity_of(path)
        try:
            text = self._open(path, device, threads)
            self.card = read_card(text)
            made, self.image_size = self.card["export"], tuple(self.card["image_size"])
            if wrong := fault(made, MADE, MADE):
                raise ValueError(f"the export in its card {wrong}")
            self.threshold, self.pixel_threshold = self.card["threshold"], self.card["pixel_threshold"]
            self.calibration = self.card["calibration"]
            self.input_size = None if made["input_size"] is None else check_size(made["input_size"])
            self.levels = check_levels(self.card["levels"])
            self.batch: int | None = made["batch"]
            self._try()
        except (ImportError, SettingsError):
            raise
        except Exception as error:  # each runtime has a dozen classes of its own for a file that it cannot use
            reason = str(error).strip().splitlines()  # the last says it, those before it where in C++
            raise SettingsError(
                f"model {path}: not a whole effad export that this runtime can use "
                f"({reason[-1] if reason else type(error).__name__}). Export it again; if this runtime is older than "
                f"the one there or lacks an operator, with a lower --opset or --precision float32."
            ) from error

    def _try(self) -> None:
        """Raise `ValueError` unless a black image of the size in the card gives maps of that size and a score."""
        size = self.input_size or self.image_size
        try:
            shapes = [values.shape for values in self.inspect(np.zeros((1, 3, *size), np.uint8))]
            reason = "" if shapes == [(1, *size)] * 3 + [(1,)] else f"it returns {shapes}"
        except Exception as error:
            reason = " ".join(str(error).split())[-200:] or type(error).__name__
        if reason:
            raise ValueError(f"an image of {size[0]}×{size[1]} pixels, as its card says, cannot be judged: {reason}")

    @abstractmethod
    def _open(self, path: Path, device: str, threads: int) -> str:
        """Load the file and return its card as text."""

    @abstractmethod
    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Return the four outputs for images float32 [N, 3, H, W] in [0, 1]; the file takes their number and size."""

    def inspect(self, images: np.ndarray) -> Inspection:
        """Return maps and scores of images [N, 3, H, W], uint8 or float32 in [0, 1].

        A fixed batch is filled up with zeros and the surplus dropped. Raises `SettingsError` for images of another size
        than a fixed export takes.
        """
        size = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or (self.input_size and size != self.input_size):
            takes = "any height and width" if self.input_size is None else "{}×{}".format(*self.input_size)
            raise SettingsError(
                f"images of shape {images.shape}: this export takes [N, 3, height, width] with {takes}. Resize them, "
                f"or export with --any-size."
            )
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        count, batch = len(images), self.batch or len(images)
        if missing := -count % batch:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.float32)])
        parts = [self._run(images[start : start + batch]) for start in range(0, len(images), batch)]
        *maps, score = (np.concatenate(outputs)[:count] for outputs in zip(*parts, strict=True))
        return Inspection(*(values[:, 0] for values in maps), score)


class OnnxDetector(Exported):
    """An exported detector in ONNX Runtime.

    On graphics cards too it computes in what the file says, without TF32, which would cut float32 to ten bits.
    """

    def _open(self, path: Path, device: str, threads: int) -> str:
        try:
            import onnxruntime
        except ImportError as error:
            raise SettingsError(f"{path}: needs onnxruntime: {EXTRA.format('pip install onnxruntime')}") from error
        providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
        there = [name for name, provider in providers.items() if provider in onnxruntime.get_available_providers()]
        name = _device(device, there, "cuda")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        wanted = [(providers["cuda"], {"use_tf32": "0"})] if name == "cuda" else []
        wanted.append(providers["cpu"])
        self._session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        ran = self._session.get_providers()[0]
        if ran != providers[name] and device != "auto":
            raise SettingsError(
                f"device = {device!r}: ONNX Runtime has {providers[name]} but could not start it, and took {ran}. "
                f"Install the libraries that it needs, or use 'cpu'."
            )
        self.device = next(name for name, provider in providers.items() if provider == ran)
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        return self._session.get_modelmeta().custom_metadata_map[CARD]

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        return self._session.run(list(OUTPUTS), {"images": images})


@cache
def openvino_core() -> Any:
    """Return OpenVINO's entrance, one for the whole process.

    Each brings a stack of its own for signals along and takes it away when it dies; of two that die in the wrong order
    a dead one stays, and the next Ctrl-C ends the process with a segmentation fault (OpenVINO 2026.4, AVX-512).
    """
    import openvino

    return openvino.Core()


class OpenVinoDetector(Exported):
    """An exported detector in OpenVINO.

    It computes in float32 whatever the file's precision, but for what is quantised: bfloat16, which OpenVINO takes by
    itself where the processor has it, moved scores by 7 % here, and not on other machines; on graphics cards it takes
    float16.
    """

    def _open(self, path: Path, device: str, threads: int) -> str:
        try:
            import openvino
        except ImportError as error:
            raise SettingsError(f"{path}: needs openvino: {EXTRA.format('pip install openvino')}") from error
        core = openvino_core()
        there = {name.lower(): name for name in core.available_devices}
        self.device = _device(device, list(there), "gpu")
        name = there[self.device]
        model = core.read_model(path)
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if name.startswith(("CPU", "GPU")) else {}
        settings |= {"INFERENCE_NUM_THREADS": threads} if name == "CPU" and threads else {}
        self._compiled = core.compile_model(model, name, settings)
        self._request = self._compiled.create_infer_request()
        self.runtime = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        return model.get_rt_info([CARD]).astype(str)

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        found = self._request.infer({"images": images})
        return [found[name].copy() for name in OUTPUTS]  # the request writes the next ones in the same place


RUNTIMES: dict[str, type[Exported]] = {".onnx": OnnxDetector, ".xml": OpenVinoDetector}
"""Which class opens which file."""


def _device(wanted: str, there: list[str], best: str) -> str:
    """Return the name of a device that is there; "auto" takes `best` or the CPU. Raises `SettingsError`."""
    if wanted == "auto":
        return best if best in there else "cpu"
    if wanted not in there:
        raise SettingsError(f"device = {wanted!r}: not available to this runtime. Use 'auto' or: {', '.join(there)}.")
    return wanted


def seal_of(head: bytes, *weights: bytes) -> tuple[bytes, bytes]:
    """Return the SHA-256 that an exported file states of itself and its weights, b"" if it states none, and what it is.

    Where the hash stands in the file, zeros are hashed in its place. So no runtime has to parse the file first, and the
    card with its thresholds is covered too.
    """
    stated = SEAL.search(head)
    if stated:
        head = head[: stated.start(1)] + b"0" * 64 + head[stated.end(1) :]
    whole = hashlib.sha256(head)
    for part in weights:
        whole.update(part)
    return stated[1] if stated else b"", whole.hexdigest().encode()


def identity_of(path: Path) -> str:
    """Return the SHA-256 of an exported file and of the weights beside an `.xml`.

    Raises `SettingsError` if these are missing, or if the files are not as they were exported; those of before exports
    were sealed pass.
    """
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    if not files[-1].is_file():
        raise SettingsError(f"model {path}: not a whole effad export: {files[-1].name} is not beside it. Copy both.")
    stated, found = seal_of(*(file.read_bytes() for file in files))
    if stated not in (b"", found):
        names = " and ".join(map(str, files))
        raise SettingsError(
            f"model {names}: not a whole effad export, as the hash in its card says: altered, cut short, or of two "
            f"exports. Copy or export all of it again."
        )
    return found.decode()


def load_exported(path: str | Path, device: str = "auto", threads: int = 0) -> Exported:
    """Load a file of `effad export`: `.onnx`, or `.xml` with its `.bin` beside it.

    Raises `SettingsError` if a file is missing, not whole or not as it was exported, if the runtime is not installed,
    or for threads that cannot be and a device that the runtime does not have.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        raise SettingsError(f"model {path}: unknown ending {path.suffix!r}: {nearest(path.suffix, RUNTIMES)}")
    if not path.is_file():
        raise SettingsError(f"model {path}: there is no such file. Export one with `effad export RUN`.")
    return RUNTIMES[path.suffix](path, device, threads)
