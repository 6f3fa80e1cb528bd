"""The product `board`: a small circuit board whose artwork is fixed and whose components have tolerances."""

from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from effad_lib.synthesis.components import SOLDER, Look, assemble, pads
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
    norm,
    shadow,
    smoothstep,
)

HALF, DRILLED = 0.90, 0.80  # half the board's side; where the corner holes are drilled
UP = float(np.pi / 2)

LAYOUT = tuple(
    Part(kind, x, y, width, height, angle, corner, name=name)
    for kind, name, x, y, width, height, angle, corner in (
        ("quad", "U1", -0.14, -0.04, 0.52, 0.52, 0.0, 0.0),
        ("dual", "U2", 0.55, -0.42, 0.36, 0.30, 0.0, 0.0),
        ("can", "C1", -0.56, -0.62, 0.25, 0.25, 0.0, 0.03),
        ("can", "C2", -0.22, -0.62, 0.25, 0.25, 0.0, 0.03),
        ("coil", "L1", 0.16, -0.62, 0.26, 0.26, 0.0, 0.04),
        ("diode", "D1", 0.54, -0.74, 0.20, 0.10, 0.0, 0.0),
        ("header", "J1", 0.0, 0.745, 0.88, 0.14, 0.0, 0.0),
        ("crystal", "Y1", -0.14, 0.48, 0.34, 0.14, 0.0, 0.07),
        ("capacitor", "C3", -0.67, -0.26, 0.15, 0.085, 0.0, 0.0),
        ("capacitor", "C4", -0.67, -0.04, 0.15, 0.085, 0.0, 0.0),
        ("capacitor", "C5", -0.67, 0.18, 0.15, 0.085, 0.0, 0.0),
        ("capacitor", "C6", -0.50, 0.48, 0.15, 0.085, UP, 0.0),
        ("capacitor", "C7", 0.20, 0.48, 0.15, 0.085, UP, 0.0),
        ("resistor", "R1", 0.38, -0.12, 0.16, 0.085, 0.0, 0.0),
        ("resistor", "R2", 0.38, 0.08, 0.16, 0.085, 0.0, 0.0),
        ("resistor", "R3", 0.38, 0.28, 0.16, 0.085, 0.0, 0.0),
        ("resistor", "R4", 0.72, -0.03, 0.16, 0.085, UP, 0.0),
        ("transistor", "Q1", 0.66, 0.40, 0.20, 0.19, 0.0, 0.0),
    )
)

# Pads that a trace joins, as name.number in the order of `pads`; a bare pair of numbers is a via.
NETS = (
    ("U1.0", "C3.1"), ("U1.2", "C4.1"), ("U1.4", "C5.1"), ("U1.8", "R1.0"), ("U1.12", "R2.0"), ("U1.14", "R3.0"),
    ("R1.1", "R4.0"), ("R2.1", "R4.1"), ("R3.1", "Q1.0"), ("Q1.2", "J1.7"), ("L1.1", "U2.1"), ("D1.0", "L1.1"),
    ("C2.1", "L1.0"), ("C1.1", "C2.0"), ("U2.7", "R4.0"), ("U1.26", "Y1.0"), ("U1.29", "Y1.1"), ("Y1.0", "C6.0"),
    ("Y1.1", "C7.0"), ("C6.1", "J1.0"), ("C7.1", "J1.5"), ("U1.17", (-0.29, -0.42)), ("U1.19", (-0.16, -0.42)),
    ("U1.21", (-0.04, -0.42)), ("U1.23", (0.06, -0.40)), ("C3.0", (-0.82, -0.36)), ("C4.0", (-0.82, -0.04)),
    ("C5.0", (-0.82, 0.30)), ("J1.1", (-0.36, 0.62)), ("J1.2", (-0.25, 0.62)), ("J1.3", (-0.06, 0.62)),
    ("U1.6", (-0.50, 0.28)), ("D1.1", (0.80, -0.62)), ("U2.5", (0.83, -0.40)), ("C1.0", (-0.80, -0.52)),
    ("Q1.1", (0.83, 0.18)), ("U1.10", (0.22, -0.02)), ("Q1.2", (0.42, 0.58)),
)  # fmt: skip


