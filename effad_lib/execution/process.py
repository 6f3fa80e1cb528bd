"""One run in a process of its own: what it is told, what it leaves behind, how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effad_lib import __version__
from effad_lib.consent import NAMED
from effad_lib.documents import DocumentError, read_json
from effad_lib.execution.lock import RUN_LOCK, STALE, Lock, LockError, alone_in
from effad_lib.execution.notebooks import Task, execute, source_hash
from effad_lib.runs import NO_SPACE, PROJECT, Run, RunError, from_project, printable, resolve, unwritable, write_json

LOG, ORDER, FAILED = "run.log", "order.json", "failed.json"
"""Files of a run folder: its lock, which holds what its kernels print; what the run is; how it failed."""

FULL, REFUSED, STOPPED = 74, 75, 130
"""Exit codes: the disk is full; somebody else works in the run folder; stopped, to be resumed."""

GRACE = 60.0
"""Seconds that a run has to save its checkpoint when it is stopped."""


def order(name: str, tasks: Sequence[Task], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a process needs to know of a run, as plain values that can travel to another machine.

    tasks: its notebooks, all in one folder; identity: what `order.json` shall say from the start of what the run is.
    """
    return {
        "name": name,
        "folder": from_project(tasks[0].folder),
        "tasks": [[from_project(task.source), task.parameters, task.record, task.steps] for task in tasks],
        "identity": dict(identity),
        "data_files": os.environ.get(NAMED, ""),
    }


def tasks_of(told: Mapping[str, Any]) -> list[Task]:
    """Return the tasks of an `order`. Raises `RunError` if notebooks or library are not those it was made with."""
    folder, tasks = resolve(told["folder"]), []
    for source, parameters, record, steps in told["tasks"]:
        task = Task(resolve(source), folder, parameters, record, steps)
        here = {"source": source_hash(task.source), "effad": __version__}
        if different := [name for name, value in here.items() if record[name] != value]:
            raise RunError(f"{source} differs here ({', '.join(different)}): all machines need the same effad.")
        tasks.append(task)
    return tasks


# --- in the process that started it ---------------------------------------------------------------------------------


