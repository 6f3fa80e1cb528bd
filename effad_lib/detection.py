"""A trained detector on new images: for each a picture, a score and a decision; one bad file does not stop the rest."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
from PIL import Image

from effad_lib.documents import is_text
from effad_lib.engines import RUNTIMES, Inspection, Inspector, load_exported
from effad_lib.memory import kept_memory, ran_out
from effad_lib.progress import progress, say
from effad_lib.reading import ImageError, Size, find_images, fitted, not_text, read_image, read_mask
from effad_lib.runs import (
    COLUMNS,
    BadNameError,
    RunError,
    check_writable,
    finish_step_on_interrupt,
    printable,
    within,
    write_bytes,
    write_csv,
)
from effad_lib.settings import SettingsError, check_threads, nearest
from effad_lib.tiling import check_overlap, check_threshold, inspect_tiles

NO_PIXEL_THRESHOLD = "this model has no pixel threshold: choose one, `effad threshold MODEL --normals FOLDER`."

SQUEEZED = 1.05
"""An image whose width, in heights, differs by more than this factor from those of the training is warned of."""

HEATMAPS = ("all", "defective", "none")
"""Of which images a heatmap is drawn, which takes several times as long as judging one."""


@dataclass(frozen=True)
class Wanted:
    """What is to be done with each image, see `detect`."""

    heatmaps: str = "all"
    save_maps: bool = False
    save_masks: bool = False
    tile_overlap: int | None = None

    def check(self, detector: Inspector) -> None:
        """Raise `SettingsError` for what a detector cannot do; warnings say what is amiss with its thresholds."""
        if detector.threshold is None:
            raise SettingsError("this model has no threshold: calibrate it on held-out good images first.")
        if self.heatmaps not in HEATMAPS:
            raise SettingsError(f"heatmaps = {self.heatmaps!r}: {nearest(self.heatmaps, HEATMAPS)}")
        if self.heatmaps != "none":
            _plots()
        if self.save_masks and detector.pixel_threshold is None:
            raise SettingsError(NO_PIXEL_THRESHOLD)
        if self.tile_overlap is not None:
            check_overlap(detector, self.tile_overlap)
        check_threshold(detector, self.tile_overlap)
        if detector.pixel_threshold is None:
            warnings.warn(f"no pixels are marked: {NO_PIXEL_THRESHOLD}", stacklevel=3)


WATCH_LOCK = "watch.lock"
"""In the results of a watched folder, and in no others: who watches, or did last."""


def open_model(path: str | Path, device: str = "auto", threads: int = 0) -> Inspector:
    """Load a `model.safetensors`, or what `effad export` made of one, for which torch is not needed.

    It takes so many threads of the CPU; 0 leaves that to torch or the runtime. Raises `SettingsError` for fewer than 0,
    and as `EfficientAD.load` and `load_exported`.
    """
    path = Path(path)
    check_threads(threads)
    if path.suffix in RUNTIMES:
        return load_exported(path, device, threads)
    try:
        import torch

        from effad_lib.detector import EfficientAD
        from effad_lib.settings import pick_device
    except ImportError as error:
        raise SettingsError(
            f"model {path}: needs torch, which is not installed ({error}). Take an exported model, .onnx or .xml."
        ) from error
    if threads:
        torch.set_num_threads(threads)
    return EfficientAD.load(path, pick_device(device))


def detect(
    detector: Inspector,
    images: str | Path,
    out: str | Path,
    *,
    masks: str | Path | None = None,
    heatmaps: str = "all",
    save_maps: bool = False,
    save_masks: bool = False,
    tile_overlap: int | None = None,
) -> pd.DataFrame:
    """Run a detector over an image, or over all images below a folder, and write what it finds into the folder `out`.

    For an image `a/b.jpg` of the folder: `heatmaps/a/b.jpg.png` (image and heatmap, on one scale for all images, with
    the outline of its mask if `masks` has one, and of what is above the detector's pixel threshold; of all images, of
    the "defective" or of "none", for which no matplotlib is needed), with `save_maps`
    `maps/a/b.jpg.npy` (the combined anomaly map, float32 [H, W] at the image's own size) and with `save_masks`
    `masks/a/b.jpg.png` (255 above the pixel threshold, else 0). `scores.csv`, which is also returned, has a row for
    each file: score, threshold, decision ("good" or "defective": a score above the threshold), the share of pixels that
    is marked, missing for a model without pixel threshold (a warning says how to get one), or the error why it was left
    out.
    `masks` is a folder with `a/b_mask.png` or `a/b.png`, or for a single image its mask. Images are brought to the
    model's size, whatever their own; with `tile_overlap` they are cut into tiles that overlap by so many pixels, see
    `inspect_tiles`. One image is in memory at a time. Ctrl-C and SIGTERM let it finish its image; whatever stops it,
    `scores.csv` holds what was done.

    Raises `ImageError` if there is no image, `SettingsError` for a model without threshold, for one with broken maps,
    for `save_masks` without pixel threshold and for tiles that the model cannot take, `RunError` if nothing can be
    written or `out` is that of a watched folder.
    """
    wanted = Wanted(heatmaps, save_maps, save_masks, tile_overlap)
    wanted.check(detector)
    out = Path(out)
    if (out / WATCH_LOCK).exists():
        raise RunError(f"{out} holds the results of a watched folder. Choose another folder for these.")
    check_writable(out / "scores.csv")
    found = _listed(Path(images), out)
    truths = pair_masks(masks, list(found))
    rows = []
    try:
        with kept_memory(), finish_step_on_interrupt() as interrupted:
            for name, path in progress(found.items(), desc="detecting", unit="image"):
                if interrupted():
                    raise KeyboardInterrupt(f"stopped: {len(rows)} of {len(found)} images are done, see {out}")
                rows.append(_row(detector, path, name, out, truths.get(name), wanted))
    except BaseException:
        with contextlib.suppress(RunError):
            write_table(rows, out)
        raise
    return write_table(rows, out)


def _row(detector: Inspector, path: Path, name: Path, out: Path, truth: Path | None, wanted: Wanted) -> tuple:
    """Return an image's row of `scores.csv`; what keeps it from being judged is said and stands in it."""
    try:
        score, marked = detect_one(detector, path, name, out, truth, wanted)
    except ImageError as error:
        say(f"left out: {printable(error)}")
        return name.as_posix(), None, detector.threshold, "", None, printable(error)
    return name.as_posix(), score, detector.threshold, decision(detector, score), marked, ""


def _listed(images: Path, out: Path) -> dict[Path, Path]:
    """Return the files by the names that their results get: their paths below the folder."""
    if images.is_file():
        if not is_text(images.name):
            raise not_text(images)
        return {Path(images.name): images}
    if not images.is_dir():
        raise ImageError(f"{images}: there is no such image or folder.")
    # Results of an earlier call may lie below the same folder; they are no images to look at.
    return {path.relative_to(images): path for path in find_images(images, results=out)}


def pair_masks(masks: str | Path | None, names: list[Path]) -> dict[Path, Path]:
    """Return the masks by the names of their images, which are paths below the images' folder; {} without `masks`.

    `masks` is a folder with `a/b_mask.png` or `a/b.png` for an image `a/b.jpg`, or for a single image its mask. Raises
    `ImageError` if they belong to none of the images.
    """
    if masks is None:
        return {}
    masks = Path(masks)
    if masks.is_file():
        if len(names) > 1:
            raise ImageError(f"{masks}: one mask for {len(names)} images. Give a folder of masks.")
        return {names[0]: masks}
    files = {(path.parent, path.stem.removesuffix("_mask")): path for path in find_images(masks)}
    keys = {name: (masks / name.parent, name.stem.removesuffix("_mask")) for name in names}
    found = {name: files[key] for name, key in keys.items() if key in files}
    if not found:
        raise ImageError(
            f"{masks}: none of its {len(files)} masks belongs to an image. The mask of {names[0]} is expected at "
            f"{names[0].with_name(names[0].stem + '_mask.png')} below that folder."
        )
    return found


def decision(detector: Inspector, score: float) -> str:
    """Return "defective" for a score above the detector's threshold, else "good"."""
    return "defective" if score > detector.threshold else "good"


def detect_one(
    detector: Inspector, path: Path, name: Path, out: Path, truth: Path | None, wanted: Wanted
) -> tuple[float, float | None]:
    """Write the results of one image; return its score and the share of its pixels that is marked.

    Raises `ImageError` if it cannot be read or no results can have its name, and else as `detect`.
    """
    image = read_image(path, levels=detector.levels)
    if wanted.tile_overlap is None:
        _check_aspect(detector, image.shape[1:])
    mask = None if truth is None else read_mask(truth, image.shape[1:])
    try:
        found = inspect_one(detector, image, wanted.tile_overlap)
        heat, score = resize_map(found.combined[0], image.shape[1:]), float(found.score[0])
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except Exception as error:  # each runtime has classes of its own
        if not ran_out(error):
            raise
        size = "{}×{}".format(*image.shape[1:])
        raise ImageError(f"{path}: not enough memory for {size} pixels. Cut it into several images.") from error
    for what, values in (("map", heat), ("score", score)):  # an export computes them apart
        if not np.isfinite(values).all():
            raise SettingsError(
                f"the {what} of {path} is not finite: this model's training has diverged. Train it again."
            )
    if wanted.save_maps:
        packed = io.BytesIO()
        np.save(packed, heat, allow_pickle=False)
        _write(inside(out, "maps", f"{name}.npy"), packed.getvalue())
    marked = None if detector.pixel_threshold is None else heat > detector.pixel_threshold
    if wanted.save_masks:
        packed = io.BytesIO()
        Image.fromarray(marked.astype(np.uint8) * 255).save(packed, format="PNG")
        _write(inside(out, "masks", f"{name}.png"), packed.getvalue())
    picture = inside(out, "heatmaps", f"{name}.png")
    if wanted.heatmaps == "all" or (wanted.heatmaps == "defective" and decision(detector, score) == "defective"):
        _write(picture, _heatmap(detector, image, heat, mask, marked, f"{name.as_posix()}: score {score:.3g}"))
    elif os.path.isfile(picture):  # of another image of this name
        picture.unlink()
    return score, None if marked is None else float(marked.mean())


def _check_aspect(detector: Inspector, size: Size) -> None:
    """Warn, once for each size, of images that are squeezed into the model's size otherwise than those it learned from.

    Models made before cards had `aspects` are not checked.
    """
    low, high = detector.card.get("aspects", (0, math.inf))
    aspect = size[1] / size[0]
    if not low / SQUEEZED <= aspect <= high * SQUEEZED:
        there = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        warnings.warn(
            f"images of {size[1]}×{size[0]} pixels look otherwise than those of the training when all are brought to "
            f"{detector.image_size[1]}×{detector.image_size[0]}: their width is {aspect:.2f} of their height, there it "
            f"was {there}. Cut them to that shape, or train a model on such images.",
            stacklevel=1,
        )


def _heatmap(
    detector: Inspector,
    image: np.ndarray,
    heat: np.ndarray,
    mask: np.ndarray | None,
    marked: np.ndarray | None,
    title: str,
) -> bytes:
    """Return the picture of what was found on an image, as PNG."""
    plots = _plots()
    # Below 0.1, the 99.5 % quantile of normal pixels, a threshold would stretch mere noise over the whole scale.
    scale = plots.heat_scale([], max(detector.threshold, 0.1))
    figure = plots.heatmap_panel(
        image, heat, mask, scale=scale, threshold=detector.threshold, marked=marked, title=title
    )
    return plots.as_png(figure)


def _plots() -> ModuleType:
    try:
        from effad_lib import plots
    except ImportError as error:
        raise SettingsError(f"heatmaps need matplotlib ({error}): --heatmaps none goes without.") from error
    return plots


def _write(path: Path, data: bytes) -> None:
    """Write a result of one image; a name that no file can have there is a fault of that image alone."""
    try:
        write_bytes(path, data)
    except BadNameError as error:
        raise ImageError(str(error)) from error


def inspect_one(detector: Inspector, image: np.ndarray, tile_overlap: int | None = None) -> Inspection:
    """Return what a detector finds on an image uint8 [3, H, W], resized to the model's size, or with tiles as it is."""
    if tile_overlap is not None:
        return inspect_tiles(detector, image, tile_overlap)
    return detector.inspect(fitted(image, detector.input_size)[None])


def resize_map(heat: np.ndarray, size: Size) -> np.ndarray:
    """Return a map [h, w] at another size, float32, bilinear between the centres of pixels as torch does it."""
    for axis, side in enumerate(size):
        if (have := heat.shape[axis]) == side:
            continue
        place = np.maximum((np.arange(side) + 0.5) * (have / side) - 0.5, 0)
        low = place.astype(int)
        share = (place - low).astype(np.float32).reshape([-1, 1] if axis == 0 else [1, -1])
        high = np.minimum(low + 1, have - 1)
        heat = heat.take(low, axis) * (1 - share) + heat.take(high, axis) * share
    return heat


def inside(out: Path, kind: str, name: str) -> Path:
    """Return the path of a result; `ImageError` if a link in `out` would lead it elsewhere."""
    try:
        return within(out, f"{kind}/{name}")
    except RunError as error:
        raise ImageError(str(error)) from error


def write_table(rows: list[tuple], out: Path) -> pd.DataFrame:
    """Write `scores.csv` and return its rows, in which names are as they are and not as `write_csv` writes them."""
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"score": float, "threshold": float, "marked": float})
    write_csv(out / "scores.csv", table)
    return table
