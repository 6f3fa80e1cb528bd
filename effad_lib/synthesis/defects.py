"""The register of defects: each is a function `(item, rng, severity) -> Scene`.

Place and shape come from `rng` alone, so that one seed gives one defect, fainter or stronger with the severity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.scene import Item, Scene

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
