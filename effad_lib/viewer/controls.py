"""The controls of a viewer and their places: what there is to press, move and read, not what it does."""

from __future__ import annotations

from typing import Any

import ipywidgets as w
import numpy as np

from effad_lib.evaluation import MAP_NAMES
from effad_lib.images import SUFFIXES
from effad_lib.viewer.drawings import choice_of_colours
from effad_lib.viewer.findings import Findings
from effad_lib.viewer.notes import VERDICTS
from effad_lib.viewer.pages import CAPTIONS, OUTLINE_LABELS
from effad_lib.viewer.state import (
    ALL,
    BY_BRANCHES,
    COLOURS,
    ORDERS,
    OUTCOMES,
    OUTLINES,
    PANELS,
    SCALINGS,
    ZOOMS,
    State,
    score_range,
)

STRIP = 8
"""Thumbnails in a row."""

SCALING_LABELS = ("one for the whole run", "this image's own (makes good images look broken)")

OWN_KEYS = (
    '<img src="data:," hidden onerror="const own = () => {'
    "const list = this.closest('.widget-vbox')?.querySelector('.widget-select select');"
    "list ? list.setAttribute('data-lm-suppress-shortcuts', 'true') : setTimeout(own, 100)}; own()\">"
)
"""Leaves the list its arrow keys, which JupyterLab takes for its cells otherwise; elsewhere it does nothing."""

ROW = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 10px"}


