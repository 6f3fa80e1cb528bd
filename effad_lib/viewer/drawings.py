"""The colour bar and the histogram of the scores, as SVG: text stays sharp and drawing takes no time."""

from __future__ import annotations

import html
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from effad_lib.plots import DEFECTIVE, GOOD, Scale
from effad_lib.viewer.findings import UNKNOWN, Findings
from effad_lib.viewer.state import COLOURS, score_range

BINS = 48
"""Of the histogram."""

TEXT = "var(--jp-ui-font-color1, #222)"
"""JupyterLab's colour of text, dark or light as its theme is."""

BRANCH_COLOURS = ("#4477aa", "#ccbb44")
"""Of student–teacher and student–autoencoder."""

LABELS = {0: ("good", to_hex(GOOD)), 1: ("defective", to_hex(DEFECTIVE)), UNKNOWN: ("not known", "#888888")}


def colour_bar(colours: str, scale: Scale, marks: Mapping[str, float], caption: str = "", width: int = 560) -> str:
    """Return a horizontal colour bar with its values, and a named line at each mark that lies on the scale."""
    low, high = scale
    table = matplotlib.colormaps[colours](np.linspace(0, 1, 17))
    stops = "".join(f'<stop offset="{k / 16:.4f}" stop-color="{to_hex(colour)}"/>' for k, colour in enumerate(table))
    left, right, top = 12, width - 12, 30

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    name = f"effad-{colours}"
    parts = [
        f'<defs><linearGradient id="{name}">{stops}</linearGradient></defs>',
        f'<rect x="{left}" y="{top}" width="{right - left}" height="14" fill="url(#{name})"/>',
    ]
    for value, text in _ticks(low, high):
        parts.append(_text(x(value), top + 27, text))
    ends = [-np.inf, -np.inf]  # of what is written in either line above the bar
    for label, value in sorted(marks.items(), key=lambda mark: mark[1]):
        if low <= value <= high:
            half = 3.1 * len(label)
            line = 0 if x(value) - half >= ends[0] else 1
            ends[line] = x(value) + half + 6
            place = min(max(x(value), left + half), right - half)
            parts += [_line(x(value), top - 3, top + 17), _text(place, top - 7 - 11 * line, label)]
    if caption:
        parts.append(_text(width / 2, top + 42, caption))
    return _svg(width, top + (46 if caption else 32), parts)


def histogram(findings: Findings, threshold: float | None, *, width: int = 560, height: int = 150) -> str:
    """Return the scores of good, defective and unknown images as stacked bars, with a line at the threshold.

    Where it is not the stored one, that has a thin line of its own. Beside each colour its name and its number of
    images. The axis is logarithmic where `score_range` says so.
    """
    scores = findings.scores
    known = np.isfinite(scores)
    if not known.any():
        return _svg(width, height, [_text(width / 2, height / 2, "no scores yet")])
    low, high, log = score_range(findings)
    bins = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    tables = {label: np.histogram(scores[known & (findings.labels == label)], bins)[0] for label in LABELS}
    left, right, top, bottom = 30, width - 10, 22, height - 24
    places = np.log(bins) if log else bins
    edges = left + (right - left) * (places - places[0]) / (places[-1] - places[0])
    highest = max(1, int(sum(tables.values()).max()))
    unit, base = (bottom - top) / highest, np.full(len(bins) - 1, float(bottom))
    parts = []
    for label, table in tables.items():
        for k in np.flatnonzero(table):
            tall = unit * table[k]
            base[k] -= tall
            size = (
                f'x="{edges[k]:.1f}" y="{base[k]:.1f}" width="{edges[k + 1] - edges[k] - 0.6:.1f}" height="{tall:.1f}"'
            )
            parts.append(f'<rect {size} fill="{LABELS[label][1]}"/>')
    parts += [_line(left, bottom, bottom, right), _text(left - 4, top + 8, str(highest), "end")]
    ratios = [(value, f"{value:.2g}") for value in np.geomspace(low, high, 6)] if log else _ticks(low, high)

    def x(value: float) -> float:
        inside = float(np.clip(value, bins[0], bins[-1]))
        return float(np.interp(np.log(inside) if log else inside, places, edges))

    for value, text in ratios:
        parts.append(_text(x(value), bottom + 14, text))
    start = left
    for label, (name, colour) in LABELS.items():
        if count := int(tables[label].sum()):
            parts.append(f'<rect x="{start}" y="4" width="10" height="10" fill="{colour}"/>')
            text = f"{name} ({count})"
            parts.append(_text(start + 14, 13, text, "start"))
            start += 14 + 7 * len(text) + 16
    if findings.threshold not in (None, threshold):
        parts += [
            _line(x(findings.threshold), top + 12, bottom, width=0.7),
            _text(x(findings.threshold), top + 9, "stored"),
        ]
    if threshold is not None:
        place = x(threshold)
        parts.append(_line(place, top - 4, bottom, dashed=True))
        side = "end" if place > (left + right) / 2 else "start"
        parts.append(_text(place + (-4 if side == "end" else 4), top + 4, f"threshold {threshold:.4g}", side))
    return _svg(width, height, parts)


def branch_bar(parts: Mapping[str, float], width: int = 220) -> str:
    """Return the shares of the branches in a score as one bar; "" unless all of them add to it."""
    if not parts or min(parts.values()) < 0 or sum(parts.values()) <= 0:
        return ""
    total, start, drawn = sum(parts.values()), 0.0, []
    for part, colour in zip(parts.values(), BRANCH_COLOURS, strict=True):
        drawn.append(f'<rect x="{start:.1f}" y="0" width="{width * part / total:.1f}" height="10" fill="{colour}"/>')
        start += width * part / total
    return _svg(width, 10, drawn)


def choice_of_colours(colours: str) -> str:
    """Return the name of a colour map as the choice is labelled: those that are not perceptual say so."""
    return colours if colours in COLOURS[:4] else f"{colours} (not perceptual)"


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return round values of a range, each with as many digits as tell it from its neighbours."""
    values = [value for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]
    written = ScalarFormatter(useOffset=False)
    written.set_scientific(False)
    written.create_dummy_axis()
    written.axis.set_view_interval(low, high)
    return list(zip(values, written.format_ticks(values), strict=True))


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = "font-family:sans-serif;font-size:11px;max-width:100%"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{font}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} style="fill:{TEXT}">{html.escape(text)}</text>'


def _line(x: float, y: float, to: float, end: float | None = None, *, dashed: bool = False, width: float = 1.4) -> str:
    dashes = "stroke-dasharray:4 3;" if dashed else ""
    points = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x if end is None else end:.1f}" y2="{to:.1f}"'
    return f'<line {points} style="stroke:{TEXT};{dashes}stroke-width:{width}"/>'
