"""The product `connector`: an open plug housing with a row of contacts and a flat cable of coloured wires."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from effad_lib.synthesis.components import Look, Painted, assemble, component, lettered
from effad_lib.synthesis.products import jitter, lay, product
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
    shadow,
    smoothstep,
)

WIRES = {
    "brown": (0.36, 0.22, 0.15),
    "red": (0.70, 0.15, 0.14),
    "orange": (0.84, 0.44, 0.14),
    "yellow": (0.84, 0.73, 0.20),
    "green": (0.16, 0.48, 0.27),
    "blue": (0.16, 0.32, 0.62),
    "violet": (0.44, 0.26, 0.52),
    "grey": (0.55, 0.56, 0.57),
}
PINS = 8
SPAN, PITCH = 1.05, 0.15  # from the first contact to the last, from wire to wire
BOTTOM, END = 0.08, 0.88  # of the housing, where the wires leave it, and of the wires
UP = float(np.pi / 2)


@product("connector")
def connector(canvas: Canvas, rng: Generator) -> Item:
    """Ivory plug housing with eight gilt contacts in an open chamber, a latch, ribs, and eight wires below."""
    pose = lay(rng, canvas, turn=0.04)
    u, v = pose.local(canvas.x, canvas.y)
    spares = 2 * PINS  # contacts beyond the usual ones have tolerances too
    offsets = jitter(spares * (Part("pin", 0.0, -0.455, 0.33, 0.066, -UP),), rng, shift=0.004, turn=0.010)
    wires = tuple(
        Part(f"wire {name}", PITCH * (k - 3.5), (BOTTOM + END) / 2, END - BOTTOM, 0.118, UP, name=f"wire {k + 1}")
        for k, name in enumerate(WIRES)
    )
    wires = jitter(wires, rng, shift=0.004, turn=0.006)

    def arrange(more: int) -> tuple[Part, ...]:
        # Contacts come and go in the middle of the row, so that all others stay near their places.
        count, half = PINS + more, PINS // 2
        left, right = min(half, (count + 1) // 2), min(half, count // 2)
        numbers = (*range(left), *range(PINS, PINS + more), *range(PINS - right, PINS))
        pins = (
            replace(loose := offsets[k % spares], x=float(x) + loose.x, name=f"pin {k + 1}")
            for k, x in zip(numbers, np.linspace(-SPAN / 2, SPAN / 2, count), strict=True)
        )
        return *pins, *wires

    parts = arrange(0)
    # A part under an unknown name looks like the spare.
    spare = Look(rng)
    looks = defaultdict(lambda: spare, {part.name: Look(rng) for part in parts})

    speckle = grain(rng, canvas, 0.8, 0.8)
    mat = rng.normal(1, 0.012) + 0.026 * cloud(rng, canvas, 0.4, 2) + 0.032 * speckle
    outline, relief, tone = _housing(canvas, u, v)
    cover = canvas.cover(outline)
    thrown = smoothstep(0.55 - _body(u - 0.045, v - 0.045, 0.06) / 0.12) * (1 - cover)
    ivory = colour(0.775, 0.755, 0.69) * colour(*rng.normal(1, (0.003, 0.003, 0.006)))
    flow = 1 + 0.012 * cloud(rng, canvas, 0.30, 2) + 0.008 * speckle
    bare = mix(colour(0.33, 0.385, 0.42) * mat, ivory * (flow * tone), cover)
    gouged = bare * 0.6  # dirt stays in what is scratched
    relief = relief * cover + 0.022 * speckle

    def paint(parts: tuple[Part, ...]) -> Scene:
        layer = assemble(canvas, pose, parts, looks)
        dark = shadow(layer.cover, canvas, reach=0.028, softness=0.020)
        lit = 1 - 0.55 * thrown
        albedo = mix(bare * (1 - 0.5 * dark), layer.albedo, layer.cover) * lit
        height = relief * (1 - layer.cover) + layer.height
        gloss = 0.08 * cover * (1 - layer.cover) + layer.gloss * lit
        solid = np.maximum(cover, layer.cover)
        return Scene(albedo, height, gloss, solid, lambda: mix(gouged, layer.albedo * 0.5 + 0.42, layer.cover))

    return Item(canvas, paint, parts, pose, lambda x, y: 0.95 - np.maximum(np.abs(x), np.abs(y)), arrange)


def _body(u: Array, v: Array, corner: float) -> Array:
    """Signed distance to the housing without latch and keys."""
    return box(u, v - (BOTTOM - 0.80) / 2, 1.46, BOTTOM + 0.80, corner)


def _slab(u: Array, v: Array, width: float, height: float) -> Array:
    """Distance to a centred box with sharp corners: cheaper than `box`, rounded ones would not show."""
    return np.maximum(np.abs(u) - width / 2, np.abs(v) - height / 2)


def _housing(canvas: Canvas, u: Array, v: Array) -> tuple[Array, Array, Array]:
    """Distance to the housing's outline, its relief in pixels, and the tone that depth and moulding give it."""
    side = np.abs(u)
    outline = np.minimum(
        _body(u, v, 0.035), np.minimum(_slab(u, v + 0.80, 0.44, 0.20), _slab(side - 0.73, v + 0.16, 0.08, 0.22))
    )
    chamber, slit = _slab(u, v + 0.47, 1.26, 0.38), _slab(side - 0.245, v + 0.75, 0.030, 0.12)
    catch, grip = _slab(u, v + 0.82, 0.26, 0.07), _slab(side - 0.555, v + 0.075, 0.24, 0.17)
    # A triangle points at the first contact.
    arrow = np.maximum(np.abs(u + SPAN / 2) + 0.5 * (v + 0.20), -v - 0.245)

    # Below five pixels a rib the grip would alias, so small images have fewer ribs.
    pitch = max(0.05, 5 * canvas.pixel)
    ribs = canvas.cover(grip, 2) * (0.5 - 0.5 * np.cos((side - 0.435) * float(2 * np.pi / pitch)))
    ink = np.zeros(canvas.shape, np.float32)
    rows = slice(*np.searchsorted(canvas.y[:, 0], (-0.21, 0.04)))
    ink[rows] = lettered(canvas, "EFFAD  8P-250", u[rows], v[rows] + 0.09, 0.66)

    relief = 0.012 * smoothstep(-outline / 0.035) - 0.016 * smoothstep(0.5 - chamber / 0.03)
    relief = relief + 0.008 * smoothstep(0.5 - catch / 0.02) + 0.006 * ribs + 0.005 * ink
    # The wall shades the chamber's floor, most along its upper left.
    shade = 0.66 - 0.20 * smoothstep(-_slab(u - 0.05, v + 0.42, 1.26, 0.38) / 0.10)
    tone = (1 - shade * canvas.cover(chamber)) * (1 - 0.6 * canvas.cover(slit))
    tone = tone * (1 - 0.45 * canvas.cover(arrow) - 0.10 * ribs - 0.10 * ink)
    return outline, relief * np.float32(1 / canvas.pixel), tone