def _no_link(path: str, flags: int) -> int:
    """Open a file, but none that a link leads to: that is not ours to write."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def start(told: Mapping[str, Any], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of a run; it stops by itself when the one that started it dies.

    Its output goes to the run's log, and with it the lock: no other process can begin with the run before the last of
    this one's kernels has ended.
    """
    folder = resolve(told["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "ab", opener=_no_link) as log:
        # In a process group of its own: Ctrl-C goes to the sweep alone, which then stops its runs one by one.
        return subprocess.Popen(
            [sys.executable, "-m", "effad_lib.execution", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=PROJECT,
            env=os.environ | environment,
            process_group=0,
        )


def outcome(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Return how a process that has ended left its run: "done", "failed", "stopped", "full", or why it could not begin.

    "full" is a stopped one whose disk has no room, which is no fault of the run's. A process that died is marked as
    failed here, as it could not do so itself.
    """
    process.stdin.close()
    code = process.returncode
    if code in (0, STOPPED, -signal.SIGINT):
        return "stopped" if code else "done"
    if code == FULL:
        return "full"
    if code == REFUSED:
        lock = next((lock for lock in (Lock(folder / RUN_LOCK), Lock(folder / LOG)) if lock.is_held), None)
        return f"in use by process {lock.owner.pid} on {lock.owner.host}" if lock else "in use"
    if not (folder / FAILED).is_file():
        reason = f"its process ended with code {code}"
        if code < 0:
            reason = f"its process was ended by {signal.Signals(-code).name}"
            reason += ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        mark_failed(folder, "", reason)
    return "failed"


def stop(processes: Collection[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """End processes of runs: each may finish its step and save; after so many seconds, or a second Ctrl-C, it dies."""
    try:
        for process in processes:
            process.stdin.close()  # it stops as if this process had died, see `_follow_parent`
        until = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def delete_runs(folders: Iterable[Path]) -> None:
    """Delete run folders, unless somebody works in one: raises `LockError` before any is deleted."""
    with contextlib.ExitStack() as held:
        there = [folder for folder in folders if folder.is_dir()]
        for folder in there:
            held.enter_context(Lock(folder / LOG).take(wait=5.0))
            held.enter_context(alone_in(folder))
        for folder in there:
            shutil.rmtree(folder, ignore_errors=True)


def mark_failed(folder: Path, notebook: str, message: str, *, cell: int | None = None, error: str = "") -> None:
    """Write `failed.json` into a run: the notebook, the number of its cell, the name of the error, its message."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    what = {"notebook": notebook, "cell": cell, "error": error, "message": printable(message, keep="\n"), "at": at}
    write_json(folder / FAILED, what)


def failure(folder: Path) -> dict[str, Any] | None:
    """Return what `failed.json` of a run says, None if it has not failed."""
    unknown = {"notebook": "", "cell": None, "error": "", "message": "", "at": ""}
    try:
        return unknown | read_json(folder / FAILED)
    except DocumentError:
        return None


# --- in the process of the run --------------------------------------------------------------------------------------


def main(told: Mapping[str, Any]) -> int:
    """Execute the notebooks of a run, those that are not done; return the exit code."""
    # Started by a sweep in the background of a shell, it would be deaf to the signal that stops it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ[NAMED] = told["data_files"]
    folder = resolve(told["folder"])
    lock = Lock(folder / LOG, descriptor=sys.stdout.fileno())
    try:
        lock.take(wait=STALE + 10)
        Lock(folder / RUN_LOCK).take(wait=STALE + 10).leave()  # or its kernel would meet who else works in the folder
        return _execute(told, folder)
    except LockError as refusal:
        _print(refusal)
        return REFUSED
    except RunError as error:  # of a folder in which nothing can be written
        _print(error)
        return FULL if _tells_of_full_disk(error) else 1
    except KeyboardInterrupt as interrupt:
        _print(interrupt)
        return STOPPED
    finally:
        lock.leave()


def _execute(told: Mapping[str, Any], folder: Path) -> int:
    notebook = ""
    try:
        (folder / FAILED).unlink(missing_ok=True)
        write_json(folder / ORDER, told["identity"])
        renewed = False
        for task in tasks_of(told):
            notebook = task.source.name
            if task.done and not renewed:
                continue
            if not renewed:  # from now on the run is not done, whatever was measured before
                (folder / "metrics.json").unlink(missing_ok=True)
            renewed = True
            try:
                execute(task, notebook)
            except RunError as error:
                # A kernel that did not start, as two may have drawn the same port, or died: once more.
                if not isinstance(error.__cause__, RuntimeError) or _tells_of_full_disk(error):
                    raise
                _print(f"{error}\nOnce more.")
                execute(task, notebook)
        if not Run(folder).done:
            raise RunError("its notebooks left no metrics.json: the last one has to call Run(run_folder).finish(...).")
    except (RunError, ValueError, OSError) as error:
        cause = error.__cause__
        _print(error)
        if _tells_of_full_disk(error):
            return FULL
        if hasattr(cause, "ename"):
            mark_failed(folder, notebook, str(cause.evalue), cell=cause.cell_index + 1, error=str(cause.ename))
        else:
            mark_failed(folder, notebook, str(error), error=type(cause or error).__name__)
        return 1
    return 0


def _tells_of_full_disk(said: object) -> bool:
    """Whether the system refused to write for want of room; of what fails in a kernel there is but the message."""
    return any(os.strerror(reason) in str(said) for reason in NO_SPACE)


def full_disk(folder: Path) -> RunError:
    """Return what to say of a run that met a full disk: its own words, if there was room for them in its log."""
    with contextlib.suppress(OSError):
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        if said := [line for line in lines if _tells_of_full_disk(line)]:
            words = printable(said[-1]).rstrip(".")
            return RunError(f"{folder} met a full disk ({words}). Make room there, then start the sweep again.")
    return unwritable(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _print(message: object) -> None:
    """Write a line into the run's log, unless the disk is full."""
    with contextlib.suppress(OSError):
        os.write(1, f"{message}\n".encode(errors="backslashreplace"))


def _follow_parent() -> None:
    """Stop when the process that started this one has died: the pipe from it, in which it writes nothing, then ends."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(STOPPED)
