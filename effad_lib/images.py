"""Images as tensors: loaded from files; the colour augmentation; natural images for the penalty and the teacher."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from effad_lib.progress import progress
from effad_lib.reading import (
    ALL_LEVELS,
    SMALLEST,
    SUFFIXES,
    ImageError,
    Levels,
    Size,
    check_levels,
    check_size,
    find_images,
    image_size,
    read_image,
    read_mask,
    read_regions,
)

__all__ = [
    "ALL_LEVELS",
    "SMALLEST",
    "SUFFIXES",
    "ImageError",
    "Levels",
    "NaturalImages",
    "Size",
    "augment_colour",
    "change_colour",
    "check_levels",
    "check_size",
    "draw_colours",
    "find_images",
    "image_size",
    "load_images",
    "packaged_photographs",
    "read_image",
    "read_mask",
    "read_regions",
    "to_float",
    "to_grey",
]

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Luma of ITU-R BT.601, the grey of torchvision's transforms."""


def load_images(
    paths: Sequence[str | Path], size: Size, *, levels: Levels | None = None, description: str = "reading images"
) -> Tensor:
    """Decode images once, in parallel, into memory; `levels` as in `read_image`.

    Returns uint8 [N, 3, H, W], in the order of `paths`. Raises `ImageError` for the first that cannot be read.
    """
    size = check_size(size)
    images = torch.empty((len(paths), 3, *size), dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = torch.from_numpy(read_image(paths[index], size, levels))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in progress(pool.map(read, range(len(paths))), total=len(paths), desc=description, leave=False):
            pass
    return images


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def augment_colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change each image by exactly one of brightness, contrast and saturation, by a factor from U(0.8, 1.2).

    `images` float [N, 3, H, W] in [0, 1]; `generator` lives on the CPU. Returns the same shape and range. Algorithm 1.
    """
    return change_colour(images, *draw_colours(len(images), generator))


def draw_colours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for `count` images which of the three changes is made, int64 [count], and its factor, float32 [count]."""
    kinds = torch.randint(3, (count,), generator=generator)
    return kinds, torch.empty(count).uniform_(0.8, 1.2, generator=generator)


def change_colour(images: Tensor, kinds: Tensor, factors: Tensor) -> Tensor:
    """Make the changes that `draw_colours` drew, on the images' device: brightness (0), contrast (1), saturation (2).

    Each of the three blends an image [3, H, W] with another picture of it: black, its mean grey, its own grey.
    """
    grey = to_grey(images)
    contrast, saturation = ((kinds == kind).view(-1, 1, 1, 1) for kind in (1, 2))
    other = grey.mean(dim=(1, 2, 3), keepdim=True) * contrast + grey * saturation
    return torch.lerp(other, images, factors.to(images.dtype).view(-1, 1, 1, 1)).clamp_(0, 1)


def to_grey(images: Tensor) -> Tensor:
    """Return the luma of images [..., 3, H, W] as [..., 1, H, W]."""
    red, green, blue = (weight * colour for weight, colour in zip(GREY_WEIGHTS, images.split(1, dim=-3), strict=True))
    return red + green + blue


def packaged_photographs() -> list[Path]:
    """Return the colour photographs that come inside the installed scikit-image and scikit-learn packages.

    The stand-in for ImageNet when no folder of natural images is at hand: about ten pictures, always there.
    """
    names = {
        "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg"),
        "sklearn": ("china.jpg", "flower.jpg"),
    }
    names["skimage"] += ("motorcycle_left.png", "retina.jpg", "brick.png", "grass.png", "gravel.png", "camera.png")
    folders = {"skimage": "data", "sklearn": "datasets/images"}
    found = []
    for package, files in names.items():
        root = Path(util.find_spec(package).origin).parent / folders[package]
        found += [root / name for name in files if (root / name).is_file()]
    if not found:
        raise ImageError("no photographs inside the installed packages. Name a folder of natural images instead.")
    return found


def names_sha256(photographs: Iterable[Path], folder: str | Path = "") -> str:
    """Return a SHA-256 of the names of photographs below a folder, of their files' alone for "".

    It tells one collection from another: to read all of ImageNet for that would take too long.
    """
    names = (str(path.relative_to(folder)) if str(folder) else path.name for path in photographs)
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