@component("pin")
def pin(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Gilt blade contact with a tapered tip, its root to the left."""
    half = part.height / 2 - 0.35 * np.maximum(u - part.width / 2 + 0.05, 0)
    distance = np.maximum(np.abs(v) - half, np.abs(u) - part.width / 2)
    bevel = smoothstep(-distance / 0.022)
    along = np.cos(u * 13 + look.turn)
    albedo = colour(0.80, 0.66, 0.36) * look.tone * (0.66 + 0.30 * bevel + 0.04 * along)
    return Painted(albedo, canvas.cover(distance), bevel * np.float32(0.011 / canvas.pixel), 0.10 + 0.10 * bevel)


def _wire(canvas: Canvas, part: Part, look: Look, u: Array, v: Array) -> Painted:
    """Insulated strand, a little bowed; its right end is stripped and tinned."""
    v = v - 0.012 * float(np.sin(look.turn)) * (1 - (2 * u / part.width) ** 2)
    bare = canvas.cover(part.width / 2 - 0.11 - u)
    radius = part.height * (0.5 - 0.2 * bare)
    round_ = 1 - np.clip(np.abs(v) / radius, 0, 1) ** 2
    twist = max(0.035, 4 * canvas.pixel)
    strands = np.cos((u + v) * float(2 * np.pi / twist)) * 0.07
    sleeve = colour(*WIRES[part.kind.removeprefix("wire ")]) * (1 + (look.tone - 1) * np.float32(0.7))
    albedo = mix(sleeve, colour(0.72, 0.71, 0.69) * (1 + strands), bare) * (0.62 + 0.38 * round_)
    cover = canvas.cover(np.maximum(np.abs(v) - radius, np.abs(u) - part.width / 2))
    return Painted(albedo, cover, round_ * radius * np.float32(0.34 / canvas.pixel), 0.20 + 0.05 * bare)


for _name in WIRES:
    component(f"wire {_name}")(_wire)
