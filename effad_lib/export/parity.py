"""An exported detector beside the one in torch: how far maps and scores are apart, and whether decisions flip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from effad_lib.detection import decision, inspect_one, resize_map
from effad_lib.engines import OUTPUTS, Inspection, Inspector
from effad_lib.metrics import image_auroc
from effad_lib.progress import progress
from effad_lib.synthesis import damage, photograph_defects

QUANTILE = 0.1
"""What five in a thousand pixels of normal images exceed: differences of smaller values count as shares of it."""


class Tolerance(NamedTuple):
    """What an export may differ by.

    `maps`, `score`: any value of a map and a score, as shares. `near`: two scores, or a score and its threshold, closer
    than this share are not told apart, so that their order does not count: it may be rounding's. `auroc`: the AU-ROC,
    by the pairs told apart. `flips`: the share of the images whose decision may flip although score and threshold are.
    """

    maps: float
    score: float
    near: float
    auroc: float
    flips: float


TOLERANCES = {
    "float32": Tolerance(0.001, 0.001, 0.001, 0, 0),
    "float16": Tolerance(0.02, 0.02, 0.02, 0, 0),
    "int8": Tolerance(0.5, 0.25, 0.02, 0.03, 0.1),
}
"""By precision. In INT8 most scores of briefly trained detectors moved by 1 %, a few by up to 25 %."""

RESIZED = Tolerance(0.15, 0.03, 0.03, 0, 0)
"""At least this where images are resized inside: Pillow rounds some colour values otherwise, see `resize`."""


@dataclass(frozen=True)
class Parity:
    """How far an export is from its model on the same images.

    `differences`: for each output the largest one, and the largest as a share of the value, or of the threshold where
    the value is less (at least of 0.1). `auroc`: that of the scores of good images against those with a synthetic
    defect, of the model and of the export; `auroc_change`: how much it changes by pairs told apart, see `Tolerance`.
    `thresholds`: those of the model and of the export, by which each decides. `flipped`: for each decision that
    differs, how far the model's score was from its threshold, as a share of it. `plain_int8`: what is above the
    tolerance with the teacher's second convolution in eight bits too, if it was left in float32 therefore; else "".
    """

    good: int
    defective: int
    differences: dict[str, tuple[float, float]]
    auroc: tuple[float, float]
    auroc_change: float
    thresholds: tuple[float, float]
    flipped: tuple[float, ...]
    tolerance: Tolerance
    plain_int8: str = ""

    @property
    def flipped_apart(self) -> int:
        """How many decisions flip although score and threshold are told apart."""
        return sum(not far <= self.tolerance.near for far in self.flipped)

    @property
    def most_flips(self) -> int:
        """How many of them may."""
        return int(self.tolerance.flips * (self.good + self.defective))

    @property
    def auroc_limit(self) -> float | None:
        """What the AU-ROC may change by; None if a single pair were more, so that the images are too few to judge."""
        limit = self.tolerance.auroc
        return limit if limit * self.good * self.defective >= 1 or limit == 0 else None

    @property
    def faults(self) -> list[str]:
        """What is above the tolerance, in words; empty if nothing is."""
        found = [
            f"{_label(name)} differs by {relative:.2%} (tolerance {self._limit(name):.1%})"
            for name, (_, relative) in self.differences.items()
            if not relative <= self._limit(name)
        ]
        apart = f"more than {self.tolerance.near:.1%} apart"
        if self.auroc_limit is not None and abs(self.auroc_change) > self.auroc_limit:
            found.append(
                f"AU-ROC changes by {self.auroc_change:+.4f} by scores {apart} (tolerance {self.auroc_limit:g})"
            )
        if self.flipped_apart > self.most_flips:
            flips = f"{self.flipped_apart} of {self.good + self.defective} decisions flip"
            found.append(f"{flips} with score and threshold {apart} (tolerance {self.most_flips})")
        return found

    def _limit(self, name: str) -> float:
        return self.tolerance.score if name == "score" else self.tolerance.maps

    def as_card(self) -> dict[str, Any]:
        """Return the figures as plain values for the card of the export; None for what is not finite or not judged."""
        return {
            "good_images": self.good,
            "synthetic_defects": self.defective,
            "largest_difference": {name: _finite(absolute) for name, (absolute, _) in self.differences.items()},
            "largest_share": {name: _finite(relative) for name, (_, relative) in self.differences.items()},
            "auroc": {"model": self.auroc[0], "export": self.auroc[1], "change": self.auroc_change},
            "thresholds": {"model": self.thresholds[0], "export": self.thresholds[1]},
            "flipped_decisions": len(self.flipped),
            "flipped_apart": self.flipped_apart,
            "plain_int8": self.plain_int8,
            "tolerance": self.tolerance._asdict() | {"auroc": self.auroc_limit, "flips": self.most_flips},
        }

    def as_text(self) -> str:
        """Return the figures as a small table."""
        lines = [f"{'largest difference':<24}{'absolute':>10}{'share':>10}{'tolerance':>11}"]
        for name, (absolute, relative) in self.differences.items():
            lines.append(f"{_label(name):<24}{absolute:>10.2g}{relative:>10.2%}{self._limit(name):>11.1%}")
        limit = "not judged" if self.auroc_limit is None else f"{self.auroc_limit:g}"
        pairs, near = self.good * self.defective, f"{self.tolerance.near:.1%}"
        lines += [
            f"\n{'':<24}{'model':>10}{'export':>10}{'change':>10}{'tolerance':>11}",
            f"{'threshold':<24}{self.thresholds[0]:>10.4g}{self.thresholds[1]:>10.4g}",
            f"{'AU-ROC':<24}{self.auroc[0]:>10.4f}{self.auroc[1]:>10.4f}{self.auroc_change:>+10.4f}{limit:>11}",
            f"{'decisions that flip':<24}{'':>20}{self.flipped_apart:>10}{self.most_flips:>11}",
            f"change: of scores and thresholds more than {near} apart; flips in all: {len(self.flipped)}",
            f"on {self.good} good images and {self.defective} with a synthetic defect",
        ]
        if self.auroc_limit is None:
            most = self.tolerance.auroc
            lines.append(f"too few to judge the AU-ROC: one of {pairs} pairs is {1 / pairs:.2g}, more than {most:g}")
        if self.plain_int8:
            lines.append(f"the teacher's second convolution is left in float32; else: {self.plain_int8}")
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _label(name: str) -> str:
    return "score" if name == "score" else f"{name.replace('_', '–')} map"


def compare(
    model: Inspector,
    export: Inspector,
    good: Sequence[np.ndarray],
    defective: Sequence[np.ndarray],
    tolerance: Tolerance,
) -> Parity:
    """Compare an export with its model on images uint8 [3, H, W] of any size, treated as `effad detect` does."""
    least = max(model.threshold, QUANTILE)
    differences = {name: (0.0, 0.0) for name in OUTPUTS}
    scores: list[tuple[float, float]] = []
    flipped = []
    for image in progress([*good, *defective], desc="comparing", unit="image", leave=False):
        ours, theirs = (_at_size(inspect_one(one, image), image.shape[1:]) for one in (model, export))
        for name, (absolute, relative) in differences.items():
            value, other = getattr(ours, name).astype(float), getattr(theirs, name).astype(float)
            off = np.abs(value - other)
            # A value that is not a number is never below a tolerance.
            share = np.max(off / np.maximum(np.abs(value), least))
            differences[name] = float(np.fmax(absolute, off.max())), max(relative, share if share >= 0 else np.inf)
        scores.append((float(ours.score[0]), float(theirs.score[0])))
        if decision(model, scores[-1][0]) != decision(export, scores[-1][1]):
            flipped.append(abs(scores[-1][0] - model.threshold) / least)
    of_model, of_export = np.nan_to_num(np.array(scores), nan=np.inf).T
    labels = np.repeat([0, 1], [len(good), len(defective)])
    return Parity(
        len(good),
        len(defective),
        differences,
        (image_auroc(of_model, labels), image_auroc(of_export, labels)),
        _auroc_change(of_model, of_export, labels, tolerance.near, least),
        (model.threshold, export.threshold),
        tuple(flipped),
        tolerance,
    )


def _auroc_change(of_model: np.ndarray, of_export: np.ndarray, labels: np.ndarray, near: float, least: float) -> float:
    """Return how much the AU-ROC changes if pairs that are near in the model's scores [N] count as ties in both.

    A copy whose defect is not the hottest place scores as its good image does, up to rounding, which orders the two.
    """
    before, after = (np.meshgrid(scores[labels == 1], scores[labels == 0]) for scores in (of_model, of_export))
    apart = abs(before[0] - before[1]) > near * np.maximum(least, np.maximum(*np.abs(before)))
    order = [(bad > good).astype(int) - (bad < good) for bad, good in (before, after)]
    return float(np.mean((order[1] - order[0]) * apart) / 2)


def _at_size(found: Inspection, size: tuple[int, int]) -> Inspection:
    *maps, score = found
    return Inspection(*(resize_map(values[0], size) for values in maps), score)


def tolerance_of(precision: str, resized: bool) -> Tolerance:
    """Return what an export of this precision may differ by; a little more if it resizes images itself."""
    given = TOLERANCES[precision]
    return Tolerance(*map(max, given, RESIZED)) if resized else given


def with_defects(images: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Return a copy of each good image uint8 [3, H, W] with a synthetic defect on it, of all kinds in turn."""
    damaged = []
    for index, image in enumerate(images):
        picture = np.ascontiguousarray(image.transpose(1, 2, 0))
        kinds = photograph_defects(picture)
        drawn = damage(picture, kinds[index % len(kinds)], seed=seed + index)
        damaged.append(drawn.image.transpose(2, 0, 1))
    return damaged
