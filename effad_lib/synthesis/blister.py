"""The product `blister`: a pack of ten pills of two kinds under clear pockets, on a knurled aluminium foil."""

from collections import defaultdict

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.components import Look, Painted, assemble, component, lettered
from effad_lib.synthesis.products import jitter, lay, product
from effad_lib.synthesis.scene import (
    Array,
    Canvas,
    Item,
    Part,
    Pose,
    Scene,
    box,
    cloud,
    colour,
    grain,
    mix,
    shadow,
    smoothstep,
)

WIDTH, HEIGHT = 1.36, 1.80  # of the card
COLUMN, FIRST, PITCH, ROWS = 0.32, -0.70, 0.30, 5  # pockets stand at x = +-COLUMN, y = FIRST + k * PITCH
POCKET = (0.40, 0.26, 0.13)  # width, height, corner

LAYOUT = tuple(
    Part(kind, x, FIRST + PITCH * row, width, height, corner=height / 2, name=f"pill {5 * column + row + 1}")
    for column, (kind, x, width, height) in enumerate(
        (("pill white", -COLUMN, 0.20, 0.20), ("pill ochre", COLUMN, 0.28, 0.15))
    )
    for row in range(ROWS)
)


@product("blister")
def blister(canvas: Canvas, rng: Generator) -> Item:
    """Blister pack: a column of scored white tablets and one of ochre caplets, lot and date in the margin."""
    pose = lay(rng, canvas, turn=0.05)
    u, v = pose.local(canvas.x, canvas.y)
    white, ochre = LAYOUT[:ROWS], LAYOUT[ROWS:]
    parts = jitter(white, rng, shift=0.008, turn=0.16) + jitter(ochre, rng, shift=0.008, turn=0.05)
    # A part under an unknown name looks like the spare.
    spare = Look(rng)
    looks = defaultdict(lambda: spare, {part.name: Look(rng) for part in parts})

    card = box(u, v, WIDTH, HEIGHT, 0.08)
    cover = canvas.cover(card)
    row = np.clip(np.rint((v - FIRST) / PITCH), 0, ROWS - 1)
    a, b = u - np.copysign(np.float32(COLUMN), u), v - FIRST - PITCH * row
    pocket = box(a, b, *POCKET)
    inside = canvas.cover(pocket)

    speckle = grain(rng, canvas, 0.7, 0.7)
    fall = smoothstep(0.55 - box(u - 0.035, v - 0.035, WIDTH, HEIGHT, 0.08) / 0.08)
    mat = (rng.normal(1, 0.012) + 0.025 * cloud(rng, canvas, 0.4, 2) + 0.03 * speckle) * (1 - 0.45 * fall)
    relief, sheen = _foil(canvas, rng, u, v, 1 - inside)
    wrinkle = cloud(rng, canvas, 0.09)
    sheen = sheen + inside * (0.020 * wrinkle - 0.25 * (a + b))
    foil = colour(0.675, 0.685, 0.695) * colour(*rng.normal(1, 0.004, 3)) * (1 + sheen)
    _print(canvas, pose, foil)
    bare = mix(colour(0.385, 0.395, 0.41) * mat, foil, cover)

    wall, rim, glint = _dome(canvas, rng, a, b, pocket, row + np.float32(ROWS) * (u > 0))
    wall = wall * (1 + 0.012 * speckle)
    relief = relief + 0.25 * inside * wrinkle + np.float32(0.004 / canvas.pixel) * np.exp(-((pocket / 0.014) ** 2))
    relief = relief * cover + 0.9 * smoothstep(-card / 0.02)

    def paint(parts: tuple[Part, ...]) -> Scene:
        pills = assemble(canvas, pose, parts, looks)
        dark = shadow(pills.cover, canvas, reach=0.022, softness=0.016)
        albedo = mix(bare * (1 - 0.55 * dark), pills.albedo, pills.cover) * wall
        albedo = mix(albedo, colour(0.95, 0.96, 0.97), rim * (1 - pills.cover) + glint)
        height = relief * (1 - pills.cover) + pills.height
        gloss = cover * (0.12 - 0.06 * inside) * (1 - pills.cover) + pills.gloss
        return Scene(
            albedo, height, gloss, cover, lambda: mix(colour(0.93, 0.93, 0.94), pills.albedo * 0.62, pills.cover)
        )

    def room(x: Array, y: Array) -> Array:
        return np.minimum(WIDTH / 2 - np.abs(x), HEIGHT / 2 - np.abs(y)) - 0.02

    return Item(canvas, paint, parts, pose, room)


