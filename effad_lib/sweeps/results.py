"""What a sweep has found: a row for each run, means over seeds beside the published figures, what it took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from effad_lib.provenance import provenance_of
from effad_lib.published import published
from effad_lib.reports import COMPARED, EVALUATED, across
from effad_lib.runs import Run, write_csv
from effad_lib.sweeps.cost import Spent
from effad_lib.sweeps.plan import Sweep, SweepRun
from effad_lib.sweeps.state import progress_of

MADE_WITH = ("device", "commit", "changed", "effad", "python", "torch", "data", "teacher")
"""Of the run's provenance, what the summary shows."""

SHOWN_AS = {"data": "data_sha256", "teacher": "teacher_sha256"}
"""Hashes, named so where `data` is a name and `teacher` may be a parameter."""


def summary_row(sweep: Sweep, run: SweepRun, state: str) -> dict[str, Any]:
    """Return what is known of a run: name, state, what sets it apart, metrics, seconds, provenance, notebook, error.

    `seconds` are those of all its notebooks, `training_seconds` of its steps alone, whatever interrupted them.
    """
    row: dict[str, Any] = {"run": run.name, "state": state, **run.varied}
    metrics = Run(run.folder).metrics if state == "done" else {}
    plain = {
        name: value for name, value in metrics.items() if name != "seconds" and not isinstance(value, (list, dict))
    }
    row = dict.fromkeys(["run", "state", *run.varied, "data", "size", *COMPARED]) | plain | row
    row |= {"seconds": Spent.of(run).seconds if state == "done" else None, "training_seconds": metrics.get("seconds")}
    made = (provenance_of(run.folder) or [{}])[-1]
    row |= {SHOWN_AS.get(name, name): made.get(name) for name in MADE_WITH}
    there = [step.output for step in run.steps if step.output.is_file()]
    row["notebook"] = there[-1].relative_to(sweep.folder).as_posix() if there else None
    row["error"] = progress_of(run, state).note if state == "failed" else None
    return row


