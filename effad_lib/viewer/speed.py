"""How fast the viewer answers: measured, not promised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import ipywidgets as w
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from effad_lib.images import Size
from effad_lib.viewer.widgets import Viewer


def write_example(folder: str | Path, size: Size, count: int) -> tuple[Path, Path, Path]:
    """Write `count` maps, images and masks of one random texture, for measuring; return the folders as `of_maps` takes.

    All images are the same file by other names, and so are the maps, float32 of the images' size, and the masks.
    """
    images, maps, masks = (Path(folder) / name for name in ("images", "maps", "masks"))
    for place in (images, maps, masks):
        place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rough = ndimage.gaussian_filter(rng.normal(size=(*size, 3)), (2, 2, 0)) * 400 + 128
    Image.fromarray(rough.clip(0, 255).astype(np.uint8)).save(images / "00000.png")
    heat = ndimage.gaussian_filter(rng.normal(size=size), max(size) / 24)
    np.save(maps / "00000.npy", (heat / np.abs(heat).max()).astype(np.float32))
    Image.fromarray((heat > np.quantile(heat, 0.95)).astype(np.uint8) * 255).save(masks / "00000.png")
    for index in range(1, count):
        for first in (images / "00000.png", maps / "00000.npy", masks / "00000.png"):
            os.link(first, first.with_name(f"{index:05d}{first.suffix}"))
    return maps, images, masks


def redraw_times(viewer: Viewer, repeats: int = 20) -> pd.DataFrame:
    """Return how long a viewer takes to redraw after a move of each slider, and for another image.

    A row for each control; columns `median` and `slowest` of so many moves, in milliseconds, from the new value to the
    new bytes of all panels. The way to the browser comes on top: only the last picture is sent, since a cell that sends
    every one of them floods its front end.
    """
    with ExitStack() as sent_at_the_end:
        for widget in _parts(viewer.widget):
            sent_at_the_end.enter_context(widget.hold_sync())
        return _measured(viewer, repeats)


def _parts(widget: w.Widget) -> Iterator[w.Widget]:
    """Yield a widget and everything inside it, layouts and styles included."""
    yield widget
    for name in ("layout", "style"):
        if isinstance(part := getattr(widget, name, None), w.Widget):
            yield part
    for child in getattr(widget, "children", ()):
        yield from _parts(child)


def _measured(viewer: Viewer, repeats: int) -> pd.DataFrame:
    before, controls = viewer.state, viewer.controls
    viewer.change(pixel_threshold=float(np.mean(viewer.findings.scale)))
    moves = {}
    for name in ("opacity", "pixel_threshold", "threshold", "row", "zoom"):
        moves[name] = [(controls[name], value) for value in _values(controls[name], repeats)]
    rows = {}
    for name, values in moves.items():
        rows[name] = [
            _timed(lambda control=control, value=value: setattr(control, "value", value)) for control, value in values
        ]
    viewer.state = before
    count = len(viewer.findings)
    rows["another image"] = [_timed(lambda k=k: viewer.show((before.index + k) % count)) for k in range(1, repeats + 1)]
    viewer.state = before
    table = pd.DataFrame({name: [np.median(times), np.max(times)] for name, times in rows.items()})
    return table.T.set_axis(["median", "slowest"], axis=1).rename_axis("control")


def _values(control: object, count: int) -> list:
    if hasattr(control, "options"):
        values = [value for _, value in control.options]
        return [values[k % len(values)] for k in range(1, count + 1)]
    low, high = control.min, control.max
    if hasattr(control, "base"):
        return np.geomspace(control.base**low, control.base**high, count + 2)[1:-1].tolist()
    values = np.linspace(low, high, count + 2)[1:-1]
    return [int(value) for value in values] if isinstance(high, int) else values.tolist()


def _timed(work: object) -> float:
    began = perf_counter()
    work()
    return 1000 * (perf_counter() - began)
