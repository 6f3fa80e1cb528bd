"""Who works in a folder: a lock with owner and age that dies with its owner."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from effad_lib.documents import Takes, fault, is_text, is_whole, open_plain
from effad_lib.runs import RunError, resolve, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HEARTBEAT, STALE = 10.0, 120.0
"""Seconds between signs of life, and after how many without one an owner on another machine counts as dead.

The clocks of machines that share a folder must agree to within a minute."""

RUN_LOCK = ".lock"
"""The lock of a run folder, held by whoever trains, distils or measures in it."""


OWNER: Takes = {
    "host": (is_text, "a name"),
    "pid": (lambda value: is_whole(value, 1, 2**31 - 1), "the number of a process"),
    "since": (is_text, "a time"),
}
"""What an owner's line in a lock says. Of the numbers 0 and below every system makes groups of processes."""


class LockError(RunError):
    """A folder that somebody else works in; the message names who, since when, and the remedy."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: machine, process and the time at which it was taken (UTC)."""

    host: str
    pid: int
    since: str

    def __post_init__(self) -> None:
        if wrong := fault(asdict(self), OWNER):
            raise ValueError(f"the owner of a lock {wrong}")

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat())

    @property
    def is_alive(self) -> bool:
        """Whether there is such a process; on another machine that cannot be asked, and it is taken to be."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class Lock:
    """A file that one process at a time may hold, in a folder that several machines may share.

    Its lines are the owners, the last of them the one who holds it or held it last; its time is the owner's last sign
    of life, 1970 once it was given back. What decides is the system's lock on the open file (`flock`): taking it is one
    act, even for two in the same instant, and it ends with its owner, however that dies. Where a shared file system
    does not tell other machines of it, the signs of life do.

    `descriptor` is the file where it is open already. It may then be a process's standard output: whatever that
    process starts shares the lock, and it is free only when the last of them, a kernel say, has ended.
    """

    def __init__(self, path: str | Path, descriptor: int | None = None) -> None:
        self.path, self.descriptor = Path(path), descriptor
        self._opened = descriptor is None
        self._owner: Owner | None = None
        self._enforced = True
        self._over = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def owner(self) -> Owner | None:
        """Who holds the lock, or held it last."""
        with contextlib.suppress(OSError), open_plain(self.path) as file:
            for line in reversed(file.read().decode("utf-8", errors="replace").splitlines()):
                # A line that something else wrote into a log is passed by.
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    return Owner(**json.loads(line))
        return None

    @property
    def age(self) -> float:
        """Seconds since the last sign of life; infinite if there was none, or if the lock was given back.

        Below zero if the clock of another machine is ahead, or if this one's was set back.
        """
        try:
            with open_plain(self.path) as file:  # opening it makes a network file system ask for its true time
                changed = os.fstat(file.fileno()).st_mtime
        except OSError:
            return math.inf
        return time.time() - changed if changed > 1 else math.inf

    @property
    def was_given_back(self) -> bool:
        """Whether its last owner gave it back, and did not die with it."""
        return self.path.exists() and math.isinf(self.age)

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it, as far as signs of life tell; taking it is the only way to be sure."""
        return self.age < STALE and (owner := self.owner) is not None and owner.is_alive

    def take(self, wait: float = 0.0) -> Self:
        """Take the lock, waiting for it up to so many seconds; raise `LockError` if somebody else still holds it, and
        `RunError` if it cannot be written."""
        if fcntl is None:
            raise RunError("this needs the file locks of Linux or macOS, which this system does not have.")
        try:
            until = time.monotonic() + wait
            while not self._try():
                if time.monotonic() >= until:
                    raise LockError(self._refusal())
                time.sleep(0.2)
            owner = Owner.here()
            line = f"\n{json.dumps(asdict(owner))}\n".encode()  # on a line of its own, whatever was printed before
            if os.write(self.descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._owner, self._over = owner, threading.Event()
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()
            if not self._enforced:  # somebody else may have done the same just now: the last one has it
                time.sleep(1.0)
                self.check()
        except OSError as error:
            self.leave()
            raise unwritable(self.path, error) from error
        except BaseException:
            self.leave()
            raise
        return self

    def _try(self) -> bool:
        """Get the system's lock, unless the signs of life say that somebody on another machine holds the file.

        That of a file which was deleted meanwhile, and perhaps made anew, is worth nothing.
        """
        self._open()
        self._enforced = enforced = True
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            self._enforced = enforced = False  # a file system without such locks
        if not self._is_there():
            return False
        owner = self.owner
        if owner is None or self.age >= STALE:
            return True
        if owner.host == socket.gethostname():
            return enforced or not owner.is_alive
        if enforced:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return False

    def _open(self) -> None:
        """Open the file anew, unless its descriptor was given."""
        if not self._opened:
            return
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # No link is followed: the file that it leads to is not ours to write.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self.descriptor = os.open(self.path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise OSError("it is no plain file")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refusal(self) -> str:
        owner, age = self.owner, self.age
        if owner is None:
            return f"{self.path.parent} is in use by another process. Wait for it, or stop it."
        who = f"{self.path.parent} is in use by process {owner.pid} on {owner.host} since {owner.since[:19]} UTC"
        if age < -STALE:
            return (
                f"{who} (last sign of life {-age:.0f} s from now, so by another clock). Wait for it, or stop it; if it "
                f"is dead, delete {self.path}."
            )
        return (
            f"{who} (last sign of life {max(0.0, age):.0f} s ago). Wait for it, or stop it; a dead one on another "
            f"machine lets go after {STALE:.0f} s."
        )

    def check(self) -> None:
        """Raise `LockError` if somebody took the lock away, as one may who believed this process dead."""
        if self._owner is not None and self.owner != self._owner:
            raise LockError(self._refusal())

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)

    def leave(self) -> None:
        """Give the lock back; what was started with it as its output may still hold it until it has ended."""
        self._over.set()
        if self._beating is not None:  # no sign of life may follow
            self._beating.join()
            self._beating = None
        if self.descriptor is not None:
            if self._owner is not None and self.owner == self._owner:
                with contextlib.suppress(OSError):
                    os.utime(self.descriptor, (0, 0))
            if self._opened:
                os.close(self.descriptor)
                self.descriptor = None
        self._owner = None

    def __enter__(self) -> Self:
        return self.take() if self._owner is None else self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()


_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a run folder while something writes into it; what is called meanwhile holds it too.

    Raises `LockError` while another process, or another thread of this one, holds it, and `RunError` for a folder in
    which nothing can be written. What only reads a run does not ask.
    """
    folder = resolve(folder)
    if folder in _held.get():
        yield
        return
    with Lock(folder / RUN_LOCK):
        before = _held.set(_held.get() | {folder})
        try:
            yield
        finally:
            _held.reset(before)
