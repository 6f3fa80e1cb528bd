"""What a run found as a page of tables and figures, and several runs beside each other and the published figures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from effad_lib import plots
from effad_lib.batch import departures
from effad_lib.evaluation import MAP_NAMES, Evaluation, told_data, worst_mistakes
from effad_lib.images import Size, load_images
from effad_lib.published import PUBLISHED_DATA, published
from effad_lib.runs import Run, RunError, from_project, printable, resolve, write_bytes, write_text
from effad_lib.settings import SettingsError
from effad_lib.training import TrainingSettings

COMPARED = ("image_auroc", "image_ap", "pixel_auroc", "au_pro", "au_pro_05", "image_auroc_mean", "au_spro_05_mean")
"""Metrics of `metrics.json` that runs are compared by; the last two exist for MVTec LOCO only."""

EVALUATED = ("image_auroc", "data", "size")
"""What `metrics.json` of every evaluation has."""

STYLE = (
    "body{font:15px sans-serif;max-width:960px;margin:2em auto}img{max-width:100%}"
    "td,th{padding:2px 10px;text-align:right}pre{overflow-x:auto}"
)


def gallery(found: Evaluation, indices: Sequence[int], image_size: Size) -> Figure:
    """Some test images with their truth and their three maps, all maps on the one scale of the detector.

    indices: of the images in `found`, at least one; image_size: (height, width) in which they are drawn.
    """
    indices = [int(index) for index in indices]
    images = load_images([found.samples[index].image for index in indices], image_size, levels=found.levels)
    maps = {n.replace("_", "–"): [getattr(found.maps, n)[index] for index in indices] for n in MAP_NAMES}
    titles = [f"{found.samples[index].defect}\n{found.scores[index].round(2) + 0.0:.2f}" for index in indices]
    masks = [found.mask(index) for index in indices]
    masks = [] if all(mask is None for mask in masks) else masks
    scale = plots.heat_scale(found.maps.combined, found.threshold)
    return plots.plot_heatmaps(images, masks, maps, titles, scale=scale, threshold=found.threshold)


def figures(found: Evaluation, image_size: Size) -> Iterable[tuple[str, str, Figure]]:
    """Yield name, caption and figure of all that can be drawn, one after the other; close each when it is saved."""
    defects = [sample.defect for sample in found.samples]
    positive = bool((found.scores > 0).all())
    caption = "Scores by type of defect, with the threshold from held-out good images"
    yield "scores", caption, plots.plot_score_distribution(found.scores, defects, found.threshold, log_scale=positive)
    if len(set(found.labels.tolist())) == 2:
        yield "roc", "ROC curve of the images", plots.plot_roc(found.scores, found.labels)
    if curve := found.pro_curve():
        yield "pro_curve", "Overlap with the regions", plots.plot_pro_curve(*curve, found.metrics()["au_pro"])
    if found.threshold is not None:
        misses, false_alarms = worst_mistakes(found.scores, found.labels, found.threshold, count=5)
        if len(misses):
            yield "misses", "The worst misses: defective, and scored lowest", gallery(found, misses, image_size)
        if len(false_alarms):
            caption = "The worst false alarms: good, and scored highest"
            yield "false_alarms", caption, gallery(found, false_alarms, image_size)


def write_report(folder: str | Path, found: Evaluation, image_size: Size, result: Mapping[str, Any]) -> Path:
    """Write `report.html` with all tables, and `figures/`, into a run folder; return the page's path.

    result: what `finish_run` returned, which must have written it there too: the page compares the folder's evaluation
    with the published ones. It needs nothing but the figures beside it. Raises `RunError` as `across`.
    """
    folder = resolve(folder)
    beside = html.escape(beside_published([folder]))
    data = html.escape(str(result["data"]))
    parts = [f"<h1>{data}</h1>", *(f"<p>{html.escape(note)}</p>" for note in found.notes)]
    values = {name: value for name, value in result.items() if name != "data"}
    tables = {
        "Metrics": pd.Series(values, dtype=object).map(_shown).to_frame(""),
        "Decisions: the rows with F1-max have seen the test set": found.decisions(),
        "Confusion at the threshold": found.confusion(),
        "Each type of defect against all good images": found.by_defect(),
        "Image AU-ROC of each map alone": found.by_branch(),
    }
    for title, table in tables.items():
        if len(table):
            parts.append(
                f"<h2>{title}</h2>{table.rename_axis(None).to_html(border=0, na_rep='–', float_format='{:.3f}'.format)}"
            )
    for name, caption, figure in figures(found, image_size):
        write_bytes(folder / "figures" / f"{name}.png", plots.as_png(figure))
        parts.append(f'<h2>{html.escape(caption)}</h2><img src="figures/{name}.png" alt="{html.escape(caption)}">')
    parts.append(f"<h2>Beside the published figures</h2><pre>{beside}</pre>")
    page = f'<!doctype html><meta charset="utf-8"><title>{data}</title><style>{STYLE}</style>{"".join(parts)}\n'
    return write_text(folder / "report.html", page)


def across(folders: Iterable[str | Path]) -> pd.DataFrame:
    """Return mean and deviation over seeds: a row for each data set and each set of settings that differ in more.

    Rows are named by data, size and the settings in which the runs given differ, and by where the data lie if other
    data of the same name are among them: the name of a folder is not the data. Columns: `runs` (count), and for each
    metric that a run has, and for the image AU-ROC in any case, a pair (mean, deviation); the deviation is the
    sample's, missing for a single run. Raises `RunError` for a folder that holds no evaluation.
    """
    made = _parameters(folders)
    differ = {
        name for one in made.values() for name in one if len({str(other.get(name)) for other in made.values()}) > 1
    }
    differ -= {"run_folder", "seed", "device", "data_root", "dataset", "category", "size"}
    metrics = {folder: Run(folder).metrics for folder in made}
    sources: dict[str, set[str]] = {}
    for folder in made:
        sources.setdefault(metrics[folder]["data"], set()).add(_source(folder))
    rows = []
    for folder, parameters in made.items():
        data, size = metrics[folder]["data"], metrics[folder]["size"]
        named = [f"{name} {parameters.get(name)}" for name in sorted(differ)]
        named += [_source(folder)] if len(sources[data]) > 1 else []
        rows.append({"run": ", ".join([f"{data} {size}", *named])} | {n: metrics[folder].get(n) for n in COMPARED})
    table = pd.DataFrame(rows).set_index("run").astype(float)
    table = table.loc[:, table.notna().any() | (table.columns == "image_auroc")]
    groups = table.groupby("run", sort=False)
    result = groups.agg(["mean", "std"]).rename(columns={"std": "deviation"}, level=1)
    result.insert(0, ("runs", ""), groups.size())
    return result


def beside_published(folders: Iterable[str | Path]) -> str:
    """Return the figures of runs as text: means over seeds, below them the published ones, then what differs.

    What differs from the paper: for each run that departs in another way, a line for each departure.
    """
    made = _parameters(folders)
    own = across(made)
    lines = [_as_text(own)]
    sizes: dict[str, list[str]] = {}
    for metrics in (Run(folder).metrics for folder in made):
        sizes.setdefault(metrics["data"], []).append(metrics["size"])
    for data in sorted(sizes):
        theirs = pd.concat([published(data, size) for size in sorted(set(sizes[data]))])
        theirs = theirs[~theirs.index.duplicated()]  # XS stands beside the figures of S
        if len(theirs):
            lines += ["", f"Published for {data}:", theirs.to_string(na_rep="–", float_format="{:.3f}".format)]
    lines += ["", "What differs from the paper:"]
    said: dict[str, list[str]] = {}
    for folder, parameters in made.items():
        said.setdefault(_difference(parameters), []).append(from_project(folder))
    for difference, names in said.items():
        lines += [f"  {', '.join(names)}", difference]
    return printable("\n".join(lines), keep="\n")


def _parameters(folders: Iterable[str | Path]) -> dict[Path, dict[str, Any]]:
    made = {}
    for folder in map(resolve, folders):
        run = Run(folder)
        measured = run.metrics if run.done else {}
        if missing := [name for name in EVALUATED if name not in measured]:
            raise RunError(
                f"{folder} holds no evaluation: no {missing[0]} in its metrics.json. Make one: effad evaluate {folder}"
            )
        made[folder] = run.parameters
    return made


def _source(folder: Path) -> str:
    """The data set of a run and its folder; "" for a published one, which is the same wherever it lies."""
    told = told_data(Run(folder))
    dataset, root = told["dataset"], told["data_root"]
    if dataset in PUBLISHED_DATA:
        return ""
    return f"{dataset} in {from_project(resolve(root))}" if root else dataset


def _difference(parameters: Mapping[str, Any]) -> str:
    known = TrainingSettings().as_dict()
    try:
        found = departures(TrainingSettings.from_mapping({n: v for n, v in parameters.items() if n in known}))
    except SettingsError as error:
        return f"    cannot be told: {error}"
    return "\n".join(f"    {name}: {here} (paper: {paper})" for name, (paper, here) in found.items()) or "    nothing"


def _as_text(table: pd.DataFrame) -> str:
    """Means and deviations as "0.912 ± 0.004", a row for each kind of run."""
    shown = pd.DataFrame({"runs": table["runs"]}, index=table.index)
    for name in dict.fromkeys(table.columns.get_level_values(0).drop("runs")):
        pairs = zip(table[name, "mean"], table[name, "deviation"], strict=True)
        shown[name] = [_shown(mean) + ("" if np.isnan(spread) else f" ± {spread:.3f}") for mean, spread in pairs]
    return shown.to_string()


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
