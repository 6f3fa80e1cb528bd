"""How long a detector takes for one batch."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch

from effad_lib.detector import EfficientAD
from effad_lib.settings import device_name


@torch.inference_mode()
def latency(detector: EfficientAD, *, batch_size: int = 1, repeats: int = 20) -> dict[str, float | str]:
    """Return the median time from an image on the detector's device to its score, in milliseconds, and where it ran.

    Keys `latency_ms` and `latency_on`. The images are random ones of the detector's input size, the first calls, which
    only warm up, do not count; reading and resizing an image come on top.
    """
    device = detector.device
    images = torch.rand((batch_size, 3, *detector.image_size), device=device)
    took = []
    for repeat in range(3 + repeats):
        began = perf_counter()
        detector(images).score.cpu()  # waits for the device
        if repeat >= 3:
            took.append(1000 * (perf_counter() - began))
    return {"latency_ms": float(np.median(took)), "latency_on": device_name(device)}
