"""Electronic components seen from above: a painter and the solder pads of each kind.

A painter gets the component's own coordinates (u, v) inside a window and returns what is there.
The long side of a component lies along u.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from effad_lib.synthesis.scene import Array, Canvas, Part, Pose, box, colour, mix, norm, smoothstep

SOLDER = colour(0.74, 0.74, 0.72)
EPOXY = colour(0.150, 0.150, 0.158)


class Painted(NamedTuple):
    """What a painter returns: albedo [3, h, w] and cover, height, gloss, each [h, w]."""

    albedo: Array
    cover: Array
    height: Array
    gloss: Array


class Look:
    """What differs between two components of one kind: lot tone, solder, print strength, how it would break."""

    def __init__(self, rng: Generator) -> None:
        self.tone, self.solder = (np.float32(a) for a in rng.normal(1, (0.035, 0.05)))
        self.ink = np.float32(rng.uniform(0.75, 1.0))
        self.turn = np.float32(rng.uniform(0, 2 * np.pi))
        self.ragged = rng.normal(0, 0.05, 9)


Painter = Callable[[Canvas, Part, Look, Array, Array], Painted]
PAINTERS: dict[str, Painter] = {}


def component(kind: str) -> Callable[[Painter], Painter]:
    """Register the painter of a kind of component."""

    def enter(painter: Painter) -> Painter:
        PAINTERS[kind] = painter
        return painter

    return enter


def assemble(canvas: Canvas, pose: Pose, parts: tuple[Part, ...], looks: dict[str, Look]) -> Painted:
    """All components on an empty canvas, each painted only inside its own window."""
    flat = (np.zeros(canvas.shape, np.float32) for _ in range(3))
    layer = Painted(np.zeros((3, *canvas.shape), np.float32), *flat)
    for part in parts:
        x, y = pose.outer(part.x, part.y)
        turned = [abs(float(turn(part.angle + pose.angle))) for turn in (np.cos, np.sin)]
        reach_x, reach_y = (
            pose.scale * (along * part.width / 2 + across * part.height / 2 + 0.05)
            for along, across in (turned, turned[::-1])
        )
        rows = slice(*np.searchsorted(canvas.y[:, 0], (y - reach_y, y + reach_y)))
        columns = slice(*np.searchsorted(canvas.x[0], (x - reach_x, x + reach_x)))
        u, v = part.pose.local(*pose.local(canvas.x[:, columns], canvas.y[rows]))
        look = looks[part.name]
        painted = PAINTERS[part.kind](canvas, part, look, u, v)
        cover = painted.cover
        if part.kept < 1:
            ragged = np.interp(v / part.height, np.linspace(-0.5, 0.5, 9), look.ragged) * part.height
            # The ragged line starts and ends beyond the part, so that nothing goes at 1 and all at 0.
            line = (part.kept - 0.5) * (part.width + 0.4 * part.height + 2 * canvas.pixel)
            cover = cover * canvas.cover(u - line - ragged)
        layer.cover[rows, columns] = np.maximum(layer.cover[rows, columns], cover)
        for flat, new in zip((layer.height, layer.gloss), (painted.height, painted.gloss), strict=True):
            flat[rows, columns] += (new - flat[rows, columns]) * cover
        layer.albedo[:, rows, columns] = mix(layer.albedo[:, rows, columns], painted.albedo, cover)
    return layer


def pads(part: Part) -> list[tuple[float, float, float, float]]:
    """Solder pads under a component: (u, v, width, height) in its own coordinates."""
    w, h = part.width, part.height
    if part.kind == "header":
        return [((k - 3.5) * w / 8, 0, 0.075, 0.075) for k in range(8)]
    if part.kind == "transistor":
        return [(u * w, v * h, w * 0.26, h * 0.3) for u, v in ((-0.3, -0.44), (0.3, -0.44), (0, 0.44))]
    if part.kind in ("quad", "dual"):
        count, span = (8, 0.72 * h) if part.kind == "quad" else (4, 0.90 * h)
        pitch = span / count
        row = [
            (side * w * 0.46, (k + 0.5) * pitch - span / 2, w * 0.13, 0.56 * pitch)
            for side in (-1, 1)
            for k in range(count)
        ]
        return row + ([(v, u, b, a) for u, v, a, b in row] if part.kind == "quad" else [])
    place, length, breadth = {
        "can": (0.36, 0.50, 0.24), "coil": (0.42, 0.30, 0.80), "crystal": (0.26, 0.20, 0.50),
    }.get(part.kind, (0.46, 0.36, 1.12))  # fmt: skip
    return [(side * w * place, 0, w * length, h * breadth) for side in (-1, 1)]


@lru_cache(maxsize=64)
def font_mask(text: str, height: int) -> Array:
    """The text drawn about `height` pixels a line, cropped to its ink: float32 [h, w] in [0, 1]."""
    font = ImageFont.load_default(size=height)
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = (int(a) for a in probe.multiline_textbbox((0, 0), text, font=font, spacing=height // 4))
    picture = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(picture).multiline_text((1 - left, 1 - top), text, font=font, fill=255, spacing=height // 4)
    return np.asarray(picture, np.float32) / 255


@lru_cache(maxsize=64)
def _lettering(text: str, sharpness: int) -> Array:
    """Lettering blurred for sampling at a coarser grid, where `sharpness` pixels of it fall on one."""
    return ndimage.gaussian_filter(np.pad(font_mask(text, 32), 4), 0.4 * sharpness)


def lettered(canvas: Canvas, text: str, u: Array, v: Array, width: float) -> Array:
    """Coverage of a text that is `width` wide, centred at the origin."""
    columns = font_mask(text, 32).shape[1]
    scale = columns / width
    ink = _lettering(text, max(1, round(scale * canvas.pixel)))
    at = [v * scale + (ink.shape[0] - 1) / 2, u * scale + (ink.shape[1] - 1) / 2]
    return ndimage.map_coordinates(ink, at, order=1, mode="constant")


def _legs(canvas: Canvas, u: Array, v: Array, count: int, span: float, reach: float) -> Array:
    """Coverage of `count` legs spread over `span` along v, reaching out to |u| = reach."""
    pitch = span / count
    across = np.abs((v / pitch + count / 2) % 1 - 0.5) * pitch - 0.24 * pitch
    return canvas.cover(np.maximum(np.maximum(across, np.abs(v) - span / 2), np.abs(u) - reach))


def _package(canvas: Canvas, part: Part, look: Look, u: Array, v: Array, quad: bool, text: str, size: float) -> Painted:
    """Black epoxy package with gull-wing legs on two or four sides, a pin-one dimple and a laser-marked name."""
    w, h = part.width, part.height
    body_w, body_h = (w * 0.78, h * 0.78) if quad else (w * 0.66, h * 0.98)
    legs = _legs(canvas, u, v, 8 if quad else 4, 0.72 * h if quad else 0.90 * h, w / 2)
    bend = np.abs(u) / (w / 2)
    if quad:
        legs = np.maximum(legs, _legs(canvas, v, u, 8, 0.72 * w, h / 2))
        bend = np.maximum(bend, np.abs(v) / (h / 2))
    distance = box(u, v, body_w, body_h, 0.015)
    body, dimple = canvas.cover(distance), canvas.cover(norm(u + body_w * 0.36, v + body_h * 0.36) - 0.028)
    ink = lettered(canvas, text, u - 0.02, v - 0.01, size)
    epoxy = (EPOXY * look.tone + (0.34 * look.ink * ink)) * (1 - 0.35 * dimple)
    metal = SOLDER * look.solder * (0.72 + 0.36 * smoothstep((bend - 0.72) / 0.2))
    height = body * (0.8 + 1.5 * smoothstep(-distance / 0.03)) + 0.5 * legs - 0.5 * dimple
    gloss = 0.05 * body + 0.22 * legs * (1 - body)
    return Painted(mix(metal, epoxy, body), np.maximum(legs, body), height, gloss)


@component("quad")
def quad(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Controller with 32 legs."""
    return _package(canvas, part, look, u, v, True, "EF32\n2403", 0.24)


