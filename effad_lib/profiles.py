"""A profile: which notebooks run with which parameters into which folders, all of it checked before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from effad_lib.datasets import load_dataset
from effad_lib.distillation import DistillationSettings, load_teacher
from effad_lib.evaluation import EvaluationSettings
from effad_lib.latency import LatencySettings
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


class ProfileError(ValueError):
    """A profile that cannot be run; the message names its file, the step and the parameter."""


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
        """What makes an executed notebook out of date when it changes: the cells' sources, parameters and teacher."""
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in _cells(self.source)]
        source = hashlib.sha256(json.dumps(cells).encode()).hexdigest()
        return {"source": source, "parameters": self.parameters, **self.made_from}

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
    def done(self) -> bool:
        """Whether the notebook was executed to its end with these parameters; only then it has the record."""
        try:
            executed = json.loads(self.output.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(executed, dict) and executed.get("metadata", {}).get("effad") == self.record


def load_profile(profile: str, *, runs: str | Path = "runs", notebooks: str | Path = NOTEBOOKS) -> list[Step]:
    """Return the steps of a profile, every notebook and parameter of them checked.

    A profile is a YAML list of `{notebook: 03_training, run: synthetic, parameters: {steps: 500}}`. In a text
    parameter `{runs}` stands for the profile's folder of runs. Raises `ProfileError` or `SettingsError`.
    """
    notebooks = Path(notebooks)
    known = sorted(path.stem for path in (notebooks / "profiles").glob("*.yaml"))
    if profile not in known:
        raise ProfileError(f"unknown profile {profile!r} in {notebooks / 'profiles'}: {nearest(profile, known)}")
    path = notebooks / "profiles" / f"{profile}.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ProfileError(f"{path.name}: takes a list of steps, each with notebook, run and parameters.")
    steps: list[Step] = []
    for number, entry in enumerate(entries, 1):
        try:
            step = _step(entry, notebooks, resolve(runs) / profile)
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
    there = [path.stem for path in notebooks.glob("*.ipynb")]
    if entry.get("notebook") not in there:
        raise ProfileError(f"unknown notebook {entry.get('notebook')!r}: {nearest(entry.get('notebook'), there)}")
    name, run, given = entry["notebook"], entry.get("run"), entry.get("parameters") or {}
    if not isinstance(run, str) or not re.fullmatch(r"\w[\w.-]*", run):
        raise ProfileError(f"run = {run!r}: takes the name of a folder, of letters, digits, '-', '_' and '.'.")
    if not isinstance(given, dict) or "run_folder" in given:
        raise ProfileError(f"parameters = {given!r}: takes names and values, and no run_folder, which `run` names.")
    source, run_folder = notebooks / f"{name}.ipynb", folder / run
    runs = from_project(folder)
    given = {key: value.replace("{runs}", runs) if isinstance(value, str) else value for key, value in given.items()}
    defaults = notebook_parameters(source)
    if "run_folder" in defaults:
        given["run_folder"] = from_project(run_folder)
    settings = _typed(defaults, given)
    if name in SETTINGS:
        fields = {field.name for field in dataclasses.fields(SETTINGS[name])}
        values = {key: value for key, value in settings.as_dict().items() if key in fields or name == TRAINING}
        checked = SETTINGS[name].from_mapping(values)
        settings = checked if name in (TRAINING, DISTILLATION) else settings
    if isinstance(settings, TrainingSettings):
        _check_training(settings)
    return Step(source, run_folder, given, settings)


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


def _check_training(settings: TrainingSettings) -> None:
    """Raise for a teacher or a data set that is not there; data that an earlier step makes is not asked for."""
    load_teacher(settings.teacher or settings.size, padding=settings.padding)
    if settings.dataset in ("elpv", "mvtec_ad", "mvtec_ad_2", "mvtec_loco", "visa", "btad"):
        load_dataset(settings.dataset, root=settings.data_root, category=settings.category)
