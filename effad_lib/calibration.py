"""Map quantiles (Algorithm 1, last part) and decision thresholds, from held-out normal images only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effad_lib.detector import EfficientAD
from effad_lib.documents import is_text
from effad_lib.engines import Inspection, Inspector
from effad_lib.images import ImageError, read_image, to_float
from effad_lib.memory import kept_memory
from effad_lib.progress import progress
from effad_lib.reading import not_text
from effad_lib.runs import RunError
from effad_lib.settings import SettingsError
from effad_lib.tiling import inspect_tiles

QUANTILES = (0.9, 0.995)
"""q_a and q_b of the paper: they become 0 and 0.1 on the normalised scale."""

MARKED = 0.001
"""Share of an image's pixels above the pixel threshold that still counts as none: 65 pixels of 256×256, a speck."""


def rank(normals: int, false_alarm_rate: float, confidence: float) -> int:
    """Return which of so many normal scores, sorted from the lowest, counted from 1, is the threshold.

    It is the lowest that at most `false_alarm_rate` of all new normal images exceed, with `confidence`. Of n images, at
    least a share 1 − f of all others scores below the r-th with the probability that a binomial variable (n, 1 − f) is
    less than r, whatever the distribution of the scores. A rate of 0 takes the highest, above which one new normal
    image in n + 1 is expected. Raises `SettingsError` for values outside [0, 1) and (0, 1), and if there are too few
    images for the wish, saying how many it needs.
    """
    if not 0 <= false_alarm_rate < 1:
        raise SettingsError(f"false_alarm_rate = {false_alarm_rate!r}: takes a share from 0 to below 1.")
    if not 0 < confidence < 1:
        raise SettingsError(f"confidence = {confidence!r}: takes a probability between 0 and 1.")
    if false_alarm_rate == 0:
        return normals
    from scipy.stats import binom  # half a second, for this wish alone

    below = int(binom.ppf(confidence, normals, 1 - false_alarm_rate))
    if below >= normals:
        needed = math.log(1 - confidence) / math.log1p(-false_alarm_rate)
        needed = math.ceil(needed) if needed < 1e9 else f"{needed:.0e}"
        raise SettingsError(
            f"a false_alarm_rate of {false_alarm_rate:g} with confidence {confidence:g} needs {needed} held-out normal "
            f"images, there are {normals}. Hold out more (more good images, a larger validation_share), or wish for "
            f"less; 0 takes the highest score of those there are."
        )
    return below + 1


@torch.inference_mode()
def calibrate(
    detector: EfficientAD,
    images: Tensor,
    *,
    false_alarm_rate: float = 0.0,
    confidence: float = 0.95,
    batch_size: int = 8,
) -> None:
    """Set the detector's map quantiles and its thresholds from held-out normal images.

    `images` uint8 [N, 3, H, W], never seen in training and never from a test set. The quantiles run over all values of
    the raw maps, before padding and resizing. Thresholds as in `choose_thresholds`. Raises `RunError` if a map is not
    finite, naming the image's index, and `SettingsError` as `rank`.
    """
    rank(len(images), false_alarm_rate, confidence)
    detector.eval()
    maps = [
        torch.cat(detector.raw_maps(to_float(batch.to(detector.device))), dim=1).float()
        for batch in images.split(batch_size)
    ]
    values = torch.cat(maps).cpu()
    _check_finite(values.flatten(1).isfinite().all(dim=1).numpy(), ())
    values = values.transpose(0, 1).flatten(1).numpy()
    # NumPy's quantile, as torch's refuses more than 2^24 values.
    quantiles = np.quantile(values, QUANTILES, axis=1).T
    detector.quantiles.copy_(torch.from_numpy(quantiles))
    _store(detector, (detector.finished(batch, images.shape[2:]).as_arrays() for batch in maps), (), {})
    choose_thresholds(detector, false_alarm_rate, confidence)


