"""The product `gasket`: a moulded rubber ring with bolt holes, on a light table."""

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.products import lay, product
from effad_lib.synthesis.scene import (
    Array,
    Canvas,
    Item,
    Part,
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


@product("gasket")
def gasket(canvas: Canvas, rng: Generator) -> Item:
    """Moulded rubber flange gasket: six bolt holes in ears, a sealing bead, a locating notch, on a light table."""
    pose = lay(rng, canvas, turn=0.12, shift=0.03)
    u, v = pose.local(canvas.x, canvas.y)
    radius, bolts = norm(u, v), 0.66 + rng.normal(0, 0.003)
    parts = tuple(
        Part("hole", *_polar(bolts + rng.normal(0, 0.003), k * np.pi / 3 + rng.normal(0, 0.006)),
             width := 0.15 * rng.normal(1, 0.02), width, corner=width / 2, name=f"hole {k + 1}")
        for k in range(6)
    )  # fmt: skip
    notch = box(u - 0.55, v - 0.3175, 0.07, 0.07, 0.03)
    body = np.maximum(_flange(u, v, bolts, bore=0.40 + rng.normal(0, 0.003)), -notch)
    body = body + 0.0025 * cloud(rng, canvas, 0.25)
    flash = 0.02 * cloud(rng, canvas, 0.03, 2) * smoothstep(1 - np.abs(body) / 0.02)

    # Where the table shows, the rubber does not: one field serves both.
    mottle = 0.012 * cloud(rng, canvas, 0.6, 3) + 0.009 * grain(rng, canvas, 0.8, 0.8)
    table = colour(0.80, 0.81, 0.80) * rng.normal(1, 0.012) + mottle
    rubber = colour(0.235, 0.237, 0.245) * rng.normal(1, 0.05) + mottle  # talc
    skin = 0.10 * grain(rng, canvas, 0.8, 0.8) + 0.12 * cloud(rng, canvas, 0.05)

    def paint(parts: tuple[Part, ...]) -> Scene:
        edge = body
        for part in parts:
            if part.kept > 0:
                edge = np.maximum(edge, part.width / 2 * part.kept - norm(u - part.x, v - part.y))
        cover = canvas.cover(edge)
        dark = shadow(cover, canvas, reach=0.025, softness=0.014)
        bead = np.exp(-(((radius - 0.475) / 0.022) ** 2))
        height = smoothstep(-edge / 0.045) * 1.6 + bead * 1.3 + skin + flash
        albedo = mix(table * (1 - 0.42 * dark), rubber + 0.02 * bead, cover)
        return Scene(albedo, height * cover, cover * 0.13, cover, colour(0.56, 0.56, 0.55))

    return Item(canvas, paint, parts, pose, room=lambda x, y: -_flange(x, y, bolts, bore=0.42))


def _flange(u: Array, v: Array, bolts: float, bore: float) -> Array:
    """Signed distance to a ring with an ear around each of six bolts, filleted."""
    radius = norm(u, v)
    fold = (np.arctan2(v, u) + np.pi / 6) % (np.pi / 3) - np.pi / 6
    ear = norm(radius * np.cos(fold) - bolts, radius * np.sin(fold)) - 0.155
    disc = radius - 0.64
    fillet = np.clip(0.5 + (ear - disc) / 0.16, 0, 1)
    return np.maximum(ear * (1 - fillet) + disc * fillet - 0.08 * fillet * (1 - fillet), bore - radius)


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return float(radius * np.cos(angle)), float(radius * np.sin(angle))
