"""A detector on a test split: scores and maps of every image, metrics, tables, the worst mistakes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch.nn import functional
from tqdm.auto import tqdm

from effad_lib import metrics
from effad_lib.datasets import Sample, Split, load_dataset
from effad_lib.detector import AnomalyMaps, EfficientAD
from effad_lib.images import ImageError, Size, load_images, read_image, read_mask, to_float
from effad_lib.runs import PROJECT, Run, RunError, resolve, write_bytes, write_text
from effad_lib.settings import Settings, pick_device

MAP_NAMES = ("combined", "student_teacher", "student_autoencoder")


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Settings of an evaluation."""

    run_folder: str = "runs/training"  # the folder of a finished training; the results go there too
    least_image_auroc: float = 0.0  # notebook 04 fails below this image AU-ROC; 0 accepts all
    device: str = "auto"

    def check(self) -> None:
        self.require(0 <= self.least_image_auroc <= 1, "least_image_auroc", "an area between 0 and 1")
        pick_device(self.device)


@dataclass(frozen=True)
class Evaluation:
    """What a detector found on N images, and how that compares with the truth.

    `scores` float [N], unclamped; `labels` int [N], 0 good, 1 defective; `maps` holds three float32 arrays
    [N, H, W] at the detector's input size; `sizes` the (height, width) of the images as they are on disk;
    `threshold` is the detector's, None before calibration: an image counts as defective if its score is
    above it. `skipped` says which images could not be read, and why; no other field has them.
    """

    samples: tuple[Sample, ...]
    scores: np.ndarray
    labels: np.ndarray
    maps: AnomalyMaps
    sizes: tuple[Size, ...]
    threshold: float | None = None
    skipped: tuple[str, ...] = ()

    def mask(self, index: int) -> np.ndarray | None:
        """Return the truth as bool [H, W] at the original size; None for a defective image without a mask."""
        sample = self.samples[index]
        if sample.mask is not None:
            return read_mask(sample.mask, self.sizes[index])
        return None if sample.label else np.zeros(self.sizes[index], dtype=bool)

    def heat(self, index: int) -> np.ndarray:
        """Return the combined map of an image as float32 [H, W], resized bilinearly to the original size."""
        heat = torch.from_numpy(np.asarray(self.maps.combined[index]))
        if tuple(heat.shape) != tuple(self.sizes[index]):
            heat = functional.interpolate(heat[None, None], self.sizes[index], mode="bilinear")[0, 0]
        return heat.numpy()

    def metrics(self) -> dict[str, float | None]:
        """Return image AU-ROC, AP, F1-max, pixel AU-ROC and AU-PRO (FPR limit 0.3).

        The pixel metrics are computed at the original image sizes, one map at a time. A metric that cannot be
        computed is None, and `notes` says why.
        """
        everything = range(len(self.samples))
        return {
            "image_auroc": metrics.image_auroc(self.scores, self.labels),
            "image_ap": metrics.image_ap(self.scores, self.labels),
            "image_f1_max": metrics.image_f1_max(self.scores, self.labels)[0],
            "pixel_auroc": self._pixel_metric(metrics.pixel_auroc, everything),
            "au_pro": self._pixel_metric(metrics.au_pro, everything),
        }

    @property
    def notes(self) -> list[str]:
        """What is missing from the metrics and why, in sentences; empty when nothing is."""
        notes = [f"{len(self.skipped)} unreadable images were skipped."] if self.skipped else []
        for label, kind in enumerate(("good", "defective")):
            if label not in self.labels:
                notes.append(f"No {kind} image among {len(self.labels)}: no image AU-ROC, AP and F1-max.")
        if 1 not in self.labels:
            notes.append("No defective pixel: no pixel AU-ROC and AU-PRO.")
        unknown = sum(sample.label == 1 and sample.mask is None for sample in self.samples)
        if unknown:
            notes.append(f"{unknown} defective images have no mask: no pixel AU-ROC and AU-PRO.")
        return notes

    def by_defect(self) -> pd.DataFrame:
        """Return a row for each type of defect, each judged against all good images.

        Columns: images (count), image_auroc, au_pro, mean_score, misses (images not above the
        detector's threshold); a value that cannot be computed is missing.
        """
        good = np.flatnonzero(self.labels == 0)
        rows = {}
        for defect in sorted({sample.defect for sample in self.samples if sample.label}):
            bad = np.array([i for i, s in enumerate(self.samples) if s.label and s.defect == defect])
            chosen = np.concatenate([good, bad])
            scores = self.scores[bad]
            rows[defect] = {
                "images": len(bad),
                "image_auroc": metrics.image_auroc(self.scores[chosen], self.labels[chosen]),
                "au_pro": self._pixel_metric(metrics.au_pro, chosen),
                "mean_score": scores.mean(),
                "misses": None if self.threshold is None else int((scores <= self.threshold).sum()),
            }
        columns = {
            "images": int,
            "image_auroc": float,
            "au_pro": float,
            "mean_score": float,
            "misses": "Int64",
        }
        table = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).astype(columns)
        return table.rename_axis("defect")

    def by_branch(self) -> pd.DataFrame:
        """Return the image AU-ROC of each map alone, its maximum taken as score: a row for each type of defect.

        The last row, "all", takes all defective images together. Columns as in `MAP_NAMES`.
        """
        scores = {name: np.asarray(getattr(self.maps, name)).max(axis=(1, 2)) for name in MAP_NAMES}
        defects = np.array([sample.defect for sample in self.samples])
        kinds = {defect: defects == defect for defect in sorted(set(defects[self.labels == 1]))}
        kinds["all"] = self.labels == 1
        rows = {
            kind: {
                n: metrics.image_auroc(s[bad | (self.labels == 0)], self.labels[bad | (self.labels == 0)])
                for n, s in scores.items()
            }
            for kind, bad in kinds.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", dtype=float).rename_axis("defect")

    def pro_curve(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the curve under which AU-PRO is the area, see `metrics.pro_curve`; None if it cannot be computed."""
        return self._pixel_metric(metrics.pro_curve, range(len(self.samples)))

    def save(self, folder: str | Path) -> None:
        """Write `scores.csv` and, for row k of it, `maps/<k>.npz`; `load_maps` reads the latter.

        A map file holds the three maps as float16 and no pickled object. Map files of an earlier, longer
        evaluation in the same folder are removed.
        """
        folder = Path(folder)
        for index in range(len(self.samples)):
            write_bytes(_map_file(folder, index), self._packed_maps(index))
        for stale in set((folder / "maps").glob("*.npz")) - {_map_file(folder, i) for i in range(len(self.samples))}:
            stale.unlink()
        write_text(folder / "scores.csv", self.table().to_csv(index=False))

    def table(self) -> pd.DataFrame:
        """Return a row for each image, as `save` writes it.

        Columns: file (relative to the project if inside), label, defect, score, decision (1 defective,
        0 good, missing without a threshold).
        """
        table = pd.DataFrame(
            {
                "file": [_shown(sample.image) for sample in self.samples],
                "label": self.labels,
                "defect": [sample.defect for sample in self.samples],
                "score": self.scores,
            }
        )
        decided = pd.NA if self.threshold is None else (self.scores > self.threshold).astype(int)
        return table.assign(decision=pd.array(np.broadcast_to(decided, len(table)), dtype="Int64"))

    def _packed_maps(self, index: int) -> bytes:
        limit = np.finfo(np.float16).max
        packed = io.BytesIO()
        halves = {n: np.clip(getattr(self.maps, n)[index], -limit, limit).astype(np.float16) for n in MAP_NAMES}
        np.savez(packed, **halves)
        return packed.getvalue()

    def _pixel_metric(self, metric: Callable, indices: Sequence[int]) -> float | None:
        if any(self.samples[i].label and self.samples[i].mask is None for i in indices):
            return None
        return metric(_OnRequest(self.heat, indices), _OnRequest(self.mask, indices))


def evaluate(detector: EfficientAD, samples: Sequence[Sample], *, batch_size: int = 8) -> Evaluation:
    """Run a detector over samples and keep scores and maps, 12 bytes a pixel of the detector's input size.

    Images that cannot be read are left out, with one warning that names them. Raises `ValueError` if none
    remains or if a map is not finite (naming the image), and, before the first image is scored, `ImageError`
    for a mask that cannot be read or does not fit its image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    images, kept, sizes, skipped = _read(samples, detector.image_size)
    device = next(detector.parameters()).device
    scores = np.empty(len(kept))
    maps = AnomalyMaps(**{n: np.empty((len(kept), *detector.image_size), np.float32) for n in MAP_NAMES})
    was_training = detector.training
    detector.eval()
    try:
        with torch.inference_mode():
            for start in tqdm(range(0, len(kept), batch_size), desc="evaluating", unit="batch", leave=False):
                batch = slice(start, start + batch_size)
                found = detector(to_float(images[batch].to(device)))
                scores[batch] = found.score.cpu().numpy()
                for name in MAP_NAMES:
                    getattr(maps, name)[batch] = getattr(found, name)[:, 0].cpu().numpy()
                _check_finite(maps, scores, kept, batch)
    finally:
        detector.train(was_training)
    labels = np.array([sample.label for sample in kept])
    threshold = getattr(detector, "threshold", None)
    return Evaluation(tuple(kept), scores, labels, maps, tuple(sizes), threshold, tuple(skipped))


def evaluate_run(run_folder: str | Path, device: str = "auto") -> tuple[EfficientAD, Split, Evaluation]:
    """Evaluate the model of a finished training on the test images of its own data set.

    The data set is found again by the run's `parameters.yaml`. Nothing is written, see `finish_run`. Raises `RunError`
    for a folder without a finished training and for a data set without test images.
    """
    run = Run(run_folder)
    parameters = run.folder / "parameters.yaml"
    if not parameters.is_file() or not run.model.is_file():
        raise RunError(f"{run.folder} is not the folder of a finished training. Train one with `effad train`.")
    made = yaml.safe_load(parameters.read_text(encoding="utf-8"))
    split = load_dataset(
        made["dataset"],
        root=made["data_root"],
        category=made["category"],
        seed=made["seed"],
        validation_share=made["validation_share"],
    )
    if not split.test:
        raise RunError(f"{split.name} has no test images. Add test/good and test/<defect>, or use `effad detect`.")
    detector = EfficientAD.load(run.model, pick_device(device))
    return detector, split, evaluate(detector, split.test)


def finish_run(run_folder: str | Path, detector: EfficientAD, found: Evaluation) -> dict[str, Any]:
    """Write `scores.csv`, the maps and, last, `metrics.json` into a run; return what the latter holds.

    Keys: data, the metrics, and of the training its seconds, its steps and the size of the networks.
    """
    found.save(resolve(run_folder))
    card = {name: detector.card.get(name) for name in ("data", "seconds", "steps", "size")}
    result = {"data": card.pop("data"), **found.metrics(), **card}
    Run(run_folder).finish(result)
    return result


def brightness_scores(samples: Sequence[Sample], normal: Sequence[Sample], size: Size = (64, 64)) -> np.ndarray:
    """Score images by brightness alone, float [N]: how many deviations their mean grey is off that of `normal` images.

    A detector that learns nothing, to compare with: where it does well, the light gives the defects away.
    """
    brightness, usual = (
        load_images([sample.image for sample in some], size, description="measuring brightness")
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
    images = load_images([sample.image for sample in samples], detector.image_size)
    scores = []
    with torch.inference_mode():
        for batch in tqdm(images.split(batch_size), desc="teacher alone", leave=False):
            features = detector.teacher_features(detector.normalise(to_float(batch.to(detector.device))))
            scores.append(features.square().mean(dim=1).amax(dim=(1, 2)).cpu())
    return torch.cat(scores).numpy()


def worst_mistakes(
    scores: np.ndarray, labels: np.ndarray, threshold: float, count: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the worst misses and of the worst false alarms at a threshold, the worst first.

    Misses are defective images that do not score above `threshold`, false alarms good ones that do; at most
    `count` of each.
    """
    order = np.argsort(scores, kind="stable")
    scores, labels = np.asarray(scores)[order], np.asarray(labels)[order]
    misses = order[(labels == 1) & (scores <= threshold)]
    false_alarms = order[(labels == 0) & (scores > threshold)][::-1]
    return misses[:count], false_alarms[:count]


def load_maps(folder: str | Path, index: int) -> AnomalyMaps:
    """Return the maps that `Evaluation.save` wrote for row `index` of `scores.csv`, each float32 [H, W]."""
    with np.load(_map_file(Path(folder), index), allow_pickle=False) as stored:
        return AnomalyMaps(**{name: stored[name].astype(np.float32) for name in MAP_NAMES})


class _OnRequest(Sequence):
    """Arrays that are computed when asked for, so that only one is in memory."""

    def __init__(self, compute: Callable[[int], np.ndarray], indices: Sequence[int]) -> None:
        self._compute, self._indices = compute, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> np.ndarray:
        return self._compute(int(self._indices[position]))


def _read(samples: Sequence[Sample], size: Size) -> tuple[torch.Tensor, list[Sample], list[Size], list[str]]:
    """Read images at the detector's size and check the masks, all of it before the long work starts."""

    def read(sample: Sample) -> tuple[np.ndarray, Size] | ImageError:
        try:
            original = read_image(sample.image).shape[1:]
            image = read_image(sample.image, size)
        except ImageError as error:
            return error
        if sample.mask is not None:
            read_mask(sample.mask, original)
        return image, original

    images = torch.empty((len(samples), 3, *size), dtype=torch.uint8)
    kept, sizes, skipped = [], [], []
    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(read, samples), total=len(samples), desc="reading images", leave=False)
        for sample, result in zip(samples, progress, strict=True):
            if isinstance(result, ImageError):
                skipped.append(str(result))
                continue
            images[len(kept)] = torch.from_numpy(result[0])
            kept.append(sample)
            sizes.append(result[1])
    if not kept:
        reason = f"none of {len(samples)} can be read; the first one: {skipped[0]}" if skipped else "no samples given"
        raise ValueError(f"nothing to evaluate: {reason}")
    if skipped:
        warnings.warn(f"{len(skipped)} images skipped: " + " | ".join(skipped), stacklevel=3)
    return images[: len(kept)], kept, sizes, skipped


def _check_finite(maps: AnomalyMaps, scores: np.ndarray, samples: Sequence[Sample], batch: slice) -> None:
    for index in range(*batch.indices(len(samples))):
        for name in MAP_NAMES:
            if not np.isfinite(getattr(maps, name)[index]).all():
                raise ValueError(
                    f"{samples[index].image}: its {name} map holds NaN or infinite values. The detector is "
                    f"broken: its training diverged or it was never calibrated."
                )
        if not np.isfinite(scores[index]):
            raise ValueError(f"{samples[index].image}: its score is {scores[index]}. The detector is broken.")


def _map_file(folder: Path, index: int) -> Path:
    return folder / "maps" / f"{index:05d}.npz"


def _shown(path: Path) -> str:
    path = Path(path).resolve()
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()
