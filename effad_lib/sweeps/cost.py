"""What runs took, on which machines, and what many more of them would."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from effad_lib.datasets import Split
from effad_lib.documents import Takes, fault, is_number
from effad_lib.execution.notebooks import executed_metadata
from effad_lib.provenance import provenance_of
from effad_lib.runs import Run, RunError
from effad_lib.sweeps.plan import SweepRun
from effad_lib.training import TrainingSettings, train


def _is_time(value: Any) -> bool:
    try:
        return value is None or math.isfinite(datetime.fromisoformat(value).timestamp())
    except (TypeError, ValueError, OverflowError, OSError):
        return False


TOOK: Takes = {
    "duration": (lambda value: value is None or is_number(value, -1e9, 1e9), "seconds, or null"),
    **dict.fromkeys(("start_time", "end_time"), (_is_time, "a time, or null")),
}
"""What papermill notes in an executed notebook."""


@dataclass(frozen=True)
class Spent:
    """What a finished run took: `seconds` in all, on which `device`, and when its notebooks ran (POSIX times)."""

    seconds: float
    device: str
    times: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, run: SweepRun) -> Spent:
        """Read it from the executed notebooks; a training that was resumed counts with all of its steps.

        Raises `RunError` for a notebook that says what cannot be, and as `Run.metrics` and `provenance_of`.
        """
        seconds, times = 0.0, []
        for step in run.steps:
            told = executed_metadata(step.output, "papermill") or {}
            if wrong := fault(told, TOOK):
                raise RunError(f"{step.output} {wrong}. Restore it, or delete it to execute it anew.")
            took = max(0.0, told.get("duration") or 0.0)  # below where a clock was set back
            if step.settings is run.training:
                took = max(took, Run(run.folder).metrics.get("seconds") or 0.0)
            seconds += took
            if told.get("start_time") and told.get("end_time"):
                times.append(tuple(datetime.fromisoformat(told[n]).timestamp() for n in ("start_time", "end_time")))
        made = provenance_of(run.folder)
        return cls(seconds, str(made[-1].get("device")) if made else "unknown device", tuple(times))


def at_a_time(spent: Sequence[Spent]) -> float:
    """Return how many runs went on at the same time, on average, while any did."""
    times = sorted(pair for one in spent for pair in one.times)
    busy, end = 0.0, -math.inf
    for start, stop in times:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return sum(stop - start for start, stop in times) / busy if busy else 1.0


@dataclass(frozen=True)
class Rate:
    """What a run takes on a kind of machine: `seconds`, of so many runs at the same time, by a `source`."""

    device: str
    seconds: float
    parallel: float
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a graphics card, of which a machine may have several."""
        return "CPU" not in self.device


def rates(spent: Iterable[Spent], *, gpu_minutes: float = 0.0, gpu_source: str = "") -> list[Rate]:
    """Return what a run took, on average, on each kind of machine that runs were measured on.

    Times on a GPU are those measured here or, if there are none, `gpu_minutes` a run from `gpu_source`; with neither
    there is no such rate: none is invented.
    """
    kinds: dict[str, list[Spent]] = {}
    for one in spent:
        kinds.setdefault(one.device, []).append(one)
    found = []
    for device, some in kinds.items():
        parallel = at_a_time(some) if "CPU" in device else 1.0
        mean = sum(one.seconds for one in some) / len(some)
        source = f"measured: {len(some)} runs of {mean / 60:.1f} minutes, {at_a_time(some):.1f} at a time"
        found.append(Rate(device, mean, parallel, source))
    if gpu_minutes and not any(rate.is_gpu for rate in found):
        found.append(Rate("GPU", gpu_minutes * 60, 1.0, gpu_source))
    return found


def cost(some: Iterable[Rate], runs: int = 1000, gpus: Sequence[int] = (1, 8)) -> pd.DataFrame:
    """Return what so many runs would take at these rates: a row for a CPU, and for each number of GPUs.

    Columns `hours`, `days` and `source`. GPUs share the runs, one at a time on each.
    """
    rows = []
    for rate in some:
        for count in gpus if rate.is_gpu else (1,):
            hours = runs * rate.seconds / rate.parallel / count / 3600
            name = f"{count} × {rate.device}" if rate.is_gpu else f"one machine, {rate.device} a run"
            rows.append({"on": name, "hours": hours, "days": hours / 24, "source": rate.source})
    return pd.DataFrame(rows, columns=["on", "hours", "days", "source"]).set_index("on")


def seconds_per_step(settings: TrainingSettings, split: Split, steps: int = 3) -> float:
    """Return what an optimiser step with these settings takes on this machine, measured on a few, in seconds.

    Ten images do: what a step costs does not depend on their number. One held-out image is looked at in between.
    """
    few = replace(split, train=split.train[:10], validation=split.validation[:1], test=())
    with tempfile.TemporaryDirectory() as folder:
        changes = {"steps": 2 * steps, "validate_every": steps, "checkpoint_every": 2 * steps}
        train(replace(settings, run_folder=folder, **changes), few)
        seconds = pd.read_csv(Path(folder) / "history.csv")["seconds"]
    return float(seconds.iloc[1] - seconds.iloc[0]) / steps


def expected_seconds(run: SweepRun, done: Iterable[SweepRun]) -> float:
    """Return what a run would take by those that are done and differ in category and seed alone; NaN without any."""
    own = _effort(run)
    took = [Spent.of(other).seconds for other in done if _effort(other) == own]
    return sum(took) / len(took) if took else math.nan


def _effort(run: SweepRun) -> tuple[Any, ...]:
    names = "dataset size padding image_size batch_size steps ablation_steps precision patience".split()
    return tuple(getattr(run.training, name, None) for name in names)
