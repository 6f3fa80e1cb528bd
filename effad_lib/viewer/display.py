"""What the widgets show: each part drawn from the state, and only when what it depends on has changed."""

from __future__ import annotations

import html
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effad_lib.images import ImageError
from effad_lib.plots import Scale
from effad_lib.viewer import pages
from effad_lib.viewer.controls import STRIP, Controls, kinds_of
from effad_lib.viewer.drawings import BRANCH_COLOURS, branch_bar, colour_bar, histogram
from effad_lib.viewer.findings import Findings, Picture
from effad_lib.viewer.notes import Notes
from effad_lib.viewer.rendering import Layers, encoded, panel, shares, thumbnail, values_at
from effad_lib.viewer.state import ALL, OUTLINES, PANELS, State, best_threshold, listed, outcomes, score_range

OUTCOME_STYLES = {"right": "success", "miss": "danger", "false alarm": "warning"}


NOTHING = encoded(Image.new("RGB", (1, 1), "#808080"))
"""In the place of a picture that cannot be read."""


class Display:
    """Draws a `State` of `Findings` on the widgets of `Controls`.

    `order` are the images of the list. While `busy`, controls change because the state is drawn, not by hand.
    """

    def __init__(self, findings: Findings, notes: Notes, controls: Controls) -> None:
        self.findings, self.notes, self.controls = findings, notes, controls
        self.order: list[int] = []
        self.busy = False
        self.picture = lru_cache(maxsize=4)(findings.picture)
        self._thumbnail = lru_cache(maxsize=512)(self._small)
        self._drawn: dict[str, tuple] = {}  # for each part, what it was last drawn from

    def draw(self, state: State) -> None:
        """Bring every control and every part of the view up to date with a state."""
        self.busy = True
        try:
            self._follow(state)
            self._draw_list(state)
            self._draw_decision(state)
            self._draw_note(state)
            self._draw_panels(state)
            self._draw_strip(state)
        finally:
            self.busy = False

    def take_scores(self) -> bool:
        """Count the images that are scored by now; return whether the threshold's slider was made anew for them.

        What depends on scores is drawn the next time, whatever the state.
        """
        done = len(self.findings) - len(self.findings.waiting)
        bar, defect = self.controls.by_name["progress"], self.controls.by_name["defect"]
        bar.value, bar.layout.display = done, "none" if done == len(self.findings) else ""
        for part in ("list", "decision", "head", "picks"):
            self._drawn.pop(part, None)
        if (kinds := kinds_of(self.findings)) != list(defect.options):
            chosen, self.busy = defect.value, True
            defect.options, defect.value = kinds, chosen
            self.busy = False
        if new := self._changed("range", score_range(self.findings)):
            self.controls.range_over(self.findings)
        return new

    def page(self, state: State) -> list[int]:
        """The images of the row of thumbnails: the page of the list that holds the one shown."""
        place = self.order.index(state.index) if state.index in self.order else 0
        return self.order[place // STRIP * STRIP : place // STRIP * STRIP + STRIP]

    def say(self, text: str, colour: str = "inherit") -> None:
        """Show a message below everything."""
        self.controls.texts["message"].value = f"<span style='color:{colour}'>{html.escape(text)}</span>"

    def _follow(self, state: State) -> None:
        """Set the controls to the state, which may have been changed by code."""
        c = self.controls.by_name
        for name in ("order", "defect", "outcome", "map", "colours", "scaling", "opacity", "follow", "zoom"):
            c[name].value = getattr(state, name)
        for name in ("threshold", "pixel_threshold"):
            if (value := getattr(state, name)) is not None:
                c[name].value = value
        for group, all_of in (("panel", PANELS), ("outline", OUTLINES)):
            for name in all_of:
                c[f"{group}_{name}"].value = name in getattr(state, f"{group}s")
        self.controls.place_panels(state.panels)

    def _changed(self, part: str, *key: Any) -> bool:
        """Whether a part depends on something else than when it was last drawn."""
        if self._drawn.get(part) == key:
            return False
        self._drawn[part] = key
        return True

    def _draw_list(self, state: State) -> None:
        found, c = self.findings, self.controls.by_name
        by_threshold = state.outcome != ALL or state.order == "closest to the threshold"
        if self._changed("list", state.order, state.defect, state.outcome, by_threshold and state.threshold):
            self.order = listed(found, state).tolist()
            files = {k: f"{found.defects[k] or '?'}/{Path(found.names[k]).name}" for k in self.order}
            lines = [f"{_written(found.scores[k])}  {file}" for k, file in files.items()]
            c["list"].options = list(zip(lines, self.order, strict=True))
        listed_here = state.index in self.order
        c["list"].value = state.index if listed_here else None
        c["place"].max, c["place"].disabled = max(1, len(self.order)), not self.order
        if listed_here:
            c["place"].value = self.order.index(state.index) + 1

    def _draw_decision(self, state: State) -> None:
        found, texts = self.findings, self.controls.texts
        if self._changed("decision", state.threshold):
            texts["histogram"].value = histogram(found, state.threshold)
            what, rule = "chosen by hand: ", ""
            if state.threshold == found.threshold:
                what = "" if state.threshold is None else "stored threshold: "
                rule = f"<small>{html.escape(found.rule)}</small>" if found.rule else ""
            elif state.threshold == best_threshold(found):
                what = "F1-max (has seen the truth): "
            texts["counts"].value = what + pages.summary(found, state.threshold) + rule

    def _draw_note(self, state: State) -> None:
        c = self.controls.by_name
        if self._changed("note", state.index):  # what is being typed is never replaced
            c["verdict"].value, c["note"].value = self.notes[self.findings.names[state.index]]
        where = html.escape(self.notes.path.name)
        self.controls.texts["noted"].value = f"<small>{len(self.notes)} notes in {where}</small>"

    def _layers(self, state: State) -> Layers:
        """The layers of the part that is shown; made anew when image, point or zoom change."""
        centre = state.map if state.point is None else state.point
        if self._changed("layers", state.index, centre, state.zoom):
            self._last_layers = Layers(self.picture(state.index), state)
        return self._last_layers

    def _draw_panels(self, state: State) -> None:
        found, texts, images = self.findings, self.controls.texts, self.controls.images
        try:
            picture = self.picture(state.index)
        except (ImageError, OSError) as error:
            texts["head"].value = f"<b style='color:#c00'>{html.escape(str(error))}</b>"
            for image in images.values():
                image.value = NOTHING
            self._drawn.clear()
            if state.scaling == "run":
                texts["bar"].value = self._bar(state, found.scale)
            return
        layers = self._layers(state)
        place = (state.index, state.point, state.zoom, layers.point)
        heat = (state.map, state.colours, state.scaling)
        lines = (state.outlines, state.pixel_threshold)
        needs = {
            "image": (place, lines),
            "overlay": (place, lines, heat, state.opacity, state.follow),
            "heatmap": (place, lines, heat),
            "truth": (place, state.outlines),
        }
        for name in state.panels:
            if self._changed(name, *needs[name]):
                images[name].value = encoded(panel(name, layers, state, found.scale))
        if self._changed("bar", heat, state.threshold, state.pixel_threshold, state.scaling == "image" and state.index):
            texts["bar"].value = self._bar(state, layers.scale(state, found.scale))
        for name, caption in pages.captions(picture, state).items():
            self.controls.captions[name].value = f"<b>{caption}</b>"
        if self._changed("head", state.index, state.threshold):
            texts["head"].value = self._head(picture, state)
        if self._changed("point", place):
            self._draw_point(picture, layers)

    def _bar(self, state: State, scale: Scale) -> str:
        caption = f"{state.map.replace('_', '–')} map, one scale for all images"
        if state.scaling == "image":
            caption = "STRETCHED to this image's own range: its colours cannot be compared with another image's"
        return colour_bar(state.colours, scale, pages.marks(self.findings, state), caption)

    def _head(self, picture: Picture, state: State) -> str:
        """The heading of the image shown: what it is, what was decided, what each branch adds to its score."""
        (row, column), parts = shares(picture)
        text = " ".join(
            f"{value:+.3g} <span style='color:{colour}'>■</span> {name.replace('_', '–')}"
            for (name, value), colour in zip(parts.items(), BRANCH_COLOURS, strict=False)
        ).removeprefix("+")
        branches = f"score = {text} {branch_bar(parts)} at x {column}, y {row}" if parts else ""
        return f"<b>{html.escape(pages.heading(self.findings, state))}</b><br>{branches}"

    def _draw_point(self, picture: Picture, layers: Layers) -> None:
        (height, width), (row, column) = picture.image.shape[:2], layers.point
        for name, side, value in (("row", height, row), ("column", width, column)):
            control = self.controls.by_name[name]
            control.max, control.value = side - 1, value
        values = ", ".join(f"{name.replace('_', '–')} {v:.4g}" for name, v in values_at(picture, layers.point).items())
        red, green, blue = picture.image[row, column]
        where = f"x {column}, y {row} of {width}×{height}"
        self.controls.texts["point"].value = f"{where}: {values}; RGB {red}, {green}, {blue}"

    def _draw_strip(self, state: State) -> None:
        page, thumbs, picks = self.page(state), self.controls.thumbs, self.controls.picks
        if self._changed("strip", page, state.colours):
            for number, (image, pick) in enumerate(zip(thumbs, picks, strict=True)):
                image.layout.visibility = pick.layout.visibility = "visible" if number < len(page) else "hidden"
                if number < len(page):
                    image.value = self._thumbnail(page[number], state.colours)
        if self._changed("picks", page, state.index, state.threshold):
            became = outcomes(self.findings, state.threshold)
            for index, pick in zip(page, picks, strict=False):
                pick.description = _written(self.findings.scores[index], 3) + (" ◀" if index == state.index else "")
                pick.tooltip = f"{self.findings.names[index]}: {became[index]}"
                pick.button_style = OUTCOME_STYLES.get(str(became[index]), "")

    def _small(self, index: int, colours: str) -> bytes:
        """The thumbnail of an image; grey if it cannot be read, as its own view then says."""
        try:  # past the cache, which has room for the pictures that are shown
            return thumbnail(self.findings.picture(index), State(colours=colours), self.findings.scale)
        except (ImageError, OSError):
            return NOTHING


def _written(score: float, digits: int = 4) -> str:
    """Return a score as text; "–" for what is not scored."""
    return "–" if np.isnan(score) else f"{score:.{digits}g}"
