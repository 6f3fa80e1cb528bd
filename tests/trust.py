"""What the tests of trust share: a refusal is one of our own errors, and nothing is written by what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import PIL
import pytest

from effad_lib.cli import main

CELL = """run_folder = "runs/one"
dataset = "folder"
rate = 1e-3
steps = 10
sizes = [64, 64]
seed = 0
text = ""
flag = False
"""


YCBCR = (
    "image mode YCbCr is not supported" if int(PIL.__version__.split(".")[0]) >= 13 else "cannot be read as an image"
)
"""What is said of a TIFF in YCbCr: before version 13 Pillow took its own for RGB, and could not decode it."""

BROKEN = {  # contents of a file that should hold names with values in JSON
    "empty": b"",
    "cut": b'{"image_auroc": 0.9, "data',
    "words": b"metrics",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "NaN": b'{"image_auroc": NaN}',
    "a huge number": b'{"image_auroc": 1' + b"0" * 400 + b"}",
    "a number beyond all": b'{"image_auroc": 1e400}',
    "half a character": b'{"data": "\\ud800"}',
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
}


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def is_ours(error: BaseException) -> bool:
    """Whether an error was written for people: the command line prints these without a traceback."""
    return type(error).__module__.startswith("effad_lib")


def refused(work: Callable[[], Any], says: str) -> str:
    """Do what must be refused by an error of ours that matches `says`, and return its message."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        work()
    assert is_ours(caught.value), f"{type(caught.value).__name__} of another library: {caught.value}"
    assert re.search(says, str(caught.value), re.DOTALL), f"{says!r} is not in: {caught.value}"
    return str(caught.value)


def command_refused(capsys: pytest.CaptureFixture[str], arguments: list[object], says: str) -> str:
    """Give a command that must end with exit code 2 and one of our messages, without a traceback; return it."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said, said
    assert re.search(rf"^effad: .*(?:{says})", said, re.DOTALL | re.MULTILINE), f"{says!r} is not in: {said}"
    return said


def fixed(*arguments: object) -> bool:
    """Let nobody, root neither, change what is in folders ("+i"), or let them again ("-i"); False where that fails."""
    return bool(shutil.which("chattr")) and not subprocess.run(["chattr", *arguments], capture_output=True).returncode


def files(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their names, with their content: to see that nothing was written."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def notebook_folder(parent: Path) -> Path:
    """Make a folder with one notebook of a few parameters and empty ones for profiles and sweeps; return it."""
    folder = parent / "notebooks"
    for kind in ("profiles", "sweeps"):
        (folder / kind).mkdir(parents=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})])
    nbformat.write(notebook, folder / "one.ipynb")
    return folder
