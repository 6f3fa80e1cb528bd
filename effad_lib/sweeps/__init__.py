"""Sweeps: one or a few notebooks over many cases, through papermill, on this machine or on many."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from effad_lib.batch import NOTEBOOKS
from effad_lib.execution import Lock, LockError, import_papermill
from effad_lib.execution.process import LOG, delete_runs, full_disk
from effad_lib.runs import RunError
from effad_lib.sweeps import live
from effad_lib.sweeps.cost import Rate, Spent, cost, expected_seconds, rates, seconds_per_step
from effad_lib.sweeps.local import run_here
from effad_lib.sweeps.page import heat_table, write_page
from effad_lib.sweeps.plan import SWEEP_LOCK, Sweep, SweepRun, find_data, load_sweep
from effad_lib.sweeps.results import evaluated, links, means, shown, summary_row, write_summary
from effad_lib.sweeps.settings import SweepSettings
from effad_lib.sweeps.state import Progress, progress_of, state_of

__all__ = [
    "LockError",
    "Progress",
    "Rate",
    "Spent",
    "Sweep",
    "SweepRun",
    "SweepSettings",
    "cost",
    "dry_run",
    "finished",
    "heat_table",
    "links",
    "load_sweep",
    "means",
    "rates",
    "run_sweep",
    "seconds_per_step",
    "shown",
    "state_of",
    "write_page",
]


PAGE_EVERY = 60.0
"""Seconds between two versions of the page while runs end; the summary, which is cheaper, is written for each."""


def run_sweep(settings: SweepSettings, *, notebooks: str | Path = NOTEBOOKS) -> pd.DataFrame:
    """Execute the runs of a sweep that are not done, and return its summary, a row for each of its runs.

    Finished runs are skipped, interrupted ones resumed; a failed one keeps its notebook with the traceback, does not
    stop the others, and is skipped the next time without `retry_failed`. Each runs in a process of its own, see
    `run_here`, or on a Dask cluster. `summary.csv` is written whenever a run has ended, `report.html` now and then
    and at the end.

    Raises before anything starts: `ProfileError` for a faulty file, `SettingsError` or `DatasetError` for a teacher or
    data that are not there, `LockError` if another sweep works in the folder, and `RunError` for folders of other
    settings or versions, which only `force` deletes. Ctrl-C stops all runs, each with its checkpoint, and so does, with
    a `RunError`, a disk that is full: then none of them has failed.
    """
    sweep = load_sweep(settings.sweep, runs=settings.runs, notebooks=notebooks)
    chosen = sweep.matching(settings.only)
    if settings.dry_run:
        dry_run(sweep, settings)
        return _summary(sweep, {run.name: state_of(run) for run in sweep.runs})
    import_papermill()
    find_data([run for run in chosen if not run.done])
    with Lock(sweep.folder / SWEEP_LOCK) as lock, _stopped_by_signals():
        if settings.force:
            delete_runs(run.folder for run in chosen)
        states = {run.name: state_of(run) for run in sweep.runs}
        to_do = [run for run in chosen if states[run.name] != "done"]
        if not settings.retry_failed:
            to_do = [run for run in to_do if states[run.name] != "failed"]
        _check(to_do, sweep)
        find_data(to_do, make=True)
        _work(sweep, to_do, chosen, states, lock, settings)
        return _summary(sweep, states)


def dry_run(sweep: Sweep, settings: SweepSettings) -> None:
    """Print all runs with state and expected time, then look for the data; raises if they are not there."""
    chosen = sweep.matching(settings.only)
    states = {run.name: state_of(run) for run in sweep.runs}
    done = [run for run in sweep.runs if states[run.name] == "done"]
    progress = {}
    for run in chosen:
        state = states[run.name]
        seconds = Spent.of(run).seconds if state == "done" else expected_seconds(run, done)
        note = f"took {live.duration(seconds)}" if state == "done" else f"about {live.duration(seconds)}"
        if math.isnan(seconds):
            note = "not measured yet"
        one = progress_of(run, state)
        progress[run.name] = replace(one, left=math.nan, note=" · ".join(filter(None, [one.note, note])))
    print("\n".join(live.as_lines(sweep.name, progress, rows=len(progress))))
    if done or settings.gpu_minutes:
        known = {"gpu_minutes": settings.gpu_minutes, "gpu_source": settings.gpu_source}
        table = cost(rates([Spent.of(run) for run in done], **known), len(chosen))
        print(f"\nAll {len(chosen)} runs from the start:\n{table.round(2).to_string()}", flush=True)
    find_data([run for run in chosen if states[run.name] != "done"])


def finished(sweep: Sweep, pattern: str = "") -> list[SweepRun]:
    """Return the evaluated runs of a sweep, those that match a pattern if one is given, for `means` and `cost`."""
    return evaluated(run for run in sweep.matching(pattern) if state_of(run) == "done")


def _summary(sweep: Sweep, states: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame([summary_row(sweep, run, states[run.name]) for run in sweep.runs])


def _check(runs: Sequence[SweepRun], sweep: Sweep) -> None:
    """Raise `RunError` for run folders that these runs could not continue, all of them in one."""
    faults = []
    for run in runs:
        try:
            run.check()
        except RunError as error:
            faults.append(str(error))
    if faults:
        more = f"\n… and {len(faults) - 3} more" if len(faults) > 3 else ""
        again = f"effad sweep {sweep.name if sweep.path.parent.name == 'sweeps' else sweep.path} --force"
        raise RunError("\n".join(faults[:3]) + f"{more}\nTo delete the runs of this sweep and do them anew: {again}")


def _work(
    sweep: Sweep,
    to_do: Sequence[SweepRun],
    chosen: Sequence[SweepRun],
    states: dict[str, str],
    lock: Lock,
    settings: SweepSettings,
) -> None:
    """Execute runs and keep `states`, the table on the screen and the files of the sweep up to date."""
    rows = {run.name: summary_row(sweep, run, states[run.name]) for run in sweep.runs}
    skipped = [run for run in chosen if run not in to_do and states[run.name] == "failed"]
    said = {run.name: progress_of(run, states[run.name]) for run in chosen}
    written, table, waiting = -math.inf, live.Live(sweep.name), {run.name for run in to_do}
    if settings.scheduler:
        from effad_lib.sweeps.cluster import run_on_cluster

        working: Iterator = run_on_cluster(sweep, to_do, settings.scheduler, settings.workers, settings.threads)
    else:
        working = run_here(to_do, settings.workers, settings.threads)
    write_summary(sweep, rows.values())
    with contextlib.closing(working):
        for ended in working:
            for run, how in ended:
                if how == "full":
                    raise full_disk(run.folder)
                waiting.discard(run.name)
                states[run.name] = state = how if how in ("done", "failed", "stopped") else "stopped"
                rows[run.name] = summary_row(sweep, run, state)
                said[run.name] = progress_of(run, state)
                if how not in ("done", "failed", "stopped"):
                    rows[run.name]["error"], said[run.name] = how, Progress(state, note=how)
            if ended:
                lock.check()
                write_summary(sweep, rows.values())
            if ended and time.monotonic() - written > PAGE_EVERY:
                written = time.monotonic()
                write_page(sweep, [run for run in sweep.runs if states[run.name] == "done"], rows)
            for run in to_do:
                at_work = Lock(run.folder / LOG)
                if run.name in waiting and (at_work.is_held or not at_work.was_given_back):
                    said[run.name] = progress_of(run, "running" if at_work.is_held else states[run.name])
            table.draw(said, _left(rows, said, to_do))
    table.draw(said, last=True)
    write_page(sweep, [run for run in sweep.runs if states[run.name] == "done"], rows)
    if skipped:
        names = ", ".join(run.name for run in skipped)
        print(f"Failed before and not tried again: {names}. To try again: --retry-failed")


def _left(rows: dict[str, dict], said: dict[str, Progress], to_do: Sequence[SweepRun]) -> float:
    """Return the seconds that all runs still need by those that are done; NaN as long as none is."""
    took = [row["seconds"] for row in rows.values() if row["state"] == "done" and row["seconds"]]
    if not took:
        return math.nan
    mean = sum(took) / len(took)
    running = [said[run.name].left for run in to_do if said[run.name].state == "running"]
    open_runs = sum(said[run.name].state in ("waiting", "stopped") for run in to_do)
    needed = open_runs * mean + sum(mean / 2 if math.isnan(left) else left for left in running)
    return needed / max(1, len(running))


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let the signals by which systems end a process act as Ctrl-C, so that all runs save; ignored ones stay so."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}: started again, the sweep continues.")

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
