"""Image files in: found, read, checked, resized, as arrays; without torch, as exported models run without it."""

from __future__ import annotations

import errno
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from effad_lib.documents import is_text

Size = tuple[int, int]
"""Height and width in pixels."""

Levels = tuple[float, float]
"""Of a 16-bit grey image the values that become black (0) and white (255), linear in between, cut off beyond."""

ALL_LEVELS: Levels = (0, 65535)
"""For where only an image's shape counts."""

SMALLEST = 64
"""The smallest image side in pixels that the autoencoder's encoder can reduce to one cell."""

LARGEST = 16_384
"""The largest side in pixels that images can be brought to: the teacher's features of such a square are 26 GB."""

MOST_PIXELS = LARGEST**2
"""An image of more pixels is refused before it is decoded: reading this many takes 3 GB.

Pillow's own limit is lower than what line cameras take. This one takes its place, as what is hidden inside a file, such
as the tiles of a TIFF, is known to Pillow alone."""

Image.MAX_IMAGE_PIXELS = MOST_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of what is refused by name, see `_opened`

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""Pillow's names of the formats that are tried, whatever a file is called: of others it knows some start programs, such
as Ghostscript for PostScript."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Pillow's modes that become RGB without a guess."""

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of grey images that are read with `Levels`."""

DEEPEST = 100
"""So many folders may lie in each other below a folder of images: Python's own functions give up at some hundreds."""


class ImageError(ValueError):
    """An image, a mask or a folder of images that cannot be used; the message names the file and the remedy."""


class UnreachableError(ImageError):
    """An image that the system does not let us read: no right to it, a disk or a share that fails; it may be sound."""


PASSING = frozenset(
    {errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
)
"""Numbers of the system's errors that say nothing of the file itself."""


def check_size(size: Sequence[int]) -> Size:
    """Return `size` as (height, width). Raises `ImageError` unless both are whole numbers of 64 to 16,384 pixels."""
    pair = tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(length, Integral) and SMALLEST <= length <= LARGEST for length in pair):
        raise ImageError(
            f"image size {size!r}: takes height and width, whole numbers of at least {SMALLEST} pixels and at most "
            f"{LARGEST:,}."
        )
    return int(pair[0]), int(pair[1])


def find_images(folder: str | Path, results: Path | None = None) -> list[Path]:
    """Return the image files below `folder`, sorted; links that lead out of it and what is in `results` are left out.

    Raises `ImageError` if the folder is missing or holds no image, and as `image_entries`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder. Give a folder of images ({', '.join(sorted(SUFFIXES))}).")
    found = [Path(entry.path) for entry in image_entries(folder, results)]
    if not found:
        but = f" but the results in {results}" if results and results.is_dir() else ""
        raise ImageError(f"{folder}: no image below this folder{but}. Known endings: {', '.join(sorted(SUFFIXES))}.")
    return found


def _refuse(error: ImageError) -> None:
    raise error


def image_entries(
    folder: Path, results: Path | None = None, refuse: Callable[[ImageError], None] = _refuse
) -> Iterator[os.DirEntry[str]]:
    """Yield the image files below a folder in the order of their names: a million of them in seconds.

    Only links are looked up: those that lead out of the folder, into the folder `results` or nowhere are left out, as
    is all that lies in `results`, and a folder that is taken away meanwhile. `refuse` gets an `ImageError` for a folder
    that cannot be listed or lies more than `DEEPEST` folders deep and for a name that is no text, which no table could
    hold: it raises it, or they are left out.
    """
    root, apart = folder.resolve(), results and results.resolve()
    if apart and root.is_relative_to(apart):
        return
    hidden = str(folder / apart.relative_to(root)) if apart and apart.is_relative_to(root) else ""

    def below(here: str, depth: int = 0) -> Iterator[os.DirEntry[str]]:
        if depth > DEEPEST:
            refuse(ImageError(f"{here}: folders are more than {DEEPEST} deep in each other. Move their images up."))
            return
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            if here == str(folder) or not isinstance(error, FileNotFoundError):
                remedy = "Mend its permissions." if isinstance(error, PermissionError) else "Bring it back."
                remedy = "Shorten its path." if error.errno == errno.ENAMETOOLONG else remedy
                refuse(ImageError(f"{here}: the folder cannot be listed ({error.strerror}). {remedy}"))
            return
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith(".") or entry.path == hidden:
                continue
            if not is_folder and not (os.path.splitext(entry.name)[1].lower() in SUFFIXES and _is_file(entry)):
                continue
            if not is_text(entry.name):
                refuse(not_text(entry.path, "folder" if is_folder else "file"))
            elif is_folder:
                yield from below(entry.path, depth + 1)
            elif not entry.is_symlink() or _is_inside(entry.path, root, apart):
                yield entry

    yield from below(str(folder))


def not_text(path: str | Path, kind: str = "file") -> ImageError:
    """Return what to say of a file or folder whose own name is no text."""
    path = Path(path)
    return ImageError(f"{path.parent}: the name {os.fsencode(path.name)} is not UTF-8. Rename the {kind}.")


def _is_inside(link: str, root: Path, apart: Path | None) -> bool:
    target = Path(link).resolve()
    return target.is_relative_to(root) and not (apart and target.is_relative_to(apart))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False


def check_levels(levels: Sequence[float]) -> Levels | None:
    """Return levels as a pair, None for none. Raises `ImageError` unless they are two values, the first the lower."""
    if len(levels) and not (len(levels) == 2 and -math.inf < levels[0] < levels[1] < math.inf):
        raise ImageError(f"levels {list(levels)}: takes the values of black and of white, the first the lower one.")
    return (float(levels[0]), float(levels[1])) if len(levels) else None


def read_image(path: str | Path, size: Size | None = None, levels: Levels | None = None) -> np.ndarray:
    """Read an image as RGB, upright by its EXIF tag, and resize it to `size` (antialiased bilinear).

    Returns uint8 [3, H, W]. Eight-bit grey, palette and transparent images become RGB, the three channels of grey ones
    equal; 16-bit grey ones are brought to 8 bits by `levels` first. Raises `ImageError` for files that cannot be
    decoded, for more than `MOST_PIXELS`, for 16-bit colour, float and CMYK images, 16-bit grey without `levels` and
    several images in one file, whose conversion would be a guess, and, where a `size` is given, for sides below 64
    pixels: enlarging would invent what the networks are to judge.
    """
    with _opened(path, "an image", (*MODES, *SIXTEEN_BITS) if levels else MODES) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in SIXTEEN_BITS:
            low, high = levels
            share = (np.asarray(image, dtype=float) - low) / (high - low)
            pixels = np.repeat(np.rint(255 * share.clip(0, 1)).astype(np.uint8)[None], 3, axis=0)
        else:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)
    try:
        return pixels if size is None else fitted(pixels, size)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None


def fitted(image: np.ndarray, size: Size | None) -> np.ndarray:
    """Return an image uint8 [3, H, W] resized to `size`, antialiased bilinear; None leaves its size.

    Raises `ImageError` for sides below 64 pixels: enlarging would invent what the networks are to judge.
    """
    height, width = image.shape[1:]
    if min(height, width) < SMALLEST:
        raise ImageError(f"{width}×{height} pixels are too small; each side takes {SMALLEST} or more.")
    if size is None or (height, width) == tuple(size):
        return image
    picture = Image.fromarray(image.transpose(1, 2, 0))
    return np.array(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def image_size(path: str | Path, levels: Levels | None = None) -> Size:
    """Return height and width of an image as `read_image` reads it, upright by its EXIF tag, without decoding it.

    Raises `ImageError` if it is no image, or of a mode that `read_image` refuses.
    """
    with _opened(path, "an image", (*MODES, *SIXTEEN_BITS) if levels else MODES) as image:
        tags = Image.Image.getexif(image)  # PNG's own looks behind the pixels too, and decodes them for it
        lies = tags.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if lies else (image.height, image.width)


@contextmanager
def _opened(path: str | Path, what: str, modes: tuple[str, ...] = MODES) -> Iterator[Image.Image]:
    """Yield an image file of a supported mode, opened; what fails in opening or decoding it is an `ImageError`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _too_many(path, f"{image.width:,}×{image.height:,}")
            _check_mode(path, what, image, modes)
            # Not their number, as counting 20,000 in a TIFF takes seconds. An MPO is a telephone's JPEG with previews.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ImageError(f"{path}: holds several images where one is expected. Save the right one alone.")
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # with nothing but its text to tell the number by
        raise _too_many(path, f"{int(re.search('[0-9]+', str(error))[0]):,}") from error
    except MemoryError as error:
        raise ImageError(f"{path}: not enough memory to read it. Cut it into several images.") from error
    except Exception as error:  # of a broken file Pillow raises whatever its parsing runs into
        kind = UnreachableError if getattr(error, "errno", None) in PASSING else ImageError
        raise kind(f"{path}: cannot be read as {what} ({error}). Replace or remove the file.") from error


