"""A detector on images: scores and maps of each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from effad_lib.datasets import Sample, Saturation
from effad_lib.detector import AnomalyMaps, EfficientAD
from effad_lib.evaluation.result import MAP_NAMES, Evaluation, EvaluationError
from effad_lib.images import ImageError, Levels, Size, image_size, read_image, read_mask, to_float
from effad_lib.memory import kept_memory
from effad_lib.progress import progress


def evaluate(
    detector: EfficientAD,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    saturation: Mapping[int, Saturation] | None = None,
) -> Evaluation:
    """Run a detector over samples and keep scores and maps, 12 bytes a pixel of the detector's input size.

    `saturation` is that of the `Split`, for AU-sPRO.

    Images that cannot be read are left out, with one warning that names them. Raises `EvaluationError` if none
    remains or if a map is not finite (naming the image), and, before the first image is scored, `ImageError`
    for a mask that cannot be read or does not fit its image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    levels = getattr(detector, "levels", None)
    images, kept, sizes, skipped = _read(samples, detector.image_size, levels)
    device = next(detector.parameters()).device
    scores = np.empty(len(kept))
    maps = AnomalyMaps(**{n: np.empty((len(kept), *detector.image_size), np.float32) for n in MAP_NAMES})
    was_training = detector.training
    detector.eval()
    try:
        with torch.inference_mode(), kept_memory():
            for start in progress(range(0, len(kept), batch_size), desc="evaluating", unit="batch", leave=False):
                batch = slice(start, start + batch_size)
                found = detector(to_float(images[batch].to(device)))
                scores[batch] = found.score.cpu().numpy()
                for name in MAP_NAMES:
                    getattr(maps, name)[batch] = getattr(found, name)[:, 0].cpu().numpy()
                _check_finite(maps, scores, kept, batch)
    finally:
        detector.train(was_training)
    labels = np.array([sample.label for sample in kept])
    thresholds = (getattr(detector, name, None) for name in ("threshold", "pixel_threshold"))
    found = tuple(kept), scores, labels, maps, tuple(sizes), *thresholds, tuple(skipped), saturation or {}
    return Evaluation(*found, levels=levels)


def _read(
    samples: Sequence[Sample], size: Size, levels: Levels | None
) -> tuple[torch.Tensor, list[Sample], list[Size], list[str]]:
    """Read images at the detector's size and check the masks, all of it before the long work starts."""

    def read(sample: Sample) -> tuple[np.ndarray, Size] | ImageError:
        try:
            image, original = read_image(sample.image, size, levels), image_size(sample.image, levels)
        except ImageError as error:
            return error
        if sample.mask is not None:
            read_mask(sample.mask, original, sample.mask_level)
        return image, original

    images = torch.empty((len(samples), 3, *size), dtype=torch.uint8)
    kept, sizes, skipped = [], [], []
    with ThreadPoolExecutor() as pool:
        bar = progress(pool.map(read, samples), total=len(samples), desc="reading images", leave=False)
        for sample, result in zip(samples, bar, strict=True):
            if isinstance(result, ImageError):
                skipped.append(str(result))
                continue
            images[len(kept)] = torch.from_numpy(result[0])
            kept.append(sample)
            sizes.append(result[1])
    if not kept:
        reason = f"none of {len(samples)} can be read; the first one: {skipped[0]}" if skipped else "no samples given"
        raise EvaluationError(f"nothing to evaluate: {reason}")
    if skipped:
        warnings.warn(f"{len(skipped)} images skipped: " + " | ".join(skipped), stacklevel=3)
    return images[: len(kept)], kept, sizes, skipped


def _check_finite(maps: AnomalyMaps, scores: np.ndarray, samples: Sequence[Sample], batch: slice) -> None:
    for index in range(*batch.indices(len(samples))):
        for name in MAP_NAMES:
            if not np.isfinite(getattr(maps, name)[index]).all():
                raise EvaluationError(
                    f"{samples[index].image}: its {name} map holds NaN or infinite values. The detector is "
                    f"broken: its training diverged or it was never calibrated."
                )
        if not np.isfinite(scores[index]):
            raise EvaluationError(f"{samples[index].image}: its score is {scores[index]}. The detector is broken.")
