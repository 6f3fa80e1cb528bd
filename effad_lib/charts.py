"""Charts of whatever numbers a lesson measures: distributions, maps side by side on one scale, competitors, costs.

Like `plots`, each is a function that returns a matplotlib figure, 9 inches wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from effad_lib.plots import HEAT, PALETTE, WIDTH, Scale, plain


def plot_distributions(
    values: Mapping[str, np.ndarray],
    xlabel: str,
    *,
    marks: Mapping[str, float] | None = None,
    log: bool = False,
    tail: bool = False,
    count: str = "values",
) -> Figure:
    """Histograms of several sets of numbers over one another, all with the same bins.

    values: for each set its name and its numbers, any shape; marks: names and places of vertical lines; log: bins of
    equal ratio on a logarithmic axis, over six decades at most, smaller numbers being left out; tail: logarithmic
    counts, so that what is rare stays visible; count: what is counted. Raises ValueError if a set is empty.
    """
    arrays = {name: np.asarray(numbers, dtype=float).ravel() for name, numbers in values.items()}
    if not arrays or any(numbers.size == 0 for numbers in arrays.values()):
        raise ValueError("no numbers to draw: each set needs at least one")
    bins = _bins(np.concatenate(list(arrays.values())), log, min(numbers.size for numbers in arrays.values()))
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for (name, numbers), colour in zip(arrays.items(), itertools.cycle(PALETTE), strict=False):
        weights = np.full(numbers.size, 1 / numbers.size)
        style = {"histtype": "stepfilled", "facecolor": (*colour, 0.2), "edgecolor": colour, "linewidth": 1.4}
        ax.hist(numbers, bins, weights=weights, label=name, **style)
    for (name, place), dashes in zip((marks or {}).items(), ("--", ":", "-.", "-") * len(marks or {}), strict=False):
        ax.axvline(place, color="black", linestyle=dashes, linewidth=1.2, label=f"{name} = {place:.3g}")
    ax.set(xlabel=xlabel, ylabel=f"share of the {count}", xscale="log" if log else "linear")
    ax.set(yscale="log" if tail else "linear")
    if log and bins[-1] / bins[0] < 100:
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return fig


def plot_panels(
    panels: Mapping[str, np.ndarray],
    label: str,
    *,
    scale: Scale | None = None,
    log: bool = False,
    unit: str = "cells",
    columns: int = 4,
) -> Figure:
    """Maps side by side, all on one colour scale with one colour bar.

    panels: for each map its title and its values [h, w]; label: of the colour bar, with the unit of the values; scale:
    the values drawn darkest and brightest, by default the smallest and the largest of all maps; log: colours by the
    logarithm; unit: of rows and columns. Raises ValueError if there is nothing to draw.
    """
    if not panels:
        raise ValueError("no maps to draw")
    arrays = [np.asarray(values, dtype=float) for values in panels.values()]
    low, high = scale or (min(a.min() for a in arrays), max(a.max() for a in arrays))
    norm = LogNorm(low, high) if log else Normalize(low, high)
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    height = rows * (WIDTH / (columns + 0.6) * arrays[0].shape[0] / arrays[0].shape[1] + 0.5)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="compressed")
    for ax in axes.flat[len(arrays) :]:
        ax.set_axis_off()
    for ax, title, values in zip(axes.flat, panels, arrays, strict=False):
        drawn = ax.imshow(values, cmap=plt.get_cmap(HEAT).with_extremes(bad="black"), norm=norm)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(f"column ({unit})", fontsize=8)
        ax.tick_params(labelsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"row ({unit})", fontsize=8)
    fig.colorbar(drawn, ax=axes, label=label, extend="both" if scale else "neither", fraction=0.05, aspect=25)
    return fig


def plot_dots(table: pd.DataFrame, *, hollow: Collection[str] = ()) -> Figure:
    """A panel for each metric, in it a line for each data set and one for their mean, with a mark for each competitor.

    table: rows (metric, data set), a column for each competitor; NaN is not drawn, nor a mean with it; hollow:
    competitors that get the empty mark of the one after them, of which they are the "before". Raises ValueError if
    there is nothing to draw.
    """
    if table.empty:
        raise ValueError("no values to draw")
    metrics = list(dict.fromkeys(table.index.get_level_values(0)))
    longest = int(table.index.get_level_values(0).value_counts().max())
    fig, axes = plt.subplots(
        1, len(metrics), figsize=(WIDTH, 0.32 * longest + 1.7), squeeze=False, sharex=True, layout="constrained"
    )
    for ax, metric in zip(axes[0], metrics, strict=True):
        part = table.loc[metric]
        names = [*part.index, f"mean of {len(part)}"]
        place = 0
        for name, values in part.items():
            x, colour = [*values, values.mean(skipna=False)], PALETTE[place % len(PALETTE)]
            face = "none" if name in hollow else colour
            ax.plot(x, range(len(x)), "osD^vP*X"[place % 8], color=colour, markerfacecolor=face, label=name)
            place += name not in hollow
        ax.axhline(len(part) - 0.5, color="black", linewidth=0.8)
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=metric)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return fig


def plot_curves(curves: Mapping[str, pd.DataFrame], xlabel: str, ylabel: str, *, columns: int = 4) -> Figure:
    """A panel for each set of curves, all on the same axes from 0 to 1, with a grey line at 0.5, which is chance.

    curves: for each panel its title and a table with a column for each curve and x as its index. Raises ValueError if
    there is nothing to draw.
    """
    if not curves:
        raise ValueError("no curves to draw")
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    size = WIDTH, 1.75 * rows + 0.8
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for ax in axes.flat[len(curves) :]:
        ax.set_axis_off()
    for ax, (title, table) in zip(axes.flat, curves.items(), strict=False):
        for place, (name, values) in enumerate(table.items()):
            style = {"marker": "osD^"[place % 4], "markersize": 4, "linewidth": 1.3}
            ax.plot(table.index, values, label=name, color=PALETTE[place % len(PALETTE)], **style)
        ax.axhline(0.5, color="grey", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set(ylim=(-0.02, 1.04))
        ax.grid(alpha=0.3)
    fig.supxlabel(xlabel, fontsize=10)
    fig.supylabel(ylabel, fontsize=10)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    return fig


def pareto_front(cost: pd.Series, value: pd.Series) -> list[str]:
    """Return the names, cheapest first, of those that have a higher value than all that cost no more.

    cost, value: a number for each name; whoever lacks one (NaN) is left out.
    """
    front, best = [], -np.inf
    both = pd.DataFrame({"cost": cost, "value": value}).dropna()
    for name, value_here in both.sort_values(["cost", "value"], ascending=[True, False])["value"].items():
        if value_here > best:
            front.append(name)
            best = value_here
    return front


def plot_tradeoff(
    cost: pd.Series, values: Mapping[str, pd.Series], xlabel: str, *, lower: Collection[str] = (), bold: Collection[str]
) -> Figure:
    """A panel for each measure against the cost on a logarithmic axis; a line joins those on the Pareto front.

    cost: a number for each competitor, by name; values: for each panel the label of its axis and numbers by the same
    names; lower: labels of those of which less is better; bold: names that stand out. Competitors off the front, beaten
    at no higher cost, are hollow. Raises ValueError if there is nothing to draw.
    """
    if not values or cost.empty:
        raise ValueError("no values to draw")
    fig, axes = plt.subplots(1, len(values), figsize=(WIDTH, 4.2), squeeze=False, layout="constrained")
    for ax, (label, numbers) in zip(axes[0], values.items(), strict=True):
        front = pareto_front(cost, -numbers if label in lower else numbers)
        ax.plot(
            cost[front], numbers[front], color=PALETTE[0], linewidth=1, drawstyle="steps-post", label="Pareto front"
        )
        for name, value in numbers.dropna().items():
            style = {"color": PALETTE[1] if name in bold else PALETTE[0], "markersize": 7, "zorder": 3}
            style["fillstyle"] = "full" if name in front else "none"
            ax.plot(cost[name], value, "s" if name in bold else "o", **style)
        ax.set(ylabel=label, xscale="log")
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
        ax.margins(x=0.2, y=0.1)
        ax.grid(alpha=0.3)
    fig.supxlabel(xlabel, fontsize=10)
    for ax, (label, numbers) in zip(axes[0], values.items(), strict=True):
        points = {name: (cost[name], value) for name, value in numbers.dropna().items()}
        _label(ax, points, bold, 1 if label in lower else -1)
    axes[0][0].legend(loc="upper right" if next(iter(values)) in lower else "lower right", fontsize=9, frameon=False)
    return fig


def plot_table(table: pd.DataFrame, label: str, *, scale: Scale) -> Figure:
    """A table as colours, each cell with its figure; what is missing stays empty.

    table: numbers, a row for each line; label: of the colour bar; scale: the values drawn darkest and brightest, the
    same for whatever tables are to be compared. Raises ValueError if there is nothing to draw.
    """
    import seaborn as sns  # slow to import

    if table.empty:
        raise ValueError("no values to draw")
    size = WIDTH, 0.34 * len(table) + 1.2
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    style = {"cmap": HEAT, "vmin": scale[0], "vmax": scale[1], "linewidths": 0.5, "annot_kws": {"fontsize": 9}}
    table = table.astype(float).rename(index=plain, columns=plain)
    sns.heatmap(table, annot=True, fmt=".3f", ax=ax, cbar_kws={"label": label}, **style)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(axis="y", rotation=0)
    return fig


def _label(ax: Axes, points: Mapping[str, tuple[float, float]], bold: Collection[str], side: int) -> None:
    """Write the name of each point beside it, where it covers no other point and no name written before.

    side: 1 or −1 for names above or below the line that goes to the right, if there is room.
    """
    ax.figure.draw_without_rendering()  # decides where the axes are
    taken = [Bbox.from_bounds(*(ax.transData.transform(point) - 4), 8, 8) for point in points.values()]
    for name, point in points.items():
        style = {"fontsize": 9 if name in bold else 8, "fontweight": "bold" if name in bold else "normal"}
        text = ax.annotate(name, point, (0, 0), textcoords="offset points", **style)
        text.set_in_layout(False)
        covered = {}
        for place in ((5, 8 * side, "left"), (-7, 0, "right"), (5, -8 * side, "left"), (-5, -8 * side, "right")):
            text.set(position=place[:2], ha=place[2], va="center")
            covered[place] = text.get_window_extent().count_overlaps(taken)
        best = min(covered, key=covered.get)
        text.set(position=best[:2], ha=best[2])
        taken.append(text.get_window_extent())


def _bins(numbers: np.ndarray, log: bool, fewest: int) -> np.ndarray:
    """Return the edges from the smallest to the largest number: the more numbers, the more, up to 80 bins."""
    edges = 1 + int(np.clip(2 * fewest**0.5, 10, 80))
    high = float(numbers.max())
    if not log:
        low = float(numbers.min())
        return np.linspace(low, high if high > low else low + 1, edges)
    high = high if high > 0 else 1.0
    above = numbers[numbers > 0]
    low = max(float(above.min()), 1e-6 * high) if above.size else 1e-6 * high
    return np.geomspace(low if low < high else high / 10, high, edges)
