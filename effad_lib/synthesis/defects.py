"""The defects: each is a function `(item, rng, severity) -> Scene` and is registered by name.

Place and shape come from `rng` alone, so that one seed gives one defect, fainter or stronger with the severity.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.scene import Array, Item, Part, Pose, Scene, cloud, colour, grain, mix, smoothstep

DEFECTS: dict[str, Callable[[Item, Generator, float], Scene]] = {}
LOGICAL: set[str] = set()


def defect(name: str, logical: bool = False) -> Callable:
    """Register a defect; a logical one needs a product that has parts."""

    def enter(apply: Callable[[Item, Generator, float], Scene]) -> Callable[[Item, Generator, float], Scene]:
        DEFECTS[name] = apply
        if logical:
            LOGICAL.add(name)
        return apply

    return enter


@defect("scratch")
def scratch(item: Item, rng: Generator, severity: float) -> Scene:
    """One to three strokes of a sharp edge that lay bare what is under the surface, deepest in the middle."""
    scene, canvas = item.scene, item.canvas
    x, y = _spot(item, rng, margin=0.06)
    u, v = Pose(x, y, float(rng.uniform(0, np.pi))).local(canvas.x, canvas.y)
    bend, sway, phase = rng.normal(0, 0.25), rng.uniform(0, 0.006), rng.uniform(0, 6.28)
    # A hard edge skips over low places and hits the high ones: the relief breaks the stroke up.
    relief = scene.height - ndimage.uniform_filter(scene.height, max(3, round(0.15 / canvas.pixel)))
    contact = np.clip(0.9 + 0.25 * relief / (relief.std() + 1e-3), 0.4, 1)
    cut, burr = np.zeros(canvas.shape, np.float32), np.zeros(canvas.shape, np.float32)
    for stroke in range(rng.integers(1, 4)):
        length, width = rng.uniform(0.18, 0.42), max(rng.uniform(0.006, 0.012), 0.55 * canvas.pixel)
        t = (u - rng.normal(0, 0.05)) / length
        path = v - bend * u**2 - sway * np.sin(phase + 14 * u) - stroke * rng.normal(0, 0.025)
        pressure = np.interp(t, np.linspace(-1, 1, 24), rng.uniform(0.6, 1, 24)).astype(np.float32)
        pressure = pressure * smoothstep(3 * (1 - np.abs(t))) * (1 if stroke == 0 else rng.uniform(0.4, 0.9))
        cut = np.maximum(cut, pressure * canvas.cover(np.abs(path) - width, softness=1.3))
        burr = np.maximum(burr, pressure * np.exp(-((path / (width + canvas.pixel)) ** 2)))
    depth = severity * contact * scene.surface
    return replace(
        scene,
        albedo=mix(scene.albedo, np.broadcast_to(scene.under, scene.albedo.shape), 0.95 * cut * depth),
        height=scene.height - 0.5 * burr * depth,
        gloss=scene.gloss + 0.08 * cut * depth,
    )


class Dirt(NamedTuple):
    """Its colour; how far it hides, takes on the texture below, is grainy, is glossy (each in [0, 1])."""

    tint: Array
    hiding: float
    clear: float
    coarse: float
    gloss: float


DIRT = {
    "oil": Dirt(colour(0.17, 0.145, 0.11), 0.80, 0.9, 0.02, 0.10),
    "rust": Dirt(colour(0.47, 0.29, 0.15), 0.80, 0.3, 0.14, 0.0),
    "dust": Dirt(colour(0.74, 0.71, 0.65), 0.70, 0.1, 0.22, 0.0),
    "paste": Dirt(colour(0.82, 0.80, 0.72), 0.85, 0.0, 0.05, 0.06),
}


@defect("contamination")
def contamination(item: Item, rng: Generator, severity: float) -> Scene:
    """A stain of oil, rust, dust or paste with a ragged soft edge and a few splashes around it."""
    scene, canvas = item.scene, item.canvas
    x, y = _spot(item, rng, margin=0.04)
    u, v = Pose(x, y, float(rng.uniform(0, np.pi))).local(canvas.x, canvas.y)
    size, stretch = rng.uniform(0.09, 0.20), rng.uniform(1.0, 1.8)
    near = ((u / stretch) ** 2 + v**2) / size**2
    for du, dv, share in (rng.normal(0, 1, (5, 3)) * (1.1 * size, 0.9 * size, 0.12)).tolist():
        near = np.minimum(near, ((u - du) ** 2 + (v - dv) ** 2) / ((0.12 + abs(share)) * size) ** 2)
    lobe = 1 - near**0.75
    lobe = lobe + 0.30 * cloud(rng, canvas, 0.09, 3) * smoothstep(2 + lobe)
    here = scene.surface * smoothstep(3 + 4 * lobe)
    ground = np.einsum("hw,hwc->c", here, scene.albedo) / here.sum()
    # Dirt of the ground's own colour would be no defect to see: take one that stands out.
    kinds = [kind for kind in DIRT.values() if np.abs(kind.tint - ground).mean() > 0.12]
    dirt = kinds[rng.integers(len(kinds))]
    film = smoothstep(lobe / 0.55) * (0.80 + 0.20 * smoothstep(1.2 - np.abs(lobe - 0.25) / 0.25))
    film = np.clip(film * (1 + dirt.coarse * grain(rng, canvas, 0.8, 0.8)), 0, 1)
    share = severity * dirt.hiding * film * scene.surface
    light = scene.albedo.mean(axis=2)
    below = light / ndimage.uniform_filter(light, max(3, round(0.08 / canvas.pixel)))
    tone = dirt.tint * (1 + dirt.clear * (below - 1) + 0.04 * cloud(rng, canvas, 0.06))[..., None]
    return replace(
        scene,
        albedo=mix(scene.albedo, tone, share),
        height=scene.height * (1 - 0.5 * share),
        gloss=scene.gloss * (1 - share) + dirt.gloss * share,
    )


@defect("misplaced", logical=True)
def misplaced(item: Item, rng: Generator, severity: float) -> Scene:
    """One part moved off its place by about its own size, and turned, towards where there is room for it."""
    part = item.parts[rng.integers(len(item.parts))]
    reach = min(rng.uniform(0.85, 1.25) * max(part.width, part.height), 0.26)
    x, y = _free_direction(item, part, reach, rng)
    turn = float(rng.choice((-1, 1)) * rng.uniform(0.25, 0.9))
    moved = replace(part, x=part.x + severity * x, y=part.y + severity * y, angle=part.angle + severity * turn)
    scene = item.paint(tuple(moved if other is part else other for other in item.parts))
    return replace(scene, claimed=item.footprint(part) | item.footprint(moved))


@defect("missing", logical=True)
def missing(item: Item, rng: Generator, severity: float) -> Scene:
    """One part absent: broken off by the share `severity`, wholly gone at 1."""
    part = item.parts[rng.integers(len(item.parts))]
    return item.paint(tuple(replace(other, kept=1 - severity) if other is part else other for other in item.parts))


def _spot(item: Item, rng: Generator, margin: float) -> tuple[float, float]:
    """A place well inside the surface, and not at the very border of the image."""
    canvas = item.canvas
    inside = ndimage.minimum_filter(item.scene.surface, max(1, round(2 * margin / canvas.pixel))) > 0.5
    border = round(0.12 / canvas.pixel)
    inside[:border] = inside[-border:] = inside[:, :border] = inside[:, -border:] = False
    places = np.flatnonzero(inside if inside.any() else item.scene.surface > 0.5)
    row, column = divmod(int(places[rng.integers(len(places))]), canvas.width)
    return float(canvas.x[0, column]), float(canvas.y[row, 0])


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
