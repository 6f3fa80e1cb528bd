"""A profile: numbered notebooks through papermill into run folders, and the table of what came out."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tqdm.auto import tqdm

from effad_lib.datasets import load_dataset
from effad_lib.distillation import DistillationSettings, load_teacher
from effad_lib.images import packaged_photographs
from effad_lib.runs import PROJECT, Run, RunError, resolve, write_text
from effad_lib.settings import Settings, nearest
from effad_lib.synthesis import SynthesisSettings
from effad_lib.training import TrainingSettings

NOTEBOOKS = PROJECT / "notebooks"
"""The numbered notebooks; `profiles/<profile>.yaml` beside them."""

TRAINING = "03_training"
SETTINGS: dict[str, type[Settings]] = {
    "01_data_synthesis": SynthesisSettings,
    "02_teacher_distillation": DistillationSettings,
    TRAINING: TrainingSettings,
}
"""Notebooks whose parameters are the fields of settings, or some of them: their values are checked beforehand."""

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
    "teacher penalty_images".split()
)
"""Settings of a training on which the paper has nothing to say, or that `departures` words itself."""


class ProfileError(ValueError):
    """A profile that cannot be run; the message names its file, the step and the parameter."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One notebook to execute: its source, its run folder and what papermill injects.

    `settings` are all parameters, the notebook's defaults included, checked; for a training `TrainingSettings`.
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
        """What makes an executed notebook out of date when it changes: the cells' sources and the parameters."""
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in _cells(self.source)]
        return {"source": hashlib.sha256(json.dumps(cells).encode()).hexdigest(), "parameters": self.parameters}

    @property
    def done(self) -> bool:
        """Whether the notebook was executed to its end with these parameters; only then it has the record."""
        try:
            executed = json.loads(self.output.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(executed, dict) and executed.get("metadata", {}).get("effad") == self.record


def run_profile(
    profile: str, *, runs: str | Path = "runs", force: bool = False, notebooks: str | Path = NOTEBOOKS
) -> pd.DataFrame:
    """Execute the notebooks of a profile into `<runs>/<profile>/<run>/` and return the table of results.

    All steps are checked before the first one runs; its departures from the paper are printed. A step that is done is
    skipped, unless the source or the parameters of its notebook changed or an earlier step of the same run was done
    anew; `force` deletes the profile's run folders first. Raises `ProfileError` or `SettingsError` for a faulty
    profile, and `RunError` for a notebook that fails: the steps before it are kept.
    """
    steps = load_profile(profile, runs=runs, notebooks=notebooks)
    _import_papermill()
    folders = list(dict.fromkeys(step.folder for step in steps))
    _print_departures(profile, steps)
    if force:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    began, renewed = time.monotonic(), set()
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.source.stem} → {from_project(step.folder)}"
        if step.folder not in renewed and step.done:
            print(f"{title}: done before", flush=True)
            continue
        renewed.add(step.folder)
        started = time.monotonic()
        _execute(step, title)
        print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)
    table = results(folders)
    print(f"\n{profile}: {time.monotonic() - began:.0f} s in all", flush=True)
    if len(table):
        print(f"\n{as_text(table)}", flush=True)
    return table


# --- before anything runs -------------------------------------------------------------------------------------------


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
        settings = checked if name == TRAINING else settings
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
    if settings.dataset in ("elpv", "mvtec_ad"):
        load_dataset(settings.dataset, root=settings.data_root, category=settings.category)


def _import_papermill() -> Any:
    try:
        import papermill
    except ImportError as error:
        raise RunError('running notebooks needs papermill and Jupyter: pip install "effad[notebooks]"') from error
    return papermill


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
    made, original = card.get("settings", {}), DistillationSettings()
    backbone, steps, photographs = made.get("backbone", "?"), made.get("steps", "?"), card.get("photographs", "?")
    if (backbone, steps) != (original.backbone, original.steps) or (photographs != "?" and photographs < 1_000_000):
        found["teacher"] = (
            f"from {original.backbone}, {original.steps} steps on ImageNet",
            f"from {backbone}, {steps} steps on {photographs} photographs",
        )
    packaged = f"{len(packaged_photographs())} photographs inside installed packages"
    found["penalty_images"] = ("ImageNet", Path(settings.penalty_images).name or packaged)
    return found


def _print_departures(profile: str, steps: Iterable[Step]) -> None:
    for step in steps:
        if isinstance(step.settings, TrainingSettings):
            print(f"Departures of {profile}/{step.folder.name} from the paper:")
            for name, (paper, here) in departures(step.settings).items():
                print(f"  {name}: {here} (paper: {paper})")
    print(flush=True)


# --- execution ------------------------------------------------------------------------------------------------------


def _execute(step: Step, title: str) -> None:
    """Execute one notebook and mark it as done. Raises `RunError` if it fails."""
    papermill = _import_papermill()
    # Else every kernel greets with a page of debugger warnings.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    step.folder.mkdir(parents=True, exist_ok=True)
    where = from_project(step.output)
    kept = "What was finished before is kept: start again to continue."
    record = step.record
    try:
        with _ticking(title, step):
            notebook = papermill.execute_notebook(
                step.source,
                step.output,
                step.parameters,
                progress_bar=False,
                cwd=step.source.parent,
                start_timeout=180,
                extra_arguments=["--log-level=50"],  # the kernel's own log would end up between our lines
            )
    except papermill.PapermillExecutionError as error:
        cell = f"cell {error.cell_index + 1}"
        raise RunError(f"{where}: {cell} failed with {error.ename}: {error.evalue}\n{kept}") from error
    except KeyboardInterrupt:
        # The cell that was waited for is left unfinished, of which asyncio would complain at the end.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise KeyboardInterrupt(f"stopped in {step.source.stem}. {kept}") from None
    except (OSError, RuntimeError) as error:
        # A full disk, or a kernel that does not start or dies (short of memory).
        raise RunError(f"{where}: {error or type(error).__name__}\n{kept}") from error
    notebook.metadata["effad"] = record
    notebook.metadata["papermill"] |= {"input_path": from_project(step.source), "output_path": where}
    write_text(step.output, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _ticking(title: str, step: Step) -> Iterator[None]:
    """Show on a terminal that a notebook is running, a training with the steps that its history has reached."""
    over = threading.Event()
    steps = step.settings.steps if isinstance(step.settings, TrainingSettings) else None
    bar = tqdm(total=steps, desc=title, leave=False, disable=None, bar_format=None if steps else "{desc} {elapsed}")

    def tick() -> None:
        while not over.wait(1.0):
            bar.n = _last_step(step.folder / "history.csv") if steps else 0
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.close()


def _last_step(history: Path) -> int:
    try:
        return int(history.read_text(encoding="utf-8").splitlines()[-1].split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0


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
        return f"{value:.0f}" if name == "seconds" else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [list(COLUMNS.values())]
    lines += [[shown(name, row[name]) for name in COLUMNS] for row in table.to_dict("records")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def from_project(path: str | Path) -> str:
    """Return a path relative to the project if it lies inside, else absolute: as `resolve` takes it."""
    path = Path(path).expanduser().resolve()
    return (path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path).as_posix()
