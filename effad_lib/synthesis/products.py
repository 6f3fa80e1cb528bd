"""The products: each is a function that draws one piece, `(canvas, rng) -> Item`, and is registered by name."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.random import Generator

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

PRODUCTS: dict[str, Callable[[Canvas, Generator], Item]] = {}


def product(name: str) -> Callable:
    """Register a product: a function `(canvas, rng) -> Item` that draws all its chance before `paint` is called."""

    def enter(draw: Callable[[Canvas, Generator], Item]) -> Callable[[Canvas, Generator], Item]:
        PRODUCTS[name] = draw
        return draw

    return enter


def lay(rng: Generator, canvas: Canvas, turn: float, shift: float = 0.02) -> Pose:
    """How a piece comes to lie under the camera: shifted, turned by up to `turn` radians, nearer or farther."""
    x, y = rng.uniform(-shift, shift, 2)
    return Pose(float(x), float(y), float(rng.uniform(-turn, turn)), float(rng.normal(1, 0.006)))


@product("gasket")
def gasket(canvas: Canvas, rng: Generator) -> Item:
    """Moulded rubber flange gasket: six bolt holes in ears, a sealing bead, a locating notch, on a light table."""
    pose = lay(rng, canvas, turn=0.12, shift=0.03)
    u, v = pose.local(canvas.x, canvas.y)
    radius, bolts = np.hypot(u, v), 0.66 + rng.normal(0, 0.003)
    parts = tuple(
        Part("hole", *_polar(bolts + rng.normal(0, 0.003), k * np.pi / 3 + rng.normal(0, 0.006)),
             width := 0.15 * rng.normal(1, 0.02), width, corner=width / 2, name=f"hole {k + 1}")
        for k in range(6)
    )  # fmt: skip
    notch = box(u - 0.55, v - 0.3175, 0.07, 0.07, 0.03)
    body = np.maximum(_flange(u, v, bolts, bore=0.40 + rng.normal(0, 0.003)), -notch)
    body = body + 0.0025 * cloud(rng, canvas, 0.25)
    flash = 0.02 * cloud(rng, canvas, 0.03, 2) * smoothstep(1 - np.abs(body) / 0.02)

    table = colour(0.80, 0.81, 0.80) * rng.normal(1, 0.012) + 0.012 * cloud(rng, canvas, 0.7, 3)[..., None]
    table = table + 0.008 * grain(rng, canvas, 0.9, 0.9)[..., None]
    rubber = colour(0.235, 0.237, 0.245) * rng.normal(1, 0.05)
    talc = 0.012 * cloud(rng, canvas, 0.45, 4) + 0.010 * grain(rng, canvas, 0.7, 0.7)
    skin = 0.10 * grain(rng, canvas, 0.8, 0.8) + 0.12 * cloud(rng, canvas, 0.05)

    def paint(parts: tuple[Part, ...]) -> Scene:
        edge = body
        for part in parts:
            if part.kept > 0:
                edge = np.maximum(edge, part.width / 2 * part.kept - np.hypot(u - part.x, v - part.y))
        cover = canvas.cover(edge)
        dark = shadow(canvas.cover(edge), canvas, reach=0.025, softness=0.014)
        bead = np.exp(-(((radius - 0.475) / 0.022) ** 2))
        height = smoothstep(-edge / 0.045) * 1.6 + bead * 1.3 + skin + flash
        albedo = mix(table * (1 - 0.42 * dark[..., None]), rubber + talc[..., None] + 0.02 * bead[..., None], cover)
        return Scene(albedo, height * cover, cover * 0.13, cover, colour(0.56, 0.56, 0.55))

    return Item(canvas, paint, parts, pose, room=lambda x, y: -_flange(x, y, bolts, bore=0.42))


def _flange(u: Array, v: Array, bolts: float, bore: float) -> Array:
    """Signed distance to a ring with an ear around each of six bolts, filleted."""
    radius = np.hypot(u, v)
    fold = (np.arctan2(v, u) + np.pi / 6) % (np.pi / 3) - np.pi / 6
    ear = np.hypot(radius * np.cos(fold) - bolts, radius * np.sin(fold)) - 0.155
    disc = radius - 0.64
    fillet = np.clip(0.5 + (ear - disc) / 0.16, 0, 1)
    return np.maximum(ear * (1 - fillet) + disc * fillet - 0.08 * fillet * (1 - fillet), bore - radius)


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return float(radius * np.cos(angle)), float(radius * np.sin(angle))


@product("metal")
def metal(canvas: Canvas, rng: Generator) -> Item:
    """Brushed stainless sheet: grain of several lengths along one direction, under a band of reflected light."""
    angle, short = rng.normal(0, 0.02), min(canvas.shape)
    streaks = sum(
        weight * grain(rng, canvas, length * short, across, angle)
        for length, across, weight in ((0.90, 0.42, 0.75), (0.30, 0.38, 0.55), (0.03, 0.40, 0.35))
    )
    # A belt leaves some strokes much deeper than the rest.
    stroke = grain(rng, canvas, 0.35 * short, 0.4, angle)
    height = 0.09 * streaks - 0.10 * np.clip(np.abs(stroke) - 2.1, 0, None)
    _, v = Pose(angle=float(angle)).local(canvas.x, canvas.y)
    band = np.exp(-(((v - rng.normal(-0.1, 0.12)) / rng.uniform(0.75, 0.95)) ** 2))
    wave = 0.012 * cloud(rng, canvas, 0.9, 2) + 0.012 * grain(rng, canvas, 0.5 * short, 0.06 * short, angle)
    tone = 0.50 + 0.14 * band + wave + 0.034 * streaks * (0.7 + 0.5 * band)
    tone = tone - 0.04 * np.clip(np.abs(stroke) - 2.1, 0, None)
    albedo = tone[..., None] * colour(1.0, 0.995, 0.98) * rng.normal(1, 0.008)
    scene = Scene(albedo, height, 0.10 * band, np.ones(canvas.shape, np.float32), colour(0.86, 0.86, 0.85))
    return Item(canvas, lambda parts: scene)


@product("fabric")
def fabric(canvas: Canvas, rng: Generator) -> Item:
    """Plain-woven cloth: every yarn has its own tone and thickness, wanders a little and is made of fibres."""
    # Below six pixels a yarn the weave would alias, so small images show fewer yarns.
    pitch = max(2 / 34, 6.5 * canvas.pixel) * rng.normal(1, 0.01)
    pose = lay(rng, canvas, turn=0.035, shift=0.1)
    u, v = pose.local(canvas.x, canvas.y)
    u, v = ((a + 0.10 * pitch * cloud(rng, canvas, 0.55, 3)) / pitch for a in (u, v))
    warp, warp_tone = _yarns(rng, u, v)
    weft, weft_tone = _yarns(rng, v, u)
    over = np.cos(np.pi * (np.floor(u) + np.floor(v))) * np.sin(np.pi * (u % 1)) * np.sin(np.pi * (v % 1))
    gap = np.maximum(warp, weft)
    upper = smoothstep(0.5 + 2.2 * over + 0.9 * (warp - weft))
    fibres = [grain(rng, canvas, 3.0, 0.55, pose.angle + turn) for turn in (np.pi / 2 + 0.35, 0.35)]
    profile = upper * (warp + 0.45 * over) + (1 - upper) * (weft - 0.45 * over)
    height = (
        1.05 * pitch / canvas.pixel / 7 * (1.3 * profile) + 0.10 * fibres[0] * upper + 0.10 * fibres[1] * (1 - upper)
    )
    blue, linen = (np.array(c, np.float32) * rng.normal(1, 0.012) for c in ((0.33, 0.40, 0.49), (0.62, 0.61, 0.57)))
    albedo = mix(linen * (1 + weft_tone[..., None]), blue * (1 + warp_tone[..., None]), upper)
    lit = 0.55 + 0.45 * smoothstep(gap * 1.15) - 0.10 * (1 - smoothstep(profile + 0.2))
    lit = lit * (1 + 0.035 * (fibres[0] * upper + fibres[1] * (1 - upper))) + 0.012 * cloud(rng, canvas, 0.6, 2)
    ones = np.ones(canvas.shape, np.float32)
    scene = Scene(albedo * lit[..., None], height.astype(np.float32), 0.02 * ones, ones, colour(0.88, 0.87, 0.84))
    return Item(canvas, lambda parts: scene)


def _yarns(rng: Generator, across: Array, along: Array) -> tuple[Array, Array]:
    """Round profile (1 on the crest, 0 in the gap) and relative tone of parallel yarns one unit apart."""
    index = np.floor(across).astype(int) % 512
    width = (rng.normal(1, 0.06, 512).astype(np.float32))[index]
    slub = (rng.normal(0, 0.028, (512, 64)).astype(np.float32))[index, np.floor(along / 5).astype(int) % 64]
    tone = (rng.normal(0, 0.045, 512).astype(np.float32))[index] + slub
    offset = (across % 1 - 0.5) / (0.55 * width)
    return np.sqrt(np.clip(1 - offset**2, 0, 1)), tone


def jitter(parts: tuple[Part, ...], rng: Generator, shift: float, turn: float) -> tuple[Part, ...]:
    """Placement tolerances: every part a little off its place and a little turned (standard deviations)."""
    moves = rng.normal(0, 1, (len(parts), 3)) * (shift, shift, turn)
    return tuple(
        replace(part, x=part.x + dx, y=part.y + dy, angle=part.angle + turned)
        for part, (dx, dy, turned) in zip(parts, moves.tolist(), strict=True)
    )
