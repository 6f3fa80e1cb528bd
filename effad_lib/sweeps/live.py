"""A sweep while it runs: a table that is drawn anew in place, or a line for each change where there is no terminal."""

from __future__ import annotations

import html
import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from effad_lib.runs import printable
from effad_lib.sweeps.state import STATES, Progress

EVERY_NOTEBOOK, EVERY_TERMINAL = 5.0, 1.0
"""Seconds between two drawings: a notebook's front end drops what it cannot keep up with."""

COLUMNS = ("run", "state", "progress", "remaining", "loss", "")


class Live:
    """The table of a sweep, in whatever the process writes to."""

    def __init__(self, title: str) -> None:
        self.title, self._lines, self._last, self._states = title, 0, -math.inf, {}
        self._handle: Any = None
        self.where = "notebook" if _in_notebook() else "terminal" if sys.stdout.isatty() else "lines"

    def draw(self, progress: Mapping[str, Progress], left: float = math.nan, *, last: bool = False) -> None:
        """Show how far all runs have come, by name; `left` are seconds for all. Most calls return at once."""
        if self.where == "lines":
            return self._print_changes(progress)
        every = EVERY_NOTEBOOK if self.where == "notebook" else EVERY_TERMINAL
        if not last and time.monotonic() - self._last < every:
            return None
        self._last = time.monotonic()
        if self.where == "notebook":
            return self._show(as_html(self.title, progress, left))
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in as_lines(self.title, progress, left, rows=max(3, height - 4))]
        print(f"\x1b[{self._lines}F" * bool(self._lines) + "\x1b[J" + "\n".join(lines), flush=True)
        self._lines = len(lines)
        return None

    def _print_changes(self, progress: Mapping[str, Progress]) -> None:
        done = sum(one.state in ("done", "failed") for one in progress.values())
        for name, one in progress.items():
            if self._states.get(name, one.state) != one.state:
                note = f": {printable(one.note)}" if one.note else ""
                print(f"[{done}/{len(progress)}] {name} {one.state}{note}", flush=True)
        self._states = {name: one.state for name, one in progress.items()}

    def _show(self, page: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(page), display_id=True)
        else:
            self._handle.update(HTML(page))


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """Return "12 s", "3 min" or "2 h 05 min"; "" if it is not known."""
    if math.isnan(seconds):
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def headline(title: str, progress: Mapping[str, Progress], left: float = math.nan) -> str:
    """Return how many runs are in which state, and how long it will take."""
    counts = {state: sum(one.state == state for one in progress.values()) for state in STATES}
    counted = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{title}: {len(progress)} runs, {counted}{f'; about {duration(left)} left' if duration(left) else ''}"


def cells(name: str, one: Progress) -> list[str]:
    """Return the cells of a run's row, as in `COLUMNS`."""
    step = one.steps if one.state == "done" else one.step
    reached = f"{step:,}/{one.steps:,}" if one.steps and one.state != "waiting" else ""
    loss = "" if math.isnan(one.loss) else f"{one.loss:.3f}"
    return [name, one.state, reached, duration(one.left), loss, printable(one.note)]


def as_lines(title: str, progress: Mapping[str, Progress], left: float = math.nan, *, rows: int = 40) -> list[str]:
    """Return the table as lines of text, at most so many rows: what runs and what failed first."""
    order = ("running", "failed", "stopped", "waiting", "done")
    ranked = sorted(progress.items(), key=lambda item: order.index(item[1].state))
    table = [list(COLUMNS), *(cells(name, one) for name, one in ranked[:rows])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    more = len(progress) - rows
    return [headline(title, progress, left), *lines, *([f"… and {more} more"] if more > 0 else [])]


def as_html(title: str, progress: Mapping[str, Progress], left: float = math.nan) -> str:
    """Return the table as HTML, everything in it escaped."""
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(name, one))}</tr>"
        for name, one in progress.items()
    )
    return f"<p>{html.escape(headline(title, progress, left))}</p><table><tr>{head}</tr>{rows}</table>"
