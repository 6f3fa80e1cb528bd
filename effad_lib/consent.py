"""Which files of code the user has named: what a run, a profile or a sweep names is data, and is not executed unasked.

A data set of one's own, "path/to/file.py:name", is a Python file. Whoever gives that string to a command or a function
has named the file; the settings stored in a run, which may come from anywhere, have not.
"""

from __future__ import annotations

import os
from pathlib import Path

from effad_lib.runs import from_project, resolve

NAMED = "EFFAD_DATA_FILES"
"""The environment variable that lists the named files: processes and kernels that are started from here inherit it."""


class ConsentError(ValueError):
    """Code that would be executed although the user has not named its file; the message names it and the remedy."""


def allow(file: str | Path) -> None:
    """Let runs, profiles and sweeps execute this Python file of data sets, in this process and those it starts."""
    named = os.environ.get(NAMED, "").split(os.pathsep)
    if (name := from_project(resolve(file))) not in named:
        os.environ[NAMED] = os.pathsep.join([*filter(None, named), name])


def check_named(dataset: str) -> None:
    """Raise `ConsentError` for a data set "path/to/file.py:name" whose file the user has not named, see `allow`."""
    if ".py:" not in dataset:
        return
    path = resolve(dataset.rpartition(":")[0])
    if from_project(path) not in os.environ.get(NAMED, "").split(os.pathsep):
        raise ConsentError(
            f"data set {dataset!r} is code, {path}, which was named by a file and not by you, so it is not executed. "
            f"Read it; if you trust it, name it: --data-file {from_project(path)}, or in Python "
            f"effad_lib.consent.allow({from_project(path)!r})."
        )