def _too_many(path: str | Path, pixels: str) -> ImageError:
    return ImageError(f"{path}: {pixels} pixels, at most {MOST_PIXELS:,} are read. Cut it into several images.")


def _check_mode(path: str | Path, what: str, image: Image.Image, modes: tuple[str, ...]) -> None:
    """Raise `ImageError` for modes whose conversion would be a guess, 16 bits a channel that Pillow hides included."""
    grey = image.mode in SIXTEEN_BITS
    raw = " ".join(str(argument) for tile in image.tile for argument in tile[1:])
    mode = "16 bits a channel" if ";16" in raw and not grey else image.mode
    if mode not in modes:
        said, remedy = f"{path}: image mode {mode} is not supported", "save it as 8-bit RGB or 8-bit grey first."
        if grey and what == "an image":
            levels = "`effad train` takes it with the values of black and white, such as --levels 0 4095."
            raise ImageError(f"{said} as it is. {levels} Else {remedy}")
        raise ImageError(f"{said}. S{remedy[1:]}")


def read_mask(path: str | Path, shape: Size | None = None, level: int = 128) -> np.ndarray:
    """Read a defect mask: True where the value is at least `level`, half of full scale where halos do not count.

    `path` is a file, or a folder of masks of one image, whose union it is. Returns bool [H, W]. Raises `ImageError` as
    `read_regions`.
    """
    return (read_regions(path, shape) >= level).any(axis=0)


def read_regions(path: str | Path, shape: Size | None = None) -> np.ndarray:
    """Read the masks of one image with their values: a file, or all below a folder in the order of their names.

    Returns uint8 [R, H, W], upright by their EXIF tags, palette and colour masks by their luma. Raises `ImageError` if
    one cannot be read or is not of `shape`, or if they differ in size.
    """
    files = find_images(path) if Path(path).is_dir() else [path]
    regions = []
    for file in files:
        with _opened(file, "a mask", tuple(mode for mode in MODES if mode != "PA")) as image:
            ImageOps.exif_transpose(image, in_place=True)  # as its image is
            regions.append(np.asarray(image.convert("L")))
        shape = shape or regions[0].shape
        if regions[-1].shape != tuple(shape):
            got = regions[-1].shape
            raise ImageError(f"{file}: mask of {got}, its image has {tuple(shape)}. A mask must match its image.")
    return np.stack(regions)
