"""Map quantiles and decision threshold, from held-out normal images only (Algorithm 1, last part)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from effad_lib.detector import EfficientAD
from effad_lib.images import to_float
from effad_lib.runs import RunError

QUANTILES = (0.9, 0.995)
"""q_a and q_b of the paper: they become 0 and 0.1 on the normalised scale."""


@torch.inference_mode()
def calibrate(detector: EfficientAD, images: Tensor, *, batch_size: int = 8) -> None:
    """Set the detector's map quantiles and its threshold from held-out normal images.

    `images` uint8 [N, 3, H, W], never seen in training and never from a test set. The quantiles run over all values of
    the raw maps, before padding and resizing. The threshold is the largest score of these images: one new normal image
    in N + 1 is expected above it. Raises `RunError` if a map is not finite.
    """
    detector.eval()
    batches = [to_float(batch.to(detector.device)) for batch in images.split(batch_size)]
    maps = [torch.cat(detector.raw_maps(batch), dim=1).float().cpu() for batch in batches]
    values = torch.cat(maps).transpose(0, 1).flatten(1).numpy()
    if not np.isfinite(values).all():
        raise RunError("an anomaly map of a held-out normal image is not finite: the training has diverged.")
    # NumPy's quantile, as torch's refuses more than 2^24 values.
    quantiles = np.quantile(values, QUANTILES, axis=1).T
    detector.quantiles.copy_(torch.from_numpy(quantiles))
    detector.threshold = max(float(detector(batch).score.max()) for batch in batches)
