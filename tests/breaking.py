"""Commands that are killed, or whose disk fails, in the middle of their work: what they leave is whole and goes on.

A command runs in a process that is forked from one in which the library is imported and nothing was computed, so that
starting it again fifty times costs milliseconds each and not the seconds of its imports.
"""

from __future__ import annotations

import builtins
import contextlib
import csv
import ctypes
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from PIL import Image
from safetensors import safe_open

from effad_lib.execution.process import GRACE
from effad_lib.runs import finish_step_on_interrupt

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"effad_lib.{name}" for name in "cli training distillation reports export watching synthesis sweeps".split()]
    + ["torch.utils.tensorboard"]
)

KILLS = int(os.environ.get("EFFAD_KILLS", "1"))
"""How often each job is killed, and how many faults of its disk it meets of each kind."""

NO_DISK = 77
"""Exit code where this user may not make a small disk."""

LEFT_OUT = {"provenance.json", "tensorboard", "watch.lock", "sweep.lock", "run.log"}
"""Files and folders that tell of each start, and are not compared."""

MAY_END = "Ctrl-C is awaited"
"""What a watch prints here as soon as Ctrl-C ends it in order: before, that would break off a start."""

TIMES = ("seconds", "training_seconds", "latency_ms")
"""Names of values that are measured in time, and never the same twice."""


@dataclass(frozen=True)
class Job:
    """A command that writes into one folder, which its arguments name as `{folder}`."""

    arguments: list[str]
    given: Path | None = None
    """What lies in the folder at first."""
    until: Callable[[Path], bool] | None = None
    """When to end it by Ctrl-C, if it never ends by itself."""
    notebooks: Path | None = None
    """The folder of the notebooks, if it is a sweep of others than ours."""

    def prepare(self, folder: Path) -> None:
        """Put the folder into the state from which the command starts anew."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.given:
            shutil.copytree(self.given, folder)
        else:
            folder.mkdir()


@dataclass(frozen=True)
class Fault:
    """What happens at the `file`-th file that a command writes whole, or everywhere on a disk of so many bytes.

    That file is cut in half where `cut` says so; then the process is killed, or, with `read_only`, neither this file
    nor any other can be written and no folder can be made. With `stop` the process is only stopped (SIGSTOP).
    """

    file: int = 0
    cut: bool = False
    stop: bool = False
    read_only: bool = False
    disk: int = 0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), what it printed, and after how many seconds."""

    code: int
    said: str
    seconds: float

    @property
    def files(self) -> int:
        """How many files it has written whole."""
        return int(self.said.rpartition(" files written")[0].rpartition("\n")[2])


# --- what happens on the other side ---------------------------------------------------------------------------------


def _command(arguments: list[str], notebooks: Path | None, folder: Path, said: Path, fault: Fault) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["MPLBACKEND"] = "Agg"
    torch.set_num_threads(1)
    from effad_lib import sweeps, watching
    from effad_lib.cli import main

    watching.finish_step_on_interrupt = _announced
    if notebooks:
        for name in ("load_sweep", "run_sweep"):
            setattr(sweeps, name, partial(getattr(sweeps, name), notebooks=notebooks))
    if fault.disk:
        _small_disk(folder, fault.disk)
    count = _count_files(folder, fault)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    if fault.disk:  # it is gone with this process
        shutil.copytree(folder, folder.with_name("left"))
    print(f"\n{count[0]} files written", flush=True)
    sys.exit(code)


@contextlib.contextmanager
def _announced() -> Iterator[Callable[[], bool]]:
    with finish_step_on_interrupt() as interrupted:
        print(MAY_END, flush=True)
        yield interrupted


def _count_files(folder: Path, fault: Fault) -> list[int]:
    """Bring about the fault at its file; return the count of files written so far, in a list."""
    synchronise, count = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        count[0] += 1
        if count[0] < fault.file or not fault.file:
            return synchronise(descriptor)
        if fault.stop:
            if count[0] == fault.file:
                os.kill(os.getpid(), signal.SIGSTOP)
            return synchronise(descriptor)
        if fault.cut:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        if not fault.read_only:
            os.kill(os.getpid(), signal.SIGKILL)
        _read_only(folder)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.fsync = fsync
    return count


def _read_only(folder: Path) -> None:
    """Let the system refuse, from now on, to open files in a folder for writing and to make folders in it."""
    open_file, make = builtins.open, os.mkdir

    def check(path: Any) -> None:
        if not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            check(path)
        return open_file(path, mode, *args, **options)

    def made(path: Any, *args: Any, **options: Any) -> None:
        check(path)
        make(path, *args, **options)

    builtins.open, os.mkdir = opened, made