def write_summary(sweep: Sweep, rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Write `summary.csv` into the folder of a sweep, whole or not at all, and return it as a table."""
    table = pd.DataFrame(list(rows))
    write_csv(sweep.folder / "summary.csv", table)
    return table


def evaluated(runs: Iterable[SweepRun]) -> list[SweepRun]:
    """Return those of some finished runs that are evaluated trainings, which can be compared with others."""
    there = [run for run in runs if (run.folder / "parameters.yaml").is_file()]
    return [run for run in there if set(EVALUATED) <= Run(run.folder).metrics.keys()]


# --- means over seeds -----------------------------------------------------------------------------------------------


def groups(runs: Iterable[SweepRun]) -> dict[tuple[tuple[str, Any], ...], list[SweepRun]]:
    """Return the runs that differ in nothing but their seed, by what they have in common."""
    found: dict[tuple[tuple[str, Any], ...], list[SweepRun]] = {}
    for run in runs:
        common = tuple((name, _plain(value)) for name, value in run.varied.items() if name != "seed")
        found.setdefault(common, []).append(run)
    return found


def _plain(value: Any) -> Any:
    return "×".join(map(str, value)) if isinstance(value, list) else value


def means(runs: Sequence[SweepRun]) -> pd.DataFrame:
    """Return mean and deviation over seeds, a row for each data set and each set of settings, beside published figures.

    runs: finished ones, with an evaluation. Index: what differs between the rows (`data` and `size` always), then
    columns `runs`, `auroc`, `auroc_deviation`, `au_pro`, `au_pro_deviation`, `reproduced_auroc` and `reproduced_au_pro`
    (the best-known public reproduction of this category), `paper_auroc` (its mean over all categories), `minutes` (of
    a run) and `training_minutes`. The image AU-ROC of MVTec LOCO is the mean of its logical and structural one, as in
    the paper. Rows that are the mean of several categories have `data` such as "mean of 15 × mvtec_ad".
    """
    rows = []
    for common, members in groups(runs).items():
        folders = [run.folder for run in members]
        measured, first = across(folders).iloc[0], Run(folders[0]).metrics
        name = _auroc(first)
        row = {"data": first["data"], "size": first["size"], **{n: v for n, v in common if n not in _NAMED}}
        row |= {"runs": len(members)} | _pair("auroc", measured, name) | _pair("au_pro", measured, _au_pro(first))
        rows.append(row | _published(first["data"], first["size"]) | _minutes(members))
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    index = [
        name for name in table.columns if name in ("data", "size") or name in {n for c in groups(runs) for n, _ in c}
    ]
    table = pd.concat([table, pd.DataFrame(_category_means(runs, index))], ignore_index=True)
    if "case" in index and table["case"].equals(table["size"]):
        index.remove("case")  # cases that stand for the sizes
    return table.set_index(index).drop(columns="case", errors="ignore")


_NAMED = ("category", "dataset", "size", "product")
"""What `data` and `size` of the metrics say already."""


def _auroc(metrics: dict[str, Any]) -> str:
    return "image_auroc_mean" if metrics.get("image_auroc_mean") is not None else "image_auroc"


def _au_pro(metrics: dict[str, Any]) -> str:
    return "au_spro_05_mean" if metrics.get("au_spro_05_mean") is not None else "au_pro"


def _pair(called: str, measured: pd.Series, name: str) -> dict[str, float]:
    mean, deviation = (measured.get((name, part), math.nan) for part in ("mean", "deviation"))
    return {called: mean, f"{called}_deviation": deviation}


def _published(data: str, size: str) -> dict[str, float]:
    figures, (dataset, _, category) = published(data, size), data.partition("/")
    found = {"reproduced_auroc": math.nan, "reproduced_au_pro": math.nan, "paper_auroc": math.nan}
    for source, row in figures.iterrows():
        if source.startswith("best-known") and source.endswith(category):
            found |= {"reproduced_auroc": row["image_auroc"], "reproduced_au_pro": row["au_pro"]}
        if source.endswith(f"mean of all categories of {dataset}"):
            found["paper_auroc"] = row.get("image_auroc_mean", row.get("image_auroc", math.nan))
    return found


def _minutes(runs: Sequence[SweepRun]) -> dict[str, float]:
    trained = [Run(run.folder).metrics.get("seconds") or math.nan for run in runs]
    whole = [Spent.of(run).seconds for run in runs]
    return {"minutes": float(np.mean(whole)) / 60, "training_minutes": float(np.mean(trained)) / 60}


def _category_means(runs: Sequence[SweepRun], index: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each data set of several categories and each set of settings: the mean over its categories.

    As in the paper, the categories are averaged for each seed and the deviation is that between seeds. Seeds that lack
    a category are left out.
    """
    found: dict[tuple, dict[int, dict[str, dict[str, Any]]]] = {}
    for run in runs:
        metrics = Run(run.folder).metrics
        dataset = metrics["data"].partition("/")[0]
        rest = tuple((n, _plain(v)) for n, v in run.varied.items() if n in index and n not in ("data", "size"))
        seed = run.training.seed if run.training else 0
        found.setdefault((dataset, metrics["size"], rest), {}).setdefault(seed, {})[metrics["data"]] = metrics
    rows = []
    for (dataset, size, rest), seeds in found.items():
        everything = {data for categories in seeds.values() for data in categories}
        whole = [list(categories.values()) for categories in seeds.values() if len(categories) == len(everything)]
        if len(everything) < 2 or not whole:
            continue
        row = {"data": f"mean of {len(everything)} × {dataset}", "size": size, **dict(rest)}
        row["runs"] = len(everything) * len(whole)
        for called, name in (("auroc", _auroc), ("au_pro", _au_pro)):
            by_seed = [
                np.mean([m[name(m)] if m.get(name(m)) is not None else math.nan for m in metrics]) for metrics in whole
            ]
            row[called] = float(np.mean(by_seed))
            row[f"{called}_deviation"] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else math.nan
        rows.append(row | _published(f"{dataset}/15 categories", size))
    return rows


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `means` for people: "0.912 ± 0.004", empty columns left out, "–" for what is not known."""
    if table.empty:
        return table
    result = pd.DataFrame({"runs": table["runs"]}, index=table.index)
    for name, title in (("auroc", "image AU-ROC"), ("au_pro", "AU-PRO")):
        pairs = zip(table[name], table[f"{name}_deviation"], strict=True)
        result[title] = [_figure(mean) + ("" if math.isnan(spread) else f" ± {spread:.3f}") for mean, spread in pairs]
    titles = {
        "reproduced_auroc": "public reproduction",
        "reproduced_au_pro": "its AU-PRO",
        "paper_auroc": "paper, mean of all categories",
    }
    for name, title in titles.items():
        if table[name].notna().any():
            result[title] = table[name].map(_figure)
    result["minutes a run"] = table["minutes"].map(lambda minutes: "–" if math.isnan(minutes) else f"{minutes:.1f}")
    return result


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def links(folder: Path, runs: Iterable[SweepRun]) -> dict[str, list[str]]:
    """Return for each run the paths, as seen from `folder`, of its executed notebooks and of its page."""
    found = {}
    for run in runs:
        paths = [*(step.output for step in run.steps), run.folder / "report.html"]
        found[run.name] = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return found
