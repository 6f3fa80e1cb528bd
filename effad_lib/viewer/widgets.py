"""The widgets: a thin shell that turns what people do into a new `State`, and draws again what depends on it."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from effad_lib.images import SUFFIXES, ImageError
from effad_lib.progress import progress
from effad_lib.runs import RunError, within, write_bytes
from effad_lib.viewer import pages
from effad_lib.viewer.controls import Controls, steps_from_start
from effad_lib.viewer.display import Display
from effad_lib.viewer.findings import Findings
from effad_lib.viewer.notes import Notes
from effad_lib.viewer.rendering import hottest
from effad_lib.viewer.state import (
    ALL,
    OUTLINES,
    PANELS,
    ZOOMS,
    State,
    best_threshold,
    listed,
)


class Viewer:
    """An interactive view of `Findings`; in a notebook, the last line of a cell shows it.

    `state` is what is shown; setting it, or any control, draws what changed. `widget` is the whole, `controls` its
    parts by name. Images that wait for their score are scored while one looks on, or at once by `score_all`.
    """

    def __init__(self, findings: Findings, *, panel_width: int = 250) -> None:
        self.findings, self.notes = findings, Notes(findings.notes)
        self._state = State(threshold=findings.threshold, pixel_threshold=findings.pixel_threshold)
        self._shell = Controls(findings, panel_width)
        self._display = Display(findings, self.notes, self._shell)
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
        self._display.draw(state)

    def change(self, **values: Any) -> None:
        """Change some fields of the state and draw again what depends on them."""
        self.state = replace(self._state, **values)

    def step(self, by: int) -> None:
        """Show the next image of the list, or with -1 the previous one; the list's ends are ends."""
        order = self._display.order
        if order:
            self._go_to((order.index(self._state.index) if self._state.index in order else 0) + by)

    def _go_to(self, place: int) -> None:
        order = self._display.order
        self.show(order[min(max(place, 0), len(order) - 1)])

    def show(self, index: int) -> None:
        """Show the image of this index, whole and without a point."""
        self._display.say("")
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
                self._display.say(f"scoring stopped: {error}", "#c00")

        self._task = loop.create_task(work())  # kept: a task that nobody holds may vanish
        self._task.add_done_callback(over)

    def _scored(self) -> None:
        if self._display.take_scores():
            self._watch_threshold()
        self._display.draw(self._state)

    def _watch_threshold(self) -> None:
        self.controls["threshold"].observe(lambda change: self._slid("threshold", change["new"]), "value")

    def _wire(self) -> None:
        c = self.controls
        self._watch_threshold()
        for name in ("order", "defect", "outcome"):
            c[name].observe(lambda change, name=name: self._by_hand(find=True, **{name: change["new"]}), "value")
        for name in ("map", "colours", "scaling", "opacity", "follow"):
            c[name].observe(lambda change, name=name: self._by_hand(**{name: change["new"]}), "value")
        c["zoom"].observe(lambda change: self._zoomed(change["new"]), "value")
        c["pixel_threshold"].observe(lambda change: self._slid("pixel_threshold", change["new"]), "value")
        c["list"].observe(lambda change: self._display.busy or self.show(change["new"]), "value")
        c["place"].observe(lambda change: self._display.busy or self._go_to(change["new"] - 1), "value")
        for name in ("row", "column"):
            c[name].observe(lambda _: self._by_hand(point=(c["row"].value, c["column"].value)), "value")
        for group, all_of in (("panel", PANELS), ("outline", OUTLINES)):
            for name in all_of:
                c[f"{group}_{name}"].observe(
                    lambda _, group=group, all_of=all_of: self._toggled(group, all_of), "value"
                )
        c["panel_width"].observe(lambda _: self._shell.place_panels(self._state.panels), "value")
        c["previous"].on_click(lambda _: self.step(-1))
        c["next"].on_click(lambda _: self.step(1))
        c["stored"].on_click(lambda _: self.change(threshold=self.findings.threshold))
        c["best"].on_click(lambda _: self._to_best())
        c["stored_pixels"].on_click(lambda _: self.change(pixel_threshold=self.findings.pixel_threshold))
        c["hottest"].on_click(lambda _: self._try(self._to_hottest))
        c["to_defect"].on_click(lambda _: self._try(self._to_defect))
        c["whole"].on_click(lambda _: self.change(point=None, zoom=1))
        for number, pick in enumerate(self._shell.picks):
            pick.on_click(lambda _, number=number: self.show(self._display.page(self._state)[number]))
        for name in ("verdict", "note"):
            c[name].observe(lambda change, name=name: self._note(name, change["new"]), "value")
        c["upload"].observe(lambda change: self._upload(change["new"]), "value")
        c["save"].on_click(lambda _: self._try(lambda: f"saved as {self.save()}"))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return self.widget._repr_mimebundle_(**kwargs)

    # --- what people do ----------------------------------------------------------------------------------------------

    def _by_hand(self, *, find: bool = False, **values: Any) -> None:
        """Take the value of a control, unless it only follows the state; `find` goes to the first of another list."""
        if self._display.busy:
            return
        if find:
            self._display.say("")
        self.change(**values)
        if find and self._state.index not in self._display.order:
            self._first()

    def _slid(self, name: str, value: float) -> None:
        """Take the value of a threshold's slider, unless the browser has only rounded what it was told to its steps."""
        slider, now = self.controls[name], getattr(self._state, name)
        if now is not None and abs(steps_from_start(slider, value) - steps_from_start(slider, now)) <= 0.5 + 1e-6:
            return
        self._by_hand(**{name: value})

    def _zoomed(self, zoom: float) -> None:
        """Zoom to the point, or to what is hottest now: the part stays the same when another map is chosen."""
        if not self._display.busy:
            if self._state.point is None and zoom > 1:
                self._to_hottest(zoom)
            else:
                self.change(zoom=zoom)

    def _toggled(self, group: str, all_of: tuple[str, ...]) -> None:
        chosen = tuple(name for name in all_of if self.controls[f"{group}_{name}"].value)
        self._by_hand(**{f"{group}s": chosen})

    def _to_best(self) -> None:
        best = best_threshold(self.findings)
        if best is None:
            self._display.say("F1-max takes good and defective images whose truth is known")
        else:
            self.change(threshold=best)

    def _to_hottest(self, zoom: float = 3) -> None:
        picture = self._display.picture(self._state.index)
        point = hottest(picture.maps[self._state.map], picture.image.shape[:2])
        self.change(point=point, zoom=max(self._state.zoom, zoom))

    def _to_defect(self) -> str | None:
        truth = self._display.picture(self._state.index).truth
        if truth is None or not truth.any():
            return "no true defect is known on this image"
        rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
        share = max((rows[-1] - rows[0] + 1) / truth.shape[0], (columns[-1] - columns[0] + 1) / truth.shape[1])
        zoom = max([zoom for zoom in ZOOMS if zoom <= 0.7 / share], default=1)
        point = (int(rows[0] + rows[-1]) // 2, int(columns[0] + columns[-1]) // 2)
        self.change(point=point, zoom=zoom)
        return None

    def _first(self) -> None:
        """Show the first image of the list."""
        order = listed(self.findings, self._state)
        if len(order):
            self.show(order[0])
        else:
            self._display.say("no image passes these filters")

    def _note(self, part: str, value: str) -> None:
        """Write what was typed or chosen, and show what another viewer has written beside it."""

        def write() -> None:
            note = self.notes.change(self.findings.names[self._state.index], **{part: value})
            other = "verdict" if part == "note" else "note"
            self._display.busy = True
            self.controls[other].value = getattr(note, other)

        if not self._display.busy:
            self._try(write)
            self._display.draw(self._state)

    @cached_property
    def _uploads(self) -> tempfile.TemporaryDirectory:
        """The folder of uploaded pictures, gone with the viewer; made for the first of them, as most get none."""
        return tempfile.TemporaryDirectory(prefix="effad-")

    def _upload(self, files: tuple[dict[str, Any], ...]) -> None:
        for file in files:
            self._try(lambda file=file: self._added(Path(file["name"].replace("\\", "/")).name, file["content"]))
        self.controls["upload"].value = ()  # else the same file again would be no change

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
        """Save the current view as PNG at print quality, by default in a new file in `views/` beside the notes.

        Returns the path.
        """
        if path is None:
            folder, name = self.findings.notes.parent, Path(self.findings.names[self._state.index])
            stem = f"{self._state.index:05d}_{name.stem}_{self._state.map}"
            paths = (within(folder, f"views/{stem}{f'_{k}' if k > 1 else ''}.png") for k in itertools.count(1))
            path = next(path for path in paths if not path.exists())
        return write_bytes(path, self.png())

    def png(self, *, dpi: int = 300) -> bytes:
        """Return the current view as PNG."""
        return pages.print_png(self.findings, self._display.picture(self._state.index), self._state, dpi=dpi)

    def _try(self, work: Callable[[], str | None]) -> None:
        """Do something that may fail for a reason that people can mend; tell them that, or what it has to say."""
        try:
            self._display.say(work() or "")
        except (ImageError, RunError, OSError) as error:
            self._display.say(str(error), "#c00")