def _small_disk(folder: Path, size: int) -> None:
    """Put the folder on a disk of so many bytes that only this process sees."""
    libc, there = ctypes.CDLL(None, use_errno=True), folder.with_name("given")
    new_mounts, private = 0x00020000, 0x4000 | 1 << 18
    folder.rename(there)
    folder.mkdir()
    for failed in (
        libc.unshare(new_mounts),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()),
    ):
        if failed:
            sys.exit(NO_DISK)
    shutil.copytree(there, folder, dirs_exist_ok=True)
    shutil.rmtree(there)


# --- what is seen from here -----------------------------------------------------------------------------------------


def start(job: Job, folder: Path, fault: Fault = Fault()) -> tuple[Any, Path]:
    """Start a job with a fault; return its main process and the file of what it prints."""
    said = folder.with_name("said.txt")
    said.unlink(missing_ok=True)
    arguments = [argument.format(folder=folder) for argument in job.arguments]
    process = FORKS.Process(target=_command, args=(arguments, job.notebooks, folder, said, fault))
    process.start()
    return process, said


def run(job: Job, folder: Path, fault: Fault = Fault(), kill_after: float | None = None) -> Ended:
    """Run a job with a fault, or kill it after some seconds: its main process or, of a sweep, everything.

    All that it started must end with it.
    """
    began, told = time.monotonic(), False
    process, said = start(job, folder, fault)
    while process.is_alive():
        process.join(0.01)
        seconds = time.monotonic() - began
        assert seconds < 300, said.read_text()
        if kill_after is not None and seconds >= kill_after:
            for number in _session(process.pid) | processes_of(folder) if job.notebooks else {process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        if job.until and not told and said.is_file() and MAY_END in said.read_text() and job.until(folder):
            told = True
            os.kill(process.pid, signal.SIGINT)
    seconds = time.monotonic() - began
    until = time.monotonic() + (GRACE if job.notebooks else 10)
    while left := _session(process.pid) | (processes_of(folder) if job.notebooks else set()):
        assert time.monotonic() < until, f"processes {left} are left"
        time.sleep(0.01)
    return Ended(process.exitcode, said.read_text() if said.is_file() else "", seconds)


def _session(number: int) -> set[int]:
    """Return the processes that belong to a session and have not ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.add(int(path.parent.name))
    return found


def processes_of(folder: Path) -> set[int]:
    """Return the processes, of any session, that name a folder on their command line or have a file of it open."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            told = (place / "cmdline").read_bytes().decode(errors="replace")
            files = [os.readlink(link) for link in (place / "fd").iterdir()]
        except OSError:
            continue
        if str(folder) in told or any(file.startswith(str(folder)) for file in files):
            found.add(int(place.name))
    return found - {os.getpid()}


def visible(folder: Path) -> list[Path]:
    """Return the files below a folder that count: hidden ones are those that are not whole yet."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def content(path: Path) -> Any:
    """Return what a file says, read to its end, without what it says of time; it fails for one that is not whole."""
    match path.suffix:
        case ".json":
            return timeless(json.loads(path.read_text(encoding="utf-8")))
        case ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                return timeless(list(csv.DictReader(file)))
        case ".pt":
            return timeless(torch.load(path, weights_only=True))
        case ".safetensors":
            with safe_open(path, "pt") as file:
                card = {name: json.loads(value) for name, value in (file.metadata() or {}).items() if value[:1] == "{"}
                return timeless([card, {name: file.get_tensor(name) for name in file.keys()}])
        case ".png":
            with Image.open(path) as image:
                return [image.size, image.tobytes()]
        case ".onnx":
            onnx.checker.check_model(model := onnx.load(path))
            card = {entry.key: timeless(json.loads(entry.value)) for entry in model.metadata_props}
            del model.metadata_props[:]
            return [card, model.SerializeToString(deterministic=True)]
        case ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            return [["".join(cell["source"]), cell["metadata"].get("papermill", {}).get("status")] for cell in cells]
        case ".html":
            text = path.read_text(encoding="utf-8")
            assert text.endswith("\n")
            if "minutes a run" in text:  # the page of a sweep, whose other figures are in its tables
                return re.sub(r"<td>[\d.]+</td>", "", text)
            return re.sub(rf"<th>({'|'.join(TIMES)})</th>\s*<td>[^<]*</td>", "", text)
        case _:
            data = path.read_bytes()
            assert data, f"{path} is empty"
            return data


def timeless(value: Any) -> Any:
    """Return a value as one that can be compared, tensors as bytes, without what it says of time."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in TIMES}
    if isinstance(value, (list, tuple)):
        return [timeless(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return [list(value.shape), value.contiguous().numpy().tobytes()]
    return value


def contents(folder: Path) -> dict[str, Any]:
    """Return what all files in a folder say: each must be whole."""
    return {path.as_posix(): content(folder / path) for path in visible(folder) if not LEFT_OUT & set(path.parts)}


def check_same(now: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what a job's files say, and name those that differ."""
    assert now.keys() == wanted.keys()
    assert not (differ := [name for name in wanted if now[name] != wanted[name]]), differ
