"""What an evaluation found: metrics, tables, files, the worst mistakes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from zipfile import ZIP_STORED

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional

from effad_lib import metrics
from effad_lib.datasets import DatasetError, Sample, Saturation
from effad_lib.detector import AnomalyMaps
from effad_lib.documents import open_plain
from effad_lib.images import Levels, Size, read_mask, read_regions
from effad_lib.runs import from_project, write_bytes, write_csv

MAP_NAMES = ("combined", "student_teacher", "student_autoencoder")

KINDS = ("logical_anomalies", "structural_anomalies")
"""The two kinds of defects in MVTec LOCO, over which the paper takes its means."""


class EvaluationError(ValueError):
    """A detector or images that cannot be evaluated; the message names the image and the reason."""


@dataclass(frozen=True)
class Evaluation:
    """What a detector found on N images, and how that compares with the truth.

    `scores` float [N], unclamped; `labels` int [N], 0 good, 1 defective; `maps` holds three float32 arrays
    [N, H, W] at the detector's input size; `sizes` the (height, width) of the images as they are on disk;
    `threshold` and `pixel_threshold` are the detector's, None before calibration: an image counts as defective if its
    score, a pixel if its value in the combined map is above it. `skipped` says which images could not be read, and why;
    no other field has them. `saturation` is that of the `Split`, `levels` those of the detector.
    """

    samples: tuple[Sample, ...]
    scores: np.ndarray
    labels: np.ndarray
    maps: AnomalyMaps
    sizes: tuple[Size, ...]
    threshold: float | None = None
    pixel_threshold: float | None = None
    skipped: tuple[str, ...] = ()
    saturation: Mapping[int, Saturation] = field(default_factory=dict)
    levels: Levels | None = None

    def mask(self, index: int) -> np.ndarray | None:
        """Return the truth as bool [H, W] at the original size; None for a defective image without a mask."""
        sample = self.samples[index]
        if sample.mask is not None:
            return read_mask(sample.mask, self.sizes[index], sample.mask_level)
        return None if sample.label else np.zeros(self.sizes[index], dtype=bool)

    def heat(self, index: int) -> np.ndarray:
        """Return the combined map of an image as float32 [H, W], resized bilinearly to the original size."""
        heat = torch.from_numpy(np.asarray(self.maps.combined[index]))
        if tuple(heat.shape) != tuple(self.sizes[index]):
            heat = functional.interpolate(heat[None, None], self.sizes[index], mode="bilinear")[0, 0]
        return heat.numpy()

    def metrics(self) -> dict[str, float | None]:
        """Return what the field reports: of images and of pixels AU-ROC, AP and F1-max; AU-PRO up to 0.3 and 0.05.

        With `saturation` (MVTec LOCO) also AU-sPRO up to 0.05, it and the image AU-ROC of each kind of defect, and
        their means over the two, which the paper reports; as in MVTec's evaluation code a kind is judged on the good
        images and its own. The pixel metrics are computed at the original image sizes, one map at a time. A metric that
        cannot be computed is None, and `notes` says why.
        """
        found = self.sweep if self._all_known else None
        result = {
            "image_auroc": metrics.image_auroc(self.scores, self.labels),
            "image_ap": metrics.image_ap(self.scores, self.labels),
            "image_f1_max": metrics.image_f1_max(self.scores, self.labels)[0],
            "pixel_auroc": found and found.auroc,
            "pixel_ap": found and found.ap,
            "pixel_f1_max": found and found.f1_max[0],
            "au_pro": found and found.au_pro(0.3),
            "au_pro_05": found and found.au_pro(0.05),
        }
        return result | self._by_kind() if self.saturation else result

    def _by_kind(self) -> dict[str, float | None]:
        """The metrics of MVTec LOCO: all defects together, each kind against the good images, the mean of the two."""
        table = self.by_defect()
        result = {"au_spro_05": self.sweep.au_pro(0.05, saturated=True) if self._all_known and self.sweep else None}
        for metric in ("image_auroc", "au_spro_05"):
            each = {kind: None if np.isnan(value) else float(value) for kind, value in table[metric].items()}
            both = [each.get(kind) for kind in KINDS]
            result |= {f"{metric}_{kind.removesuffix('_anomalies')}": value for kind, value in each.items()}
            result[f"{metric}_mean"] = None if None in both else float(np.mean(both))
        return result

    @property
    def notes(self) -> list[str]:
        """What is missing from the metrics and why, in sentences; empty when nothing is."""
        notes = [f"{len(self.skipped)} unreadable images were skipped."] if self.skipped else []
        for label, kind in enumerate(("good", "defective")):
            if label not in self.labels:
                notes.append(f"No {kind} image among {len(self.labels)}: no image AU-ROC, AP and F1-max.")
        if self._all_known and self.sweep is None:
            marked = any(self.mask(index).any() for index in range(len(self.samples)))
            notes.append(f"No {'normal' if marked else 'defective'} pixel: no pixel AU-ROC, AP, F1-max and AU-PRO.")
        unknown = sum(sample.label == 1 and sample.mask is None for sample in self.samples)
        if unknown:
            notes.append(f"{unknown} defective images have no mask: no pixel AU-ROC, AP, F1-max and AU-PRO.")
        if self.saturation and (missing := [kind for kind in KINDS if kind not in self._defects]):
            notes.append(f"No {' and no '.join(missing)} among the images: no means over the two kinds.")
        return notes

    def by_defect(self) -> pd.DataFrame:
        """Return a row for each type of defect, each judged against all good images as if there were no other defects.

        Columns: images (count), image_auroc, au_pro, au_spro_05 if there is `saturation`, mean_score, misses (images
        not above the detector's threshold); a value that cannot be computed is missing. The normal pixels are those of
        the good images and of the defect's own: what the maps of other defects show is no false alarm here.
        """
        rows = {}
        for group, defect in enumerate(self._defects, start=1):
            bad = self._groups == group
            chosen, scores = bad | (self.labels == 0), self.scores[bad]
            rows[defect] = {
                "images": bad.sum(),
                "image_auroc": metrics.image_auroc(self.scores[chosen], self.labels[chosen]),
                "au_pro": self._au_pro(group, 0.3),
                "au_spro_05": self._au_pro(group, 0.05, saturated=True) if self.saturation else None,
                "mean_score": scores.mean(),
                "misses": None if self.threshold is None else int((scores <= self.threshold).sum()),
            }
        columns = {
            "images": int,
            "image_auroc": float,
            "au_pro": float,
            "au_spro_05": float,
            "mean_score": float,
            "misses": "Int64",
        }
        if not self.saturation:
            del columns["au_spro_05"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).astype(columns)
        return table.rename_axis("defect")

    def _au_pro(self, group: int, limit: float, saturated: bool = False) -> float | None:
        """AU-PRO of the good images and those of one type of defect; None if one of them has no mask."""
        if self.sweep is None or not self._known[self._groups == group].all():
            return None
        return self.sweep.au_pro(limit, [0, group], saturated=saturated)

    @property
    def _defects(self) -> list[str]:
        """The types of defects in the order of their names; in `_groups` they count from 1."""
        return sorted({sample.defect for sample in self.samples if sample.label})

    @property
    def _groups(self) -> np.ndarray:
        """For each image 0 if it is good, else the number of its type of defect, int [N]."""
        numbers = {defect: number for number, defect in enumerate(self._defects, start=1)}
        return np.array([numbers[sample.defect] if sample.label else 0 for sample in self.samples])

    def decisions(self) -> pd.DataFrame:
        """Return what each threshold does to the test set: a row for each, the deployed ones first.

        Rows: "image" and "pixel", the detector's own, from held-out normal images; then "image, F1-max" and "pixel,
        F1-max", which were chosen with the truth of the test set in hand and tell how well a threshold could do, not
        how well one does. Columns: threshold, false_alarms (share of good images or normal pixels above it), found
        (share of defective ones), f1; missing where a threshold or the truth is.
        """
        rows = {"image": self._decided(self.threshold), "pixel": self._marked(self.pixel_threshold)}
        best = metrics.image_f1_max(self.scores, self.labels)[1]
        rows["image, F1-max"] = self._decided(None if best is None else np.nextafter(best, -np.inf))
        found = self.sweep if self._all_known else None
        rows["pixel, F1-max"] = self._marked(found and np.nextafter(np.float32(found.f1_max[1]), np.float32(-np.inf)))
        columns = ["threshold", "false_alarms", "found", "f1"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)

    def confusion(self) -> pd.DataFrame:
        """Return how many test images of each truth (rows) got which decision (columns); empty without a threshold."""
        if self.threshold is None:
            return pd.DataFrame()
        counts = np.bincount(2 * self.labels + (self.scores > self.threshold), minlength=4).reshape(2, 2)
        return pd.DataFrame(counts, ["good", "defective"], ["called good", "called defective"]).rename_axis("truth")

    def _decided(self, threshold: float | None) -> list[float | None]:
        above = None if threshold is None else self.scores > threshold
        counts = [0] * 4 if above is None else np.bincount(2 * self.labels + above, minlength=4)
        return [threshold, *_shares(*counts)]

    def _marked(self, threshold: float | None) -> list[float | None]:
        counts = np.zeros(4, dtype=np.int64)
        if threshold is not None and self._all_known:
            for index in range(len(self.samples)):
                counts += np.bincount((2 * self.mask(index) + (self.heat(index) > threshold)).ravel(), minlength=4)
        return [threshold, *_shares(*counts)]

    def branch_scores(self, name: str) -> np.ndarray:
        """Return the largest value of each image's map `name`, float [N]: what it would score by this map alone."""
        return np.asarray(getattr(self.maps, name)).max(axis=(1, 2))

    def by_branch(self) -> pd.DataFrame:
        """Return the image AU-ROC of each map alone, its maximum taken as score: a row for each type of defect.

        The last row, "all", takes all defective images together. Columns as in `MAP_NAMES`.
        """
        scores = {name: self.branch_scores(name) for name in MAP_NAMES}
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

    def pro_curve(self) -> metrics.Curve | None:
        """Return the curve under which AU-PRO is the area; None if it cannot be computed."""
        return self.sweep.pro_curve() if self._all_known and self.sweep else None

    @cached_property
    def sweep(self) -> metrics.FoundShares | None:
        """The pixel metrics of the images whose truth is known; None if there is no defective or no normal pixel."""
        known = np.flatnonzero(self._known)
        regions = _OnRequest(self._regions, known) if self.saturation else None
        return metrics.sweep(_OnRequest(self.heat, known), _OnRequest(self.mask, known), regions, self._groups[known])

    @property
    def _known(self) -> np.ndarray:
        """Whether the pixels of each image are known to be normal or defective, bool [N]."""
        return np.array([sample.label == 0 or sample.mask is not None for sample in self.samples])

    @property
    def _all_known(self) -> bool:
        return bool(self._known.all())

    def _regions(self, index: int) -> list[metrics.Region]:
        """The annotated regions of an image, each mask of it one, saturated as its pixel value says."""
        sample = self.samples[index]
        if sample.mask is None:
            return []
        regions = []
        for values in read_regions(sample.mask, self.sizes[index]):
            mask, value = values >= sample.mask_level, int(values.max())
            if value not in self.saturation:
                known = ", ".join(map(str, sorted(self.saturation)))
                raise DatasetError(
                    f"{sample.mask}: pixel value {value} has no saturation threshold, only {known} have."
                )
            regions.append(metrics.Region(mask, self.saturation[value].pixels(int(mask.sum()))))
        return regions

    def save(self, folder: str | Path) -> None:
        """Write `scores.csv` and, for row k of it, `maps/<k>.npz`; `load_maps` reads the latter.

        A map file holds the three maps as float16 and no pickled object.
        """
        folder = Path(folder)
        for index in range(len(self.samples)):
            write_bytes(_map_file(folder, index), self._packed_maps(index))
        write_csv(folder / "scores.csv", self.table())

    def table(self) -> pd.DataFrame:
        """Return a row for each image, as `save` writes it.

        Columns: file (relative to the project if inside), label, defect, score, decision (1 defective,
        0 good, missing without a threshold), and the largest values of the two branches' maps.
        """
        table = pd.DataFrame(
            {
                "file": [from_project(sample.image) for sample in self.samples],
                "label": self.labels,
                "defect": [sample.defect for sample in self.samples],
                "score": self.scores,
            }
        )
        decided = pd.NA if self.threshold is None else (self.scores > self.threshold).astype(int)
        table = table.assign(decision=pd.array(np.broadcast_to(decided, len(table)), dtype="Int64"))
        return table.assign(**{name: self.branch_scores(name) for name in MAP_NAMES[1:]})

    def _packed_maps(self, index: int) -> bytes:
        limit = np.finfo(np.float16).max
        packed = io.BytesIO()
        halves = {n: np.clip(getattr(self.maps, n)[index], -limit, limit).astype(np.float16) for n in MAP_NAMES}
        np.savez(packed, **halves)
        return packed.getvalue()

    def save_tiffs(self, folder: str | Path) -> None:
        """Write each combined map as float32 TIFF at its image's size, where the evaluation code of MVTec expects it.

        That is `<folder>/test/<defect>/<image>.tiff`, see `tiff_files`. Of MVTec AD 2 only the part `test_public` is
        evaluated and written; MVTec's server wants the maps of `test_private` and `test_private_mixed` too.
        """
        for index, file in enumerate(tiff_files(self.samples, folder)):
            packed = io.BytesIO()
            Image.fromarray(self.heat(index)).save(packed, format="TIFF")
            write_bytes(file, packed.getvalue())


def tiff_files(samples: Sequence[Sample], folder: str | Path) -> list[Path]:
    """Return where `Evaluation.save_tiffs` writes the map of each image, below a folder for its category.

    The path from the folder `test` (or `test_public`) that holds the image's folder <defect> on; for an image that lies
    in no such folders `test/<defect>/<image>.tiff`. Raises `EvaluationError` if two images would have the same file,
    or if maps would lie among the images, or in their place.
    """
    places = [_place(sample) for sample in samples]
    for place, count in Counter(places).items():
        if count > 1:
            raise EvaluationError(f"{count} images would have their map in {place}: rename one of them.")
    for top in {(Path(folder) / place.parts[0]).resolve() for place in places}:
        if any(sample.image.resolve().is_relative_to(top) for sample in samples):
            raise EvaluationError(f"{top} holds the images themselves, and maps would lie there. Name another folder.")
    return [Path(folder) / place for place in places]


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
    """Return the maps that `Evaluation.save` wrote for row `index` of `scores.csv`, each float32 [H, W].

    Raises `EvaluationError` for maps that are not finite [H, W], and for an archive that is compressed, as ours are
    not: a small one could fill the memory.
    """
    path = _map_file(Path(folder), index)
    with open_plain(path) as file, np.load(file, allow_pickle=False) as stored:
        if any(entry.compress_type != ZIP_STORED for entry in stored.zip.infolist()):
            raise EvaluationError(f"{path} is compressed, which this program does not do.")
        maps = AnomalyMaps(**{name: stored[name].astype(np.float32) for name in MAP_NAMES})
    if any(values.ndim != 2 or not values.size or not np.isfinite(values).all() for values in maps):
        raise EvaluationError(f"{path} holds what is no map.")
    return maps


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


def _shares(normal: int, false_alarms: int, missed: int, found: int) -> list[float | None]:
    """False alarms among the normal, found among the defective, F1 where there are both; None for a share of none."""
    good, bad = normal + false_alarms, missed + found
    f1 = 2 * found / (2 * found + false_alarms + missed) if good and bad else None
    return [false_alarms / good if good else None, found / bad if bad else None, f1]


def _place(sample: Sample) -> PurePosixPath:
    """The path of an image's map below the folder of its category."""
    # A folder above the data set, or the defect itself, may be called test too.
    parts, tests = sample.image.parts, [(name, sample.defect) for name in ("test", "test_public")]
    starts = [index for index, two in enumerate(pairwise(parts[:-1])) if two in tests]
    below = parts[starts[-1] :] if starts else ("test", sample.defect, sample.image.name)
    return PurePosixPath(*below).with_suffix(".tiff")
