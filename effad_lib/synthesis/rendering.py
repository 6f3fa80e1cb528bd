"""From names and a seed to one image with its mask and its good twin."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real

import numpy as np

from effad_lib.images import SMALLEST, check_size
from effad_lib.settings import nearest
from effad_lib.synthesis.defects import DEFECTS, Defect
from effad_lib.synthesis.photographs import Photograph, SecondExposure, photograph
from effad_lib.synthesis.products import PRODUCTS
from effad_lib.synthesis.scene import REACH, Camera, Canvas, Item, Scene, SynthesisError, Window

# A pixel belongs to the mask where a defect changes any colour channel by more than this, before noise.
TOLERANCE = 2 / 255


@dataclass(frozen=True)
class SyntheticImage:
    """One rendered image: `image` uint8 [H, W, 3], `mask` bool [H, W], `good_twin` the same shot without the defect.

    Outside the mask, image and twin are equal bit for bit; a good image has an empty mask and is its own twin.
    """

    image: np.ndarray
    mask: np.ndarray
    good_twin: np.ndarray
    product: str
    defect: str
    seed: int


def product_names() -> list[str]:
    """The names of all products."""
    return sorted(PRODUCTS)


def defect_names(product: str) -> list[str]:
    """The names of the defects that a product can have, logical ones last; SynthesisError for an unknown product."""
    check_product(product)
    able = [name for name, defect in DEFECTS.items() if _can_have(PRODUCTS[product], defect)]
    return sorted(able, key=lambda name: DEFECTS[name].logical)


def photograph_defects(picture: np.ndarray) -> list[str]:
    """The names of the defects that `damage` can put on a photograph: an edge breaks only where there is one."""
    return _able(_checked_photograph(picture))


def _able(item: Item) -> list[str]:
    return [name for name, defect in DEFECTS.items() if defect.needs(item)]


def _checked_photograph(picture: np.ndarray) -> Photograph:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        got = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise SynthesisError(f"the photograph is {got}; it must be an array uint8 [H, W, 3].")
    check_size(picture.shape[:2])
    return photograph(picture)


@cache
def _can_have(draw: Callable, defect: Defect) -> bool:
    return defect.needs(_specimen(draw))


@cache
def _specimen(draw: Callable) -> Item:
    return draw(Canvas(SMALLEST, SMALLEST), np.random.default_rng(0))


def render(
    product: str,
    defect: str = "good",
    *,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
    severity: float = 1.0,
) -> SyntheticImage:
    """Render one image of a product, good or with a defect, with its exact mask.

    `size` is (height, width) in pixels, each at least 64. `severity` in (0, 1] goes from invisible (the mask may then
    be empty) to obvious; place and shape follow from `seed` and `size`, holes and chips also grow. The mask is True
    where the defect changes a colour channel by more than `TOLERANCE` before noise; that of parts out of place covers
    their old and their new place.
    The good twin equals `render(product, size=size, seed=seed).image`. Raises `SynthesisError` or, for a size,
    `ImageError`.
    """
    check_product(product)
    if defect != "good":
        check_name("defect", defect, ["good", *defect_names(product)], f" of {product}")
    size = check_size(size)
    check_severity(severity)
    check_seed(seed)

    canvas = Canvas(*size)
    piece, shot, damage = _streams(seed)
    item = PRODUCTS[product](canvas, piece)
    image, mask, twin = _shoot(item, Camera(canvas, shot), defect, damage, severity)
    return SyntheticImage(image, mask, twin, product, defect, int(seed))


def damage(picture: np.ndarray, defect: str, *, seed: int = 0, severity: float = 1.0) -> SyntheticImage:
    """Put a defect on a good photograph, uint8 [H, W, 3] of at least 64 pixels a side, with its exact mask.

    The defects are those of `photograph_defects`; `severity` and mask as in `render`. The good twin is the photograph
    itself. Defects lie on what stands out from an even ground, or anywhere.
    Raises `SynthesisError` or, for a size, `ImageError`.
    """
    item = _checked_photograph(picture)
    check_name("defect", defect, _able(item), " of this photograph")
    check_severity(severity)
    check_seed(seed)
    _, shot, change = _streams(seed)
    image, mask, twin = _shoot(item, SecondExposure(item, shot), defect, change, severity)
    return SyntheticImage(image, mask, twin, "photograph", defect, int(seed))


def _streams(seed: int) -> list[np.random.Generator]:
    """Separate streams of chance for the piece, the shot and the defect."""
    return [np.random.default_rng(child) for child in np.random.SeedSequence(int(seed)).spawn(3)]


def _shoot(
    item: Item, camera: Camera, defect: str, rng: np.random.Generator, severity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image uint8 [H, W, 3], mask bool [H, W] and good twin of an item seen by a camera."""
    good = camera.expose(item.scene)
    twin = camera.develop(good)
    mask = np.zeros(item.canvas.shape, bool)
    if defect == "good":
        return twin, mask, twin
    scene = DEFECTS[defect].apply(item, rng, float(severity))
    inner, outer = _windows(item.scene, scene)
    cut = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    bad = camera.expose(scene, outer)[:, *cut]
    mask[inner] = np.abs(bad - good[:, *inner]).max(axis=0) > TOLERANCE
    if scene.claimed is not None and mask.any():
        mask |= scene.claimed
    image = twin.copy()
    np.copyto(image[inner], camera.develop(bad, inner), where=mask[inner][..., None])
    return image, mask, twin


def _windows(good: Scene, bad: Scene) -> tuple[Window, Window]:
    """The window in which two scenes look different, and the larger one that has to be exposed to see it."""
    changed = np.zeros(good.height.shape, bool)
    for before, after in ((good.albedo, bad.albedo), (good.height, bad.height), (good.gloss, bad.gloss)):
        if before is not after:
            changed |= (before != after).reshape(-1, *changed.shape).any(axis=0)
    inner, outer = [], []
    for length, line in zip(changed.shape, (changed.any(axis=1), changed.any(axis=0)), strict=True):
        places = np.flatnonzero(line)
        first, last = (places[0], places[-1] + 1) if len(places) else (0, 1)
        for windows, margin in ((inner, REACH), (outer, 2 * REACH)):
            windows.append(slice(max(0, first - margin), min(length, last + margin)))
    return tuple(inner), tuple(outer)


def check_name(what: str, name: str, known: Iterable[str], of: str = "") -> None:
    """Raise SynthesisError, naming the nearest known name, unless `name` is known."""
    known = list(known)
    if name not in known:
        raise SynthesisError(f"unknown {what} {name!r}{of}: {nearest(name, known)}")


def check_product(product: str) -> None:
    """Raise SynthesisError unless there is such a product; the message lists the known ones."""
    check_name("product", product, PRODUCTS)


def check_severity(severity: float) -> None:
    """Raise SynthesisError unless 0 < severity <= 1."""
    if not isinstance(severity, Real) or not 0 < severity <= 1:
        raise SynthesisError(f"severity is {severity!r}; it must be above 0 (invisible) and at most 1 (obvious).")


def check_seed(seed: int) -> None:
    """Raise SynthesisError unless `seed` is a whole number of at least 0."""
    if not isinstance(seed, Integral) or seed < 0:
        raise SynthesisError(f"seed is {seed!r}; it must be a whole number of at least 0.")
