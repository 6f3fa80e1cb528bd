"""The register of defects: each is a function `(item, rng, severity) -> Scene`.

Place and shape come from `rng`, so that one seed gives one defect, fainter or stronger with the severity.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.scene import Array, Canvas, Item, Pose, Scene, Window, cloud, norm

Apply = Callable[[Item, Generator, float], Scene]


def anything(item: Item) -> bool:
    """Every product will do."""
    return True


@dataclass(frozen=True)
class Defect:
    """What a defect does to a piece, whether it is logical (every patch looks fine), and which products can have it."""

    apply: Apply
    logical: bool
    needs: Callable[[Item], bool]


DEFECTS: dict[str, Defect] = {}


def defect(name: str, logical: bool = False, needs: Callable[[Item], bool] = anything) -> Callable[[Apply], Apply]:
    """Register a defect; `needs(item)` tells whether a product can have it."""

    def enter(apply: Apply) -> Apply:
        DEFECTS[name] = Defect(apply, logical, needs)
        return apply

    return enter


def spot(item: Item, rng: Generator, margin: float) -> tuple[float, float]:
    """A place well inside the surface, and not at the very border of the image."""
    canvas = item.canvas
    inside = ndimage.minimum_filter(item.scene.surface, max(1, round(2 * margin / canvas.pixel))) > 0.5
    border = round(0.12 / canvas.pixel)
    inside[:border] = inside[-border:] = inside[:, :border] = inside[:, -border:] = False
    places = np.flatnonzero(inside if inside.any() else item.scene.surface > 0.5)
    row, column = divmod(int(places[rng.integers(len(places))]), canvas.width)
    return float(canvas.x[0, column]), float(canvas.y[row, 0])


@dataclass(frozen=True, eq=False)
class Patch(Canvas):
    """The part of the canvas `whole` within `reach` of the place (`left`, `top`), which is the patch's origin."""

    window: Window
    whole: Canvas
    left: float
    top: float

    @property
    def pixel(self) -> float:
        return self.whole.pixel

    @cached_property
    def x(self) -> Array:
        return self.whole.x[:, self.window[1]] - np.float32(self.left)

    @cached_property
    def y(self) -> Array:
        return self.whole.y[self.window[0]] - np.float32(self.top)

    def cut(self, scene: Scene) -> Scene:
        """The scene inside the patch."""
        flat = (layer[self.window] for layer in (scene.height, scene.gloss, scene.surface))
        return Scene(scene.albedo[:, *self.window], *flat, lambda: scene.under[:, *self.window])

    def paste(self, scene: Scene, **painted: Array) -> Scene:
        """The scene with its layers of these names (`albedo`, `height`, `gloss`) painted anew inside the patch."""
        layers = {name: getattr(scene, name).copy() for name in painted}
        for name, piece in painted.items():
            layers[name][..., *self.window] = piece
        return replace(scene, **layers)


def around(canvas: Canvas, place: tuple[float, float], reach: float) -> Patch:
    """The patch of a canvas within `reach` of a place; the canvas's border cuts it off."""
    window = []
    for line, centre in ((canvas.y[:, 0], place[1]), (canvas.x[0], place[0])):
        first, last = np.searchsorted(line, (centre - reach, centre + reach)).tolist()
        window.append(slice(min(first, len(line) - 2), max(last, 2)))
    height, width = (cut.stop - cut.start for cut in window)
    return Patch(height, width, tuple(window), canvas, *place)


def blob(rng: Generator, patch: Patch, size: float, stretch: float = 1.5, ragged: float = 0.25) -> Array:
    """An irregular patch about `size` in radius: 1 in the middle, 0 on its outline, negative beyond."""
    stretch = rng.uniform(1, stretch) ** 0.5
    u, v = Pose(angle=float(rng.uniform(0, np.pi))).local(patch.x, patch.y)
    return 1 - norm(u / stretch, v * stretch) / size + ragged * cloud(rng, patch, 0.7 * size, 3)


def trace(canvas: Canvas, x: Array, y: Array, half: Array, reach: float) -> Array:
    """Signed distance to a line through the points (x, y), half as wide as `half` there; exact up to `reach`.

    The points must not be more than about half a pixel apart.
    """
    steps = np.arange(-(n := int(np.ceil((reach + half.max()) / canvas.pixel))), n + 1)
    row, column = ((a - line.flat[0]) / canvas.pixel for a, line in ((y, canvas.y), (x, canvas.x)))
    rows, columns = (np.rint(a).astype(int)[:, None] + steps for a in (row, column))
    gap = np.hypot((rows - row[:, None])[:, :, None], (columns - column[:, None])[:, None])
    gap = (gap * canvas.pixel - half[:, None, None]).astype(np.float32)
    rows, columns = np.broadcast_arrays(rows[:, :, None], columns[:, None])
    inside = (rows >= 0) & (rows < canvas.height) & (columns >= 0) & (columns < canvas.width)
    distance = np.full(canvas.shape, reach, np.float32)
    np.minimum.at(distance, (rows[inside], columns[inside]), gap[inside])
    return distance
