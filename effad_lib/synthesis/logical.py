"""Logical defects: every surface is fine, the arrangement of the parts is not."""

from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.defects import defect
from effad_lib.synthesis.scene import Array, Item, Part, Scene, norm


def has_parts(item: Item) -> bool:
    """The product has parts that can move or go missing."""
    return bool(item.parts)


def has_pairs(item: Item) -> bool:
    """The product has parts of different kinds that fit into each other's places."""
    return bool(_pairs(item))


def has_rows(item: Item) -> bool:
    """The product has evenly spaced parts, of which there could be another number."""
    return item.arrange is not None


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


@defect("extra", logical=True, needs=has_parts)
def extra(item: Item, rng: Generator, severity: float) -> Scene:
    """One part too many, at the roomiest of some places; of the share `severity` of it there is something."""
    part = item.parts[rng.integers(len(item.parts))]
    places = rng.uniform(-0.9, 0.9, (96, 2))
    x, y = places[np.argmax(_slack(item, part, item.parts, *places.T))].tolist()
    added = replace(part, x=x, y=y, angle=float(rng.uniform(0, 2 * np.pi)), kept=severity)
    return item.paint((*item.parts, added))


@defect("swapped", logical=True, needs=has_pairs)
def swapped(item: Item, rng: Generator, severity: float) -> Scene:
    """Two parts of different kinds in each other's places; the fainter, the less the two kinds differ."""
    pairs = _pairs(item)
    one, other = pairs[rng.integers(len(pairs))]
    places = {one: other, other: one}
    changed = [
        replace(part, x=places[part].x, y=places[part].y, angle=places[part].angle) if part in places else part
        for part in item.parts
    ]
    good, bad = item.scene, item.paint(tuple(changed))
    blended = {name: _between(getattr(good, name), getattr(bad, name), severity) for name in VISIBLE}
    return replace(good, **blended, claimed=item.footprint(one) | item.footprint(other))


@defect("wrong_count", logical=True, needs=has_rows)
def wrong_count(item: Item, rng: Generator, severity: float) -> Scene:
    """One part too many or too few in a row that is evenly spaced for all that, as drawn for another variant.

    The fainter, the nearer the parts are to their places, and the less is there of the one too many.
    """
    before = {part.name: part for part in item.parts}
    after = {part.name: part for part in item.arrange(int(rng.choice((-1, 1))))}
    parts = []
    for name in before | after:
        if name in before and name in after:
            old, new = before[name], after[name]
            moved = {field: _between(getattr(old, field), getattr(new, field), severity) for field in ("x", "y")}
            parts.append(replace(old, **moved))
        elif name in before:
            parts.append(replace(before[name], kept=1 - severity))
        else:
            parts.append(replace(after[name], kept=severity))
    return item.paint(tuple(parts))


VISIBLE = ("albedo", "height", "gloss")
"""What of a scene the camera sees."""


def _between(a: Array, b: Array, share: float) -> Array:
    return a + (b - a) * share


def _pairs(item: Item) -> list[tuple[Part, Part]]:
    """Parts of different kinds whose sides differ by half at most."""

    def alike(a: float, b: float) -> bool:
        return max(a, b) <= 1.5 * min(a, b)

    return [
        (one, other)
        for one, other in combinations(item.parts, 2)
        if one.kind != other.kind and alike(one.width, other.width) and alike(one.height, other.height)
    ]


def _free_direction(item: Item, part: Part, reach: float, rng: Generator) -> Array:
    """The step of length `reach`, of 24 around the part, that leaves it the most room."""
    angles = rng.uniform(0, 2 * np.pi) + np.arange(24) * (np.pi / 12)
    steps = reach * np.stack([np.cos(angles), np.sin(angles)], 1)
    others = tuple(other for other in item.parts if other is not part)
    return steps[np.argmax(_slack(item, part, others, part.x + steps[:, 0], part.y + steps[:, 1]))]


def _slack(item: Item, part: Part, others: tuple[Part, ...], x: Array, y: Array) -> Array:
    """How much room a part has at each of the places (x, y) [N] between `others` and the border."""
    gaps = [norm(x - other.x, y - other.y) - part.radius - other.radius for other in others]
    room = [] if item.room is None else [item.room(x, y) - part.radius]
    return np.min([*gaps, *room], axis=0) if gaps or room else np.zeros(len(x))
