"""How faint a defect may be: image AU-ROC by severity, for each synthetic defect and each of the two branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from effad_lib.detector import EfficientAD
from effad_lib.evaluation.result import MAP_NAMES
from effad_lib.images import Size, to_float
from effad_lib.metrics import image_auroc
from effad_lib.synthesis import DEFECTS, Shot, SynthesisSettings, defect_names, draw

LEVELS = (0.1, 0.2, 0.4, 0.7, 1.0)


def severity_curves(
    detector: EfficientAD,
    product: str,
    *,
    levels: Sequence[float] = LEVELS,
    size: Size = (256, 256),
    pieces: int = 16,
    good: int = 60,
    seed: int = 1,
) -> pd.DataFrame:
    """Return the image AU-ROC of each defect of a product at each severity, by the largest value of each map.

    Columns `defect`, `logical`, `severity`, and one for each map. For every defect `pieces` pieces are drawn, each with
    the same defect at every level, against `good` good pieces, at the `size` of the images that the detector was
    trained on. All are drawn for this: none is in a data set on disk.
    """
    settings = SynthesisSettings(product=product, image_size=list(size))
    words = np.random.SeedSequence((seed, 271828)).generate_state(good + pieces, np.uint32).tolist()
    normal = _scores(detector, settings, [Shot("", "good", word) for word in words[:good]])
    rows = []
    for defect in defect_names(product):
        shots = [Shot("", defect, word, level) for level in levels for word in words[good:]]
        found = _scores(detector, settings, shots)
        for place, level in enumerate(levels):
            row = {"defect": defect, "logical": DEFECTS[defect].logical, "severity": level}
            for name in MAP_NAMES:
                bad = found[name][place * pieces : (place + 1) * pieces]
                labels = np.repeat([0, 1], [good, pieces])
                row[name] = image_auroc(np.concatenate([normal[name], bad]), labels)
            rows.append(row)
    return pd.DataFrame(rows)


@torch.inference_mode()
def _scores(detector: EfficientAD, settings: SynthesisSettings, shots: list[Shot]) -> dict[str, np.ndarray]:
    """Return for each map its largest value on each shot."""
    images = torch.from_numpy(draw(settings, shots).images)
    if tuple(images.shape[-2:]) != detector.image_size:
        images = F.interpolate(images, detector.image_size, mode="bilinear", antialias=True)
    parts = [detector(to_float(batch.to(detector.device))) for batch in images.split(8)]
    return {
        name: np.concatenate([getattr(maps, name).amax(dim=(1, 2, 3)).cpu().numpy() for maps in parts])
        for name in MAP_NAMES
    }
