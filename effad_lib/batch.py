"""The notebooks of a profile, through papermill into run folders, and the table of what came out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from effad_lib.datasets import load_dataset
from effad_lib.distillation import DistillationSettings, load_teacher
from effad_lib.evaluation import evaluate_run, finish_run
from effad_lib.execution import execute, import_papermill
from effad_lib.execution.process import delete_runs
from effad_lib.images import packaged_photographs
from effad_lib.profiles import NOTEBOOKS, Step, load_profile, notebook_parameters
from effad_lib.runs import Run, RunError, from_project, printable
from effad_lib.training import TrainingSettings, train

__all__ = [
    "NOTEBOOKS",
    "as_text",
    "departures",
    "load_profile",
    "make_default_run",
    "notebook_parameters",
    "results",
    "run_profile",
]

COLUMNS = {
    "data": "data",
    "image_auroc": "image AU-ROC",
    "image_ap": "AP",
    "image_f1_max": "F1-max",
    "pixel_auroc": "pixel AU-ROC",
    "au_pro": "AU-PRO",
    "seconds": "seconds",
    "run_folder": "run folder",
}

OURS = frozenset(
    "run_folder dataset category data_root device seed cache_gb validate_every checkpoint_every ablation_steps "
    "teacher penalty_images false_alarm_rate confidence levels compiled".split()
)
"""Settings of a training on which the paper has nothing to say, or that `departures` words itself."""

TEACHERS_OWN = frozenset(
    "run_folder size images backbone_weights held_out seed device checkpoint_seconds fit_views ridge".split()
)
"""Settings of a distillation on which the paper has nothing to say."""


def run_profile(
    profile: str, *, runs: str | Path = "runs", force: bool = False, notebooks: str | Path = NOTEBOOKS
) -> pd.DataFrame:
    """Execute the notebooks of a profile into `<runs>/<profile>/<run>/` and return the table of results.

    All steps are checked before the first one runs; its departures from the paper are printed. A step that is done is
    skipped, unless its notebook, parameters or teacher changed or an earlier step of the same run was done anew;
    `force` deletes the profile's run folders first. Raises `ProfileError` or `SettingsError` for a faulty profile, and
    `RunError` if a folder holds a training of other settings, which is not deleted without `force`, or for a notebook
    that fails: the steps before it are kept.
    """
    steps = load_profile(profile, runs=runs, notebooks=notebooks)
    import_papermill()
    folders = list(dict.fromkeys(step.folder for step in steps))
    _print_departures(profile, steps)
    if force:
        delete_runs(folders)
    for step in steps:
        try:
            if not step.done:
                step.check()
        except RunError as error:
            raise RunError(f"{error} Or do all of this profile anew: effad run --profile {profile} --force") from error
    began, renewed = time.monotonic(), set()
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.source.stem} → {from_project(step.folder)}"
        if step.folder not in renewed and step.done:
            print(f"{title}: done before", flush=True)
            continue
        renewed.add(step.folder)
        started = time.monotonic()
        execute(step.task, title)
        print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)
    table = results(step.folder for step in steps if isinstance(step.settings, TrainingSettings))
    print(f"\n{profile}: {time.monotonic() - began:.0f} s in all", flush=True)
    if len(table):
        print(f"\n{as_text(table)}", flush=True)
    return table


def make_default_run(run_folder: str, device: str = "auto", *, evaluated: bool = False) -> None:
    """Train the run that the notebooks share, with the parameters of notebook 03, if it is asked for and not there yet.

    With `evaluated` it is also measured. Any other folder is left as it is: a slip of the pen starts no training.
    """
    run, shared = Run(run_folder), TrainingSettings().run_folder
    if run_folder != shared:
        return
    if not run.model.is_file():
        defaults = notebook_parameters(NOTEBOOKS / "03_training.ipynb")
        settings = TrainingSettings.from_mapping(defaults | {"run_folder": run_folder, "device": device})
        names = ("category", "seed", "validation_share")
        given = {name: getattr(settings, name) for name in names}
        train(settings, load_dataset(settings.dataset, root=settings.data_root, **given))
    if evaluated and not run.done:
        detector, _, found = evaluate_run(run_folder, device)
        finish_run(run_folder, detector, found)


# --- departures from the paper --------------------------------------------------------------------------------------


def departures(settings: TrainingSettings) -> dict[str, tuple[Any, Any]]:
    """Return where a training departs from the paper: for each name the paper's value and this one.

    The paper's values are the defaults of `TrainingSettings`. A teacher that was not made as in Algorithm 3, as its
    card says, and penalty images other than ImageNet are departures too. Raises `SettingsError` without a teacher.
    """
    paper, here = TrainingSettings().as_dict(), settings.as_dict()
    found = {name: (paper[name], here[name]) for name in paper if name not in OURS and here[name] != paper[name]}
    if settings.size == "M":  # the paper's other size
        del found["size"]
    card = load_teacher(settings.teacher or settings.size, padding=settings.padding)[1]
    if made := card.get("settings"):
        original = DistillationSettings().as_dict()
        changed = [f"{n} {made[n]}" for n in original if n in made and n not in TEACHERS_OWN and made[n] != original[n]]
        if (photographs := card.get("photographs", 0)) < 1_000_000:
            changed.append(f"{photographs} photographs")
    else:
        changed = ["a file without a card"]
    if changed:
        found["teacher"] = ("Algorithm 3 on ImageNet", ", ".join(changed))
    packaged = f"{len(packaged_photographs())} photographs inside installed packages, random crops"
    found["penalty_images"] = ("ImageNet", Path(settings.penalty_images).name or packaged)
    return found


def _print_departures(profile: str, steps: Iterable[Step]) -> None:
    for step in steps:
        if isinstance(step.settings, TrainingSettings):
            print(f"Departures of {profile}/{step.folder.name} from the paper:")
            for name, (paper, here) in departures(step.settings).items():
                print(f"  {name}: {here} (paper: {paper})")
    print(flush=True)


# --- results --------------------------------------------------------------------------------------------------------


def results(folders: Iterable[str | Path]) -> pd.DataFrame:
    """Return a row for each run folder that holds an evaluation, read from its `metrics.json`; unknown values are None.

    Columns: data, image_auroc, image_ap, image_f1_max, pixel_auroc, au_pro, seconds (of the training), run_folder.
    """
    rows = []
    for run in map(Run, folders):
        if run.done and "image_auroc" in (metrics := run.metrics):
            rows.append([metrics.get(name) for name in list(COLUMNS)[:-1]] + [from_project(run.folder)])
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def as_text(table: pd.DataFrame) -> str:
    """Return a table of results for a terminal: three decimals, whole seconds, "–" for what cannot be measured."""

    def shown(name: str, value: Any) -> str:
        if value is None or value != value:
            return "–"
        return f"{value:.0f}" if name == "seconds" else f"{value:.3f}" if isinstance(value, float) else printable(value)

    lines = [list(COLUMNS.values())]
    lines += [[shown(name, row[name]) for name in COLUMNS] for row in table.to_dict("records")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
