"""Which notebooks run with which parameters into which folders, all of it checked before anything runs; profiles."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from effad_lib import __version__
from effad_lib.consent import check_named
from effad_lib.datasets import load_dataset
from effad_lib.datasets.synthetic import is_rendered
from effad_lib.distillation import DistillationSettings, load_teacher
from effad_lib.documents import DocumentError, read_yaml
from effad_lib.evaluation import EvaluationSettings
from effad_lib.execution.notebooks import Task, executed_metadata, source_hash
from effad_lib.latency import LatencySettings
from effad_lib.published import PUBLISHED_DATA
from effad_lib.runs import PROJECT, Run, from_project, resolve
from effad_lib.settings import Settings, nearest
from effad_lib.synthesis import SynthesisSettings
from effad_lib.training import TrainingSettings
from effad_lib.viewer import ViewerSettings

NOTEBOOKS = PROJECT / "notebooks"
"""The numbered notebooks; `profiles/<profile>.yaml` beside them."""

DISTILLATION, TRAINING = "02_teacher_distillation", "03_training"
SETTINGS: dict[str, type[Settings]] = {
    "00_overview": TrainingSettings,
    "01_data_synthesis": SynthesisSettings,
    DISTILLATION: DistillationSettings,
    TRAINING: TrainingSettings,
    "04_evaluation": EvaluationSettings,
    "05_viewer": ViewerSettings,
    "07_export_and_latency": LatencySettings,
}
"""Notebooks whose parameters are the fields of settings, or some of them: their values are checked beforehand."""


WRITTEN = {"01_data_synthesis": ("data_root",), "06_sweeps": ("runs",)}
"""Parameters that name a folder in which a notebook writes, beside its run folder."""

REPLACES = {"01_data_synthesis": "overwrite", "06_sweeps": "force"}
"""Parameters by which a notebook replaces or deletes what is in such a folder."""

FOLDER = r"\w[\w.-]*"
"""The name of a run folder."""


class ProfileError(ValueError):
    """A profile or sweep that cannot be run; the message names its file, the step or run, and the parameter."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One notebook to execute: its source, its run folder and what papermill injects.

    `settings` are all parameters, the notebook's defaults included, checked; for a training `TrainingSettings`, for a
    distillation `DistillationSettings`.
    """

    source: Path
    folder: Path
    parameters: dict[str, Any]
    settings: Settings

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return self.folder / self.source.name

    @property
    def record(self) -> dict[str, Any]:
        """What makes an executed notebook out of date when it changes: its cells, parameters, version and teacher."""
        return {
            "source": source_hash(self.source),
            "parameters": self.parameters,
            "effad": __version__,
            **self.made_from,
        }

    @property
    def made_from(self) -> dict[str, str]:
        """The teacher's hash for a training; {} else."""
        if not isinstance(self.settings, TrainingSettings):
            return {}
        return {"teacher": load_teacher(self.settings.teacher or self.settings.size)[1]["sha256"]}

    def check(self) -> None:
        """Raise `RunError` if the folder holds a training or distillation that this step could not continue."""
        if isinstance(self.settings, (TrainingSettings, DistillationSettings)):
            Run(self.folder).check(self.settings, self.made_from)

    @property
    def task(self) -> Task:
        """What is needed to execute it. Raises `SettingsError` for a training whose teacher is not there."""
        steps = self.settings.steps if isinstance(self.settings, TrainingSettings) else 0
        return Task(self.source, self.folder, self.parameters, self.record, steps)

    @property
    def done(self) -> bool:
        """Whether the notebook was executed to its end with these parameters; only then it has the record."""
        made = executed_metadata(self.output, "effad")
        return made is not None and made == self.record


def load_profile(profile: str, *, runs: str | Path = "runs", notebooks: str | Path = NOTEBOOKS) -> list[Step]:
    """Return the steps of a profile, every notebook and parameter of them checked.

    A profile is a YAML list of `{notebook: 03_training, run: synthetic, parameters: {steps: 500}}`. In a text
    parameter `{runs}` stands for the profile's folder of runs. Raises `ProfileError`.
    """
    notebooks = Path(notebooks)
    known = sorted(path.stem for path in (notebooks / "profiles").glob("*.yaml"))
    if profile not in known:
        raise ProfileError(f"unknown profile {profile!r} in {notebooks / 'profiles'}: {nearest(profile, known)}")
    path = notebooks / "profiles" / f"{profile}.yaml"
    try:
        entries = read_yaml(path)
    except DocumentError as error:
        raise ProfileError(str(error)) from error
    if not isinstance(entries, list) or not entries:
        raise ProfileError(f"{path.name}: takes a list of steps, each with notebook, run and parameters.")
    steps: list[Step] = []
    for number, entry in enumerate(entries, 1):
        try:
            step = _step(entry, notebooks, resolve(runs) / profile)
            check_sources(step.settings)
        except ValueError as error:
            name = entry.get("notebook", "?") if isinstance(entry, dict) else entry
            raise ProfileError(f"{path.name}, step {number} ({name}): {error}") from error
        if step.output in [other.output for other in steps]:
            raise ProfileError(f"{path.name}, step {number}: {step.source.stem} is in run {entry['run']!r} twice.")
        steps.append(step)
    return steps


