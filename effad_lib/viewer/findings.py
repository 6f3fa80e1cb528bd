"""What there is to look at: images with their scores, maps and truth, each read when it is shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from effad_lib import plots
from effad_lib.datasets import Sample
from effad_lib.detection import pair_masks
from effad_lib.detector import EfficientAD
from effad_lib.evaluation import MAP_NAMES, data_of, load_maps
from effad_lib.images import ALL_LEVELS, ImageError, find_images, read_image, read_mask
from effad_lib.progress import progress
from effad_lib.runs import Run, RunError, from_project, harmless
from effad_lib.settings import pick_device

UNKNOWN = -1
"""The label of an image whose truth is not known."""

Maps = Mapping[str, np.ndarray]
"""Anomaly maps float32 [h, w] by name: those of `MAP_NAMES`, or the combined one alone."""


@dataclass(frozen=True)
class Picture:
    """One image to look at: uint8 [H, W, 3], its truth bool [H, W] or None where it is not known, and its maps."""

    image: np.ndarray
    truth: np.ndarray | None
    maps: Maps


class Findings:
    """N images, what a detector found on them, and what is known of them.

    `names` are shown and key the notes; `samples` tell image and mask; `labels` int [N] are 0 good, 1 defective or
    `UNKNOWN`; `scores` float [N] and `branches` float [N, 2], the largest values of the combined map and of the two
    branches' maps, are NaN where they are not known (yet). `threshold` and `pixel_threshold` are the detector's and
    `calibration` what they were chosen from. `scale` is the one colour scale of all maps. `detector`, if there is one,
    can score further images; `notes` is the file for what people write. `has_branches` tells whether there are maps of
    the two branches beside the combined ones.
    """

    def __init__(
        self,
        title: str,
        samples: Sequence[Sample],
        read_maps: Callable[[int], Maps],
        *,
        notes: Path,
        names: Sequence[str],
        scores: np.ndarray | None = None,
        branches: np.ndarray | None = None,
        scale: plots.Scale | None = None,
        detector: EfficientAD | None = None,
        has_branches: bool = True,
    ) -> None:
        count = len(samples)
        self.has_branches = has_branches
        self.title, self.notes, self.detector = title, notes, detector
        self.samples, self.names = list(samples), list(names)
        self.labels = np.array([sample.label for sample in samples], dtype=int)
        self.scores = np.full(count, np.nan) if scores is None else np.asarray(scores, dtype=float)
        self.branches = np.full((count, 2), np.nan) if branches is None else np.asarray(branches, dtype=float)
        self.errors: dict[int, str] = {}  # why an image could not be scored
        self.threshold: float | None = detector and detector.threshold
        self.pixel_threshold: float | None = detector and detector.pixel_threshold
        self.calibration: dict[str, Any] = detector.calibration if detector else {}
        # Twice the threshold, as in every figure of the project: the decision is in the middle of the colours.
        self.scale = scale or plots.heat_scale([], max(self.threshold or 0.0, 0.1))
        self._read_maps = read_maps
        self._added: dict[int, Maps] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def defects(self) -> list[str]:
        """The type of defect of each image, "good" for good ones, "" where it is not known."""
        return [sample.defect for sample in self.samples]

    @property
    def waiting(self) -> list[int]:
        """Indices of the images that are still to be scored."""
        return [index for index in np.flatnonzero(np.isnan(self.scores)).tolist() if index not in self.errors]

    @property
    def rule(self) -> str:
        """What the threshold was chosen from, as a sentence; "" if there is none."""
        if self.threshold is None:
            return ""
        chosen = self.calibration
        if "rank" not in chosen:
            return "the model does not say what its threshold was chosen from"
        images = "normal images in tiles" if "tile_overlap" in chosen else "normal images"
        of = f"score {chosen['rank']} of {chosen['normals']} held-out {images}, from the lowest"
        if not chosen["false_alarm_rate"]:
            return f"{of}: one false alarm in {chosen['normals'] + 1} is expected"
        rate, confidence = 100 * chosen["false_alarm_rate"], 100 * chosen["confidence"]
        return f"{of}: at most {rate:g} % false alarms, with {confidence:g} % confidence"

    def maps(self, index: int) -> Maps:
        """Return the maps of an image."""
        return self._added[index] if index in self._added else self._read_maps(index)

    def picture(self, index: int) -> Picture:
        """Read image, truth and maps. Raises `ImageError` for what cannot be read any more."""
        sample = self.samples[index]
        levels = self.detector.levels if self.detector else ALL_LEVELS
        image = read_image(sample.image, levels=levels).transpose(1, 2, 0)
        truth = np.zeros(image.shape[:2], dtype=bool) if sample.label == 0 else None
        if sample.mask is not None:
            truth = read_mask(sample.mask, image.shape[:2], sample.mask_level)
        return Picture(image, truth, self.maps(index))

    def score(self, index: int) -> None:
        """Score an image that waits for it; if it cannot be read, `errors` says why and nothing is raised."""
        try:
            self._take(index, self.maps(index))
        except ImageError as error:
            self.errors[index] = str(error)

    def add(self, path: Path, name: str) -> int:
        """Score a further image, of which nothing is known, and return its index. Raises `ImageError`, `RunError`.

        A second one of the same name gets a number, so that each has a note of its own.
        """
        if self.detector is None:
            raise RunError("only maps are at hand here, no model that could score another image.")
        maps = scan(self.detector, path)
        index = len(self)
        self.samples.append(Sample(path, None, UNKNOWN, ""))
        same = (f"{Path(name).stem} ({k}){Path(name).suffix}" for k in range(2, index + 3))
        self.names.append(name if name not in self.names else next(new for new in same if new not in self.names))
        self.labels = np.append(self.labels, UNKNOWN)
        self.scores = np.append(self.scores, np.nan)
        self.branches = np.append(self.branches, [[np.nan, np.nan]], axis=0)
        self._added[index] = maps
        self._take(index, maps)
        return index

    def _take(self, index: int, maps: Maps) -> None:
        self.scores[index] = maps["combined"].max()
        if len(maps) > 1:
            self.branches[index] = [maps[name].max() for name in MAP_NAMES[1:]]


def scan(detector: EfficientAD, path: Path) -> Maps:
    """Run a detector over one image file. Raises `ImageError` if it cannot be read or its map is not finite."""
    found = detector.inspect(read_image(path, detector.image_size, detector.levels)[None])
    maps = {name: getattr(found, name)[0] for name in MAP_NAMES}
    if not np.isfinite(maps["combined"]).all():
        raise ImageError(f"{path}: its map is not finite: this model's training has diverged. Train it again.")
    return maps


def of_run(folder: str | Path, device: str = "auto") -> Findings:
    """Return what an evaluated run found on its test images; only `scores.csv` and the list of images are read.

    Raises `RunError` if the run has not been evaluated or some of its images are gone, `DatasetError` if all are.
    """
    run = Run(folder)
    table, remedy = run.folder / "scores.csv", f"Measure it: effad evaluate {from_project(run.folder)}"
    if not run.done or not table.is_file():
        raise RunError(f"{run.folder} holds no finished evaluation. {remedy}")
    try:
        found = pd.read_csv(table, dtype={"file": str, "defect": str}, na_filter=False)
    except ValueError as error:  # pandas' own errors and those of the encoding are such
        raise RunError(f"{table} cannot be read ({error}). {remedy}") from error
    if not {"file", "score", *MAP_NAMES[1:]} <= set(found.columns):
        raise RunError(f"{table}: columns {', '.join(found.columns)}, written by another version. {remedy}")
    numbers = found[["score", *MAP_NAMES[1:]]]
    if any(kind.kind not in "fiu" for kind in numbers.dtypes) or not np.isfinite(numbers).all(axis=None):
        raise RunError(f"{table} holds scores that are no finite numbers. {remedy}")
    split = data_of(run)
    there = {harmless(from_project(sample.image)): sample for sample in split.test}
    if lost := [name for name in found["file"] if name not in there]:
        raise RunError(f"{run.folder}: {len(lost)} of its images are not in {split.name} any more, {lost[0]}. {remedy}")

    def maps(index: int) -> Maps:
        try:
            maps = load_maps(run.folder, index)
        except Exception as error:  # of a broken archive NumPy raises whatever its parsing runs into
            raise ImageError(f"the maps of {found['file'][index]} cannot be read ({error}). {remedy}") from error
        limit = np.finfo(np.float16).max  # maps are kept as such numbers
        if not np.isclose(maps.combined.max(), np.clip(found["score"][index], -limit, limit), rtol=1e-3, atol=1e-6):
            raise ImageError(
                f"the maps of {found['file'][index]} are not those of its score: {table} was changed since. {remedy}"
            )
        return maps._asdict()

    return Findings(
        split.name,
        [there[name] for name in found["file"]],
        maps,
        names=found["file"].tolist(),
        scores=found["score"].to_numpy(),
        branches=found[list(MAP_NAMES[1:])].to_numpy(),
        detector=EfficientAD.load(run.model, pick_device(device)),
        notes=run.folder / "notes.csv",
    )


def of_images(model: str | Path, images: str | Path, masks: str | Path | None = None, device: str = "auto") -> Findings:
    """Return the images below a folder, which a model has still to `score`.

    Their truth is known if they lie in folders named after it, one of them `good`, or by `masks`, a folder with
    `a/b_mask.png` or `a/b.png` for an image `a/b.jpg`. The notes go beside the model. Raises `ImageError` if there is
    no image, `SettingsError` for what is no model.
    """
    model, images = Path(model).expanduser(), Path(images).expanduser()
    detector = EfficientAD.load(model, pick_device(device))
    samples = _samples(find_images(images), images, masks)
    return Findings(
        images.name,
        samples,
        lru_cache(maxsize=64)(lambda index: scan(detector, samples[index].image)),
        names=[from_project(sample.image) for sample in samples],
        detector=detector,
        notes=model.with_name("notes.csv"),
    )


def of_maps(
    maps: str | Path, images: str | Path, masks: str | Path | None = None, model: str | Path | None = None
) -> Findings:
    """Return the images below a folder for which another folder has maps, by whatever method they were made.

    The map of an image `a/b.jpg` is `a/b.jpg.npy`, as `effad detect --save-maps` writes it, `a/b.npy`, or a float TIFF
    `a/b.tiff`, as MVTec's evaluation code reads it: [h, w], of any size and scale. `masks` and truth as in `of_images`;
    a `model` gives its thresholds. All maps are read once, for their scores. Raises `ImageError` for a map that cannot
    be read, is not [h, w] or not finite, and if there is none.
    """
    maps, images = Path(maps).expanduser(), Path(images).expanduser()
    files = {path: _map_of(path.relative_to(images), maps) for path in find_images(images)}
    found = {path: file for path, file in files.items() if file}
    if not found:
        example = next(iter(files)).relative_to(images)
        raise ImageError(f"{maps}: no map of any of {len(files)} images. That of {example} would be {example}.npy.")
    if len(found) < len(files):
        warnings.warn(f"{len(files) - len(found)} of {len(files)} images have no map and are left out", stacklevel=2)
    samples, sources = _samples(list(found), images, masks), list(found.values())
    with ThreadPoolExecutor() as pool:
        bar = progress(pool.map(_extremes, sources), total=len(sources), desc="reading maps", leave=False)
        lowest, scores = np.array(list(bar)).T
    detector = EfficientAD.load(model) if model else None
    high = float(np.quantile(scores, 0.99))
    return Findings(
        images.name,
        samples,
        lambda index: {"combined": _read_map(sources[index])},
        names=[from_project(sample.image) for sample in samples],
        scores=scores,
        has_branches=False,
        scale=None if detector else plots.with_width(float(lowest.min()), high),
        detector=detector,
        notes=maps / "notes.csv",
    )


def _samples(paths: Sequence[Path], folder: Path, masks: str | Path | None) -> list[Sample]:
    """The images with what their folders and masks tell of them."""
    named = {path.relative_to(folder): path for path in paths}
    truths = pair_masks(masks, list(named))
    sorted_by_truth = any("good" in name.parent.parts for name in named)
    samples = []
    for name, path in named.items():
        defect = ("good" if "good" in name.parent.parts else name.parent.name) if sorted_by_truth else ""
        mask = truths.get(name)
        label = UNKNOWN if not defect and mask is None else int(defect != "good")
        samples.append(Sample(path, mask, label, defect or ("defective" if label == 1 else "")))
    return samples


def _map_of(name: Path, folder: Path) -> Path | None:
    """The file of the map of the image `name`; None if there is none, or if a link leads out of the folder."""
    for file in (f"{name}.npy", *(name.with_suffix(suffix) for suffix in (".npy", ".tiff", ".tif"))):
        path = folder / file
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    return None


def _read_map(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=["TIFF"]) as image:
                values = np.asarray(image)
    except Exception as error:  # of a broken file NumPy and Pillow raise whatever their parsing runs into
        raise ImageError(f"{path}: cannot be read as an anomaly map ({error}). Replace or remove it.") from error
    values = np.squeeze(values) if isinstance(values, np.ndarray) else np.empty(0)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise ImageError(
            f"{path}: {values.dtype} {values.shape} is no anomaly map. It takes one array of numbers [h, w]."
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ImageError(f"{path}: the map holds NaN or infinite values. Make it again.")
    return values


def _extremes(path: Path) -> tuple[float, float]:
    values = _read_map(path)
    return float(values.min()), float(values.max())
