"""The product `wood`: a planed softwood board that fills the image."""

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.products import lay, product
from effad_lib.synthesis.scene import Array, Canvas, Item, Scene, colour, grain, mix, smoothstep

YEARS = 400


@product("wood")
def wood(canvas: Canvas, rng: Generator) -> Item:
    """Planed board, cut beside the heart of the log: growth rings, fibres, pores and flecks along the grain."""
    pose, short = lay(rng, canvas, turn=0.045), min(canvas.shape)
    u, v = pose.local(canvas.x, canvas.y)
    along = pose.angle + float(np.pi / 2)
    late, year = _rings(canvas, rng, u, v, along)

    fine = grain(rng, canvas, 0.10 * short, 0.45, along)
    fibres = 0.6 * fine + 0.6 * grain(rng, canvas, 0.5 * short, 0.9, along)
    pores = np.clip(grain(rng, canvas, 0.012 * short + 1, 0.45, along) - 1.7, 0, 1.5)
    flecks = grain(rng, canvas, 0.022 * short + 1, 0.004 * short + 0.4, along)
    dark, bright = (smoothstep((side * flecks - 2.3) / 0.9) for side in (1, -1))

    lot = np.float32(rng.normal(1, 0.02)) * colour(*rng.normal(1, (0.005, 0.005, 0.012)))
    albedo = mix(colour(0.775, 0.615, 0.435), colour(0.600, 0.405, 0.240), 0.85 * late) * lot
    # Heartwood, sap and light tint the board in broad stripes, on some boards more than on others.
    drift = 0.8 * grain(rng, canvas, 1.2 * short, 0.10 * short, along)
    drift = drift * float(rng.uniform(0.010, 0.018) + 0.016 * (rng.random() < 0.25))
    tone = 1 + drift + year + 0.026 * fibres - 0.09 * pores - 0.10 * dark + 0.055 * bright
    albedo = albedo * tone * (1 + drift * colour(-0.3, 0.1, 0.7))

    # The plane leaves the hard late wood a little proud, and the pores open.
    height = 0.16 * late + 0.10 * fibres - 0.30 * pores
    gloss = 0.015 + 0.02 * late + 0.05 * bright
    ones = np.ones(canvas.shape, np.float32)
    scene = Scene(albedo, height, gloss, ones, colour(0.90, 0.82, 0.68))
    return Item(canvas, lambda parts: scene)


def _rings(canvas: Canvas, rng: Generator, u: Array, v: Array, along: float) -> tuple[Array, Array]:
    """Share of late wood, which ends abruptly with its year, and relative tone of the year, each [H, W]."""
    short = min(canvas.shape)
    # Below seven pixels a year the rings would alias, so small images show fewer.
    spacing = max(0.105, 7 * canvas.pixel)
    widths = np.clip(1 + 0.22 * rng.standard_normal(YEARS), 0.5, 1.6) * spacing
    waves = 0.028 * grain(rng, canvas, 0.35 * short, 0.10 * short, along)
    waves = waves + 0.004 * grain(rng, canvas, 0.05 * short, 0.03 * short, along)
    # A ring is a circle around the heart, which lies under the board's edge and leans against it.
    heart, depth, lean = rng.normal(-0.35, 0.08) + float(canvas.x[0, 0]), rng.normal(0.50, 0.06), rng.normal(0, 0.06)
    radius = np.hypot(u - float(heart), float(depth) + float(lean) * v) + waves
    age = np.interp(radius, np.cumsum(widths), np.arange(YEARS)).astype(np.float32)
    index = age.astype(int)
    phase = age - np.floor(age)
    end = np.float32(1.6 * canvas.pixel / spacing)
    dense, onset, tone = (
        rng.normal(mean, spread, YEARS).astype(np.float32)[index]
        for mean, spread in ((0.80, 0.13), (0.30, 0.08), (0.0, 0.018))
    )
    late = smoothstep((phase - onset) / (1 - end - onset)) ** 2 * smoothstep((1 - phase) / end)
    return late * np.clip(dense, 0.4, 1), tone
