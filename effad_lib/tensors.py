"""Torch files that anybody may have written: read without unpickling, and with no more numbers than the file holds."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ZIP = b"PK\x03\x04"
"""How a torch file begins that is an archive: those before torch 1.6 are none."""


def read_torch(path: Path) -> Any:
    """Return what a torch file holds, on the CPU: dense tensors of real numbers, and plain values.

    Raises `ValueError` for an archive whose entries are packed or overlap, for tensors of another kind or of more
    numbers than the file holds (a few bytes can stand for any number of terabytes), and with the name of the error for
    whatever else torch does not read: its own words advise to execute what a file that was sent holds.
    """
    try:
        return _read(path)
    except Exception as error:
        raise error if type(error) is ValueError else ValueError(type(error).__name__) from error


def _read(path: Path) -> Any:
    import torch  # what only reads and writes files starts without it

    size = path.stat().st_size
    with open(path, "rb") as file:
        archive = file.read(len(ZIP)) == ZIP
    if archive:
        with zipfile.ZipFile(path) as stored:
            entries = stored.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is packed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts overlap")
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [leaf for leaf in leaves(content) if isinstance(leaf, torch.Tensor)]
    for tensor in tensors:
        if kind := _odd(tensor):
            raise ValueError(f"one of its tensors is {kind}")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
        raise ValueError("its tensors have more numbers than it holds")
    return content


def _odd(tensor: Tensor) -> str:
    """What a tensor is instead of dense, real and here; "" if nothing."""
    if tensor.device.type != "cpu":
        return "without numbers"
    if tensor.is_quantized:
        return "quantised"
    layout = str(tensor.layout).removeprefix("torch.").replace("strided", "")
    return "complex" if tensor.is_complex() else layout


def unsound(weights: Mapping[str, Tensor], *, whole: bool = False) -> str:
    """Return what is wrong with the first of these weights that is not finite or no float; "" if nothing.

    `whole` lets whole numbers pass.
    """
    for name, value in weights.items():
        if not value.isfinite().all():
            return f"{name} holds NaN or infinite values"
        if not (whole or value.is_floating_point()):
            return f"{name} holds {value.dtype}, where floats should be"
    return ""


def leaves(value: Any) -> Iterator[Any]:
    """Yield everything in nested dicts, lists and tuples, whatever is there several times once."""
    left, known = [value], set()
    while left:
        value = left.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, (dict, list, tuple)):
            left.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value
