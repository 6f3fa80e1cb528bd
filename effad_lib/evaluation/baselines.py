"""Scores to compare with: of detectors that have learned nothing, and of ours without its normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from effad_lib.datasets import Sample
from effad_lib.detector import EfficientAD
from effad_lib.evaluation.result import Evaluation
from effad_lib.images import ALL_LEVELS, Size, load_images, to_float
from effad_lib.progress import progress


def brightness_scores(samples: Sequence[Sample], normal: Sequence[Sample], size: Size = (64, 64)) -> np.ndarray:
    """Score images by brightness alone, float [N]: how many deviations their mean grey is off that of `normal` images.

    A detector that learns nothing, to compare with: where it does well, the light gives the defects away.
    """
    brightness, usual = (
        load_images([sample.image for sample in some], size, levels=ALL_LEVELS, description="measuring brightness")
        .float()
        .mean(dim=(1, 2, 3))
        .numpy()
        for some in (samples, normal)
    )
    return np.abs(brightness - usual.mean()) / max(usual.std(), 1e-6)


def blind_scores(detector: EfficientAD, samples: Sequence[Sample], *, batch_size: int = 8) -> np.ndarray:
    """Score images as if the student always answered with the teacher's mean, float [N], the map's largest value.

    A second detector that has learned nothing: where it does as well as ours, the teacher alone finds the defects.
    """
    images = load_images([sample.image for sample in samples], detector.image_size, levels=detector.levels)
    scores = []
    with torch.inference_mode():
        for batch in progress(images.split(batch_size), desc="teacher alone", leave=False):
            features = detector.teacher_features(detector.normalise(to_float(batch.to(detector.device))))
            scores.append(features.square().mean(dim=1).amax(dim=(1, 2)).cpu())
    return torch.cat(scores).numpy()


def unnormalised_scores(detector: EfficientAD, found: Evaluation) -> np.ndarray:
    """Score images by the plain mean of the two raw maps, float [N], its largest value: without map quantiles.

    What the paper's first ablation compares with: the map that varies more then rules the other. `found` is what the
    detector found.
    """
    low, high = (value.reshape(2, 1, 1, 1) for value in detector.quantiles.T.double().cpu().numpy())
    maps = np.stack([found.maps.student_teacher, found.maps.student_autoencoder])
    return (maps * (high - low) / 0.1 + low).mean(axis=0).max(axis=(1, 2))
