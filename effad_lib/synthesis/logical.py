"""Logical defects: every surface is fine, the arrangement of the parts is not."""

from dataclasses import replace

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.defects import defect
from effad_lib.synthesis.scene import Array, Item, Part, Scene


def has_parts(item: Item) -> bool:
    """The product has parts that can move or go missing."""
    return bool(item.parts)


@defect("misplaced", logical=True, needs=has_parts)
def misplaced(item: Item, rng: Generator, severity: float) -> Scene:
    """One part moved off its place by about its own size, and turned, towards where there is room for it."""
    part = item.parts[rng.integers(len(item.parts))]
    reach = min(rng.uniform(0.85, 1.25) * max(part.width, part.height), 0.26)
    x, y = _free_direction(item, part, reach, rng)
    turn = float(rng.choice((-1, 1)) * rng.uniform(0.25, 0.9))
    moved = replace(part, x=part.x + severity * x, y=part.y + severity * y, angle=part.angle + severity * turn)
    scene = item.paint(tuple(moved if other is part else other for other in item.parts))
    return replace(scene, claimed=item.footprint(part) | item.footprint(moved))


@defect("missing", logical=True, needs=has_parts)
def missing(item: Item, rng: Generator, severity: float) -> Scene:
    """One part absent: broken off by the share `severity`, wholly gone at 1."""
    part = item.parts[rng.integers(len(item.parts))]
    return item.paint(tuple(replace(other, kept=1 - severity) if other is part else other for other in item.parts))


def _free_direction(item: Item, part: Part, reach: float, rng: Generator) -> Array:
    """The step of length `reach`, of 24 around the part, that leaves it the most room."""
    angles = rng.uniform(0, 2 * np.pi) + np.arange(24) * (np.pi / 12)
    steps = reach * np.stack([np.cos(angles), np.sin(angles)], 1)
    x, y = part.x + steps[:, 0], part.y + steps[:, 1]
    others = [other for other in item.parts if other is not part]
    gaps = [np.hypot(x - other.x, y - other.y) - part.radius - other.radius for other in others]
    room = [] if item.room is None else [item.room(x, y) - part.radius]
    slack = np.min([*gaps, *room], axis=0) if gaps or room else np.zeros(24)
    return steps[np.argmax(slack)]
