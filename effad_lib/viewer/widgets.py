"""The widgets: a thin shell that turns what people do into a new `State`, and draws again what depends on it."""

from __future__ import annotations

import asyncio
import html
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from effad_lib.images import SUFFIXES, ImageError
from effad_lib.progress import progress
from effad_lib.runs import RunError, write_bytes
from effad_lib.viewer import pages
from effad_lib.viewer.controls import STRIP, Controls, steps_from_start
from effad_lib.viewer.drawings import branch_bar, colour_bar, histogram
from effad_lib.viewer.findings import Findings, Picture
from effad_lib.viewer.notes import Note, Notes
from effad_lib.viewer.rendering import Layers, encoded, hottest, panel, shares, thumbnail, values_at
from effad_lib.viewer.state import (
    ALL,
    OUTLINES,
    PANELS,
    ZOOMS,
    State,
    best_threshold,
    listed,
    outcomes,
    score_range,
)

OUTCOME_STYLES = {"right": "success", "miss": "danger", "false alarm": "warning"}


class Viewer:
    """An interactive view of `Findings`; in a notebook, the last line of a cell shows it.

    `state` is what is shown; setting it, or any control, draws what changed. `widget` is the whole, `controls` its
    parts by name. Images that wait for their score are scored while one looks on, or at once by `score_all`.
    """

    def __init__(self, findings: Findings, *, panel_width: int = 250) -> None:
        self.findings, self.notes = findings, Notes(findings.notes)
        self._state = State(threshold=findings.threshold, pixel_threshold=findings.pixel_threshold)
        self._drawn: dict[str, tuple] = {}  # for each part, what it was last drawn from
        self._order: list[int] = []
        self._picture = lru_cache(maxsize=4)(findings.picture)
        self._thumbnail = lru_cache(maxsize=512)(self._small)
        self._uploads = tempfile.TemporaryDirectory(prefix="effad-")
        self._updating = False
        self._shell = Controls(findings, self._state, panel_width)
        self.controls, self.widget = self._shell.by_name, self._shell.widget
        self._wire()
        self._first()
        if findings.waiting:
            self._score_in_background()

    # --- the state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What is shown now."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self._draw()

    def change(self, **values: Any) -> None:
        """Change some fields of the state and draw again what depends on them."""
        self.state = replace(self._state, **values)

    def step(self, by: int) -> None:
        """Show the next image of the list, or with -1 the previous one; the list's ends are ends."""
        if self._order:
            place = self._order.index(self._state.index) if self._state.index in self._order else 0
            self.show(self._order[min(max(place + by, 0), len(self._order) - 1)])

    def show(self, index: int) -> None:
        """Show the image of this index, whole and without a point."""
        self.change(index=int(index), point=None, zoom=1)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_all(self) -> Viewer:
        """Score at once what still waits, with a progress bar."""
        for index in progress(self.findings.waiting, desc="scoring", unit="image"):
            self.findings.score(index)
        self._scored()
        self._first()
        return self

    def _score_in_background(self) -> None:
        """Score one image after the other between the messages of the front end; without a running loop, at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.score_all()
            return

        async def work() -> None:
            for number, index in enumerate(self.findings.waiting):
                if np.isnan(self.findings.scores[index]):  # `score_all` may have come first
                    self.findings.score(index)
                    if number % 10 == 0:
                        self._scored()
                await asyncio.sleep(0.001)
            self._scored()

        def over(task: asyncio.Task) -> None:
            if not task.cancelled() and (error := task.exception()):
                self._say(f"scoring stopped: {error}", "#c00")

        self._task = loop.create_task(work())  # kept: a task that nobody holds may vanish
        self._task.add_done_callback(over)

    def _scored(self) -> None:
        done = len(self.findings) - len(self.findings.waiting)
        bar = self.controls["progress"]
        bar.value, bar.layout.display = done, "none" if done == len(self.findings) else ""
        if self._changed("range", score_range(self.findings)):
            self._watch_threshold(self._shell.range_over(self.findings))
        for part in ("list", "decision", "head", "picks"):
            self._drawn.pop(part, None)
        self._draw()

    def _watch_threshold(self, slider: Any) -> None:
        slider.observe(lambda change: self._slid("threshold", change["new"]), "value")

    def _wire(self) -> None:
        c = self.controls
        self._watch_threshold(c["threshold"])
        for name in ("order", "defect", "outcome"):
            c[name].observe(lambda change, name=name: self._by_hand(find=True, **{name: change["new"]}), "value")
        for name in ("map", "colours", "scaling", "opacity", "follow", "zoom"):
            c[name].observe(lambda change, name=name: self._by_hand(**{name: change["new"]}), "value")
        c["pixel_threshold"].observe(lambda change: self._slid("pixel_threshold", change["new"]), "value")
        c["list"].observe(lambda change: None if self._updating else self.show(change["new"]), "value")
        c["place"].observe(lambda change: self._updating or self.show(self._order[change["new"] - 1]), "value")
        for name in ("row", "column"):
            c[name].observe(lambda _: self._by_hand(point=(c["row"].value, c["column"].value)), "value")
        for group, all_of in (("panel", PANELS), ("outline", OUTLINES)):
            for name in all_of:
                c[f"{group}_{name}"].observe(
                    lambda _, group=group, all_of=all_of: self._toggled(group, all_of), "value"
                )
        c["panel_width"].observe(lambda _: self._resize(), "value")
        c["previous"].on_click(lambda _: self.step(-1))
        c["next"].on_click(lambda _: self.step(1))
        c["stored"].on_click(lambda _: self.change(threshold=self.findings.threshold))
        c["best"].on_click(lambda _: self._to_best())
        c["stored_pixels"].on_click(lambda _: self.change(pixel_threshold=self.findings.pixel_threshold))
        c["hottest"].on_click(lambda _: self._try(self._to_hottest))
        c["to_defect"].on_click(lambda _: self._try(self._to_defect))
        c["whole"].on_click(lambda _: self.change(point=None, zoom=1))
        for number, pick in enumerate(self._shell.picks):
            pick.on_click(lambda _, number=number: self.show(self._page()[number]))
        for name in ("verdict", "note"):
            c[name].observe(lambda _: self._note(), "value")
        c["upload"].observe(lambda change: self._upload(change["new"]), "value")
        c["save"].on_click(lambda _: self._try(lambda: f"saved as {self.save()}"))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return self.widget._repr_mimebundle_(**kwargs)

    # --- what people do ----------------------------------------------------------------------------------------------

    def _by_hand(self, *, find: bool = False, **values: Any) -> None:
        """Take the value of a control, unless it only follows the state; `find` goes to the first of another list."""
        if self._updating:
            return
        self.change(**values)
        if find and self._state.index not in self._order:
            self._first()

    def _slid(self, name: str, value: float) -> None:
        """Take the value of a threshold's slider, unless the browser has only rounded what it was told to its steps."""
        slider, now = self.controls[name], getattr(self._state, name)
        if now is not None and abs(steps_from_start(slider, value) - steps_from_start(slider, now)) <= 0.5 + 1e-6:
            return
        self._by_hand(**{name: value})

    def _toggled(self, group: str, all_of: tuple[str, ...]) -> None:
        chosen = tuple(name for name in all_of if self.controls[f"{group}_{name}"].value)
        self._by_hand(**{f"{group}s": chosen})

    def _resize(self) -> None:
        for cell in self._shell.cells:
            cell.layout.width = f"{self.controls['panel_width'].value}px"

    def _to_best(self) -> None:
        best = best_threshold(self.findings)
        if best is None:
            self._say("F1-max takes good and defective images whose truth is known")
        else:
            self.change(threshold=best)

    def _to_hottest(self) -> None:
        picture = self._picture(self._state.index)
        point = hottest(picture.maps[self._state.map], picture.image.shape[:2])
        self.change(point=point, zoom=max(self._state.zoom, 3))

    def _to_defect(self) -> str | None:
        truth = self._picture(self._state.index).truth
        if truth is None or not truth.any():
            return "no true defect is known on this image"
        rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
        share = max((rows[-1] - rows[0] + 1) / truth.shape[0], (columns[-1] - columns[0] + 1) / truth.shape[1])
        zoom = max([zoom for zoom in ZOOMS if zoom <= 0.7 / share], default=1)
        point = (int(rows[0] + rows[-1]) // 2, int(columns[0] + columns[-1]) // 2)
        self.change(point=point, zoom=zoom)
        return None

    def _note(self) -> None:
        if not self._updating:
            name = self.findings.names[self._state.index]
            written = Note(self.controls["verdict"].value, self.controls["note"].value)
            self._try(lambda: self.notes.__setitem__(name, written))
            self._draw()

    def _upload(self, files: tuple[dict[str, Any], ...]) -> None:
        for file in files:
            self._try(lambda file=file: self._added(Path(file["name"].replace("\\", "/")).name, file["content"]))

    def _added(self, name: str, content: bytes) -> str:
        """Score an uploaded picture and show it; of its name, which may be anything, only the ending makes a file."""
        ending = Path(name).suffix.lower()
        if ending not in SUFFIXES:
            raise ImageError(f"{name}: no known ending of an image. It takes {', '.join(sorted(SUFFIXES))}.")
        path = write_bytes(Path(self._uploads.name) / f"{len(self.findings)}{ending}", content)
        try:
            index = self.findings.add(path, name)
        except ImageError as error:
            raise ImageError(str(error).replace(str(path), name)) from error
        self._state = replace(self._state, index=index, point=None, zoom=1, defect=ALL, outcome=ALL)
        self._scored()
        return f"{name}: score {self.findings.scores[index]:.4g}"

    def save(self, path: str | Path | None = None) -> Path:
        """Save the current view as PNG at print quality, by default in `views/` beside the notes; return the path."""
        if path is None:
            folder, name = self.findings.notes.parent / "views", Path(self.findings.names[self._state.index])
            path = folder / f"{self._state.index:05d}_{name.stem}_{self._state.map}.png"
        return write_bytes(path, self.png())

    def png(self, *, dpi: int = 300) -> bytes:
        """Return the current view as PNG."""
        return pages.print_png(self.findings, self._picture(self._state.index), self._state, dpi=dpi)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def _first(self) -> None:
        """Show the first image of the list."""
        order = listed(self.findings, self._state)
        self.show(order[0] if len(order) else 0)

    def _draw(self) -> None:
        """Bring every control and every part of the view up to date with the state."""
        self._updating = True
        try:
            self._follow()
            self._draw_list()
            self._draw_decision()
            self._draw_note()
            self._draw_panels()
            self._draw_strip()
        finally:
            self._updating = False

    def _follow(self) -> None:
        """Set the controls to the state, which may have been changed by code."""
        c, state = self.controls, self._state
        for name in ("order", "defect", "outcome", "map", "colours", "scaling", "opacity", "follow", "zoom"):
            c[name].value = getattr(state, name)
        for name in ("threshold", "pixel_threshold"):
            if (value := getattr(state, name)) is not None:
                c[name].value = value
        for group, all_of in (("panel", PANELS), ("outline", OUTLINES)):
            for name in all_of:
                c[f"{group}_{name}"].value = name in getattr(state, f"{group}s")
        for name, cell in zip(PANELS, self._shell.cells, strict=True):
            cell.layout.display = "" if name in state.panels else "none"

    def _changed(self, part: str, *key: Any) -> bool:
        """Whether a part depends on something else than when it was last drawn."""
        if self._drawn.get(part) == key:
            return False
        self._drawn[part] = key
        return True

    def _draw_list(self) -> None:
        state, found = self._state, self.findings
        by_threshold = state.outcome != ALL or state.order == "closest to the threshold"
        if self._changed("list", state.order, state.defect, state.outcome, by_threshold and state.threshold):
            self._order = listed(found, state).tolist()
            lines = [
                f"{found.scores[k]:8.3f}  {found.defects[k] or '?'}/{Path(found.names[k]).name}" for k in self._order
            ]
            self.controls["list"].options = list(zip(lines, self._order, strict=True))
        listed_here = state.index in self._order
        self.controls["list"].value = state.index if listed_here else None
        self.controls["place"].max, self.controls["place"].disabled = max(1, len(self._order)), not self._order
        if listed_here:
            self.controls["place"].value = self._order.index(state.index) + 1

    def _draw_decision(self) -> None:
        state, found = self._state, self.findings
        if self._changed("decision", state.threshold):
            self._shell.texts["histogram"].value = histogram(found, state.threshold)
            what = "stored threshold" if state.threshold == found.threshold else "chosen by hand"
            rule = f"<small>{html.escape(found.rule)}</small>" if state.threshold == found.threshold else ""
            self._shell.texts["counts"].value = f"{what}: {pages.summary(found, state.threshold)}{rule}"

    def _draw_note(self) -> None:
        if self._changed("note", self._state.index):  # what is being typed is never replaced
            note = self.notes[self.findings.names[self._state.index]]
            self.controls["verdict"].value, self.controls["note"].value = note
        where = html.escape(self.notes.path.name)
        self._shell.texts["noted"].value = f"<small>{len(self.notes)} notes in {where}</small>"

    def _layers(self) -> Layers:
        """The layers of the part that is shown; made anew when image, point or zoom change."""
        state = self._state
        centre = state.map if state.point is None else state.point
        if self._changed("layers", state.index, centre, state.zoom):
            self._last_layers = Layers(self._picture(state.index), state)
        return self._last_layers

    def _draw_panels(self) -> None:
        state, found = self._state, self.findings
        try:
            picture = self._picture(state.index)
        except (ImageError, OSError) as error:
            self._shell.texts["head"].value = f"<b style='color:#c00'>{html.escape(str(error))}</b>"
            for image in self._shell.images.values():
                image.value = b""
            self._drawn.clear()
            return
        layers = self._layers()
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
                self._shell.images[name].value = encoded(panel(name, layers, state, found.scale))
        if self._changed("bar", heat, state.pixel_threshold, state.scaling == "image" and state.index):
            caption, scale = "anomaly score, one scale for all images", layers.scale(state, found.scale)
            if state.scaling == "image":
                caption = "STRETCHED to this image's own range: its colours cannot be compared with another image's"
            self._shell.texts["bar"].value = colour_bar(state.colours, scale, pages.marks(found, state), caption)
        if self._changed("head", state.index, state.threshold):
            self._shell.texts["head"].value = self._head(picture)
        if self._changed("point", place):
            self._draw_point(picture, layers)

    def _head(self, picture: Picture) -> str:
        """The heading of the image shown: what it is, what was decided, what each branch adds to its score."""
        (row, column), parts = shares(picture)
        text = " ".join(f"{value:+.3f} {name.replace('_', '–')}" for name, value in parts.items()).removeprefix("+")
        branches = f"score = {text} {branch_bar(parts)} at x {column}, y {row}" if parts else ""
        truth = "" if picture.truth is not None else "<br>ground truth: not known"
        return f"<b>{html.escape(pages.heading(self.findings, self._state))}</b><br>{branches}{truth}"

    def _draw_point(self, picture: Picture, layers: Layers) -> None:
        (height, width), (row, column) = picture.image.shape[:2], layers.point
        for name, side, value in (("row", height, row), ("column", width, column)):
            self.controls[name].max = side - 1
            self.controls[name].value = value
        values = ", ".join(f"{name.replace('_', '–')} {v:.4g}" for name, v in values_at(picture, layers.point).items())
        red, green, blue = picture.image[row, column]
        where = f"x {column}, y {row} of {width}×{height}"
        self._shell.texts["point"].value = f"{where}: {values}; RGB {red}, {green}, {blue}"

    def _page(self) -> list[int]:
        """The images of the row of thumbnails: the page of the list that holds the one shown."""
        place = self._order.index(self._state.index) if self._state.index in self._order else 0
        return self._order[place // STRIP * STRIP : place // STRIP * STRIP + STRIP]

    def _draw_strip(self) -> None:
        state, page = self._state, self._page()
        if self._changed("strip", page, state.colours):
            for number, (image, pick) in enumerate(zip(self._shell.thumbs, self._shell.picks, strict=True)):
                image.layout.visibility = pick.layout.visibility = "visible" if number < len(page) else "hidden"
                if number < len(page):
                    image.value = self._thumbnail(page[number], state.colours)
        if self._changed("picks", page, state.index, state.threshold):
            became = outcomes(self.findings, state.threshold)
            for index, pick in zip(page, self._shell.picks, strict=False):
                pick.description = f"{self.findings.scores[index]:.3g}" + (" ◀" if index == state.index else "")
                pick.tooltip = f"{self.findings.names[index]}: {became[index]}"
                pick.button_style = OUTCOME_STYLES.get(str(became[index]), "")

    def _small(self, index: int, colours: str) -> bytes:
        """The thumbnail of an image; nothing if it cannot be read, as its own view then says."""
        try:
            return thumbnail(self._picture(index), State(colours=colours), self.findings.scale)
        except (ImageError, OSError):
            return b""

    def _say(self, text: str, colour: str = "inherit") -> None:
        self._shell.texts["message"].value = f"<span style='color:{colour}'>{html.escape(text)}</span>"

    def _try(self, work: Callable[[], str | None]) -> None:
        """Do something that may fail for a reason that people can mend; tell them that, or what it has to say."""
        try:
            self._say(work() or "")
        except (ImageError, RunError, OSError) as error:
            self._say(str(error), "#c00")
