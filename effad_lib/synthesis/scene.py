"""Scenes before the camera: coordinates, shapes, textures, parts, and the camera that photographs them.

Lengths are in units of half the image's short side (the canvas spans [-1, 1] along it, so every product looks
the same at any size); colours are display values in [0, 1]; heights are in pixels, for shading only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from scipy import fft, ndimage

Array = np.ndarray


class SynthesisError(ValueError):
    """An unknown product or defect, an impossible size or severity, or a folder that must not be replaced."""


@dataclass(frozen=True)
class Canvas:
    """The image plane of `height` x `width` pixels; `x` is [1, W] and `y` [H, 1], origin in the centre."""

    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixel(self) -> float:
        return 2.0 / min(self.shape)

    @cached_property
    def x(self) -> Array:
        return ((np.arange(self.width, dtype=np.float32) - (self.width - 1) / 2) * np.float32(self.pixel))[None]

    @cached_property
    def y(self) -> Array:
        return ((np.arange(self.height, dtype=np.float32) - (self.height - 1) / 2) * np.float32(self.pixel))[:, None]

    def cover(self, distance: Array, softness: float = 1.0) -> Array:
        """Anti-aliased coverage of a shape given its signed distance (negative inside)."""
        return np.clip(0.5 - distance / (self.pixel * softness), 0, 1)


@dataclass(frozen=True)
class Pose:
    """Where a body lies: its origin, its turn in radians, its scale."""

    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    scale: float = 1.0

    def local(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Outer coordinates -> the body's own."""
        c, s = np.float32(np.cos(self.angle) / self.scale), np.float32(np.sin(self.angle) / self.scale)
        x, y = x - np.float32(self.x), y - np.float32(self.y)
        return c * x + s * y, c * y - s * x

    def outer(self, u: float, v: float) -> tuple[float, float]:
        """The body's own coordinates -> outer ones."""
        c, s = np.cos(self.angle) * self.scale, np.sin(self.angle) * self.scale
        return self.x + c * u - s * v, self.y + s * u + c * v


