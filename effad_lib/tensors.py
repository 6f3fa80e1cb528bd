"""Torch files that anybody may have written: read without unpickling, and with no more numbers than the file holds."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ZIP = b"PK\x03\x04"
"""How a torch file begins that is an archive: those before torch 1.6 are none."""


def read_torch(path: Path) -> Any:
    """Return what a torch file holds, on the CPU: dense tensors of real numbers, and plain values.

    Raises `ValueError` for an archive whose entries are packed or overlap, and for tensors of another kind or of more
    numbers than the file holds: a few bytes can stand for any number of terabytes. What else is wrong raises whatever
    torch does.
    """
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
    left = size
    for tensor in leaves(content):
        if isinstance(tensor, torch.Tensor):
            _check(tensor)
            left -= tensor.numel() * tensor.element_size()
    if left < 0:
        raise ValueError("its tensors have more numbers than it holds")
    return content


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


def _check(tensor: Tensor) -> None:
    kind = str(tensor.layout).removeprefix("torch.")
    if kind != "strided" or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        kind = "quantised" if tensor.is_quantized else "complex" if tensor.is_complex() else kind
        raise ValueError(f"one of its tensors is {kind if tensor.device.type == 'cpu' else 'without numbers'}")
