"""Structural defects that lie on a surface and leave the piece whole."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.defects import around, blob, defect, spot
from effad_lib.synthesis.scene import Array, Item, Pose, Scene, cloud, colour, grain, mix, smoothstep


@defect("scratch")
def scratch(item: Item, rng: Generator, severity: float) -> Scene:
    """One to three strokes of a sharp edge that lay bare what is under the surface, deepest in the middle."""
    scene, canvas = item.scene, item.canvas
    x, y = spot(item, rng, margin=0.06)
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
        albedo=mix(scene.albedo, scene.under, 0.95 * cut * depth),
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
    x, y = spot(item, rng, margin=0.04)
    u, v = Pose(x, y, float(rng.uniform(0, np.pi))).local(canvas.x, canvas.y)
    size, stretch = rng.uniform(0.09, 0.20), rng.uniform(1.0, 1.8)
    near = ((u / stretch) ** 2 + v**2) / size**2
    for du, dv, share in (rng.normal(0, 1, (5, 3)) * (1.1 * size, 0.9 * size, 0.12)).tolist():
        near = np.minimum(near, ((u - du) ** 2 + (v - dv) ** 2) / ((0.12 + abs(share)) * size) ** 2)
    lobe = 1 - near**0.75
    lobe = lobe + 0.30 * cloud(rng, canvas, 0.09, 3) * smoothstep(2 + lobe)
    here = scene.surface * smoothstep(3 + 4 * lobe)
    ground = (here * scene.albedo).sum(axis=(1, 2), keepdims=True) / here.sum()
    # Dirt of the ground's own colour would be no defect to see: take one that stands out.
    kinds = [kind for kind in DIRT.values() if np.abs(kind.tint - ground).mean() > 0.12]
    dirt = kinds[rng.integers(len(kinds))]
    film = smoothstep(lobe / 0.55) * (0.80 + 0.20 * smoothstep(1.2 - np.abs(lobe - 0.25) / 0.25))
    film = np.clip(film * (1 + dirt.coarse * grain(rng, canvas, 0.8, 0.8)), 0, 1)
    share = severity * dirt.hiding * film * scene.surface
    light = scene.albedo.mean(axis=0)
    # Black has no texture to take on.
    below = (light + 0.02) / (ndimage.uniform_filter(light, max(3, round(0.08 / canvas.pixel))) + 0.02)
    tone = dirt.tint * (1 + dirt.clear * (below - 1) + 0.04 * cloud(rng, canvas, 0.06))
    return replace(
        scene,
        albedo=mix(scene.albedo, tone, share),
        height=scene.height * (1 - 0.5 * share),
        gloss=scene.gloss * (1 - share) + dirt.gloss * share,
    )


class Tone(NamedTuple):
    """A change of colour, albedo * gain + lift, with a gain for its middle and one for its outline; and of gloss."""

    core: Array
    rim: Array
    lift: Array
    gloss: float


TONES = {
    "heat tint": Tone(colour(0.66, 0.74, 0.92), colour(1.0, 0.84, 0.60), colour(0.01, 0.01, 0.0), 0.0),
    "bleaching": Tone(colour(0.68, 0.68, 0.68), colour(0.70, 0.70, 0.70), colour(0.25, 0.25, 0.24), -0.02),
    "dampness": Tone(colour(0.70, 0.71, 0.73), colour(0.56, 0.58, 0.61), colour(0.0, 0.0, 0.0), 0.03),
    "ageing": Tone(colour(0.90, 0.82, 0.58), colour(0.95, 0.89, 0.70), colour(0.03, 0.02, 0.0), 0.0),
    "scorching": Tone(colour(0.45, 0.42, 0.38), colour(0.75, 0.66, 0.50), colour(0.13, 0.08, 0.03), -0.03),
    "bloom": Tone(colour(0.70, 0.70, 0.70), colour(0.70, 0.70, 0.70), colour(0.22, 0.20, 0.15), -0.03),
}


@defect("discolouration")
def discolouration(item: Item, rng: Generator, severity: float) -> Scene:
    """A soft change of tone that keeps the texture: heat tint, bleaching, dampness, ageing."""
    place, size = spot(item, rng, margin=0.04), rng.uniform(0.18, 0.32)
    patch = around(item.canvas, place, 2.0 * size)
    here = patch.cut(item.scene)
    lobe = blob(rng, patch, size)
    field = smoothstep((lobe + 0.15) / 1.0) * here.surface
    ground = (field * here.albedo).sum(axis=(1, 2), keepdims=True) / field.sum()
    # Dark rubber hardly gets darker: take a tone that shows.
    kinds = [tone for tone in TONES.values() if np.abs(ground * (tone.core - 1) + tone.lift).mean() > 0.09]
    tone = kinds[rng.integers(len(kinds))]
    gain = mix(tone.rim, tone.core, smoothstep(lobe / 0.6)) - 1
    share = severity * field * np.clip(1 + 0.12 * cloud(rng, patch, 0.10, 3), 0, 1.3)
    return patch.paste(
        item.scene,
        albedo=np.clip(here.albedo * (1 + gain * share) + tone.lift * share, 0, 1),
        gloss=np.clip(here.gloss + tone.gloss * share, 0, 1),
    )
