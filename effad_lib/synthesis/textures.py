"""Products without parts that fill the whole image: brushed metal and woven fabric."""

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.products import lay, product
from effad_lib.synthesis.scene import Array, Canvas, Item, Pose, Scene, cloud, colour, grain, mix, smoothstep


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
    albedo = tone * colour(1.0, 0.995, 0.98) * rng.normal(1, 0.008)
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
    blue, linen = (colour(*rgb) * rng.normal(1, 0.012) for rgb in ((0.33, 0.40, 0.49), (0.62, 0.61, 0.57)))
    albedo = mix(linen * (1 + weft_tone), blue * (1 + warp_tone), upper)
    lit = 0.55 + 0.45 * smoothstep(gap * 1.15) - 0.10 * (1 - smoothstep(profile + 0.2))
    lit = lit * (1 + 0.035 * (fibres[0] * upper + fibres[1] * (1 - upper))) + 0.012 * cloud(rng, canvas, 0.6, 2)
    ones = np.ones(canvas.shape, np.float32)
    scene = Scene(albedo * lit, height.astype(np.float32), 0.02 * ones, ones, colour(0.88, 0.87, 0.84))
    return Item(canvas, lambda parts: scene)


def _yarns(rng: Generator, across: Array, along: Array) -> tuple[Array, Array]:
    """Round profile (1 on the crest, 0 in the gap) and relative tone of parallel yarns one unit apart."""
    index = np.floor(across).astype(int) % 512
    width = (rng.normal(1, 0.06, 512).astype(np.float32))[index]
    slub = (rng.normal(0, 0.028, (512, 64)).astype(np.float32))[index, np.floor(along / 5).astype(int) % 64]
    tone = (rng.normal(0, 0.045, 512).astype(np.float32))[index] + slub
    offset = (across % 1 - 0.5) / (0.55 * width)
    return np.sqrt(np.clip(1 - offset**2, 0, 1)), tone
