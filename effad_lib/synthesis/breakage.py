"""Structural defects that break the piece or bend it out of shape."""

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from effad_lib.synthesis.defects import Patch, around, blob, defect, spot, trace
from effad_lib.synthesis.scene import Array, Item, Scene, cloud, colour, grain, mix, shadow, smoothstep

OUTSIDE = 0.02  # where `surface` is below this, the piece has ended


@defect("crack")
def crack(item: Item, rng: Generator, severity: float) -> Scene:
    """A ragged dark line that forks and runs out at its ends; one of its lips stands up and has chipped bright."""
    canvas, place = item.canvas, spot(item, rng, margin=0.06)
    length, heading = rng.uniform(0.35, 0.75), rng.uniform(0, 2 * np.pi)
    half = rng.uniform(0.006, 0.010)
    trunk = _walk(rng, canvas.pixel, length, heading, half, start=0.25)
    middle = trunk.shape[1] // 2
    trunk[:2] -= trunk[:2, middle, None]
    lines = [trunk]
    for side in rng.permutation((-1, 1, -1))[: rng.integers(1, 4)]:
        fork = trunk[:, int(rng.uniform(0.2, 0.8) * trunk.shape[1])]
        turn = heading + side * rng.uniform(0.5, 1.0)
        branch = _walk(rng, canvas.pixel, length * rng.uniform(0.2, 0.45), turn, 0.75 * fork[2], start=1.0)
        branch[:2] += fork[:2, None]
        lines.append(branch)
    x, y, half = np.concatenate(lines, axis=1)
    patch = around(canvas, place, max(np.abs(x).max(), np.abs(y).max()) + 0.05)
    here = patch.cut(item.scene)
    reach = 3 * canvas.pixel
    gap = patch.cover(trace(patch, x, y, half, reach), softness=1.2)
    # The lip is the same line, moved to one side of the crack's mean course.
    aside = (half + 0.9 * canvas.pixel) * float(rng.choice((-1, 1)))
    lip = trace(patch, x - aside * np.sin(heading), y + aside * np.cos(heading), half, reach)
    chipped = np.clip(0.5 + 0.35 * cloud(rng, patch, 0.05), 0, 1)
    lip = patch.cover(lip, softness=1.6) * (1 - gap) * here.surface * severity
    gap = gap * here.surface * severity
    albedo = mix(here.albedo, 0.5 * (here.albedo + here.under), 0.7 * lip * chipped)
    return patch.paste(
        item.scene,
        albedo=mix(albedo, 0.12 * here.albedo + 0.015, 0.93 * gap),
        height=here.height + 0.5 * lip - 0.4 * gap,
        gloss=here.gloss * (1 - gap),
    )


def _walk(rng: Generator, pixel: float, length: float, heading: float, half: float, start: float) -> Array:
    """Points of a random walk from the origin, half a pixel apart: x, y and half the width, which ends in nothing."""
    sway, jag = np.cumsum(rng.normal(0, 0.13, 48)), rng.normal(0, 0.55, 48)
    turns = heading + sway - sway.mean() + jag
    nodes = np.stack([np.cos(turns), np.sin(turns)]).cumsum(axis=1) * (length / 48)
    nodes = np.concatenate([np.zeros((2, 1)), nodes], axis=1)
    t, places = np.linspace(0, 1, int(2.5 * length / pixel) + 2), np.linspace(0, 1, 49)
    taper = np.interp(t, (0, 0.4, 1), (start, 1, 0.15)) * np.interp(t, places, rng.uniform(0.6, 1, 49))
    # Thinner than about a pixel, a line only pales.
    return np.stack([*(np.interp(t, places, line) for line in nodes), np.maximum(half, 0.5 * pixel) * taper])


@defect("dent")
def dent(item: Item, rng: Generator, severity: float) -> Scene:
    """A shallow crater with a rim pushed up around it, which only the light makes visible."""
    place, size = spot(item, rng, margin=0.10), rng.uniform(0.09, 0.17)
    patch = around(item.canvas, place, 2.6 * size)
    here = patch.cut(item.scene)
    radius = 1 - blob(rng, patch, size, stretch=1.8, ragged=0.05)
    crater = np.clip(1 - radius**2, 0, None) ** 2
    rim = np.clip(1 - ((radius - 1.1) / 0.5) ** 2, 0, None) ** 2
    # Towards the border of the piece it fades out, so that the border stays as it is.
    inland = np.clip(2 * ndimage.gaussian_filter(here.surface, 0.04 / patch.pixel) - 1, 0, 1)
    depth = severity * inland * here.surface * (crater - 0.12 * rim)
    return patch.paste(
        item.scene,
        height=here.height - rng.uniform(0.42, 0.55) * size / patch.pixel * depth,
        gloss=np.clip(here.gloss + 0.04 * depth, 0, 1),
    )


