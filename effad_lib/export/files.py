"""The files of an export: an ONNX file, or OpenVINO's two, with the card inside, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from effad_lib.engines import CARD, SEAL, seal_of
from effad_lib.runs import RunError, write_bytes


def to_openvino(model: Any) -> Any:
    """Return an ONNX model as one of OpenVINO."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return openvino.convert_model(path)


def check_place(target: Path) -> None:
    """Raise `RunError` for a `.bin` in the place of an OpenVINO export's, which nobody named, that is not of one."""
    weights = target.with_suffix(".bin")
    heads = [path for path in (target, _new(target)) if path.is_file()]
    if target.suffix == ".xml" and weights.exists() and not any(CARD.encode() in path.read_bytes() for path in heads):
        raise RunError(
            f"{weights} is not of an export, and the weights of {target} would replace it. Choose another name: "
            f"--out FILE."
        )


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


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
        halves = {path: _new(path) for path in written}
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
