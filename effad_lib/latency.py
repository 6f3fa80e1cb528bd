"""How long a detector takes from image tensor to maps and score: every engine and precision in one run, in turn."""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from effad_lib.datasets import Sample
from effad_lib.detection import inspect_one
from effad_lib.detector import EfficientAD
from effad_lib.engines import Exported, Inspector, load_exported
from effad_lib.export import LEAST_OPSET, ExportSettings, convert, in_half, record, save, to_onnx
from effad_lib.images import Size, check_size, read_image
from effad_lib.memory import kept_memory
from effad_lib.metrics import image_auroc
from effad_lib.networks import check_network, multiply_adds
from effad_lib.reading import fitted
from effad_lib.settings import Settings, check_threads, cores, pick_device

PRECISIONS = ("float32", "float16", "int8")

PAUSE = 0.01
"""Seconds between two calls on a CPU: threads of the last one that still wait for work would slow the next one down."""

LEAST_CALLS = 5
"""That each case is timed for."""

Call = Callable[[Tensor], object]
"""From images float32 [N, 3, H, W] in [0, 1] on a device to maps and scores, finished when it returns."""

Key = tuple[str, str, str]
"""Engine, precision and the device that it runs on."""


@dataclass(frozen=True)
class LatencySettings(Settings):
    """Settings of notebook 07."""

    run_folder: str = "runs/training"  # of an evaluated run, whose exports are tested on its own test images
    more_runs: list[str] = ()  # further evaluated runs, such as one of size S, for accuracy against latency
    sizes: list[str] = ("S", "M")  # whose latency is measured, with random weights
    image_size: list[int] = (64, 64)  # height and width in pixels for that; the paper's is 256 256
    batches: list[int] = (1, 16)  # images at a time
    seconds: float = 0.3  # to measure each case for, five calls at least
    longest: float = 2.0  # cases whose call takes more seconds than this are left out
    compiled: list[str] = ("S",)  # sizes for torch.compile, for the smallest batch; half a minute for each
    exports: bool = True  # measure ONNX Runtime and OpenVINO too
    most_images: int = 70  # of the test images, evenly spread, for accuracy against latency
    threads: int = 1  # of the CPU for every engine; 0 takes all cores, which wants a machine without other work
    device: str = "auto"

    def check(self) -> None:
        for size in (*self.sizes, *self.compiled):
            check_network(size)
        check_size(self.image_size)
        self.require(len(self.batches) > 0, "batches", "at least one number")
        self.require(all(batch >= 1 for batch in self.batches), "batches", "numbers of at least 1")
        self.require(self.most_images >= 1, "most_images", "a number of at least 1")
        self.require(self.seconds > 0, "seconds", "a number above 0")
        self.require(self.longest > 0, "longest", "a number above 0")
        check_threads(self.threads)
        pick_device(self.device)

    @property
    def cores(self) -> int:
        """The number of threads, spelt out."""
        return self.threads or cores()


