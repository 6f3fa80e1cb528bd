"""A sweep as a page: means beside the published figures, every run with links to its notebooks, what differs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from effad_lib.charts import plot_table
from effad_lib.plots import as_png
from effad_lib.reports import STYLE, beside_published
from effad_lib.runs import write_bytes, write_text
from effad_lib.sweeps.plan import Sweep, SweepRun
from effad_lib.sweeps.results import evaluated, links, means, shown

LISTED = ("run", "state", "image_auroc", "au_pro", "seconds", "device", "error")


def heat_table(table: pd.DataFrame, column: str = "auroc") -> pd.DataFrame:
    """Return a column of the table of `means` as data sets × everything else that varies."""
    rest = [name for name in table.index.names if name != "data"]
    wide = table[column].groupby(level=table.index.names, sort=False, dropna=False).mean().unstack(rest)
    if isinstance(wide.columns, pd.MultiIndex):
        wide.columns = [", ".join(str(part) for part in parts if part == part) for parts in wide.columns]
    return wide.reindex(dict.fromkeys(table.index.get_level_values("data")))


def write_page(sweep: Sweep, done: Sequence[SweepRun], rows: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write `report.html` into the folder of a sweep, beside it `heat.png`, and return its path.

    done: its finished runs; rows: for each run its row of the summary.
    """
    measured = evaluated(done)
    parts = [f"<h1>{html.escape(sweep.name)}</h1>"]
    states = [row["state"] for row in rows.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    parts.append(f"<p>{len(rows)} runs: {counts}</p>")
    if measured:
        table = means(measured)
        parts.append(
            f"<h2>Means over seeds</h2>{shown(table).reset_index().to_html(border=0, index=False, na_rep='–')}"
        )
        figure = plot_table(heat_table(table), "image AU-ROC", scale=(0.5, 1.0))
        write_bytes(sweep.folder / "heat.png", as_png(figure))
        parts.append('<h2>Image AU-ROC, mean over seeds</h2><img src="heat.png" alt="Image AU-ROC, mean over seeds">')
    parts.append(f"<h2>Runs</h2>{_runs(sweep, rows)}")
    if measured:
        compared = html.escape(beside_published([run.folder for run in measured]))
        parts.append(f"<h2>Beside the published figures</h2><pre>{compared}</pre>")
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(sweep.name)}</title><style>{STYLE}</style>'
    return write_text(sweep.folder / "report.html", page + "".join(parts) + "\n")


def _runs(sweep: Sweep, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Every run as a line of an HTML table, with links to its notebooks and its page."""
    linked = links(sweep.folder, sweep.runs)
    lines = ["".join(f"<th>{name}</th>" for name in (*LISTED, "notebooks"))]
    for name, row in rows.items():
        values = [row.get(column) for column in LISTED]
        cells = [f"<td>{html.escape(_shown(value))}</td>" for value in values]
        names = [f'<a href="{html.escape(path)}">{html.escape(Path(path).stem)}</a>' for path in linked[name]]
        lines.append("".join([*cells, f"<td>{' · '.join(names)}</td>"]))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return (
        f"{value:.3f}"
        if isinstance(value, float) and value < 10
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