class Controls:
    """Every widget of a viewer: those that people act on, by name in `by_name`, and those that only show something.

    `texts`, `images` and their `captions` are shown parts by name, `thumbs` and `picks` the row of thumbnails, `cells`
    the panels with their captions; `widget` holds all of them in place. Nothing is wired.
    """

    def __init__(self, findings: Findings, panel_width: int) -> None:
        self.by_name = c = {**_find(findings), **_look(findings, panel_width), **_place(), **_decide(findings)}
        c |= {
            "verdict": w.ToggleButtons(
                options=[(name or "none", name) for name in VERDICTS], style={"button_width": "auto"}
            ),
            "note": w.Textarea(placeholder="a note, kept in notes.csv", layout=_wide()),
            "save": w.Button(description="save this view as PNG", layout=_small()),
            "upload": w.FileUpload(
                accept=",".join(sorted(SUFFIXES)),
                description="look at a picture",
                tooltip="up to 10 MB, or 256 MB under `make lab`; for larger ones there is viewer.view_images",
                layout=_small(),
            ),
        }
        names = ("head", "bar", "histogram", "counts", "point", "message", "noted")
        self.texts = {name: w.HTML() for name in names}
        self.images = {name: w.Image(format="jpeg", layout=w.Layout(width="100%", margin="0")) for name in PANELS}
        whole = {"width": "88px", "height": "88px", "object_fit": "contain"}
        self.thumbs = [w.Image(format="jpeg", layout=w.Layout(**whole)) for _ in range(STRIP)]
        self.picks = [w.Button(layout=w.Layout(width="88px")) for _ in range(STRIP)]
        self.captions = {name: w.HTML() for name in PANELS}
        self.cells = {name: w.VBox([self.captions[name], image]) for name, image in self.images.items()}
        self._panels = w.GridBox(tuple(self.cells.values()), layout=w.Layout(grid_gap="4px 10px"))
        self.place_panels(PANELS)
        self._threshold = w.VBox()
        self.range_over(findings)
        self.widget = self._arranged(can_score=findings.detector is not None)

    def place_panels(self, shown: tuple[str, ...]) -> None:
        """Show these panels side by side, as wide as asked for or narrower where there is less room."""
        for name, cell in self.cells.items():
            cell.layout.display = "" if name in shown else "none"
        width = self.by_name["panel_width"].value
        self._panels.layout.grid_template_columns = f"repeat(auto-fit, minmax(min({0.6 * width:.0f}px, 100%), 1fr))"
        self._panels.layout.max_width = f"{max(1, len(shown)) * (width + 10)}px"

    def range_over(self, findings: Findings) -> None:
        """Make the slider of the threshold anew: over the scores that there are, in ratios if it can."""
        low, high, log = score_range(findings)
        margin = 0.02 * (high - low)
        low, high = (low / 1.02, high * 1.02) if log else (low - margin, high + margin)
        kind, of = (w.FloatLogSlider, np.log10) if log else (w.FloatSlider, float)
        stored = None if findings.threshold is None else of(findings.threshold)
        steps = _steps(of(low), of(high), 1000, stored)
        slider = kind(value=high, **steps, **_named("image threshold"))
        self.by_name["threshold"] = slider
        self._threshold.children = (slider,)

    def _arranged(self, can_score: bool) -> w.Widget:
        c, texts = self.by_name, self.texts
        c["upload"].layout.display = "" if can_score else "none"
        tabs = {
            "decide": [
                _row(texts["histogram"], texts["counts"]),
                self._threshold,
                _row(c["stored"], c["best"]),
                c["pixel_threshold"],
                _row(c["stored_pixels"]),
            ],
            "look": [
                _row(c["map"]),
                _row(*(c[f"panel_{name}"] for name in PANELS), c["panel_width"]),
                _row(c["opacity"], c["follow"], *(c[f"outline_{name}"] for name in OUTLINES)),
                _row(c["colours"], c["scaling"]),
            ],
            "point and zoom": [
                _row(c["zoom"], c["hottest"], c["to_defect"], c["whole"]),
                _row(c["column"], c["row"]),
                texts["point"],
            ],
            "note and save": [c["verdict"], c["note"], texts["noted"], _row(c["save"], c["upload"])],
        }
        tab = w.Tab([w.VBox(parts) for parts in tabs.values()], selected_index=0)
        tab.titles = tuple(tabs)
        pairs = zip(self.thumbs, self.picks, strict=True)
        strip = w.HBox(
            [w.VBox(pair, layout=w.Layout(flex="0 0 auto")) for pair in pairs], layout=w.Layout(flex_flow="row wrap")
        )
        main = [texts["head"], self._panels, texts["bar"], strip, tab, texts["message"]]
        find = [
            c["order"],
            c["defect"],
            c["outcome"],
            c["list"],
            w.HTML(OWN_KEYS, layout=w.Layout(display="none")),
            c["place"],
            w.HBox([c["previous"], c["next"]]),
            c["progress"],
        ]
        left = w.VBox(find, layout=w.Layout(width="270px", flex="0 0 auto"))
        return w.HBox(
            [left, w.VBox(main, layout=w.Layout(flex="1 1 0", min_width="0"))], layout=w.Layout(grid_gap="10px")
        )


def steps_from_start(slider: w.FloatSlider | w.FloatLogSlider, value: float) -> float:
    """Return how many steps of a slider a value lies above its start; a browser only knows whole ones."""
    if isinstance(slider, w.FloatLogSlider):
        value = np.log(max(value, 1e-300)) / np.log(slider.base)
    return (min(max(value, slider.min), slider.max) - slider.min) / slider.step