@product("board")
def board(canvas: Canvas, rng: Generator) -> Item:
    """Green circuit board on a dark mat: chips, resistors, capacitors, a coil, a crystal, a pin header."""
    pose = lay(rng, canvas, turn=0.03)
    u, v = pose.local(canvas.x, canvas.y)
    parts = jitter(LAYOUT, rng, shift=0.004, turn=0.012)
    looks = {part.name: Look(rng) for part in parts}

    # The print is registered to the copper only so well, hence its own small shift.
    slip = rng.normal(0, 0.005, 2)
    traces, tin, print_ = _artwork(1.25 / canvas.pixel)
    traces, tin, print_ = (
        _sample(layer, canvas, pose, shift) for layer, shift in ((traces, (0, 0)), (tin, (0, 0)), (print_, slip))
    )
    edge = box(u, v, 2 * HALF, 2 * HALF, 0.05)
    hole = 0.052 - norm(np.abs(u) - DRILLED, np.abs(v) - DRILLED)
    cover = canvas.cover(np.maximum(edge, hole))
    tin = np.maximum(tin, canvas.cover(np.abs(hole + 0.018) - 0.018))

    mat = colour(0.23, 0.24, 0.26) + (0.010 * cloud(rng, canvas, 0.6, 3) + 0.012 * grain(rng, canvas, 0.7, 0.7))
    mat = mat * (1 - 0.5 * shadow(cover, canvas, 0.03, 0.025))
    mottle = 1 + 0.02 * cloud(rng, canvas, 0.6, 3) + 0.02 * grain(rng, canvas, 0.7, 0.7)
    lacquer = colour(0.09, 0.33, 0.21) * colour(*rng.normal(1, (0.05, 0.025, 0.04))) * mottle
    wet = 1 + 0.07 * cloud(rng, canvas, 0.05)
    bare = mix(lacquer, lacquer * 1.25 + 0.03, traces)
    bare = mix(bare, SOLDER * wet, tin)
    bare = mix(bare, colour(0.86, 0.87, 0.84) * np.float32(rng.normal(1, 0.02)), 0.9 * print_)
    relief = 0.3 * traces + (0.5 + 0.3 * wet) * tin

    def paint(parts: tuple[Part, ...]) -> Scene:
        layer = assemble(canvas, pose, parts, looks)
        dark = shadow(layer.cover, canvas, reach=0.024, softness=0.022)
        albedo = mix(mat, bare, cover) * (1 - 0.5 * dark)
        free = 1 - layer.cover
        height = 1.2 * smoothstep(-edge / 0.03) * cover + relief * cover * free + layer.height
        gloss = cover * free * (0.05 + 0.16 * tin) + layer.gloss
        albedo = mix(albedo, layer.albedo, layer.cover)
        return Scene(
            albedo, height, gloss, cover, lambda: mix(colour(0.72, 0.60, 0.42), layer.albedo * 0.6 + 0.38, layer.cover)
        )

    return Item(canvas, paint, parts, pose, room=lambda x, y: HALF - 0.03 - np.maximum(np.abs(x), np.abs(y)))


def _sample(layer: Image.Image, canvas: Canvas, pose: Pose, shift: tuple[float, float]) -> Array:
    """An artwork layer as it lies under the camera, float32 [H, W] in [0, 1]."""
    side = layer.width
    scale = (side - 2) / (2 * HALF)
    c, s = (scale / pose.scale * f(pose.angle) for f in (np.cos, np.sin))
    x, y = -canvas.width / 2 * canvas.pixel - pose.x, -canvas.height / 2 * canvas.pixel - pose.y
    across = (c * canvas.pixel, s * canvas.pixel, c * x + s * y + scale * shift[0] + side / 2)
    down = (-s * canvas.pixel, c * canvas.pixel, c * y - s * x + scale * shift[1] + side / 2)
    size = canvas.width, canvas.height
    seen = layer.transform(size, Image.Transform.AFFINE, (*across, *down), Image.Resampling.BILINEAR)
    return np.asarray(seen, np.float32) / 255


@lru_cache(maxsize=4)
def _artwork(scale: float) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Traces, tinned copper and white print of the bare board, as square grey images of `scale` pixels per unit."""
    n = int(np.ceil(2 * HALF * scale)) + 2
    fine = 4 * (n - 2) / (2 * HALF)
    layers = [Image.new("L", (4 * n, 4 * n)) for _ in range(3)]
    traces, tin, print_ = (ImageDraw.Draw(layer) for layer in layers)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * fine + 2 * n, y * fine + 2 * n

    def disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int = 255) -> None:
        draw.ellipse([*at(x - radius, y - radius), *at(x + radius, y + radius)], fill=fill)

    def corners(part: Part, u: float, v: float, w: float, h: float) -> list[tuple[float, float]]:
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))
        return [at(*part.pose.outer(u + a * w / 2, v + b * h / 2)) for a, b in signs]

    def line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], width: float) -> None:
        draw.line(points, fill=255, width=max(1, round(width * fine)), joint="curve")

    places = {f"{part.name}.{k}": part.pose.outer(*pad[:2]) for part in LAYOUT for k, pad in enumerate(pads(part))}
    for start, end in NETS:
        a, b = places[start], places[end] if isinstance(end, str) else end
        dx, dy = b[0] - a[0], b[1] - a[1]
        slant = min(abs(dx), abs(dy))
        knee = (b[0] - np.sign(dx) * slant, a[1]) if abs(dx) > abs(dy) else (a[0], b[1] - np.sign(dy) * slant)
        line(traces, [at(*a), at(*knee), at(*b)], 0.020)
        if not isinstance(end, str):
            disc(traces, *b, 0.028)
            disc(tin, *b, 0.020)
            disc(tin, *b, 0.009, fill=0)
    for part in LAYOUT:
        for pad in pads(part):
            tin.polygon(corners(part, *pad), fill=255)
            if part.kind == "header":
                disc(tin, *part.pose.outer(*pad[:2]), 0.020, fill=0)
        margin = 0.05 if part.kind in ("transistor", "resistor", "capacitor", "diode") else 0.03
        line(print_, corners(part, 0, 0, part.width + margin, part.height + margin), 0.010)
        tall = part.width if part.angle else part.height
        font = ImageFont.load_default(size=round(0.058 * fine))
        print_.text(at(part.x, part.y + tall / 2 + margin / 2 + 0.008), part.name, fill=235, font=font, anchor="mt")
    font = ImageFont.load_default(size=round(0.085 * fine))
    print_.text(at(0.83, 0.62), "EFFAD-1", fill=235, font=font, anchor="rm")
    return tuple(layer.reduce(4) for layer in layers)
