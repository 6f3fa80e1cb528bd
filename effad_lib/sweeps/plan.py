"""From a YAML file to the runs of a sweep: every combination, its name, its parameters, all of them checked."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from effad_lib import __version__
from effad_lib.datasets import load_dataset
from effad_lib.documents import DocumentError, read_json, read_yaml, short
from effad_lib.execution import process
from effad_lib.profiles import (
    FOLDER,
    NOTEBOOKS,
    SETTINGS,
    ProfileError,
    Step,
    check_notebook,
    check_sources,
    make_step,
    notebook_parameters,
)
from effad_lib.published import PUBLISHED_DATA
from effad_lib.runs import Run, RunError, resolve
from effad_lib.settings import SettingsError, nearest
from effad_lib.training import TrainingSettings

MOST_RUNS = 2000
"""Runs of one sweep: more is a slip of the pen, or belongs into several files."""

ENTRIES = ("notebooks", "parameters", "grid", "cases", "seeds")

PLAIN_NAMES = frozenset({"dataset", "category", "product", "size", "case", "schedule", "initialisation", "precision"})
"""Parameters whose values speak for themselves in a run's name: `screw-S`, not `category_screw-size_S`."""

SYNTHESIS = "01_data_synthesis"

SWEEP_LOCK = "sweep.lock"
"""The lock of a sweep, in its folder."""

