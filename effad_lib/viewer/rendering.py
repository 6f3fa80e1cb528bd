"""From a picture and a state to the bytes of each panel: pure, fast, and without matplotlib's drawing.

Heat is coloured by a table of 256 colours and blended by Pillow, so a panel of 256×256 takes a few milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache, cached_property

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw

from effad_lib.images import Size
from effad_lib.plots import OUTLINE, PREDICTED, Scale, with_width
from effad_lib.viewer.findings import Picture
from effad_lib.viewer.state import State, region

LONGEST, SHORTEST = 1024, 384
"""Of the longer side of a drawn panel in pixels: larger parts of an image are shrunk, smaller ones enlarged."""

SHADOW = "#202020"

CROSS = "#ff3df2"
"""Of the cross at the point: a colour that neither colour maps nor outlines have."""


def hottest(heat: np.ndarray, size: Size) -> tuple[int, int]:
    """Return (row, column), in pixels of an image of this size, of the largest value of its map [h, w]."""
    place = np.unravel_index(np.argmax(heat), heat.shape)
    return tuple(int((k + 0.5) * to / side) for k, to, side in zip(place, size, heat.shape, strict=True))


def values_at(picture: Picture, point: tuple[int, int]) -> dict[str, float]:
    """Return the value of each map in the cell that a pixel of the image lies in: at the hottest one, the score."""
    size = picture.image.shape[:2]

    def cell(heat: np.ndarray) -> tuple[int, ...]:
        return tuple(int((k + 0.5) * have / side) for k, have, side in zip(point, heat.shape, size, strict=True))

    return {name: float(heat[cell(heat)]) for name, heat in picture.maps.items()}


def shares(picture: Picture) -> tuple[tuple[int, int], Mapping[str, float]]:
    """Return where the score is, (row, column), and what each branch adds to it there: half of its map's value.

    The parts add up to the score. Without maps of the branches there are none.
    """
    combined = picture.maps["combined"]
    place = np.unravel_index(np.argmax(combined), combined.shape)
    parts = {name: 0.5 * float(heat[place]) for name, heat in picture.maps.items() if name != "combined"}
    return hottest(combined, picture.image.shape[:2]), parts


class Layers:
    """The part of a picture that is shown, at the size of the panels; what several panels need is made once."""

    def __init__(self, picture: Picture, state: State, *, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        size = picture.image.shape[:2]
        self.picture = picture
        self.point = state.point or hottest(picture.maps[state.map], size)
        self.region = region(size, self.point, state.zoom)
        side = max(self.region[2:])
        factor = longest / side if side > longest else -(-shortest // side)
        self.size = tuple(max(1, round(factor * side)) for side in self.region[2:])
        self._heat: dict[str, np.ndarray] = {}
        self._marked: tuple[float | None, Image.Image] = (None, Image.new("L", (1, 1)))

    @cached_property
    def image(self) -> Image.Image:
        """The image: pixels stay pixels when it is enlarged, and are averaged when it is shrunk."""
        top, left, height, width = self.region
        part = Image.fromarray(np.ascontiguousarray(self.picture.image[top : top + height, left : left + width]))
        larger = self.size[0] >= height
        return part.resize(self.size[::-1], Image.Resampling.NEAREST if larger else Image.Resampling.BOX)

    @cached_property
    def truth(self) -> np.ndarray | None:
        """The truth, bool [H, W] of the panel."""
        if self.picture.truth is None:
            return None
        top, left, height, width = self.region
        part = Image.fromarray(self.picture.truth[top : top + height, left : left + width] * np.uint8(255))
        larger = self.size[0] >= height  # a defect thinner than a pixel of the panel is not lost
        return (
            np.asarray(part.resize(self.size[::-1], Image.Resampling.NEAREST if larger else Image.Resampling.BOX)) > 0
        )

    @cached_property
    def truth_outline(self) -> Image.Image | None:
        return None if self.truth is None else outline(self.truth)

    def heat(self, name: str) -> np.ndarray:
        """The map of this name, float32 [H, W] of the panel, interpolated bilinearly."""
        if name not in self._heat:
            heat = self.picture.maps[name]
            self._heat[name] = _resample(heat, self.picture.image.shape[:2], self.region, self.size)
        return self._heat[name]

    def marked_outline(self, threshold: float) -> Image.Image:
        """The outline of the pixels whose combined map is above the threshold."""
        if self._marked[0] != threshold:
            self._marked = threshold, outline(self.heat("combined") > threshold)
        return self._marked[1]

    def scale(self, state: State, scale: Scale) -> Scale:
        """The colour scale: the given one of the run, or with `scaling` "image" the range of this picture's map."""
        if state.scaling == "run":
            return scale
        heat = self.picture.maps[state.map]
        return with_width(float(heat.min()), float(heat.max()))


