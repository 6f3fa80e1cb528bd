"""What the tests of training share: alike pictures, a small teacher, whether two detectors are the same."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from effad_lib.backbones import file_sha256
from effad_lib.detector import EfficientAD

SIDE, CHANNELS = 64, 8


def striped(index: int) -> np.ndarray:
    """One of many alike pictures: vertical stripes whose phase depends on the index."""
    columns = 128 + 90 * np.sin((np.arange(SIDE) + index) * 2 * np.pi / 16)
    return np.stack([np.tile(columns, (SIDE, 1))] * 3, axis=-1).astype(np.uint8)


def write_teacher(path, pdn):
    """Write a teacher file of the shipped layout."""
    save_file({name: value.contiguous() for name, value in pdn.state_dict().items()}, path)
    card = {"size": "XS", "channels": CHANNELS, "sha256": file_sha256(path), "network": "PDN-XS"}
    path.with_suffix(".json").write_text(json.dumps(card))
    return path


def weights_equal(one: EfficientAD, other: EfficientAD) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