def source_of(folder: str | Path) -> str:
    """Return the name of a folder of normal images as a `source`. Raises `ImageError` for one that is not UTF-8."""
    folder = Path(folder).resolve()
    if not is_text(folder.name):
        raise not_text(folder, "folder")
    return folder.name


def measure_normals(
    detector: Inspector, batches: Iterable[Tensor | np.ndarray], *, source: str = "", names: Sequence[object] = ()
) -> None:
    """Store what a calibrated detector, or an export of one, finds on normal images; `choose_thresholds` chooses by it.

    `batches` are of images uint8 [N, 3, H, W], as in `calibrate`. `detector.calibration` gets the sorted image scores,
    the sorted values that all but `MARKED` of an image's pixels stay below, and where the images came from, if a
    `source` is named. Raises `RunError` if a map is not finite, naming the image as in `names`, such as its file, or by
    its index.
    """
    found = (detector.inspect(np.asarray(batch)) for batch in batches)
    _store(detector, found, names, {"source": source} if source else {})


def measure_tiled_normals(detector: Inspector, files: Sequence[Path], overlap: int, *, source: str) -> None:
    """Store what a detector, or an export of one, finds on normal images of any size in tiles, see `inspect_tiles`.

    The score of such an image is the highest of many tiles, which a threshold from single ones does not allow for.
    `detector.calibration` gets what `measure_normals` gives it, and the overlap. One image is in memory at a time.
    Raises `ImageError` for a file that cannot be read or is smaller than a tile, and `RunError` as `measure_normals`.
    """

    def found() -> Iterator[Inspection]:
        for file in progress(files, desc="measuring normal images", unit="image"):
            image = read_image(file, levels=detector.levels)
            try:
                yield inspect_tiles(detector, image, overlap)
            except ImageError as error:
                raise ImageError(f"{file}: {error}") from None

    with kept_memory():
        _store(detector, found(), files, {"source": source, "tile_overlap": overlap})


def _store(detector: Inspector, found: Iterable[Inspection], names: Sequence[object], told: dict[str, Any]) -> None:
    """Store score and pixels of each image, sorted, with what else is told of the images."""
    scores, pixels = [], []
    for batch in found:
        scores += batch.score.tolist()
        flat = batch.combined.reshape(len(batch.score), -1)
        pixels += np.quantile(flat, 1 - MARKED, axis=1, method="higher").tolist()
    _check_finite(np.isfinite(scores), names)
    detector.calibration = {"normals": len(scores), "scores": sorted(scores), "pixels": sorted(pixels)} | told


def choose_thresholds(detector: Inspector, false_alarm_rate: float, confidence: float) -> None:
    """Set a detector's thresholds for a false-alarm rate, from the normal images that it was measured on.

    With `confidence`, at most `false_alarm_rate` of all new normal images score above `threshold`, and at most as many
    have more than the share `MARKED` of their pixels above `pixel_threshold`, which is never the higher of the two.
    `detector.calibration` keeps rate, confidence and rank. Raises `SettingsError` as `rank`, and for a model that
    stores no normal images.
    """
    stored = detector.calibration
    if not stored:
        raise SettingsError("this model stores no scores of normal images: measure some, `effad threshold --normals`.")
    place = rank(stored["normals"], false_alarm_rate, confidence)
    detector.threshold, detector.pixel_threshold = stored["scores"][place - 1], stored["pixels"][place - 1]
    rule = {"false_alarm_rate": false_alarm_rate, "confidence": confidence, "rank": place}
    detector.calibration = stored | rule


def _check_finite(finite: np.ndarray, names: Sequence[object]) -> None:
    """Raise `RunError` unless all maps are finite, bool [N]; it names the first image whose map is not."""
    if not finite.all():
        index = int(finite.argmin())
        name = names[index] if names else f"normal image {index}"
        raise RunError(
            f"{name}: its anomaly map holds NaN or infinite values. The training has diverged: train again with "
            f"a lower learning_rate or in precision float32."
        )
