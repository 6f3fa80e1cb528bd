"""Structural defects of what does not belong there: a thread on the surface, a print or texture out of its place."""

from dataclasses import replace

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.defects import Patch, around, blob, defect, spot, trace
from effad_lib.synthesis.scene import Array, Item, Pose, Scene, cloud, colour, grain, mix, shadow, smoothstep

# Lint, hair, and two yarns of working clothes.
THREADS = (colour(0.90, 0.89, 0.86), colour(0.08, 0.07, 0.06), colour(0.20, 0.28, 0.52), colour(0.62, 0.17, 0.14))


@defect("thread")
def thread(item: Item, rng: Generator, severity: float) -> Scene:
    """A curled thread or hair that lies on the piece, lit like the small cylinder it is, with its own shadow."""
    canvas, place = item.canvas, spot(item, rng, margin=0.06)
    length, half = rng.uniform(0.6, 1.3), max(rng.uniform(0.0042, 0.0070), 0.5 * canvas.pixel)
    t = np.linspace(0, 1, int(2.2 * length / canvas.pixel) + 2)
    # A few slow bends and one curl make the heading.
    waves = zip(rng.normal(0, 1, 3) * (1.3, 0.7, 0.4), (0.5, 1.0, 2.0), rng.uniform(0, 2 * np.pi, 3), strict=True)
    heading = rng.uniform(0, 2 * np.pi) + sum(
        size * np.sin(2 * np.pi * turns * t + phase) for size, turns, phase in waves
    )
    heading = heading + rng.choice((-1, 1)) * rng.uniform(0.5, 5) / (1 + np.exp(-(t - rng.uniform(0.2, 0.8)) / 0.1))
    x, y = (step.cumsum() * (length / len(t)) for step in (np.cos(heading), np.sin(heading)))
    x, y = x - x[len(t) // 2], y - y[len(t) // 2]
    patch = around(canvas, place, max(np.abs(x).max(), np.abs(y).max()) + 0.08)
    here = patch.cut(item.scene)
    distance = trace(patch, x, y, np.full(len(t), half), 2 * canvas.pixel)
    cover = patch.cover(distance)
    ground = (here.albedo * cover).sum(axis=(1, 2), keepdims=True) / cover.sum()
    kinds = [tint for tint in THREADS if np.abs(tint - ground).mean() > 0.15]
    tint = kinds[rng.integers(len(kinds))] * (1 + 0.06 * grain(rng, patch, 1.2, 1.2))
    dark = np.clip(shadow(cover, patch, reach=0.014, softness=0.008) - cover, 0, 1)
    round_ = np.sqrt(np.clip(1 - np.clip(1 + distance / half, 0, 1) ** 2, 0, 1))
    cover = severity * cover
    return patch.paste(
        item.scene,
        albedo=mix(here.albedo * (1 - 0.55 * severity * dark), tint, cover),
        height=here.height + (0.7 * half / canvas.pixel * round_ - here.height + here.height.mean()) * cover,
        gloss=mix(here.gloss, np.float32(0.04), cover),
    )


@defect("interruption")
def interruption(item: Item, rng: Generator, severity: float) -> Scene:
    """A patch where print or texture is worn off, or turned or shifted against what surrounds it."""
    place, size = spot(item, rng, margin=0.08), rng.uniform(0.13, 0.20)
    patch = around(item.canvas, place, 2.2 * size)
    here = patch.cut(item.scene)
    lobe = blob(rng, patch, size, stretch=2.0, ragged=0.25)
    share = smoothstep(lobe / 0.35) * np.clip(1 + 0.1 * cloud(rng, patch, 0.06), 0, 1) * here.surface
    turned = Pose(*place, angle=float(rng.choice((-1, 1)) * rng.uniform(0.5, 1.4)))
    away = float(rng.uniform(0, 2 * np.pi))
    shifted = Pose(place[0] + 0.11 * float(np.cos(away)), place[1] + 0.11 * float(np.sin(away)))
    worn = _worn(here, patch, rng)
    # A part's displaced copy would be half a part more. Where a texture is even, a shifted one does not show.
    moved = [] if item.parts else [_seen_from(item, patch, pose, worn) for pose in (turned, shifted)]
    seen = [worn, *(other for other in moved if _change(here, other, share) > 0.045)]
    other = seen[rng.integers(len(seen))]
    share = severity * share
    return patch.paste(
        item.scene,
        albedo=mix(here.albedo, other.albedo, share),
        height=mix(here.height, other.height, share),
        gloss=mix(here.gloss, other.gloss, share),
    )


def _change(here: Scene, other: Scene, share: Array) -> float:
    return float((np.abs(other.albedo - here.albedo).mean(axis=0) * share).sum() / share.sum())


def _worn(here: Scene, patch: Patch, rng: Generator) -> Scene:
    """The scene rubbed down: fine print, traces and relief gone, in places a part of what is underneath laid bare."""
    width, blur = max(3, round(0.075 / patch.pixel)), 0.012 / patch.pixel

    def rub(layer: Array) -> Array:
        """Level what is finer than `width`, the bright and the dark."""
        level = ndimage.grey_closing(ndimage.grey_opening(layer, width), width)
        return ndimage.gaussian_filter(level, blur)

    fine = grain(rng, patch, 0.7, 0.7)
    albedo = np.stack([rub(channel) for channel in here.albedo])
    # The less it differs from what is on it, the more of it must be bare to show.
    contrast = max(float(np.abs(here.under - albedo).mean()), 1e-3)
    depth = min(max(0.15 / contrast, 0.34), 0.65)
    bare = np.clip(depth + 0.10 * cloud(rng, patch, 0.07, 3), 0, 1)
    return replace(
        here,
        albedo=mix(albedo, here.under, bare) * (1 + 0.035 * fine),
        height=ndimage.gaussian_filter(here.height, 3 * blur) + 0.08 * fine,
        gloss=0.6 * here.gloss,
    )


def _seen_from(item: Item, patch: Patch, pose: Pose, worn: Scene) -> Scene:
    """What the patch shows if the piece lies under it in another `pose`; worn where the piece does not reach."""
    canvas = patch.whole
    x, y = (np.float32(a) for a in pose.outer(0, 0))
    u, v = replace(pose, x=0.0, y=0.0).local(patch.x, patch.y)
    places = [(v + y - canvas.y[0, 0]) / canvas.pixel, (u + x - canvas.x[0, 0]) / canvas.pixel]

    def moved(layer: Array) -> Array:
        return ndimage.map_coordinates(layer, places, order=1, mode="reflect")

    there = smoothstep(moved(item.scene.surface))
    albedo = np.stack([moved(channel) for channel in item.scene.albedo])
    return replace(
        worn,
        albedo=mix(worn.albedo, albedo, there),
        height=mix(worn.height, moved(item.scene.height), there),
        gloss=mix(worn.gloss, moved(item.scene.gloss), there),
    )