def _step(entry: Any, notebooks: Path, folder: Path) -> Step:
    if not isinstance(entry, dict):
        raise ProfileError(f"{entry!r}: takes notebook, run and parameters.")
    for key in entry:
        if key not in (keys := ("notebook", "run", "parameters")):
            raise ProfileError(f"unknown entry {key!r}: {nearest(key, keys)}")
    run, given = entry.get("run"), entry.get("parameters") or {}
    check_notebook(entry.get("notebook"), notebooks)
    if not isinstance(run, str) or not re.fullmatch(FOLDER, run):
        raise ProfileError(f"run = {run!r}: takes the name of a folder, of letters, digits, '-', '_' and '.'.")
    if not isinstance(given, dict):
        raise ProfileError(f"parameters = {given!r}: takes names and values.")
    return make_step(entry["notebook"], folder / run, given, runs=folder, notebooks=notebooks)


def check_notebook(name: Any, notebooks: Path = NOTEBOOKS) -> None:
    """Raise `ProfileError` if there is no notebook of this name."""
    there = [path.stem for path in notebooks.glob("*.ipynb")]
    if name not in there:
        raise ProfileError(f"unknown notebook {name!r}: {nearest(name, there)}")


def make_step(notebook: str, folder: Path, given: dict[str, Any], *, runs: Path, notebooks: Path = NOTEBOOKS) -> Step:
    """Return the step that executes a notebook with the given parameters in a run folder, names and values checked.

    In a text parameter `{run}` stands for the run folder and `{runs}` for `runs`, the folder of all runs of the profile
    or sweep. Whether teacher and data are there is not asked, see `check_sources`. Raises `ProfileError`,
    `SettingsError`, or `ConsentError` for a data set that is code which the user has not named.
    """
    if "run_folder" in given:
        raise ProfileError(f"parameters = {given!r}: takes no run_folder, which the name of the run gives.")
    places = {"{runs}": from_project(runs), "{run}": from_project(folder)}
    for name, value in given.items():
        for place, path in places.items() if isinstance(value, str) else ():
            value = value.replace(place, path)
        given = given | {name: value}
    source = notebooks / f"{notebook}.ipynb"
    defaults = notebook_parameters(source)
    if "run_folder" in defaults:
        given["run_folder"] = from_project(folder)
    settings = _typed(defaults, given)
    _check_places(notebook, settings.as_dict(), runs)
    if isinstance(dataset := settings.as_dict().get("dataset"), str):
        check_named(dataset)
    if notebook in SETTINGS:
        fields = {field.name for field in dataclasses.fields(SETTINGS[notebook])}
        values = {key: value for key, value in settings.as_dict().items() if key in fields or notebook == TRAINING}
        checked = SETTINGS[notebook].from_mapping(values)
        settings = checked if notebook in (TRAINING, DISTILLATION) else settings
    return Step(source, folder, given, settings)


def _check_places(notebook: str, values: dict[str, Any], runs: Path) -> None:
    """Raise `ProfileError` for a folder to write in that is neither below `runs` nor the project's own for that, for
    one of the project's own that would be replaced, and for the address of a scheduler.

    A sweep may come from anybody, and is no way to render over, or to delete, what is not its own. A scheduler sends
    pickled functions to whoever calls it.
    """
    if (address := values.get("scheduler", "")) not in ("", "local"):
        raise ProfileError(
            f"scheduler = {address!r}: who answers there may have code executed here, so no file may name it. Name it "
            f"yourself: effad sweep FILE --scheduler {address}"
        )
    names, flag = WRITTEN.get(notebook, ()), REPLACES.get(notebook, "")
    replaces = bool(values.get(flag))
    if values.get("dataset") == "synthetic" and "data_root" in values:
        names += () if is_rendered(values["data_root"], values.get("category", "")) else ("data_root",)
    for name in names:
        own = [runs] if replaces else [runs, PROJECT / "data", PROJECT / "runs"]
        if not any(resolve(values[name] or "data/synthetic").is_relative_to(resolve(folder)) for folder in own):
            what = "replace what is" if replaces else "write"
            more = f" with {flag}" if replaces else ", or in data or runs of the project"
            raise ProfileError(
                f"{name} = {values[name]!r}: {notebook} may {what} there, which a file may only ask for in {{runs}}"
                f"{more}. Execute that notebook with papermill for a folder of your own."
            )


def notebook_parameters(notebook: str | Path) -> dict[str, Any]:
    """Return names and defaults from the notebook's cell that is tagged `parameters`; {} if it has none.

    Raises `ProfileError` if a default is not a plain value, since its type could not be checked.
    """
    for cell in _cells(notebook):
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            break
    else:
        return {}
    defaults = {}
    for node in ast.parse("".join(cell["source"])).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(targets[0], ast.Name):
            try:
                defaults[targets[0].id] = ast.literal_eval(node.value)
            except ValueError as error:
                raise ProfileError(f"{Path(notebook).name}: {targets[0].id} is not a plain value.") from error
    return defaults


def _cells(notebook: str | Path) -> list[dict[str, Any]]:
    return json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]


def _typed(defaults: dict[str, Any], given: dict[str, Any]) -> Settings:
    """Return the parameters as settings whose types are those of the notebook's defaults."""
    fields = []
    for name, default in defaults.items():
        hint = type(default)
        if hint in (list, tuple):
            # An empty default says nothing of its items; those that are given then only have to agree.
            items = list(default) or given.get(name) or [0.0]
            hint = list[float if isinstance(items, list) and float in map(type, items) else type(items[0])]
            default = tuple(default)
        fields.append((name, hint, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Parameters", fields, bases=(Settings,), frozen=True).from_mapping(given)


def check_sources(settings: Settings) -> None:
    """Raise for the teacher or data set of a training that is not there; data that can be made are not asked for."""
    if not isinstance(settings, TrainingSettings):
        return
    load_teacher(settings.teacher or settings.size, padding=settings.padding)
    if settings.dataset in PUBLISHED_DATA:
        load_dataset(settings.dataset, root=settings.data_root, category=settings.category)
