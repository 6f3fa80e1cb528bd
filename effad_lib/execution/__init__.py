"""Notebooks through papermill: one after the other, and a run in a process of its own with a lock on its folder.

It needs neither torch nor Jupyter to be imported: beside every kernel of a sweep there is a process that watches over
it, and these should be small.
"""

from effad_lib.execution.lock import Lock, LockError, Owner, alone_in
from effad_lib.execution.notebooks import Task, execute, import_papermill, last_step, source_hash

__all__ = ["Lock", "LockError", "Owner", "Task", "alone_in", "execute", "import_papermill", "last_step", "source_hash"]
