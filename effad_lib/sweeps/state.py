"""How far the runs of a sweep have come, read from their folders alone: so it can be asked from anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import StringIO

import pandas as pd

from effad_lib.documents import is_number, is_seconds
from effad_lib.execution import Lock
from effad_lib.execution.process import LOG, failure
from effad_lib.sweeps.plan import SweepRun

STATES = ("done", "failed", "running", "stopped", "waiting")
"""Of a run; a stopped one has begun and will be resumed."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: its state, its training's steps of so many, the loss, seconds left, and a word more.

    `step` and `steps` are 0 for a run without training, `loss` and `left` NaN as long as nothing is known. `note` says
    where a running one runs, and why a failed one failed.
    """

    state: str
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    left: float = math.nan
    note: str = ""


def state_of(run: SweepRun) -> str:
    """Return the state of a run; a failed run that is running again is running."""
    if Lock(run.folder / LOG).is_held:
        return "running"
    if run.done:
        return "done"
    if failure(run.folder):
        return "failed"
    return "stopped" if (run.folder / LOG).exists() else "waiting"


def progress_of(run: SweepRun, state: str) -> Progress:
    """Return how far a run of a known state has come."""
    steps = run.training.steps if run.training else 0
    if state == "waiting":
        return Progress(state, 0, steps)
    try:
        text = (run.folder / "history.csv").read_text(encoding="utf-8")
        rows = pd.read_csv(StringIO(text))[["step", "seconds", "validation"]].astype(float).to_numpy().tolist()
        if not all(is_number(at, 0, steps or math.inf) and is_seconds(s) and is_number(loss) for at, s, loss in rows):
            raise ValueError("no history of this run")
        (first, began, _), (last, now, loss) = rows[0], rows[-1]
        step = int(last)
        # The first stretch has the start-up in it; from one validation to the next it has not.
        left = (steps - step) * (now - began) / (step - first) if step > first else math.nan
    except (OSError, ValueError, KeyError, IndexError):
        step, loss, left = 0, math.nan, math.nan
    note = ""
    if state == "running" and (owner := Lock(run.folder / LOG).owner):
        note = f"process {owner.pid} on {owner.host}"
    if state == "failed" and (what := failure(run.folder)):
        cell = f", cell {what['cell']}" if what["cell"] else ""
        note = f"{what['notebook']}{cell}: {what['error']}: {what['message']}".strip(": ").partition("\n")[0][:200]
    return Progress(state, step, steps, loss, left if state == "running" else math.nan, note)
