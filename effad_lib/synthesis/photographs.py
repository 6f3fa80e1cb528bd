"""Defects on real photographs: the same models, on a picture in place of a drawn product."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from effad_lib.images import packaged_photographs
from effad_lib.synthesis.defects import defect, spot
from effad_lib.synthesis.scene import (
    WHOLE,
    Array,
    Camera,
    Canvas,
    Item,
    Pose,
    Scene,
    Window,
    box,
    cloud,
    colour,
    mix,
    norm,
    smoothstep,
    white,
)


@dataclass(frozen=True)
class Photograph(Item):
    """A photograph as an item: flat, matt, without parts; what it shows is the albedo."""


def photograph(picture: Array) -> Photograph:
    """Return a photograph uint8 [H, W, 3] as an item, its surface being what stands out from an even ground."""
    albedo = (picture.astype(np.float32) / 255).transpose(2, 0, 1)
    canvas = Canvas(*picture.shape[:2])
    flat = np.zeros(canvas.shape, np.float32)
    around = ndimage.uniform_filter(albedo, (0, *(max(3, side // 8) for side in canvas.shape)))
    # A scratch shows as light on dark and as dark on light.
    under = around + np.where(around.mean(axis=0) < 0.55, 0.38, -0.38).astype(np.float32)
    scene = Scene(albedo, flat, flat, foreground(albedo), np.clip(under, 0.04, 0.96))
    return Photograph(canvas, lambda parts: scene)


def foreground(albedo: Array) -> Array:
    """Return where an object lies on an even ground, float32 [H, W] 0 or 1; all ones if the ground is not even.

    The ground is the colour along the picture's border; Otsu's threshold on the distance from it parts the two.
    """
    rim = np.concatenate([albedo[:, 0], albedo[:, -1], albedo[:, :, 0], albedo[:, :, -1]], axis=1)
    ground = np.median(rim, axis=1)[:, None]
    everywhere = np.ones(albedo.shape[1:], np.float32)
    if np.mean(np.abs(rim - ground).max(axis=0) < 0.12) < 0.9:
        return everywhere
    distance = np.abs(albedo - ground[..., None]).max(axis=0)
    if distance.max() - distance.min() < 0.1:
        return everywhere
    found = ndimage.binary_fill_holes(ndimage.binary_opening(distance > threshold_otsu(distance), iterations=2))
    return found.astype(np.float32) if 0.02 < found.mean() < 0.98 else everywhere


class SecondExposure(Camera):
    """Adds to a photograph what a defect changes: an even light, and noise like the photograph's where it is hidden."""

    def __init__(self, item: Photograph, rng: Generator) -> None:
        self.canvas, self.photograph = item.canvas, item.scene.albedo
        self.light = float(np.cos(-2.36)), float(np.sin(-2.36))
        self.field = np.ones(item.canvas.shape, np.float32)
        self.tint, self.softness = np.ones((3, 1, 1), np.float32), np.float32(0.14)
        residue = self.photograph - ndimage.uniform_filter(self.photograph, (0, 3, 3))
        # The median, for edges are no noise; 1.48 makes it a deviation, 9/8 is what the mean of nine takes away.
        deviation = 1.48 * (9 / 8) ** 0.5 * np.median(np.abs(residue), axis=(1, 2), keepdims=True)
        # What is grey stays grey: a colour would give the defect away, and no camera that made it could see one.
        self.grey = bool(np.ptp(self.photograph, axis=0).max() == 0)
        planes = 1 if self.grey else 3
        self.noise = white(rng, (planes, *self.canvas.shape)) * deviation
        self.before = super().expose(item.scene)

    def expose(self, scene: Scene, window: Window = WHOLE) -> Array:
        """The photograph and what the scene changes in it, float32 [3, h, w] in [0, 1] of that window."""
        change = super().expose(scene, window) - self.before[:, *window]
        if self.grey:
            change = change.mean(axis=0, keepdims=True)
        return np.clip(self.photograph[:, *window] + change, 0, 1)

    def develop(self, picture: Array, window: Window = WHOLE) -> Array:
        """Quantise, with noise where the picture differs from the photograph: uint8 [h, w, 3] of that window."""
        hidden = np.abs(picture - self.photograph[:, *window]).max(axis=0)
        noise = self.noise[:, *window] * np.clip(hidden / 0.2, 0, 1)
        levels = np.rint(np.clip(picture + noise, 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))