@component("dual")
def dual(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Regulator with eight legs."""
    return _package(canvas, part, look, u, v, False, "L78", 0.14)


def _two_ended(canvas: Canvas, part: Part, look: Look, u: Array, v: Array, body: Array, ends: float) -> Painted:
    """Small box of colour `body` with a solderable metal cap on each end."""
    distance = box(u, v, part.width, part.height, 0.008)
    cap = canvas.cover(part.width * (0.5 - ends) - np.abs(u))
    albedo = mix(body, SOLDER * look.solder, cap)
    height = (1.0 + 0.25 * cap) * smoothstep(-distance / 0.03) + 0.3
    return Painted(albedo, canvas.cover(distance), height, 0.04 + 0.18 * cap)


@component("resistor")
def resistor(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Thick-film chip resistor with its value printed in white."""
    ink = lettered(canvas, "103", u, v, part.width * 0.46)
    return _two_ended(canvas, part, look, u, v, EPOXY * look.tone + (0.6 * look.ink * ink), 0.20)


@component("capacitor")
def capacitor(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Ceramic multilayer capacitor; the ceramic differs from lot to lot."""
    return _two_ended(canvas, part, look, u, v, colour(0.60, 0.49, 0.37) * look.tone, 0.24)


@component("diode")
def diode(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Moulded diode with a white cathode band."""
    band = canvas.cover(np.abs(u + part.width * 0.20) - part.width * 0.055)
    body = mix(EPOXY * look.tone, colour(0.78, 0.78, 0.76), band)
    return _two_ended(canvas, part, look, u, v, body, 0.11)


@component("transistor")
def transistor(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Three-legged small transistor."""
    w, h = part.width, part.height
    body = box(u, v, w, h * 0.50, 0.01)
    upper = box(np.abs(u) - w * 0.30, v + h * 0.3, w * 0.17, h * 0.4)
    legs = canvas.cover(np.minimum(upper, box(u, v - h * 0.3, w * 0.17, h * 0.4)))
    solid, ink = canvas.cover(body), lettered(canvas, "1A", u, v, w * 0.4)
    metal = SOLDER * look.solder
    albedo = mix(metal, EPOXY * look.tone + (0.5 * look.ink * ink), solid)
    height = solid * (0.6 + smoothstep(-body / 0.03)) + 0.4 * legs
    return Painted(albedo, np.maximum(legs, solid), height, 0.05 * solid + 0.2 * legs * (1 - solid))


@component("can")
def can(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Aluminium electrolytic capacitor: black base, round can, black sector at the minus side."""
    base, rim = box(u, v, part.width, part.height, 0.03), norm(u, v) - part.width * 0.455
    solid, minus = canvas.cover(rim), canvas.cover(np.maximum(u + part.width * 0.22, rim + 0.012))
    turned = 0.05 * np.cos(2 * (np.arctan2(v, u) - look.turn))
    top = mix(colour(0.70, 0.70, 0.71) * look.tone + turned, EPOXY, 0.92 * minus)
    ink = lettered(canvas, "47\n16V", u - part.width * 0.10, v, part.width * 0.36)
    top = mix(top, colour(0.2, 0.2, 0.22), 0.8 * look.ink * ink)
    albedo = mix(EPOXY, top, solid)
    height = 0.8 * smoothstep(-base / 0.02) + 2.2 * solid * smoothstep(-rim / 0.035)
    return Painted(albedo, canvas.cover(base), height, 0.03 + 0.10 * solid * (1 - minus))


@component("header")
def header(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Row of eight gilt pins in a notched black plastic strip."""
    pitch = part.width / 8
    a = (u / pitch % 1 - 0.5) * pitch
    notch = box(np.abs(a) - pitch / 2, np.abs(v) - part.height / 2, 0.03, 0.05)
    strip, pin = np.maximum(box(u, v, part.width, part.height, 0.01), -notch), box(a, v, 0.042, 0.042, 0.006)
    gilt, plastic = canvas.cover(pin), EPOXY * look.tone
    height = 1.4 * smoothstep(-strip / 0.025) + 1.6 * smoothstep(-pin / 0.02)
    albedo = mix(plastic, colour(0.83, 0.70, 0.40) * look.solder, gilt)
    return Painted(albedo, canvas.cover(strip), height, 0.05 + 0.22 * gilt)


@component("crystal")
def crystal(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Quartz crystal in a drawn steel can with a flange."""
    flange = box(u, v, part.width, part.height, part.corner)
    ink = lettered(canvas, "16.0", u, v, part.width * 0.5)
    steel = colour(0.71, 0.71, 0.69) * look.tone * (1 + 0.06 * np.sin(u * 9 + look.turn))
    height = 0.6 * smoothstep(-flange / 0.015) + 1.8 * smoothstep(-(flange + 0.016) / 0.03)
    albedo = mix(steel, colour(0.33, 0.33, 0.33), 0.8 * look.ink * ink)
    return Painted(albedo, canvas.cover(flange), height, np.full(u.shape, 0.14, np.float32))


@component("coil")
def coil(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Power inductor: ferrite block with a round copper winding."""
    block, radius = box(u, v, part.width, part.height, part.corner), norm(u, v)
    winding = canvas.cover(np.abs(radius - part.width * 0.29) - part.width * 0.125)
    turns = 0.5 + 0.5 * np.cos(2 * np.pi * radius / max(0.030, 3.2 * canvas.pixel) + look.turn)
    wire = colour(0.62, 0.36, 0.20) * look.tone * (0.72 + 0.34 * turns)
    albedo = mix(colour(0.27, 0.27, 0.28) * look.tone, wire, winding)
    height = 1.4 * smoothstep(-block / 0.03) + winding * (0.4 * turns - 0.9)
    return Painted(albedo, canvas.cover(block), height, 0.05 + 0.08 * winding)