def contenders(
    detector: EfficientAD,
    images: np.ndarray,
    folder: str | Path,
    *,
    threads: int,
    compiled: bool = True,
    exports: bool = True,
) -> dict[Key, Call]:
    """Return every engine and precision that is here as a function of the same images.

    `images` uint8 [N, 3, H, W] of the detector's size calibrate INT8. The exports are written below `folder`. In torch
    float16 is measured on CUDA only, as CPUs have no such convolution; exports run on the CPU unless the detector is
    on CUDA and ONNX Runtime can start it too, and are left out without `exports`. On CUDA compiled networks are
    replayed as one graph. Sets torch's number of threads.
    """
    torch.set_num_threads(threads)
    torch.compiler.reset()  # of one function torch keeps but a few compiled forms, and then goes without
    detector, device = detector.eval(), detector.device.type
    on_gpu = device == "cuda"
    torches = {"float32": detector} | ({"float16": in_half(detector)} if on_gpu else {})
    found: dict[Key, Call] = {("torch", name, device): _in_torch(model) for name, model in torches.items()}
    mode = "reduce-overhead" if on_gpu else "default"
    for name, model in torches.items() if compiled and (on_gpu or shutil.which(os.environ.get("CXX", "g++"))) else ():
        call = _in_torch(torch.compile(copy.deepcopy(model), mode=mode, dynamic=False))
        try:
            call(torch.from_numpy(images[:1]).to(detector.device) / 255)
        except RuntimeError as error:  # it needs Python's headers too, and on CUDA a compiler of its own
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch.compile does not work here and is left out: {reason}", stacklevel=2)
        else:
            found["torch.compile", name, device] = call
    if not exports:
        return found
    graphs = {half: to_onnx(detector, half=half, input_size=detector.image_size) for half in (False, True)}
    for to, engine in (("onnx", "ONNX Runtime"), ("openvino", "OpenVINO")):
        for precision in PRECISIONS:
            settings = ExportSettings(to=to, precision=precision)
            model = convert(graphs[precision == "float16"], settings, images)
            card = detector.card_now() | {"export": record(settings, detector.image_size)}
            path = save(model, card, Path(folder) / f"{precision}.{'onnx' if to == 'onnx' else 'xml'}")
            exported = load_exported(path, "auto" if on_gpu and to == "onnx" else "cpu", threads)
            found[engine, precision, exported.device] = _in_runtime(exported)
    return found


def _in_torch(model: Callable[[Tensor], tuple]) -> Call:
    @torch.inference_mode()
    def call(images: Tensor) -> object:
        maps = model(images)
        return maps, maps[0].amax(dim=(1, 2, 3)).cpu()  # which waits for the device

    return call


def _in_runtime(exported: Exported) -> Call:
    return lambda images: exported.inspect(images.cpu().numpy())


def of_literal(literal: ModuleType, detector: EfficientAD) -> Call:
    """Return the paper's Algorithm 2 as `tests/literal.py` writes it down, one image at a time, for sizes S and M."""
    T, S = (literal.pdn(detector.size, factor * detector.channels, detector.padding) for factor in (1, 2))
    A = literal.LiteralAutoencoder(detector.channels)
    for source, target in ((detector.teacher, T), (detector.student, S), (detector.autoencoder, A)):
        literal.copy_weights(source, target)
        target.to(detector.device).eval()
    quantiles = detector.quantiles.flatten().tolist()
    mu, sigma = detector.teacher_mean.flatten(), detector.teacher_std.flatten()

    def call(images: Tensor) -> object:
        return [literal.score(T, S, A, mu, sigma, quantiles, image[None], detector.padding) for image in images]

    return call


def measure(
    calls: Mapping[tuple, Callable[[], object]], *, seconds: float, longest: float = np.inf, pause: float = PAUSE
) -> pd.DataFrame:
    """Time calls in turn, one of each a round, so that whatever slows the machine slows all of them.

    After two calls that warm up, the second of which decides whether a call takes longer than `longest` and is left
    out, each is timed for `seconds` and five times at least, `pause` seconds after the one before. Returns for each key
    median_ms, p99_ms (the 99th percentile; with less than a hundred calls that is close to the slowest) and calls; NaN
    for those left out. Memory is kept from call to call, as training, evaluation and detection keep it, and as the
    runtimes of exports do; while it grows, the first few calls clear new pages, which a median of three would show.
    """
    took: dict[tuple, list[float]] = {}
    with kept_memory():
        for key, call in calls.items():
            call()
            time.sleep(pause)
            if _timed(call) <= longest:
                took[key] = []
        waiting = list(took)
        while waiting:
            for key in waiting:
                time.sleep(pause)
                took[key].append(_timed(calls[key]))
            waiting = [key for key in waiting if len(took[key]) < LEAST_CALLS or sum(took[key]) < seconds]
            waiting = waiting[1:] + waiting[:1]  # nobody always comes after the same one
    rows = {
        key: [1000 * statistics.median(took[key]), 1000 * float(np.quantile(took[key], 0.99)), len(took[key])]
        if key in took
        else [np.nan, np.nan, 0]
        for key in calls
    }
    index = pd.MultiIndex.from_tuples(list(rows))
    return pd.DataFrame(list(rows.values()), index, columns=["median_ms", "p99_ms", "calls"])