def is_photograph(item: Item) -> bool:
    """The item is a photograph: defects that are pasted make sense on nothing else."""
    return isinstance(item, Photograph)


def is_lit(item: Item) -> bool:
    """The item is a photograph that is not black: a piece of black in another place is no defect."""
    return is_photograph(item) and bool(item.scene.albedo.max() > 0.1)


@lru_cache(maxsize=16)
def _foreign(path: Path) -> Array:
    """A photograph of something else, float32 [3, h, w] in [0, 1], its sides 512 pixels at most."""
    with Image.open(path) as image:
        image.draft("RGB", (512, 512))
        image = image.convert("RGB")
        image.thumbnail((512, 512))
        return (np.asarray(image, np.float32) / 255).transpose(2, 0, 1)


@defect("texture_blend", needs=is_photograph)
def texture_blend(item: Item, rng: Generator, severity: float) -> Scene:
    """A ragged patch of another picture's texture, blended in through thresholded noise, as DRAEM trains with."""
    scene, canvas = item.scene, item.canvas
    x, y = spot(item, rng, margin=0.04)
    paths = packaged_photographs()
    other = _foreign(paths[rng.integers(len(paths))])
    top, left = (int(rng.integers(length)) for length in other.shape[1:])
    rows, columns = ((np.arange(n) + start) for n, start in zip(canvas.shape, (top, left), strict=True))
    # Mirrored at its borders, the picture has no seam however large the canvas.
    texture = other[:, _mirrored(rows, other.shape[1])[:, None], _mirrored(columns, other.shape[2])]
    size = rng.uniform(0.12, 0.28)
    lobe = 1 - norm(canvas.x - x, canvas.y - y) / size + 0.45 * cloud(rng, canvas, 0.12, 3)
    near = smoothstep(2 * (2.2 - norm(canvas.x - x, canvas.y - y) / size))
    share = smoothstep(lobe * near / 0.35) * scene.surface * rng.uniform(0.55, 1.0) * severity
    return replace(scene, albedo=mix(scene.albedo, texture, share))


@defect("cut_paste", needs=is_lit)
def cut_paste(item: Item, rng: Generator, severity: float) -> Scene:
    """A piece of the same picture in another place, turned, its colours shifted and its border blended."""
    scene, canvas = item.scene, item.canvas
    (x, y), (from_x, from_y) = spot(item, rng, margin=0.06), spot(item, rng, margin=0.06)
    width, height = rng.uniform(0.10, 0.34, 2)
    u, v = Pose(x, y, float(rng.uniform(0, 2 * np.pi))).local(canvas.x, canvas.y)
    rows = (v + from_y) / canvas.pixel + (canvas.height - 1) / 2
    columns = (u + from_x) / canvas.pixel + (canvas.width - 1) / 2
    cut = np.stack([ndimage.map_coordinates(plane, [rows, columns], order=1, mode="mirror") for plane in scene.albedo])
    # Hues shift as far as there are any.
    hue = min(1.0, 12 * float(np.ptp(scene.albedo, axis=0).mean()))
    cut = cut * rng.uniform(0.75, 1.25) + hue * colour(*rng.uniform(-0.08, 0.08, 3))
    cover = canvas.cover(box(u, v, width, height, 0.3 * min(width, height)), softness=max(2.0, 0.02 / canvas.pixel))
    return replace(scene, albedo=mix(scene.albedo, np.clip(cut, 0, 1), cover * scene.surface * severity))


def _mirrored(places: Array, length: int) -> Array:
    folded = places % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)