class NaturalImages:
    """Random views of natural photographs: the penalty's images in training, the teacher's in distillation.

    `folder` holds any photographs (ImageNet in the paper); "" takes the few inside the installed packages. Files are
    decoded at first use and kept while they fit in `memory_gb`. Unreadable files are left out and listed in `.skipped`,
    by index. With `workers` the views of a batch are made in as many threads.
    """

    def __init__(
        self, folder: str | Path = "", *, memory_gb: float = 2.0, longest_side: int = 640, workers: int = 0
    ) -> None:
        self.paths = find_images(folder) if str(folder) else packaged_photographs()
        self.skipped: dict[int, str] = {}
        self._kept: dict[Path, Tensor] = {}
        self._room = int(memory_gb * 2**30)
        self._longest_side = longest_side
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, indices: Iterable[int]) -> NaturalImages:
        """Return the photographs of these indices as a collection of its own."""
        part = copy.copy(self)
        part.paths = [self.paths[index] for index in indices]
        part.skipped, part._kept = {}, {}
        return part

    def check(self) -> None:
        """Raise `ImageError` if no photograph can be read, before the work that needs them."""
        self._readable(0)

    def read(self, index: int) -> Tensor:
        """Return photograph `index` as uint8 [3, H, W], its longest side at most `longest_side` pixels."""
        path = self.paths[index]
        if path in self._kept:
            return self._kept[path]
        image = torch.from_numpy(read_image(path))
        shrink = self._longest_side / max(image.shape[-2:])
        if shrink < 1:
            image = _resize(image, [max(1, round(side * shrink)) for side in image.shape[-2:]])
        if image.numel() <= self._room:
            self._room -= image.numel()
            self._kept[path] = image
        return image

    def sample(
        self,
        count: int,
        size: Size,
        generator: torch.Generator,
        *,
        grayscale: float = 0.3,
        zoom: float = 2.0,
        crop_scale: tuple[float, float] | None = None,
    ) -> Tensor:
        """Draw `count` views as float32 [count, 3, H, W] in [0, 1].

        Without `crop_scale`: the photograph resized to `zoom` times `size`, then its centre; 2 as in Algorithm 1, 1 as
        in Algorithm 3. With it: a random region that covers this share of the photograph's area, mirrored half of the
        time, which makes more of a small collection.
        `grayscale` is the probability of a grey view. Raises `ImageError` if no photograph can be read.
        """
        drawn = self.draw(count, generator)
        return self.views(drawn, size, grayscale=grayscale, zoom=zoom, crop_scale=crop_scale)

    def draw(self, count: int, generator: torch.Generator) -> list[tuple[int, list[float]]]:
        """Draw which photograph each of `count` views is of, and the numbers that say how it is seen.

        Processes with equal generators may divide a batch: all draw all of it, and each makes a part of the `views`.
        """
        return [
            (int(torch.randint(len(self.paths), (), generator=generator)), torch.rand(6, generator=generator).tolist())
            for _ in range(count)
        ]

    def views(
        self,
        drawn: Iterable[tuple[int, list[float]]],
        size: Size,
        *,
        grayscale: float = 0.3,
        zoom: float = 2.0,
        crop_scale: tuple[float, float] | None = None,
    ) -> Tensor:
        """Make the views that `draw` drew, as `sample` does; nothing is drawn, so several threads may."""

        def view(draw: tuple[int, list[float]]) -> Tensor:
            index, numbers = draw
            photograph = self._readable(index)
            cut = _crop(photograph, size, crop_scale, numbers) if crop_scale else _centre(photograph, size, zoom)
            cut = to_float(cut)
            return to_grey(cut).expand_as(cut) if numbers[0] < grayscale else cut

        return torch.stack(list((self._pool.map if self._pool else map)(view, drawn)))

    def _readable(self, index: int) -> Tensor:
        """Return photograph `index` or, if it cannot be read, the next one that can: the draws stay the same."""
        for near in (*range(index, len(self.paths)), *range(index)):
            if near in self.skipped:
                continue
            try:
                return self.read(near)
            except ImageError as error:
                self.skipped[near] = str(error)
                warnings.warn(f"natural image left out: {error}", stacklevel=3)
        last = next(reversed(self.skipped.values()))
        raise ImageError(f"none of the natural images can be read; the last one: {last}")


def _centre(photograph: Tensor, size: Size, zoom: float) -> Tensor:
    resized = _resize(photograph, [round(zoom * side) for side in size])
    top, left = (round((have - want) / 2) for have, want in zip(resized.shape[-2:], size, strict=True))
    return resized[:, top : top + size[0], left : left + size[1]]


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Return an image uint8 [3, H, W] at another size, antialiased bilinear."""
    return F.interpolate(image[None], tuple(size), mode="bilinear", antialias=True)[0]


def _crop(photograph: Tensor, size: Size, scale: tuple[float, float], numbers: list[float]) -> Tensor:
    """Cut a region of the wanted area, its aspect within 3:4 and 4:3 of the output's; resize and maybe mirror it."""
    _, share, aspect, top, left, mirror = numbers
    height, width = photograph.shape[-2:]
    area = height * width * (scale[0] + share * (scale[1] - scale[0]))
    ratio = size[1] / size[0] * (3 / 4) ** (1 - 2 * aspect)
    cut_h = min(height, max(1, round((area / ratio) ** 0.5)))
    cut_w = min(width, max(1, round((area * ratio) ** 0.5)))
    y, x = round(top * (height - cut_h)), round(left * (width - cut_w))
    view = _resize(photograph[:, y : y + cut_h, x : x + cut_w], size)
    return view.flip(-1) if mirror < 0.5 else view
