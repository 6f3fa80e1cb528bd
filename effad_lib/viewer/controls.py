"""The controls of a viewer and their places: what there is to press, move and read, not what it does."""

from __future__ import annotations

import ipywidgets as w
import numpy as np

from effad_lib.evaluation import MAP_NAMES
from effad_lib.images import SUFFIXES
from effad_lib.viewer.drawings import choice_of_colours
from effad_lib.viewer.findings import Findings
from effad_lib.viewer.notes import VERDICTS
from effad_lib.viewer.pages import CAPTIONS
from effad_lib.viewer.state import ALL, COLOURS, ORDERS, OUTCOMES, OUTLINES, PANELS, SCALINGS, ZOOMS, State, score_range

STRIP = 8
"""Thumbnails in a row."""

SCALING_LABELS = ("one for the whole run", "this image's own (makes good images look broken)")

ROW = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 10px"}


class Controls:
    """Every widget of a viewer: those that people act on, by name in `by_name`, and those that only show something.

    `texts` and `images` are shown parts by name, `thumbs` and `picks` the row of thumbnails, `cells` the panels with
    their captions; `widget` holds all of them in place. Nothing is wired.
    """

    def __init__(self, findings: Findings, state: State, panel_width: int) -> None:
        self.by_name = c = {**_find(findings), **_look(findings, state, panel_width), **_place(), **_decide(findings)}
        c |= {
            "verdict": w.ToggleButtons(
                options=[(name or "none", name) for name in VERDICTS], style={"button_width": "auto"}
            ),
            "note": w.Textarea(placeholder="a note, kept in notes.csv", layout=_wide()),
            "save": w.Button(description="save this view as PNG", layout=_small()),
            "upload": w.FileUpload(accept=",".join(sorted(SUFFIXES)), description="look at a picture", layout=_small()),
        }
        names = ("head", "bar", "histogram", "counts", "point", "message", "noted")
        self.texts = {name: w.HTML() for name in names}
        self.images = {name: w.Image(format="jpeg", layout=w.Layout(width="100%")) for name in PANELS}
        self.thumbs = [w.Image(format="jpeg", layout=w.Layout(width="88px", height="88px")) for _ in range(STRIP)]
        self.picks = [w.Button(layout=w.Layout(width="88px")) for _ in range(STRIP)]
        self.cells = [
            w.VBox([w.HTML(f"<b>{CAPTIONS[name]}</b>"), image], layout=w.Layout(width=f"{panel_width}px"))
            for name, image in self.images.items()
        ]
        self._threshold = w.VBox()
        self.range_over(findings)
        self.widget = self._arranged(can_score=findings.detector is not None)

    def range_over(self, findings: Findings) -> w.Widget:
        """Make the slider of the threshold anew and return it: over the scores that there are, in ratios if it can."""
        low, high, log = score_range(findings)
        margin = 0.02 * (high - low)
        low, high = (low / 1.02, high * 1.02) if log else (low - margin, high + margin)
        common = {"description": "image >", "readout_format": ".4g", "layout": _wide()}
        if log:
            ends = {"min": np.log10(low), "max": np.log10(high), "step": np.log10(high / low) / 1000}
            slider = w.FloatLogSlider(value=high, **ends, **common)
        else:
            slider = w.FloatSlider(value=high, min=low, max=high, step=(high - low) / 1000, **common)
        self.by_name["threshold"] = slider
        self._threshold.children = (slider,)
        return slider

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
        strip = w.HBox([w.VBox(pair) for pair in zip(self.thumbs, self.picks, strict=True)])
        main = [texts["head"], _row(*self.cells), texts["bar"], strip, tab, texts["message"]]
        find = [
            c["order"],
            c["defect"],
            c["outcome"],
            c["list"],
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


def _find(findings: Findings) -> dict[str, w.Widget]:
    kinds = sorted(set(findings.defects), key=lambda kind: (kind != "good", kind))
    half = w.Layout(width="49%")
    return {
        "order": w.Dropdown(options=ORDERS, description="order", layout=_wide()),
        "defect": w.Dropdown(
            options=[(kind or "not known", kind) for kind in (ALL, *kinds)], description="defect", layout=_wide()
        ),
        "outcome": w.Dropdown(options=(ALL, *OUTCOMES), description="outcome", layout=_wide()),
        "list": w.Select(rows=24, layout=_wide()),
        # JupyterLab keeps the arrow keys up and down to itself, in a list too; left and right move a slider.
        "place": w.IntSlider(1, min=1, max=1, description="place", layout=_wide()),
        "previous": w.Button(description="◀ previous", layout=half),
        "next": w.Button(description="next ▶", layout=half),
        "progress": w.IntProgress(
            max=len(findings),
            description="scored",
            layout=w.Layout(width="98%", display="" if findings.waiting else "none"),
        ),
    }


def _look(findings: Findings, state: State, panel_width: int) -> dict[str, w.Widget]:
    names = MAP_NAMES if findings.has_branches else MAP_NAMES[:1]
    labelled = list(zip(SCALING_LABELS, SCALINGS, strict=True))
    return {
        "map": w.ToggleButtons(
            options=[(name.replace("_", "–"), name) for name in names], style={"button_width": "auto"}
        ),
        **{f"panel_{name}": w.ToggleButton(True, description=CAPTIONS[name], layout=_small()) for name in PANELS},
        **{
            f"outline_{name}": w.Checkbox(True, description=f"outline {name}", indent=False, layout=_small())
            for name in OUTLINES
        },
        "opacity": w.FloatSlider(state.opacity, min=0, max=1, step=0.05, description="opacity"),
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
            min=low,
            max=high,
            step=(high - low) / 400,
            readout_format=".4g",
            description="pixels >",
            layout=_wide(),
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