@dataclass(frozen=True)
class Part:
    """A part of a product that can move or go missing: a box of `width` x `height` with corners rounded by `corner`.

    `kept` is the share of the part that is there: 1 whole, 0 gone.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0
    corner: float = 0.0
    kept: float = 1.0
    name: str = ""

    @property
    def pose(self) -> Pose:
        return Pose(self.x, self.y, self.angle)

    @property
    def radius(self) -> float:
        """Radius of the circle around the part."""
        return float(np.hypot(self.width, self.height)) / 2 - 0.414 * self.corner


@dataclass(frozen=True)
class Scene:
    """What the camera sees: albedo [3, H, W], height [H, W], gloss and surface (each [H, W] in [0, 1]).

    `surface` is where dirt and scratches can lie; `bared` (broadcasts to albedo, or a function that returns what does)
    is the colour a scratch lays bare; `claimed` (bool [H, W]) adds to a defect's mask what belongs to it without
    changing in colour.
    """

    albedo: Array
    height: Array
    gloss: Array
    surface: Array
    bared: Array | Callable[[], Array]
    claimed: Array | None = None

    @cached_property
    def under(self) -> Array:
        """`bared` as [3, H, W], worked out only for the few defects that ask for it."""
        return np.broadcast_to(self.bared() if callable(self.bared) else self.bared, self.albedo.shape)


@dataclass(frozen=True)
class Item:
    """One piece of a product: its parts, and `paint(parts) -> Scene`, all of its chance already drawn.

    `room(x, y)` is the distance from a place (the item's own coordinates) to the border that parts must not cross.
    `arrange(more)` gives the parts of a variant with that many more (or fewer) in a row, evenly spaced.
    """

    canvas: Canvas
    paint: Callable[[tuple[Part, ...]], Scene]
    parts: tuple[Part, ...] = ()
    pose: Pose = field(default_factory=Pose)
    room: Callable[[Array, Array], Array] | None = None
    arrange: Callable[[int], tuple[Part, ...]] | None = None

    @cached_property
    def scene(self) -> Scene:
        """The piece as it should be."""
        return self.paint(self.parts)

    def footprint(self, part: Part) -> Array:
        """The pixels that a part covers, bool [H, W]."""
        u, v = part.pose.local(*self.pose.local(self.canvas.x, self.canvas.y))
        return box(u, v, part.width, part.height, part.corner) <= self.canvas.pixel


def box(u: Array, v: Array, width: float, height: float, corner: float = 0.0) -> Array:
    """Signed distance to a centred box with rounded corners."""
    a, b = np.abs(u) - (width / 2 - corner), np.abs(v) - (height / 2 - corner)
    return norm(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner


def norm(a: Array, b: Array) -> Array:
    """Return √(a² + b²): `np.hypot` without its care for numbers that overflow, which takes eight times as long."""
    return np.sqrt(a * a + b * b)


def smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, smooth in between."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, share: Array) -> Array:
    """Blend colours `a` -> `b`, [3, H, W] or [3, 1, 1], by `share` [H, W]."""
    blend = (b - a) * share
    blend += a
    return blend


def colour(*rgb: float) -> Array:
    """Return a colour, red, green and blue in [0, 1], that broadcasts to an albedo: [3, 1, 1]."""
    return np.array(rgb, np.float32)[:, None, None]


def white(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """White noise of unit deviation: sums of eight random bytes, near to normal up to 4.9 and twice as fast."""
    count = math.prod(shape)
    drawn = rng.integers(2**64, size=count, dtype=np.uint64).view(np.uint8).reshape(8, count)
    total = drawn[0].astype(np.uint16)
    for more in drawn[1:]:
        total += more
    noise = total.astype(np.float32)
    noise -= 8 * 255 / 2
    noise *= np.float32((12 / (8 * (256**2 - 1))) ** 0.5)
    return noise.reshape(shape)


def cloud(rng: np.random.Generator, canvas: Canvas, cell: float, octaves: int = 1) -> Array:
    """Smooth noise [H, W] of unit deviation with blobs about `cell` wide; each octave halves cell and weight."""
    total = np.zeros(canvas.shape, np.float32)
    for octave in range(octaves):
        step = max(cell / 2**octave / canvas.pixel, 1.0)
        (rows, down), (columns, along) = (_spline(length, step) for length in canvas.shape)
        nodes = rng.standard_normal((rows[-1] + 4, columns[-1] + 4), dtype=np.float32)
        # Four terms, not a matrix product: its order of summation may change with the number of threads.
        nodes = sum(along[k] * nodes[:, columns + k] for k in range(4)) * np.float32(2.1 * 0.5**octave)
        for k in range(4):
            lines = nodes[rows + k]
            lines *= down[k][:, None]
            total += lines
    return total


@lru_cache(maxsize=256)
def _spline(length: int, step: float) -> tuple[Array, Array]:
    """First node [length] and the weights [4, length] of a cubic B-spline whose nodes are `step` pixels apart."""
    place = np.arange(length) / step
    first = place.astype(int)
    t = np.abs(place - first - np.arange(-1, 3)[:, None])
    weights = np.where(t < 1, (4 - 6 * t**2 + 3 * t**3) / 6, np.clip(2 - t, 0, None) ** 3 / 6)
    return first, weights.astype(np.float32)


def grain(rng: np.random.Generator, canvas: Canvas, along: float, across: float, angle: float = 0.0) -> Array:
    """Gaussian noise [H, W] of unit deviation, `along` x `across` pixels in size, its long axis turned by `angle`."""
    rows, columns = (fft.next_fast_len(length, real=True) for length in canvas.shape)
    noise = fft.rfft2(white(rng, (rows, columns)), overwrite_x=True)
    noise *= _blur(rows, columns, float(along), float(across), float(angle))
    noise = fft.irfft2(noise, s=(rows, columns), overwrite_x=True)[: canvas.height, : canvas.width]
    return noise / noise.std()


@lru_cache(maxsize=8)
def _blur(rows: int, columns: int, along: float, across: float, angle: float) -> Array:
    """What a Gaussian blur of `along` x `across` pixels, turned by `angle`, does to the spectrum of `fft.rfft2`."""
    ky, kx = (k.astype(np.float32) for k in (fft.fftfreq(rows)[:, None], fft.rfftfreq(columns)[None]))
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return np.exp(-2 * np.pi**2 * ((along * (c * kx + s * ky)) ** 2 + (across * (c * ky - s * kx)) ** 2))


def shadow(cover: Array, canvas: Canvas, reach: float, softness: float) -> Array:
    """Soft shadow [H, W] that `cover` casts to the lower right, `reach` and `softness` in canvas units."""
    shift = round(reach / canvas.pixel)
    moved = np.pad(cover, ((shift, 0), (shift, 0)), mode="edge")[: canvas.height, : canvas.width]
    return ndimage.gaussian_filter(moved, softness / canvas.pixel, truncate=2.5)


def _soften(picture: Array, share: np.float32) -> None:
    """Let every row of [3, H, W] give `share` of its light to each of its two neighbours, in place."""
    given = picture * share
    picture -= 2 * given
    picture[:, 1:] += given[:, :-1]
    picture[:, :-1] += given[:, 1:]
    picture[:, 0] += given[:, 0]
    picture[:, -1] += given[:, -1]


Window = tuple[slice, slice]
"""Rows and columns of the canvas."""

WHOLE: Window = (slice(None), slice(None))

REACH = 2
"""Pixels that a change spreads in the camera: one by the slope of the relief, one by the lens."""


class Camera:
    """One exposure: light from the upper left, an uneven field, a slightly soft lens and sensor noise.

    Colours being square roots of light, photon noise has the same deviation at every brightness.
    """

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        turn, tilt = rng.normal(-2.36, 0.08), rng.normal(0, np.pi)
        self.light = float(np.cos(turn)), float(np.sin(turn))
        slope = rng.uniform(0.02, 0.09)
        field = 1 + slope * (canvas.x * float(np.cos(tilt)) + canvas.y * float(np.sin(tilt)))
        field = field - rng.uniform(0.03, 0.07) * (canvas.x**2 + canvas.y**2)
        self.field = field * rng.normal(1, 0.018)
        self.tint = colour(*rng.normal(1, 0.006, 3))
        self.softness = np.float32(rng.uniform(0.12, 0.17))
        deviation = rng.uniform(1.2, 2.2) / 255
        self.noise = white(rng, (3, *canvas.shape))
        self.noise *= np.float32(deviation)

    def expose(self, scene: Scene, window: Window = WHOLE) -> Array:
        """The scene lit and seen through the lens, without noise: float32 [3, h, w] in [0, 1] of that window.

        What a window shows depends on `REACH` pixels around it: its own rim is right only at the canvas's border.
        """
        height, field = scene.height[window], self.field[window]
        slope_y, slope_x = np.gradient(height)
        away = self.light[0] * slope_x + self.light[1] * slope_y
        # In place, for speed. The sheen falls off with |slope + light / 2|² = |slope|² + away + 1/4.
        sheen = np.square(slope_x)
        sheen += np.square(slope_y)
        sheen += away + 0.25
        sheen *= -6
        np.exp(sheen, out=sheen)
        sheen *= scene.gloss[window]
        picture = scene.albedo[:, *window] * self.tint
        picture *= np.sqrt(np.clip(1 - away, 0.25, 2.2))
        picture += sheen
        picture *= field
        _soften(picture, self.softness)
        _soften(picture.swapaxes(1, 2), self.softness)
        return np.clip(picture, 0, 1, out=picture)

    def develop(self, picture: Array, window: Window = WHOLE) -> Array:
        """Add this exposure's noise and quantise: uint8 [h, w, 3] of that window."""
        levels = np.rint(np.clip(picture + self.noise[:, *window], 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))
