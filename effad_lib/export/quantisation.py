"""INT8 by NNCF: the convolutions of the networks, calibrated on good and damaged images; all else stays float32."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from effad_lib.engines import openvino_core

TAIL = {
    "onnx": ["MatMul", "Sub", "Mul", "Div", "Pow", "Add", "ReduceMean", "Resize", "Pad", "Concat", "Split"],
    "openvino": ["MatMul", "Subtract", "Multiply", "Divide", "Power", "Add", "ReduceMean", "Interpolate"],
}
"""Operations whose inputs are not quantised: resizing, normalisation, squared differences. What is rare there, a
defect, would be clipped at what good images reach."""

SENSITIVE = "detector.teacher.trunk.3.weight"
"""The kernel of the teacher's second convolution: of all, measured on XS, the one that bears eight bits least. What a
teacher loses, T̂ = (T − μ)/σ enlarges."""


def quantise(model: Any, images: np.ndarray, to: str, batch: int, spared: str = "") -> Any:
    """Return a model, ONNX or OpenVINO as `to` says, with convolutions of 8 bits.

    `images` uint8 [N, 3, H, W] are what it is calibrated on, of the size that the model takes, `batch` at a time. The
    first convolution of each network, a few per cent of the work, stays float32, ranges reach from the lowest to the
    highest value, and biases are corrected layer by layer: on the solar cells of ELPV that brought the largest error of
    a test score from 85 % with all of it left out to 2.5 %, on gaskets from 22 % to 17 %. The convolution whose
    kernel is named `spared`, such as `SENSITIVE`, stays float32 too.
    """
    in_float = [name for name, kernel, channels in convolutions(model, to) if channels == 3 or kernel == spared]
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which is not needed
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)
    step = batch or 1
    count = -(-len(images) // step) * step
    batches = (np.arange(count) % len(images)).reshape(-1, step)  # of indices: as float32 all at once are gigabytes

    def take(batch: np.ndarray) -> Any:
        values = images[batch].astype(np.float32) / 255
        return {"images": values} if to == "onnx" else values

    if to == "openvino":
        openvino_core()  # before those of NNCF, which live within its life
    with _without_bars():
        return nncf.quantize(
            model,
            nncf.Dataset(batches, take),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            fast_bias_correction=False,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
            ),
            ignored_scope=nncf.IgnoredScope(types=TAIL[to], names=in_float, validate=False),
        )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the bars of NNCF to itself: in a notebook each leaves a widget behind."""
    console = importlib.import_module("rich").get_console()  # which NNCF draws them on
    before = console.quiet, console.is_jupyter
    console.quiet, console.is_jupyter = True, False
    try:
        yield
    finally:
        console.quiet, console.is_jupyter = before


def convolutions(model: Any, to: str) -> Iterator[tuple[str, str, int]]:
    """Yield each convolution's name, its kernel's, and how many channels it takes: three, if it sees the image."""
    if to == "onnx":
        channels = {value.name: value.dims[1] for value in model.graph.initializer if len(value.dims) == 4}
        for node in model.graph.node:
            if node.op_type == "Conv":
                yield node.name, node.input[1], channels[node.input[1]]
        return
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            kernel = node.input_value(1)  # [groups,] channels out, in, rows, columns
            yield node.get_friendly_name(), kernel.get_node().get_friendly_name(), kernel.get_shape()[-3]