def pause_on(devices: Iterable[str]) -> float:
    """Return the seconds between two calls: none where all kinds of devices are "cuda", which has no such threads."""
    return PAUSE if any(device != "cuda" for device in devices) else 0.0


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def some_of(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return about so many samples, evenly spread over either kind: good and defective, both if there are any."""
    chosen = []
    for label in (0, 1):
        kind = [sample for sample in samples if sample.label == label]
        share = min(len(kind), max(1, round(count * len(kind) / max(1, len(samples)))))
        chosen += [kind[k] for k in np.linspace(0, len(kind) - 1, share).astype(int)]
    return chosen


def accuracy(
    inspectors: Mapping[tuple[str, str], Inspector], samples: Sequence[Sample], *, seconds: float
) -> pd.DataFrame:
    """Let a model and its exports score the images of a test split, read as `effad detect` does, and time one of them.

    Returns for each engine and precision median_ms, from an image of the network's size to maps and score, measured for
    `seconds`, and image_auroc.
    """
    images = [read_image(sample.image, levels=next(iter(inspectors.values())).levels) for sample in samples]
    labels = np.array([sample.label for sample in samples])
    small = {key: fitted(images[0], one.image_size)[None] for key, one in inspectors.items()}
    table = measure({key: lambda key=key: inspectors[key].inspect(small[key]) for key in inspectors}, seconds=seconds)
    scores = {key: np.array([float(inspect_one(one, i).score[0]) for i in images]) for key, one in inspectors.items()}
    table["image_auroc"] = np.array([image_auroc(scores[key], labels) for key in inspectors], dtype=float)
    return table.rename_axis(["engine", "precision"])[["median_ms", "image_auroc"]]


def flop(detector: EfficientAD, size: Size) -> int:
    """Return the floating-point operations for one image: two for each multiplication with its addition."""
    return 2 * sum(multiply_adds(one, size) for one in (detector.teacher, detector.student, detector.autoencoder))


SIDES = {"cuda": 8192}
"""Of the matrices for the peak of a kind of device, 2048 elsewhere: as large as it takes to keep all of it at work."""

COPIED = 2**26
"""Numbers in what is copied for the peak of a device's memory, 256 MiB: more than any cache."""


def peak(device: str | torch.device = "cpu", threads: int = 0, *, side: int = 0, repeats: int = 7) -> float:
    """Return the floating-point operations a second that a large float32 matrix product reaches, the best of some.

    `side` of the matrices, 0 takes that of `SIDES`. On the CPU the better of torch's and ONNX Runtime's, as on some
    processors either is far from what they can do. Sets torch's number of threads, unless 0 leaves it as it is.
    """
    if threads:
        torch.set_num_threads(threads)
    kind = torch.device(device).type
    side = side or SIDES.get(kind, 2048)
    one, other = torch.rand((2, side, side), device=device)
    wait = _waiting(one.device)
    products = [lambda: (torch.mm(one, other), wait())]
    if kind == "cpu":
        session, given = _matrix_product(side, threads), {"one": one.numpy(), "other": other.numpy()}
        products.append(lambda: session.run(None, given))
    return 2 * side**3 / _best(products, repeats)


def copy_peak(device: str | torch.device = "cpu", *, repeats: int = 7) -> float:
    """Return the bytes a second that a large copy within a device's memory reads and writes, the best of some."""
    source = torch.zeros(COPIED, device=device)
    target, wait = torch.ones_like(source), _waiting(source.device)
    return 2 * source.nbytes / _best([lambda: (target.copy_(source), wait())], repeats)


def _waiting(device: torch.device) -> Callable[[], object]:
    """Return what waits until a device has done its work."""
    waits = {"cuda": partial(torch.cuda.synchronize, device), "mps": torch.mps.synchronize}
    return waits.get(device.type, lambda: None)


def _best(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Return the seconds of the quickest of some calls, each made once more than `repeats`."""
    took = []
    for call in (1 + repeats) * list(calls):
        time.sleep(PAUSE)
        took.append(_timed(call))
    return min(took)


def _matrix_product(side: int, threads: int) -> Any:
    """Return a session of ONNX Runtime that multiplies two matrices."""
    import onnxruntime
    from onnx import TensorProto, helper

    one, other, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("one", "other", "product")
    )
    node = helper.make_node("MatMul", ["one", "other"], ["product"])
    graph = helper.make_graph([node], "product", [one, other], [product])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", LEAST_OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def grid(
    detectors: Mapping[str, EfficientAD],
    settings: LatencySettings,
    folder: str | Path,
    literal: ModuleType | None = None,
) -> pd.DataFrame:
    """Measure sizes × engines × precisions × batches in one run, size after size: each takes gigabytes.

    Returns a row for each: size, engine, precision, device, batch, median_ms, p99_ms, calls, ratio (how much faster
    than the literal algorithm with this size and batch, NaN without it), images_per_second, gflop (an image),
    share_of_peak (of the float32 peak of that row's device, measured before, between and after the sizes;
    `attrs["peaks"]` has the best for each).
    """
    own = next(iter(detectors.values())).device
    tables, peaks = {}, {own.type: peak(own, settings.cores)}
    for size, one in detectors.items():
        tables[size] = _one_size(size, one, settings, Path(folder) / size, literal)
        for name in tables[size].index.unique(level=2):
            peaks[name] = max(peaks.get(name, 0.0), peak(own if name == own.type else name, settings.cores))
    table = pd.concat(tables).rename_axis(["size", "engine", "precision", "device", "batch"]).reset_index()
    slowest = table[table["engine"] == "literal"].set_index(["size", "batch"])["median_ms"]
    table["ratio"] = slowest.reindex(pd.MultiIndex.from_frame(table[["size", "batch"]])).array / table["median_ms"]
    table["images_per_second"] = 1000 * table["batch"] / table["median_ms"]
    table["gflop"] = table["size"].map({size: flop(one, one.image_size) / 1e9 for size, one in detectors.items()})
    table["share_of_peak"] = 1e9 * table["gflop"] * table["images_per_second"] / table["device"].map(peaks)
    table.attrs["peaks"] = peaks
    return table


def _one_size(
    size: str, detector: EfficientAD, settings: LatencySettings, folder: Path, literal: ModuleType | None
) -> pd.DataFrame:
    """Measure all engines and precisions of one size in turn, batch after batch, the smallest first.

    What one batch takes tells which cases of a larger one would take too long: they are left out untried, as an engine
    keeps the gigabytes of its largest batch.
    """
    shape = (2, 3, *detector.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    how = {"threads": settings.cores, "compiled": size in settings.compiled, "exports": settings.exports}
    found = contenders(detector, images, folder, **how)
    if literal and size != "XS":  # which is not the paper's
        found = {("literal", "float32", detector.device.type): of_literal(literal, detector)} | found
    anew = detector.device.type != "cuda"  # torch.compile would compile for another batch
    tables, cases, an_image = [], [], dict.fromkeys(found, 0.0)
    for batch in sorted(set(settings.batches)):
        given = torch.rand((batch, *shape[1:]), device=detector.device)
        keys = [key for key in found if not (key[0] == "torch.compile" and anew and tables)]
        cases += [(*key, batch) for key in keys]
        short = [key for key in keys if batch * an_image[key] <= settings.longest]
        calls = {(*key, batch): lambda call=found[key], given=given: call(given) for key in short}
        if calls:
            pause = pause_on(device for _, _, device, _ in calls)
            tables.append(measure(calls, seconds=settings.seconds, longest=settings.longest, pause=pause))
            medians = tables[-1]["median_ms"]
            an_image = {key: medians.get((*key, batch), np.nan) / 1000 / batch for key in keys}
    return pd.concat(tables).reindex(cases).fillna({"calls": 0})


def chance_detector(size: str, image_size: Sequence[int], device: torch.device, channels: int = 384) -> EfficientAD:
    """Return an untrained detector with some threshold: as fast as a trained one, and of no other use."""
    torch.manual_seed(0)
    detector = EfficientAD(size, channels, image_size=tuple(image_size)).to(device).eval().requires_grad_(False)
    detector.threshold = detector.pixel_threshold = 1.0
    return detector