TAKEN = frozenset({SWEEP_LOCK, "summary.csv", "report.html", "heat.png", "data"})
"""What else may be in the folder of a sweep: no names of runs."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its name, which is that of its folder, its steps, and what sets it apart from the others."""

    name: str
    steps: tuple[Step, ...]
    varied: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.steps[0].folder

    @property
    def training(self) -> TrainingSettings | None:
        """The settings of its training; None if no step is one."""
        return next((step.settings for step in self.steps if isinstance(step.settings, TrainingSettings)), None)

    @property
    def done(self) -> bool:
        """Whether all steps were executed to their end, by this version and as they are now, and left metrics."""
        return Run(self.folder).done and all(step.done for step in self.steps)

    def check(self) -> None:
        """Raise `RunError` if the folder holds a run of other parameters or of another version of the library.

        Parameters that do not change the result may differ, as in `Settings.MAY_CHANGE`.
        """
        path = self.folder / process.ORDER
        if not path.is_file():
            return
        made = read_json(path)
        if made.get("effad") != __version__:
            raise RunError(f"{self.folder} holds a run of effad {made.get('effad')}, this is {__version__}.")
        told = made.get("parameters")
        if not isinstance(told, dict) or not all(isinstance(values, dict) for values in told.values()):
            raise RunError(f"{path} does not tell the parameters of each notebook. Restore it or delete the run.")
        for step in self.steps:
            step.check()
            old, new = told.get(step.source.stem, {}), step.parameters
            changed = {n for n in old.keys() | new.keys() if old.get(n) != new.get(n)} - _may_change(step)
            if changed:
                what = "; ".join(f"{n}: {old.get(n)!r} there, {new.get(n)!r} now" for n in sorted(changed))
                raise RunError(f"{self.folder} holds a run with other parameters of {step.source.stem} ({what}).")

    @property
    def order(self) -> dict[str, Any]:
        """What a process is told that shall execute it. Raises `SettingsError` for a teacher that is not there."""
        return process.order(self.name, [step.task for step in self.steps], self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """What its folder says of it from the start, in `order.json`: version and parameters of each notebook."""
        return {"effad": __version__, "parameters": {step.source.stem: step.parameters for step in self.steps}}


@dataclass(frozen=True)
class Sweep:
    """A sweep: its file, its folder below which each run has its own, its notebooks and its runs in order."""

    path: Path
    folder: Path
    notebooks: tuple[Path, ...]
    runs: tuple[SweepRun, ...]

    @property
    def name(self) -> str:
        """The name of its file and of its folder."""
        return self.path.stem

    @cached_property
    def varied(self) -> list[str]:
        """The names of what differs between the runs, in the order of the file."""
        return list(dict.fromkeys(name for run in self.runs for name in run.varied))

    def matching(self, pattern: str) -> list[SweepRun]:
        """Return the runs whose names match a pattern with `*`, `?` and `[...]`; "" takes all.

        Raises `ProfileError` if there is none.
        """
        names = [run.name for run in self.runs]
        found = [run for run in self.runs if not pattern or fnmatchcase(run.name, pattern)]
        if not found:
            shown = f"its runs are {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
            raise ProfileError(f"only = {pattern!r}: no run of {self.path.name} has such a name; {shown}.")
        return found


def load_sweep(sweep: str, *, runs: str | Path = "runs/sweeps", notebooks: str | Path = NOTEBOOKS) -> Sweep:
    """Return a sweep, every name and value of it checked against the parameters of its notebooks.

    `sweep` is the name of a file in `<notebooks>/sweeps` or a path that ends in .yaml or .yml. The file holds:

    - `notebooks`: their names, executed one after the other in the folder of each run;
    - `parameters`: names and values that all runs share;
    - `grid`: names, each with a list of values: every combination is run;
    - `cases`: names, each with the parameters that make this case (they win over those that all share);
    - `seeds`: a list of whole numbers for the parameter `seed`.

    A parameter goes to those of the notebooks that have it. In text `{run}` stands for the run's folder, `{runs}` for
    that of the sweep. Raises `ProfileError`, naming file, run and parameter. Data are not asked for, see `find_data`.
    """
    notebooks = Path(notebooks)
    path = _file(sweep, notebooks)
    try:
        if not re.fullmatch(FOLDER, path.stem):
            raise ProfileError("the name of the file becomes that of a folder: letters, digits, '-', '_' and '.'.")
        names, fixed, grid, cases, seeds = _entries(read_yaml(path), notebooks)
        choices = _choices(fixed, grid, cases, seeds)
        folder = resolve(runs) / path.stem
        defaults = {name: notebook_parameters(notebooks / f"{name}.ipynb") for name in names}
        _check_names(defaults, fixed, grid, cases, seeds)
        planned: dict[str, SweepRun] = {}
        for number, chosen in enumerate(itertools.product(*choices), 1):
            varied = {name: value for name, value, _ in chosen}
            name = "-".join(_label(name, value) for name, value in varied.items()) or "run"
            given = fixed | {key: value for *_, part in chosen for key, value in part.items()}
            if not re.fullmatch(FOLDER, name) or len(name.encode()) > 200 or name in TAKEN:
                raise ProfileError(
                    f"run {number}: {short(name)} cannot be the name of a folder, which takes letters, digits, '-', "
                    f"'_' and '.', 200 bytes at most. Use `cases` to name it."
                )
            if name in planned:
                raise ProfileError(f"two runs would be called {name!r}: a value is there twice, or two look the same.")
            try:
                steps = [
                    make_step(
                        notebook,
                        folder / name,
                        {key: value for key, value in given.items() if key in known},
                        runs=folder,
                        notebooks=notebooks,
                    )
                    for notebook, known in defaults.items()
                ]
            except ValueError as error:
                raise ProfileError(f"run {name}: {error}") from error
            planned[name] = SweepRun(name, tuple(steps), varied)
    except (ProfileError, DocumentError) as error:
        raise ProfileError(str(error) if path.name in str(error) else f"{path.name}: {error}") from error
    return Sweep(path, folder, tuple(notebooks / f"{name}.ipynb" for name in names), tuple(planned.values()))


def find_data(runs: Iterable[SweepRun], *, make: bool = False) -> None:
    """Raise for a teacher or data set that is not there; with `make`, synthetic products are rendered if need be.

    What an earlier notebook of the same run makes is not asked for. Raises `SettingsError` or `DatasetError`, which say
    where to get it.
    """
    asked = set()
    for run in runs:
        settings = run.training
        makes_data = any(step.source.stem == SYNTHESIS for step in run.steps)
        if settings is None:
            continue
        wanted = {name: getattr(settings, name) for name in ("category", "seed", "validation_share")}
        question = (
            settings.size,
            settings.teacher,
            settings.padding,
            settings.dataset,
            settings.data_root,
            *wanted.values(),
        )
        if question in asked:
            continue
        asked.add(question)
        try:
            check_sources(settings)
            if settings.dataset not in PUBLISHED_DATA and not makes_data and (make or settings.dataset != "synthetic"):
                load_dataset(settings.dataset, root=settings.data_root, **wanted)
        except SettingsError as error:
            raise SettingsError(f"run {run.name}: {error}") from error


def _may_change(step: Step) -> frozenset[str]:
    known = SETTINGS.get(step.source.stem)
    return known.MAY_CHANGE if known else frozenset()


def _file(sweep: str, notebooks: Path) -> Path:
    if sweep.endswith((".yaml", ".yml")):
        path = resolve(sweep)
        if not path.is_file():
            raise ProfileError(f"sweep = {sweep!r}: there is no file {path}.")
        return path
    known = sorted(path.stem for path in (notebooks / "sweeps").glob("*.yaml"))
    if sweep not in known:
        where = notebooks / "sweeps"
        raise ProfileError(f"unknown sweep {sweep!r} in {where}: {nearest(sweep, known)} Your own file ends in .yaml.")
    return notebooks / "sweeps" / f"{sweep}.yaml"


Entries = tuple[list[str], dict[str, Any], dict[str, list[Any]], dict[str, dict[str, Any]], list[int]]


def _entries(content: Any, notebooks: Path) -> Entries:
    """Return notebooks, parameters, grid, cases and seeds of a file's content, each of the form that it must have."""
    if not isinstance(content, dict):
        raise ProfileError(f"takes entries with the names {', '.join(ENTRIES)}.")
    for key in content:
        if key not in ENTRIES:
            raise ProfileError(f"unknown entry {key!r}: {nearest(key, ENTRIES)}")
    names = content.get("notebooks")
    if not isinstance(names, list) or not names or len({*map(str, names)}) < len(names):
        raise ProfileError(f"notebooks = {names!r}: takes a list of one or more, each of them once.")
    for name in names:
        check_notebook(name, notebooks)
    fixed, grid, cases = (content.get(key) or {} for key in ("parameters", "grid", "cases"))
    for key, mapping in (("parameters", fixed), ("grid", grid), ("cases", cases)):
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
            raise ProfileError(f"{key} = {mapping!r}: takes names, each with its value.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ProfileError(f"grid: {name} = {values!r}: takes a list of values, such as [{values!r}].")
    for name, part in cases.items():
        cases[name] = part = part or {}
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            raise ProfileError(f"cases: {name} = {part!r}: takes names of parameters, each with its value.")
    seeds = content.get("seeds", [])
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ProfileError(f"seeds = {seeds!r}: takes a list of whole numbers from 0, such as [0, 1, 2].")
    return names, fixed, grid, cases, seeds


def _choices(
    fixed: dict[str, Any], grid: dict[str, list[Any]], cases: dict[str, dict[str, Any]], seeds: list[int]
) -> list[list[tuple[str, Any, dict[str, Any]]]]:
    """Return for each thing that varies its values: the name, the value, and the parameters that it stands for."""
    for name in grid:
        if name in fixed:
            raise ProfileError(f"{name} is in `parameters` and in `grid`: leave one of them out.")
        if named := [case for case, part in cases.items() if name in part]:
            raise ProfileError(f"{name} is in `grid` and in the case {named[0]!r}: leave one of them out.")
    if seeds and (where := [part for part in (fixed, grid, *cases.values()) if "seed" in part]):
        raise ProfileError(f"seed is among {sorted(where[0])} and in `seeds`: leave one of them out.")
    choices = [[(name, value, {name: value}) for value in values] for name, values in grid.items()]
    choices += [[("case", case, part) for case, part in cases.items()]] if cases else []
    choices += [[("seed", seed, {"seed": seed}) for seed in seeds]] if seeds else []
    if (count := math.prod(map(len, choices))) > MOST_RUNS:
        raise ProfileError(f"stands for {count:,} runs, at most {MOST_RUNS:,} are taken. Make several files of it.")
    return choices


def _check_names(
    defaults: dict[str, dict[str, Any]],
    fixed: dict[str, Any],
    grid: dict[str, list[Any]],
    cases: dict[str, dict[str, Any]],
    seeds: list[int],
) -> None:
    """Raise for a parameter that none of the notebooks has."""
    known = {name for parameters in defaults.values() for name in parameters} - {"run_folder"}
    given = [*fixed, *grid, *(name for part in cases.values() for name in part), *(["seed"] if seeds else [])]
    for name in given:
        if name not in known:
            raise ProfileError(f"unknown parameter {name!r} of {', '.join(defaults)}: {nearest(name, known)}")


def _label(name: str, value: Any) -> str:
    """Return the part of a run's name that says a value: "screw", "seed0", "steps500", "image_size64x64"."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    if name not in PLAIN_NAMES or not text:
        text = f"{name}{Path(text).name if isinstance(value, str) else text}"
    return re.sub(r"[^\w.]+", "_", text)
