"""What an evaluation found: metrics, tables, files, the worst mistakes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from effad_lib import metrics
from effad_lib.datasets import Sample
from effad_lib.detector import AnomalyMaps
from effad_lib.images import Size, read_mask
from effad_lib.runs import PROJECT, write_bytes, write_text

MAP_NAMES = ("combined", "student_teacher", "student_autoencoder")


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


def _map_file(folder: Path, index: int) -> Path:
    return folder / "maps" / f"{index:05d}.npz"


def _shown(path: Path) -> str:
    path = Path(path).resolve()
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()