class List(w.Select):
    """A list whose lines may change while the browser chooses one: a line that is gone by then is not taken."""

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take what the browser has to say."""
        index = sync_data.get("index")
        gone = index is not None and index >= len(self.options)
        super().set_state({name: value for name, value in sync_data.items() if not (gone and name == "index")})


def kinds_of(findings: Findings) -> list[tuple[str, str]]:
    """Return the choices of the filter by type of defect, each with its label."""
    kinds = sorted(set(findings.defects), key=lambda kind: (kind != "good", kind))
    return [(kind or "not known", kind) for kind in (ALL, *kinds)]


def _steps(low: float, high: float, count: int, on: float | None) -> dict[str, float]:
    """Return `min`, `max` and `step` of a slider: about so many steps, one of them on a value that it must show."""
    step = (high - low) / count
    start = low if on is None else on - step * np.ceil((on - low) / step)
    return {"min": start, "max": high, "step": step}


def _named(name: str) -> dict[str, Any]:
    """Return what the sliders of both thresholds have in common."""
    return {"description": name, "style": {"description_width": "110px"}, "readout_format": ".4g", "layout": _wide()}


def _find(findings: Findings) -> dict[str, w.Widget]:
    orders = [order for order in ORDERS if findings.has_branches or order != BY_BRANCHES]
    half = w.Layout(width="49%")
    return {
        "order": w.Dropdown(options=orders, description="order", layout=_wide()),
        "defect": w.Dropdown(options=kinds_of(findings), description="defect", layout=_wide()),
        "outcome": w.Dropdown(options=(ALL, *OUTCOMES), description="outcome", layout=_wide()),
        "list": List(rows=24, layout=_wide()),
        "place": w.IntSlider(1, min=1, max=1, description="place", layout=_wide()),
        "previous": w.Button(description="◀ previous", layout=half),
        "next": w.Button(description="next ▶", layout=half),
        "progress": w.IntProgress(
            max=len(findings),
            description="scored",
            layout=w.Layout(width="98%", display="" if findings.waiting else "none"),
        ),
    }


def _look(findings: Findings, panel_width: int) -> dict[str, w.Widget]:
    names = MAP_NAMES if findings.has_branches else MAP_NAMES[:1]
    labelled = list(zip(SCALING_LABELS, SCALINGS, strict=True))
    return {
        "map": w.ToggleButtons(
            options=[(name.replace("_", "–"), name) for name in names], style={"button_width": "auto"}
        ),
        **{f"panel_{name}": w.ToggleButton(True, description=CAPTIONS[name], layout=_small()) for name in PANELS},
        **{
            f"outline_{name}": w.Checkbox(
                True, description=f"outline {OUTLINE_LABELS[name]}", indent=False, layout=_small()
            )
            for name in OUTLINES
        },
        "opacity": w.FloatSlider(State().opacity, min=0, max=1, step=0.05, description="opacity"),
        "follow": w.Checkbox(True, description="opacity follows the score", indent=False, layout=_small()),
        "colours": w.Dropdown(options=[(choice_of_colours(name), name) for name in COLOURS], description="colours"),
        "scaling": w.Dropdown(options=labelled, description="scale", layout=w.Layout(width="480px")),
        "panel_width": w.IntSlider(panel_width, min=120, max=800, step=10, description="panel px"),
    }


def _place() -> dict[str, w.Widget]:
    return {
        "zoom": w.SelectionSlider(options=[(f"{zoom:g}×", zoom) for zoom in ZOOMS], description="zoom"),
        "row": w.IntSlider(0, min=0, max=1, description="y"),
        "column": w.IntSlider(0, min=0, max=1, description="x"),
        "hottest": w.Button(description="hottest point", layout=_small()),
        "to_defect": w.Button(description="defect", tooltip="zoom to the true defect", layout=_small()),
        "whole": w.Button(description="whole image", layout=_small()),
    }


def _decide(findings: Findings) -> dict[str, w.Widget]:
    low, high = findings.scale
    seen = "the best threshold for these very images; no detector could know it"
    return {
        "stored": w.Button(
            description="stored threshold", disabled=findings.threshold is None, tooltip=findings.rule, layout=_small()
        ),
        "best": w.Button(description="F1-max (has seen the truth)", tooltip=seen, layout=_small()),
        "pixel_threshold": w.FloatSlider(
            value=high,
            **_steps(low, high, 400, findings.pixel_threshold),
            **_named("pixel threshold"),
        ),
        "stored_pixels": w.Button(
            description="stored pixel threshold", disabled=findings.pixel_threshold is None, layout=_small()
        ),
    }


def _row(*parts: w.Widget) -> w.HBox:
    return w.HBox(parts, layout=w.Layout(**ROW))


def _wide() -> w.Layout:
    return w.Layout(width="98%")


def _small() -> w.Layout:
    return w.Layout(width="auto", min_width="40px")