def _foil(canvas: Canvas, rng: Generator, u: Array, v: Array, sealed: Array) -> tuple[Array, Array]:
    """Relief and relative tone of the foil: waffled by the sealing roller, reflecting a bright and a dark side."""
    # Below five pixels a square the waffle would alias, so small images show a coarser and flatter one.
    pitch = max(0.040, 5 * canvas.pixel)
    wave, start = float(4.44 / pitch), rng.uniform(0, 6.28, 2).tolist()
    waffle = np.cos((u + v) * wave + start[0]) * np.cos((u - v) * wave + start[1])
    cloudy = cloud(rng, canvas, 0.30, 2)
    worn = sealed * waffle * (1 + 0.10 * cloudy) * np.float32(0.040 / pitch)
    fold = np.cos(np.float32(2.2) * (u * float(rng.normal(0.8, 0.1)) + v) + float(rng.normal(0.6, 0.25)))
    # The card is scored between the columns so that it can be torn.
    dash = max(0.05, 6 * canvas.pixel)
    gap = np.maximum(np.abs(v - dash * np.rint(v / dash)) - 0.3 * dash, v - 0.62)
    tear = canvas.cover(np.maximum(np.abs(u) - 0.006, gap), 1.5)
    return 0.26 * worn - 0.3 * tear, 0.085 * fold + 0.022 * cloudy + 0.085 * worn - 0.30 * tear


def _print(canvas: Canvas, pose: Pose, foil: Array) -> None:
    """Print name, lot and date on the foil below the pockets."""
    rows = slice(*np.searchsorted(canvas.y[:, 0], (pose.y + 0.58, pose.y + 0.92)))
    u, v = pose.local(canvas.x, canvas.y[rows])
    name = lettered(canvas, "Effadol 20 mg", u + 0.16, v - 0.700, 0.72)
    lot = lettered(canvas, "LOT 7K2418   EXP 03 2029", u, v - 0.815, 1.04)
    foil[:, rows] = mix(foil[:, rows], colour(0.17, 0.19, 0.30), 0.80 * np.maximum(name, lot))


def _dome(
    canvas: Canvas, rng: Generator, a: Array, b: Array, pocket: Array, index: Array
) -> tuple[Array, Array, Array]:
    """What clear pockets add: a factor that darkens their walls, what the walls mirror, what the dome mirrors."""
    index = index.astype(int)
    bright, bulge = (rng.normal(1, spread, 2 * ROWS).astype(np.float32)[index] for spread in (0.12, 0.03))
    soft = 0.5 * canvas.pixel
    facing = -(a * np.float32(0.6) + b * np.float32(1.1)) / 0.15

    def ring(depth: float, width: float) -> Array:
        return np.exp(-(((pocket + depth * bulge) / float(width + soft)) ** 2))

    wall = 1 - 0.22 * ring(0.004, 0.008)
    lamp = ring(0.028, 0.009) * smoothstep(2.6 * facing - 1.1)
    window = ring(0.022, 0.006) * smoothstep(-2.2 * facing - 1.2)
    glint = ring(0.088, 0.006) * smoothstep(5.0 * facing - 1.6)
    return wall, np.clip(bright * (0.85 * lamp + 0.50 * window), 0, 0.9), 0.50 * bright * glint


def _pill(canvas: Canvas, part: Part, u: Array, v: Array) -> tuple[Array, Array]:
    """Distance to the outline of a pill, and its bulging profile in pixels."""
    distance = box(u, v, part.width, part.height, min(part.width, part.height) / 2)
    return distance, smoothstep(0.25 + 0.75 * np.clip(-distance / 0.065, 0, 1)) * np.float32(0.022 / canvas.pixel)


@component("pill white")
def white_tablet(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Pressed white tablet with a bevelled rim and a score line to break it along."""
    distance, height = _pill(canvas, part, u, v)
    score = np.exp(-((u / max(0.010, 0.8 * canvas.pixel)) ** 2))
    chalk = colour(0.845, 0.84, 0.82) * (1 + (look.tone - 1) * np.float32(0.4))
    albedo = chalk * (1 - 0.13 * score) * (1 - 0.16 * smoothstep(1 + distance / 0.022))
    height = height - score * np.float32(0.005 / canvas.pixel)
    return Painted(albedo, canvas.cover(distance), height, np.zeros_like(distance))


@component("pill ochre")
def ochre_caplet(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Film-coated ochre caplet with its strength pressed in."""
    distance, height = _pill(canvas, part, u, v)
    mark = lettered(canvas, "20", u, v, 0.4 * part.width)
    albedo = colour(0.74, 0.40, 0.20) * look.tone * (1 - 0.16 * mark) * (1 - 0.18 * smoothstep(1 + distance / 0.03))
    height = height - mark * np.float32(0.003 / canvas.pixel)
    return Painted(albedo, canvas.cover(distance), height, np.full_like(distance, 0.07))
