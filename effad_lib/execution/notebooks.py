"""One notebook through papermill into a run folder, and the mark by which it is known to be done."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effad_lib.progress import progress
from effad_lib.runs import RunError, from_project, write_text


@dataclass(frozen=True)
class Task:
    """One notebook to execute: its source, its run folder, what papermill injects, and the record that marks it done.

    record: what makes an executed notebook out of date when it changes; steps: of its training, 0 if it is none.
    """

    source: Path
    folder: Path
    parameters: dict[str, Any]
    record: dict[str, Any]
    steps: int = 0

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return self.folder / self.source.name

    @property
    def done(self) -> bool:
        """Whether the notebook was executed to its end with this record."""
        return executed_metadata(self.output, "effad") == self.record


def executed_metadata(output: Path, name: str) -> dict[str, Any] | None:
    """Return what the metadata of a notebook have under a name; None if nothing, or if it is no notebook.

    Names are "effad", the record of one that was executed to its end, and "papermill", what the execution took.
    """
    try:
        executed = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    metadata = executed.get("metadata") if isinstance(executed, dict) else None
    found = metadata.get(name) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else None


def source_hash(notebook: Path) -> str:
    """Return the SHA-256 of what a notebook's cells say; outputs and metadata do not count."""
    content = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


WHOLE = "whole://"
"""What papermill writes to a path that begins so is `_WholeFiles`'."""


class _WholeFiles:
    """Files that papermill writes whole or not at all: it saves the notebook after each cell."""

    def write(self, text: str, path: str) -> None:
        write_text(path.removeprefix(WHOLE), text)

    def pretty_path(self, path: str) -> str:
        return path.removeprefix(WHOLE)


@functools.cache
def _register(papermill: Any) -> None:
    """Tell papermill of `WHOLE`, once."""
    papermill.iorw.papermill_io.register(WHOLE, _WholeFiles())


def import_papermill() -> Any:
    """Return papermill; raises `RunError` that names the remedy if it is not installed."""
    try:
        import papermill
    except ImportError as error:
        raise RunError('running notebooks needs papermill and Jupyter: pip install "effad[notebooks]"') from error
    _register(papermill)
    return papermill


def execute(task: Task, title: str) -> None:
    """Execute one notebook and mark it as done: only then has it the record. Raises `RunError` if it fails."""
    papermill = import_papermill()
    # Else every kernel greets with a page of debugger warnings.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    task.folder.mkdir(parents=True, exist_ok=True)
    where = from_project(task.output)
    kept = "What was finished before is kept: start again to continue."
    record = task.record
    try:
        with _ticking(title, task):
            notebook = papermill.execute_notebook(
                task.source,
                f"{WHOLE}{task.output}",
                task.parameters,
                progress_bar=False,
                cwd=task.source.parent,
                start_timeout=180,
                extra_arguments=["--log-level=50"],  # the kernel's own log would end up between our lines
            )
    except papermill.PapermillExecutionError as error:
        cell = f"cell {error.cell_index + 1}"
        raise RunError(f"{where}: {cell} failed with {error.ename}: {error.evalue}\n{kept}") from error
    except KeyboardInterrupt:
        # The cell that was waited for is left unfinished, of which asyncio would complain at the end.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise KeyboardInterrupt(f"stopped in {task.source.stem}. {kept}") from None
    except (OSError, RuntimeError) as error:
        # A full disk, or a kernel that does not start or dies (short of memory).
        raise RunError(f"{where}: {error or type(error).__name__}\n{kept}") from error
    notebook.metadata["effad"] = record
    notebook.metadata["papermill"] |= {"input_path": from_project(task.source), "output_path": where}
    write_text(task.output, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _ticking(title: str, task: Task) -> Iterator[None]:
    """Show on a terminal that a notebook is running, a training with the steps that its history has reached."""
    over = threading.Event()
    steps = task.steps or None
    bar = progress(total=steps, desc=title, leave=False, disable=None, bar_format=None if steps else "{desc} {elapsed}")

    def tick() -> None:
        while not over.wait(1.0):
            bar.n = min(last_step(task.folder / "history.csv"), task.steps)
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.close()


def last_step(history: Path) -> int:
    """Return the last step that a `history.csv` tells of; 0 if there is none."""
    try:
        return int(history.read_text(encoding="utf-8").splitlines()[-1].split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0
