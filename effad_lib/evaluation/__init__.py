"""A detector on a test split: scores and maps of every image, metrics, tables, the worst mistakes."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effad_lib.consent import check_named
from effad_lib.datasets import Split, load_dataset, verify_masks
from effad_lib.datasets.synthetic import check_rendered
from effad_lib.detector import EfficientAD
from effad_lib.evaluation.baselines import blind_scores, brightness_scores, unnormalised_scores
from effad_lib.evaluation.latency import latency
from effad_lib.evaluation.result import (
    MAP_NAMES,
    Evaluation,
    EvaluationError,
    load_maps,
    tiff_files,
    worst_mistakes,
)
from effad_lib.evaluation.scoring import evaluate
from effad_lib.execution import alone_in
from effad_lib.metrics import image_auroc
from effad_lib.runs import Run, RunError, check_writable, remove_forsaken, unwritable
from effad_lib.settings import Settings, SettingsError, pick_device
from effad_lib.tiling import check_threshold

__all__ = [
    "MAP_NAMES",
    "Evaluation",
    "EvaluationError",
    "EvaluationSettings",
    "blind_scores",
    "brightness_scores",
    "data_of",
    "data_to_test",
    "evaluate",
    "evaluate_run",
    "finish_run",
    "latency",
    "load_maps",
    "tiff_files",
    "told_data",
    "unnormalised_scores",
    "worst_mistakes",
]


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
class _Data(Settings):
    """What `parameters.yaml` of a training says of its data."""

    dataset: str = ""
    data_root: str = ""
    category: str = ""
    seed: int = 0
    validation_share: float = 0.0


def told_data(run: Run) -> dict[str, Any]:
    """Return what `parameters.yaml` of a training says of its data: dataset, data_root, category, seed and the share.

    Raises `DocumentError`, `RunError` or `SettingsError` for a file that is broken or is not that of a training.
    """
    path, made = run.folder / "parameters.yaml", run.parameters
    names = _Data().as_dict()
    if missing := [name for name in names if name not in made]:
        raise RunError(f"{path} has no {missing[0]}: it is not that of a training. Restore it or train anew.")
    try:
        return _Data(**{name: made[name] for name in names}).as_dict()
    except SettingsError as error:
        raise SettingsError(f"{path}: {error} Restore it or train anew.") from error


def data_of(run: Run) -> Split:
    """Find the data set of a finished training again, by the run's `parameters.yaml`; `RunError` if there is none.

    Raises as `told_data`, and `ConsentError` for a data set that is code which the user has not named: a run may come
    from anybody. So no product is rendered either, see `check_rendered`.
    """
    if not (run.folder / "parameters.yaml").is_file() or not run.model.is_file():
        raise RunError(f"{run.folder} is not the folder of a finished training. Train one with `effad train`.")
    told = told_data(run)
    check_named(told["dataset"])
    if told["dataset"] == "synthetic":
        check_rendered(told["data_root"], told["category"])
    return load_dataset(told.pop("dataset"), root=told.pop("data_root"), **told)


def data_to_test(run_folder: str | Path) -> Split:
    """Find the data set of a finished training again; `RunError` if there is none, or if it has no test images."""
    split = data_of(Run(run_folder))
    if not split.test:
        raise RunError(f"{split.name} has no test images. Add test/good and test/<defect>, or use `effad detect`.")
    return split


def evaluate_run(
    run_folder: str | Path, device: str = "auto", split: Split | None = None
) -> tuple[EfficientAD, Split, Evaluation]:
    """Evaluate the model of a finished training on the test images of its own data set.

    `split` is what `data_to_test` has found already; None finds it. Nothing is written, see `finish_run`. Raises
    `RunError` as `data_to_test` and where the results could not be written, and `DatasetError` for masks that a
    training would refuse, before the first image is scored. A warning says that the threshold was chosen on images in
    tiles, as here they are whole.
    """
    split = split or data_to_test(run_folder)
    for name in ("scores.csv", "metrics.json", "maps/00000.npz"):
        check_writable(Run(run_folder).folder / name)
    verify_masks(split)
    detector = EfficientAD.load(Run(run_folder).model, pick_device(device))
    check_threshold(detector, None)
    return detector, split, evaluate(detector, split.test, saturation=split.saturation)


def finish_run(run_folder: str | Path, detector: EfficientAD, found: Evaluation) -> dict[str, Any]:
    """Write `scores.csv`, the maps and, last, `metrics.json` into a run; return what the latter holds.

    An earlier evaluation stays until the new one lies whole beside it, so also on a full disk. Then its `metrics.json`
    goes first: killed in between, the run is not done, and nobody takes two evaluations for one. Raises `LockError`
    while another process trains or measures in the folder, and `RunError` for a file that cannot be written.

    Keys: data, the metrics, the image AU-ROC without map quantiles (`image_auroc_unnormalised`, the paper's first
    ablation), the latency, and of the training its seconds, its steps and the size of the networks.
    """
    run = Run(run_folder)
    with alone_in(run.folder):
        card = {name: detector.card.get(name) for name in ("seconds", "steps", "size")}
        plain = {"image_auroc_unnormalised": image_auroc(unnormalised_scores(detector, found), found.labels)}
        result = {"data": detector.card.get("data", "unknown"), **found.metrics(), **plain, **latency(detector), **card}
        remove_forsaken(run.folder, "evaluation")
        try:
            with tempfile.TemporaryDirectory(".partial", ".evaluation.", run.folder) as new:
                found.save(new)
                Run(new).finish(result)
                _put_in_place(Path(new), run.folder)
        except OSError as error:
            raise unwritable(run.folder / "metrics.json", error) from error
    return result


def _put_in_place(new: Path, folder: Path) -> None:
    """Move the files of an evaluation from the folder `new` into that of a run, in the place of an earlier one."""
    (folder / "maps").mkdir(exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    for old in (folder / "maps").glob("*.npz"):
        if re.fullmatch(r"\d{5,}", old.stem):  # others are not of an evaluation
            old.unlink()
    for path in (*(new / "maps").iterdir(), new / "scores.csv", new / "metrics.json"):
        path.replace(folder / path.relative_to(new))
