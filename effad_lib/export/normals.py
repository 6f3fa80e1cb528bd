"""The good images of an export: those it is compared on, those INT8 is calibrated on and gets its thresholds by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from effad_lib.calibration import choose_thresholds, measure_normals, measure_tiled_normals
from effad_lib.detector import EfficientAD
from effad_lib.engines import Exported
from effad_lib.evaluation import data_of
from effad_lib.images import Levels, Size, find_images, read_image
from effad_lib.progress import progress
from effad_lib.reading import fitted
from effad_lib.runs import Run, RunError
from effad_lib.settings import SettingsError

MOST = 150
"""Good images at most that INT8 is calibrated on: with a damaged copy of each, 300, which is what NNCF takes."""

ENOUGH = 10
"""Good images that INT8 should be calibrated on at least."""


def find_normals(source: Path, normals: str | Path | None) -> Sequence[Path]:
    """Return good images that were held out from training. Raises `SettingsError` if none are known."""
    if normals is not None:
        return find_images(normals)
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    try:
        run = Run(folder)
        split = data_of(run)
        if run.sources.get("training_images") not in (None, split.learned_from):  # an earlier version's is unknown
            raise RunError(f"the training images of {split.name} are others than those it was trained on")
        return [sample.image for sample in split.validation]
    except (RunError, ValueError) as error:
        raise SettingsError(
            f"{source}: the good images that it held out from training are not at hand ({error}). An export is "
            f"compared with its model on such images, and INT8 is calibrated on them: name a folder, --normals FOLDER."
        ) from error


def spread(files: Sequence[Path], count: int) -> list[Path]:
    """Return so many files at most, evenly spread."""
    places = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
    return [files[place] for place in places]


def to_calibrate_on(files: Sequence[Path], compared: Sequence[Path]) -> list[Path]:
    """Return which good images INT8 is calibrated on: others than it is compared on, if that leaves enough.

    A warning says if they are few. Raises `SettingsError` for a single one.
    """
    others = [file for file in files if file not in compared]
    chosen = spread(others if len(others) >= ENOUGH else files, MOST)
    remedy = f"Give {ENOUGH} or more, --normals FOLDER"
    if len(chosen) == 1:
        raise SettingsError(f"{chosen[0]}: one good image says nothing of others. {remedy}, or take float16.")
    if len(chosen) < ENOUGH:
        warnings.warn(f"INT8 is calibrated on {len(chosen)} good images alone. {remedy}.", stacklevel=3)
    return chosen


def read_normals(files: Sequence[Path], size: Size | None, levels: Levels | None) -> list[np.ndarray]:
    """Return good images uint8 [3, H, W] of a size, None for their own."""
    return [fitted(read_image(file, levels=levels), size) for file in files]


def may_choose(detector: EfficientAD, files: Sequence[Path], source: str, input_size: Size | None) -> bool:
    """Return whether an export that takes `input_size` may choose its thresholds by its own scores of good images.

    They stay the model's, and a warning says so, if there are fewer images than those were chosen on, or if the model
    does not say on how many. `source` is the name of the images' folder, "" for those held out from training, which
    are no larger than a tile and do not serve where the model's thresholds were chosen on images in tiles.
    """
    rule, tiled = detector.calibration, "tile_overlap" in detector.calibration
    at_hand = source and input_size in (None, detector.image_size)  # images, and a file that takes their tiles
    if "false_alarm_rate" in rule and len(files) >= rule["normals"] and (at_hand or not tiled):
        return True
    warnings.warn(
        f"the export keeps its model's thresholds, chosen on {rule.get('normals', 'an unknown number of')} good "
        f"images{' in tiles' * tiled}; here are {len(files)}. For thresholds by its own scores give as many such "
        f"images, --normals FOLDER, or choose its model's anew first, `effad threshold`.",
        stacklevel=3,
    )
    return False


def own_thresholds(exported: Exported, detector: EfficientAD, files: Sequence[Path], source: str) -> None:
    """Choose an export's thresholds by its own scores of good images and by its model's rule, see `may_choose`."""
    rule = detector.calibration
    if "tile_overlap" in rule:
        measure_tiled_normals(exported, files, rule["tile_overlap"], source=source)
    else:
        step = exported.batch or 8 if exported.input_size else 1  # images of any size are no batch
        starts = progress(range(0, len(files), step), desc="scoring good images", unit="batch", leave=False)
        parts = (files[start : start + step] for start in starts)
        batches = (np.stack(read_normals(part, exported.input_size, exported.levels)) for part in parts)
        measure_normals(exported, batches, source=source, names=files)
    choose_thresholds(exported, rule["false_alarm_rate"], rule["confidence"])
