"""Large images in tiles of the model's size that overlap; every tile's map on the model's one scale, blended."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from effad_lib.engines import Inspection, Inspector
from effad_lib.reading import ImageError
from effad_lib.settings import SettingsError

BLIND = 18
"""So many pixels along the border of a tile have no valid value of their own: no cell of the map has its 33×33 pixels
there, or only with zeros around them."""

STRIDE = 4
"""Tiles start at multiples of the cells' distance, so that the cells of all tiles lie on one grid."""

TILES_AT_ONCE = 8


def check_overlap(detector: Inspector, overlap: int) -> None:
    """Raise `SettingsError` for tiles that would leave gaps or never end, or for a model that cannot take tiles."""
    tile = detector.image_size
    if detector.input_size not in (None, tile):
        taken = "{}×{}".format(*detector.input_size)
        raise SettingsError(
            f"takes images of {taken} only, no tiles of {tile[0]}×{tile[1]}. Export it without --image-size."
        )
    least, most = 2 * BLIND + STRIDE, min(tile) - STRIDE
    if most < least:
        raise SettingsError(
            f"tiles of {tile[0]}×{tile[1]} are too small to overlap: {least + STRIDE} pixels a side are needed."
        )
    if not least <= overlap <= most:
        raise SettingsError(
            f"tile overlap = {overlap}: takes {least} to {most} pixels with tiles of {tile[0]}×{tile[1]}; the outer "
            f"{BLIND} pixels of a tile are not used."
        )


def check_threshold(detector: Inspector, overlap: int | None) -> None:
    """Warn if a threshold was chosen on images that are not in such tiles as those to come; None for whole images."""
    chosen = detector.calibration.get("tile_overlap")
    if chosen == overlap:
        return
    on = "whole images" if chosen is None else f"images in tiles that overlap by {chosen} pixels"
    used = "whole ones" if overlap is None else f"tiles that overlap by {overlap}"
    option = "" if overlap is None else f" --tile-overlap {overlap}"
    warnings.warn(
        f"the threshold was chosen on {on} and is used for {used}: the more tiles, the higher is the highest score of "
        f"a good image. Choose one for these, and export it anew: effad threshold MODEL --normals FOLDER{option}.",
        stacklevel=4,
    )


def inspect_tiles(detector: Inspector, image: np.ndarray, overlap: int) -> Inspection:
    """Return maps and score of one image uint8 [3, H, W] at its own resolution, from tiles of the model's size.

    Tiles overlap by at least `overlap` pixels, in which one fades into the other; the outer 18 pixels of a tile count
    only at the image's own border. The score is the largest value of the blended combined map. The student–teacher map
    is that of the whole image, as that branch sees 33×33 pixels; the student–autoencoder map is not, as the autoencoder
    sees a tile at a time. Raises `ImageError` for an image smaller than a tile.
    """
    size, tile = image.shape[1:], detector.image_size
    if any(have < need for have, need in zip(size, tile, strict=True)):
        raise ImageError(
            f"{size[0]}×{size[1]} pixels are less than a tile of {tile[0]}×{tile[1]}. Leave it out, or take it whole, "
            f"without --tile-overlap."
        )
    corners = [(y, x) for y in places(size[0], tile[0], overlap) for x in places(size[1], tile[1], overlap)]
    total, weight = np.zeros((3, *size), np.float32), np.zeros(size, np.float32)
    for start in range(0, len(corners), TILES_AT_ONCE):
        some = corners[start : start + TILES_AT_ONCE]
        cut = np.stack([image[:, y : y + tile[0], x : x + tile[1]] for y, x in some])
        found = detector.inspect(cut)
        for (y, x), *maps in zip(some, *found[:3], strict=True):
            window = np.s_[y : y + tile[0], x : x + tile[1]]
            down = _fade(y, tile[0], size[0], overlap)
            share = down[:, None] * _fade(x, tile[1], size[1], overlap)
            total[:, *window] += np.stack(maps) * share
            weight[window] += share
    total /= weight
    return Inspection(*total[:, None], total[0].max(keepdims=True)[0])


def places(length: int, tile: int, overlap: int) -> Iterator[int]:
    """Yield where tiles start along a side: at multiples of 4, the last one flush with the end."""
    step = (tile - overlap) // STRIDE * STRIDE
    yield from range(0, length - tile, step)
    yield length - tile


def _fade(start: int, tile: int, length: int, overlap: int) -> np.ndarray:
    """Return a tile's weights along a side, float32 [tile]: from 0 at its blind rim up to 1 where the overlap ends."""
    place = np.arange(tile) + 0.5
    ramp = overlap - 2 * BLIND
    weights = np.ones(tile)
    if start > 0:
        weights = np.clip((place - BLIND) / ramp, 0, 1)
    if start + tile < length:
        weights = np.minimum(weights, np.clip((tile - place - BLIND) / ramp, 0, 1))
    return weights.astype(np.float32)
