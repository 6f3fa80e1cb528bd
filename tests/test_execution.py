"""The lock of a folder: one at a time, even in the same instant; it dies with its owner and all that it started."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from effad_lib.execution import lock as locks
from effad_lib.execution.lock import RUN_LOCK, STALE, Lock, LockError, alone_in
from effad_lib.execution.process import LOG, delete_runs
from effad_lib.execution.process import full_disk as told_of_full_disk
from effad_lib.runs import RunError

HOLDS = """
import sys, time
from effad_lib.execution.lock import Lock, LockError
try:
    lock = Lock(sys.argv[1]).take()
except LockError as error:
    print(error, flush=True)
    raise SystemExit(3)
print("taken", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(path, seconds=60.0):
    """A process that holds the lock, or says why it cannot."""
    command = [sys.executable, "-c", HOLDS, str(path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def left_by(path, host, pid=1, age=0.0):
    """A lock file as somebody left it."""
    path.write_text(json.dumps({"host": host, "pid": pid, "since": "2026-01-02T03:04:05+00:00"}) + "\n")
    os.utime(path, (time.time() - age, time.time() - age))


def test_one_owner_at_a_time_who_is_named(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.owner is None and not first.is_held and not first.was_given_back
    with first:
        assert first.is_held and second.is_held and second.owner.pid == os.getpid()
        second.check()
        said = rf"in use by process {os.getpid()} on {socket.gethostname()} since 2\d+-.* \(last sign of life 0 s ago\)"
        with pytest.raises(LockError, match=said):
            second.take()
    assert not first.is_held and first.was_given_back
    with second:
        assert (tmp_path / "lock").read_text().count('"pid"') == 2
        first.check()


def test_a_dead_owner_holds_nothing_and_a_living_one_everything(tmp_path):
    process = holder(tmp_path / "lock")
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(LockError, match=f"process {process.pid} on"):
        Lock(tmp_path / "lock").take(wait=0.3)
    process.kill()
    process.wait()
    left = Lock(tmp_path / "lock")
    assert not left.is_held and not left.was_given_back and left.age < STALE
    with left:
        assert left.owner.pid == os.getpid()


def test_of_many_that_start_in_the_same_instant_one_wins(tmp_path):
    left_by(tmp_path / "lock", socket.gethostname(), pid=2**22 - 1)  # of one who died, to be taken over
    processes = [holder(tmp_path / "lock", 20.0) for _ in range(4)]
    said = [process.stdout.readline() for process in processes]
    assert said.count("taken\n") == 1
    assert sum("is in use by process" in line for line in said) == 3
    for process in processes:
        process.kill()
        process.wait()


def test_an_owner_on_another_machine_holds_it_as_long_as_it_gives_signs_of_life(tmp_path):
    path = tmp_path / "lock"
    left_by(path, "elsewhere", pid=7, age=5.0)
    assert Lock(path).is_held
    with pytest.raises(
        LockError, match=r"process 7 on elsewhere since 2026-01-02T03:04:05 UTC \(last sign of life 5 s"
    ):
        Lock(path).take()
    left_by(path, "elsewhere", age=-STALE - 1000)  # by a clock that is ahead, or this one was set back
    with pytest.raises(LockError, match=rf"sign of life 11\d\d s from now.* if it is dead, delete {path}\."):
        Lock(path).take()
    left_by(path, "elsewhere", age=STALE + 1)
    assert not Lock(path).is_held
    with Lock(path) as lock:
        assert lock.owner.host == socket.gethostname()


def test_a_lock_that_was_taken_away_is_noticed(tmp_path):
    with Lock(tmp_path / "lock") as lock:
        lock.check()
        with open(tmp_path / "lock", "a") as file:
            file.write('{"host": "elsewhere", "pid": 3, "since": "2026-01-02T03:04:05+00:00"}\n')
        with pytest.raises(LockError, match="process 3 on elsewhere"):
            lock.check()


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with Lock(tmp_path / "lock") as lock:
        os.utime(lock.path, (1000, 1000))
        until = time.monotonic() + 10
        while lock.age > STALE and time.monotonic() < until:
            time.sleep(0.05)
        assert lock.age < STALE


def test_what_a_process_started_shares_its_lock(tmp_path):
    """A kernel may outlive, for a moment, the process that watches over it, and still write into the run."""
    script = """
import subprocess, sys
from effad_lib.execution.lock import Lock
Lock(sys.argv[1], descriptor=1).take()
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, file=sys.stderr, flush=True)
sys.stdin.read()
"""
    with open(tmp_path / "log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "log")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.PIPE,
        )
    child = int(process.stderr.readline())
    process.kill()
    process.wait()
    with pytest.raises(LockError, match="in use"):
        Lock(tmp_path / "log").take(wait=0.3)
    os.kill(child, 9)
    Lock(tmp_path / "log").take(wait=10).leave()


def test_lines_that_a_kernel_printed_into_the_log_name_nobody(tmp_path):
    left_by(tmp_path / "log", "elsewhere", pid=9)
    with open(tmp_path / "log", "ab") as file:
        file.write(b"Segmentation fault \xff\n{}\n[1, 2]\n")
        for pid, since in (('"1"', '""'), ("true", '""'), ("-1", '""'), ("1" + 99 * "0", '""'), ("1", "2026")):
            file.write(f'{{"host": "{socket.gethostname()}", "pid": {pid}, "since": {since}}}\n'.encode())
        file.write(b"no end of line")
    assert Lock(tmp_path / "log").owner.pid == 9
    os.utime(tmp_path / "log", (0, 0))
    with Lock(tmp_path / "log") as lock:
        lock.check()


# --- a run folder ---------------------------------------------------------------------------------------------------


def test_one_process_at_a_time_writes_into_a_run_folder(tmp_path):
    folder = tmp_path / "run"
    process = holder(folder / RUN_LOCK)
    assert process.stdout.readline() == "taken\n"
    for _ in range(2):
        with pytest.raises(LockError, match=f"run is in use by process {process.pid} on"), alone_in(folder):
            raise AssertionError
    process.kill()
    process.wait()
    with alone_in(folder):  # at once
        assert Lock(folder / RUN_LOCK).owner.pid == os.getpid()


def test_of_several_run_folders_all_are_deleted_or_none(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders[:2]:
        folder.mkdir()
        (folder / "metrics.json").write_text("{}")
    process = holder(folders[1] / RUN_LOCK)
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(LockError, match=f"b is in use by process {process.pid} on"):
        delete_runs(folders)
    assert all((folder / "metrics.json").is_file() for folder in folders[:2])
    process.kill()
    process.wait()
    delete_runs(folders)
    assert not any(tmp_path.iterdir())


def test_the_lock_of_a_deleted_file_is_nobodys(tmp_path, monkeypatch):
    """One opens it, another deletes the folder, a third makes it anew: the first must not believe that it has it."""
    first, third, flock = Lock(tmp_path / "run" / "lock"), Lock(tmp_path / "run" / "lock"), locks.fcntl.flock

    def between(descriptor, how):
        monkeypatch.setattr(locks.fcntl, "flock", flock)
        shutil.rmtree(tmp_path / "run")
        third.take()
        flock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", between)
    with pytest.raises(LockError, match=f"run is in use by process {os.getpid()} on"):
        first.take()
    third.leave()
    with first:
        assert first.is_held


def test_a_full_disk_is_told_of_in_the_words_of_the_run(tmp_path):
    said = "OSError: [Errno 28] No space left on device: '/elsewhere/x'"
    (tmp_path / LOG).write_text(f"a cell failed\n{said}\n\nOnce more.\n")
    assert said in str(told_of_full_disk(tmp_path))
    (tmp_path / LOG).unlink()
    assert re.search(r"No space left on device \(\d+ MB free there\)", str(told_of_full_disk(tmp_path)))


def test_what_is_called_while_a_run_folder_is_held_holds_it_too_but_no_other_thread_does(tmp_path):
    def elsewhere():
        with alone_in(tmp_path):
            return True

    with ThreadPoolExecutor() as threads:
        with alone_in(tmp_path):
            for _ in range(2):
                with alone_in(f"{tmp_path}/../{tmp_path.name}"), alone_in(tmp_path / "inner"):
                    assert Lock(tmp_path / RUN_LOCK).is_held
            assert Lock(tmp_path / RUN_LOCK).is_held and Lock(tmp_path / "inner" / RUN_LOCK).was_given_back
            with pytest.raises(LockError, match=f"in use by process {os.getpid()} on"):
                threads.submit(elsewhere).result()
        assert Lock(tmp_path / RUN_LOCK).was_given_back and threads.submit(elsewhere).result()
    with pytest.raises(ValueError, match="mine"), alone_in(tmp_path):
        raise ValueError("mine")
    assert Lock(tmp_path / RUN_LOCK).was_given_back


def test_a_run_folder_in_which_nothing_can_be_written_is_refused_by_name(tmp_path, monkeypatch, full_disk):
    open_files = len(os.listdir("/dev/fd"))
    with full_disk(10), pytest.raises(RunError, match=rf"cannot write {tmp_path}/\.lock"), alone_in(tmp_path):
        raise AssertionError
    with alone_in(tmp_path):  # it was not kept
        pass

    def read_only(path, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as disk:
        disk.setattr(os, "open", read_only)
        with (
            pytest.raises(RunError, match=r"cannot write .*\.lock: Read-only file system\. Choose"),
            alone_in(tmp_path),
        ):
            raise AssertionError
    assert len(os.listdir("/dev/fd")) == open_files


def test_without_locks_of_the_file_system_signs_of_life_keep_processes_apart(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    left_by(tmp_path / RUN_LOCK, socket.gethostname(), pid=os.getppid())
    with pytest.raises(LockError, match=f"process {os.getppid()} on"), alone_in(tmp_path):
        raise AssertionError
    left_by(tmp_path / RUN_LOCK, socket.gethostname(), pid=2**22 - 1)  # killed
    for _ in range(2):
        with alone_in(tmp_path), alone_in(tmp_path):
            assert Lock(tmp_path / RUN_LOCK).is_held
