"""The register of products, and what they share: how a piece comes to lie, how its parts are placed.

A product is a function that draws one piece, `(canvas, rng) -> Item`, registered by name.
"""

from collections.abc import Callable
from dataclasses import replace

from numpy.random import Generator

from effad_lib.synthesis.scene import Canvas, Item, Part, Pose

PRODUCTS: dict[str, Callable[[Canvas, Generator], Item]] = {}


def product(name: str) -> Callable:
    """Register a product: a function `(canvas, rng) -> Item` that draws all its chance before `paint` is called."""

    def enter(draw: Callable[[Canvas, Generator], Item]) -> Callable[[Canvas, Generator], Item]:
        PRODUCTS[name] = draw
        return draw

    return enter


def lay(rng: Generator, canvas: Canvas, turn: float, shift: float = 0.02) -> Pose:
    """How a piece comes to lie under the camera: shifted, turned by up to `turn` radians, nearer or farther."""
    x, y = rng.uniform(-shift, shift, 2)
    return Pose(float(x), float(y), float(rng.uniform(-turn, turn)), float(rng.normal(1, 0.006)))


def jitter(parts: tuple[Part, ...], rng: Generator, shift: float, turn: float) -> tuple[Part, ...]:
    """Placement tolerances: every part a little off its place and a little turned (standard deviations)."""
    moves = rng.normal(0, 1, (len(parts), 3)) * (shift, shift, turn)
    return tuple(
        replace(part, x=part.x + dx, y=part.y + dy, angle=part.angle + turned)
        for part, (dx, dy, turned) in zip(parts, moves.tolist(), strict=True)
    )