def panel(name: str, layers: Layers, state: State, scale: Scale) -> Image.Image:
    """Draw one of `PANELS`, RGB of `layers.size`.

    The image as it is; the overlay, heat over the image; the heatmap alone; the truth, everything but the defect
    darkened. Outlines are on all of them, as far as `state.outlines` says so; a cross marks the point once it is set.
    """
    if name == "image":
        drawn = layers.image.copy()
    elif name == "truth":
        drawn = _truth(layers)
    else:
        low, high = layers.scale(state, scale)
        level = np.clip((layers.heat(state.map) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        heat = Image.fromarray(level)
        heat.putpalette(_table(state.colours))
        drawn = heat.convert("RGB")
        if name == "overlay":
            opacity = round(255 * state.opacity)
            alpha = Image.fromarray(level).point([round(k * state.opacity) for k in range(256)])
            drawn = Image.composite(drawn, layers.image, alpha if state.follow else Image.new("L", alpha.size, opacity))
    if "truth" in state.outlines and layers.truth_outline:
        drawn.paste(OUTLINE, mask=layers.truth_outline)
    if "marked" in state.outlines and state.pixel_threshold is not None and name != "truth":
        marked = layers.marked_outline(state.pixel_threshold)
        drawn.paste(SHADOW, (1, 1), mask=marked)  # white on white is seen by its shadow
        drawn.paste(PREDICTED, mask=marked)
    if state.point is not None:
        _cross(drawn, layers)
    return drawn


def encoded(drawn: Image.Image) -> bytes:
    """Return a panel as JPEG of high quality, colours at full resolution, so that thin outlines stay clear."""
    packed = io.BytesIO()
    drawn.save(packed, "JPEG", quality=88, subsampling=0)
    return packed.getvalue()


def thumbnail(picture: Picture, state: State, scale: Scale, side: int = 96) -> bytes:
    """Return a small picture of the whole image with heat that rises with the score, as JPEG."""
    whole = State(colours=state.colours, map="combined", opacity=state.opacity, outlines=())
    return encoded(panel("overlay", Layers(picture, whole, longest=side, shortest=1), whole, scale))


def outline(mask: np.ndarray) -> Image.Image:
    """Return the inner border of a mask bool [H, W] as a mask of Pillow's, two pixels wide for 512 of a side."""
    inside = mask.copy()
    for _ in range(max(1, round(max(mask.shape) / 256))):
        smaller = inside.copy()
        smaller[1:] &= inside[:-1]
        smaller[:-1] &= inside[1:]
        smaller[:, 1:] &= inside[:, :-1]
        smaller[:, :-1] &= inside[:, 1:]
        inside = smaller
    return Image.fromarray((mask & ~inside) * np.uint8(255))


@cache
def _table(colours: str) -> bytes:
    return (matplotlib.colormaps[colours](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()


def _truth(layers: Layers) -> Image.Image:
    if layers.truth is None or not layers.picture.truth.any():
        return layers.image.copy()
    darker = layers.image.point([k // 3 for k in range(256)] * 3)
    return Image.composite(layers.image, darker, Image.fromarray(layers.truth * np.uint8(255)))


def _cross(drawn: Image.Image, layers: Layers) -> None:
    """Draw four strokes that leave the point itself free."""
    top, left, height, width = layers.region
    y = (layers.point[0] + 0.5 - top) * drawn.height / height
    x = (layers.point[1] + 0.5 - left) * drawn.width / width
    unit, colour = max(drawn.size) / 512, tuple(round(255 * part) for part in to_rgb(CROSS))
    draw = ImageDraw.Draw(drawn)
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        ends = [(x + k * dx * unit, y + k * dy * unit) for k in (8, 28)]
        draw.line(ends, fill=colour, width=max(1, round(2 * unit)))


def _resample(heat: np.ndarray, size: Size, part: tuple[int, int, int, int], to: Size) -> np.ndarray:
    """A map [h, w] of an image of this size, resized bilinearly to the image; of that the part, at the size `to`."""
    top, left, height, width = part
    y, x = heat.shape[0] / size[0], heat.shape[1] / size[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    values = Image.fromarray(np.ascontiguousarray(heat, dtype=np.float32))
    return np.asarray(values.resize(to[::-1], Image.Resampling.BILINEAR, box=box))