@defect("hole")
def hole(item: Item, rng: Generator, severity: float) -> Scene:
    """A ragged hole right through the piece, with the table or the dark under it."""
    place, size = spot(item, rng, margin=0.12), rng.uniform(0.08, 0.13)
    patch = around(item.canvas, place, 2.2 * size)
    here, beyond = patch.cut(item.scene), item.scene.surface < OUTSIDE
    local = (here.albedo * here.surface).sum(axis=(1, 2), keepdims=True) / here.surface.sum()
    grounds = [colour(0.055, 0.055, 0.06)]
    if beyond.any():
        grounds.append(item.scene.albedo[:, beyond].mean(axis=1)[:, None, None])
    ground = max(grounds, key=lambda tint: float(np.abs(tint - local).mean()))
    ground = ground * (1 + 0.04 * cloud(rng, patch, 0.05, 3))
    outline = _shard(rng, patch, size) + (1 - severity) * 0.5 * size
    return _break_out(item, rng, patch, outline, ground, shade=0.6, severity=severity)


def has_edge(item: Item) -> bool:
    """The piece ends inside the image."""
    return bool((item.scene.surface < OUTSIDE).mean() > 0.01)


@defect("broken_edge", needs=has_edge)
def broken_edge(item: Item, rng: Generator, severity: float) -> Scene:
    """A chip broken out of the border of the piece: the fracture shows, and beyond it what lies around the piece."""
    canvas, surface = item.canvas, item.scene.surface
    rim = (surface > 0.5) & (ndimage.minimum_filter(surface, 3) < 0.5)
    # Rather an outer border than that of a small bore: one next to where a wide window fits outside.
    wide = round(0.16 / canvas.pixel)
    outer = rim & ndimage.maximum_filter(ndimage.maximum_filter(surface, wide) < OUTSIDE, wide + 4)
    border = round(0.12 / canvas.pixel)
    inner = np.zeros_like(rim)
    inner[border:-border, border:-border] = outer[border:-border, border:-border]
    rows, columns = np.nonzero(inner if inner.any() else rim)
    pick = rng.integers(len(rows))
    place = float(canvas.x[0, columns[pick]]), float(canvas.y[rows[pick], 0])
    patch = around(canvas, place, 0.36)
    here = patch.cut(item.scene)
    thick = 2 * patch.pixel * float(ndimage.distance_transform_edt(here.surface > 0.5).max())
    size = min(rng.uniform(0.10, 0.17), max(0.7 * thick, 3 * patch.pixel))
    # What lies beyond the border goes on under the chip.
    row, column = ndimage.distance_transform_edt(here.surface >= OUTSIDE, return_distances=False, return_indices=True)
    soft = 0.03 / patch.pixel
    ground = ndimage.gaussian_filter(here.albedo[:, row, column], (0, soft, soft)) + 0.008 * cloud(rng, patch, 0.04, 2)
    ground = np.where(here.surface < OUTSIDE, here.albedo, ground)
    outline = _shard(rng, patch, size) + (1 - severity) * 0.6 * size
    return _break_out(item, rng, patch, outline, ground, shade=0.35, severity=severity)


def _shard(rng: Generator, patch: Patch, size: float) -> Array:
    """Signed distance to a splinter's outline about `size` in radius: a few straight breaks, each of them ragged."""
    angles = (np.arange(6) + rng.uniform(-0.35, 0.35, 6)) * (np.pi / 3) + rng.uniform(0, np.pi)
    sides = zip(angles.tolist(), rng.uniform(0.65, 1.0, 6).tolist(), strict=True)
    planes = (patch.x * float(np.cos(a)) + patch.y * float(np.sin(a)) - size * far for a, far in sides)
    outline = next(planes)
    for plane in planes:
        outline = np.maximum(outline, plane)
    return outline + 0.07 * size * cloud(rng, patch, 0.35 * size, 3)


def _break_out(
    item: Item, rng: Generator, patch: Patch, outline: Array, ground: Array, shade: float, severity: float
) -> Scene:
    """Take away what lies inside `outline`: a rough face slopes down along it to the `ground`, which lies in shade."""
    here = patch.cut(item.scene)
    face = max(rng.uniform(0.014, 0.024), 1.2 * patch.pixel)
    rough = grain(rng, patch, 0.9, 0.9) + cloud(rng, patch, 0.04)
    # What is lost fades in with the severity, while the outline grows.
    whole = np.clip(2 * ndimage.maximum_filter(here.surface, 3), 0, 1)
    strength = severity * (2 - severity) * whole
    lost = patch.cover(outline) * strength
    open_ = patch.cover(outline + face * (1 + 0.35 * cloud(rng, patch, 0.06)), softness=1.5)
    dark = shadow(1 - open_, patch, reach=0.03, softness=0.015)
    fracture = here.under * (0.78 + 0.05 * rough) * (1 - 0.3 * smoothstep(-outline / face))
    albedo = mix(fracture, ground * (1 - shade * dark), open_)
    drop = 1.4 * smoothstep(-outline / face) - 0.12 * rough * (1 - open_)
    return patch.paste(
        item.scene,
        albedo=mix(here.albedo, albedo, lost),
        height=here.height - drop * lost * (1 - 0.5 * open_),
        gloss=here.gloss * (1 - lost),
    )
