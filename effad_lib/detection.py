"""A trained detector on new images: for each a picture, a score and a decision; one bad file does not stop the rest."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F

from effad_lib import plots
from effad_lib.detector import EfficientAD
from effad_lib.images import ImageError, find_images, read_image, read_mask, to_float
from effad_lib.progress import progress
from effad_lib.runs import write_bytes, write_text
from effad_lib.settings import SettingsError

NO_PIXEL_THRESHOLD = "this model has no pixel threshold: choose one, `effad threshold MODEL --normals FOLDER`."

COLUMNS = ("file", "score", "threshold", "decision", "marked", "error")


def detect(
    detector: EfficientAD,
    images: str | Path,
    out: str | Path,
    *,
    masks: str | Path | None = None,
    save_maps: bool = False,
    save_masks: bool = False,
) -> pd.DataFrame:
    """Run a detector over an image, or over all images below a folder, and write what it finds into the folder `out`.

    For an image `a/b.jpg` of the folder: `heatmaps/a/b.jpg.png` (image and heatmap, on one scale for all images, with
    the outline of its mask if `masks` has one, and of what is above the detector's pixel threshold), with `save_maps`
    `maps/a/b.jpg.npy` (the combined anomaly map, float32 [H, W] at the image's own size) and with `save_masks`
    `masks/a/b.jpg.png` (255 above the pixel threshold, else 0). `scores.csv`, which is also returned, has a row for
    each file: score, threshold, decision ("good" or "defective": a score above the threshold), the share of pixels that
    is marked, missing for a model without pixel threshold (a warning says how to get one), or the error why it was left
    out.
    `masks` is a folder with `a/b_mask.png` or `a/b.png`, or for a single image its mask. One image is in memory at a
    time. Raises `ImageError` if there is no image, `SettingsError` for a model without threshold, for one with broken
    maps, and for `save_masks` without pixel threshold, `RunError` if nothing can be written.
    """
    if detector.threshold is None:
        raise SettingsError("this model has no threshold: calibrate it on held-out good images first.")
    if save_masks and detector.pixel_threshold is None:
        raise SettingsError(NO_PIXEL_THRESHOLD)
    if detector.pixel_threshold is None:
        warnings.warn(f"no pixels are marked: {NO_PIXEL_THRESHOLD}", stacklevel=2)
    out = Path(out)
    found = _listed(Path(images), out)
    truths = pair_masks(masks, list(found))
    # Below 0.1, the 99.5 % quantile of normal pixels, a threshold would stretch mere noise over the whole scale.
    scale = plots.heat_scale([], max(detector.threshold, 0.1))
    rows = []
    try:
        bar = progress(found.items(), desc="detecting", unit="image")
        for name, path in bar:
            try:
                truth = truths.get(name)
                score, marked = _detect_one(detector, path, name, out, truth, scale, save_maps, save_masks)
            except ImageError as error:
                bar.write(f"left out: {error}", file=sys.stderr)
                rows.append((name.as_posix(), None, detector.threshold, "", None, str(error)))
                continue
            decision = "defective" if score > detector.threshold else "good"
            rows.append((name.as_posix(), score, detector.threshold, decision, marked, ""))
    except KeyboardInterrupt:
        _write_table(rows, out)
        raise KeyboardInterrupt(f"stopped: {len(rows)} of {len(found)} images are done, see {out}") from None
    return _write_table(rows, out)


def _listed(images: Path, out: Path) -> dict[Path, Path]:
    """Return the files by the names that their results get: their paths below the folder."""
    if images.is_file():
        return {Path(images.name): images}
    if not images.is_dir():
        raise ImageError(f"{images}: there is no such image or folder.")
    # Results of an earlier call may lie below the same folder; they are no images to look at.
    results = out.resolve()
    listed = {path.relative_to(images): path for path in find_images(images)}
    listed = {name: path for name, path in listed.items() if not path.resolve().is_relative_to(results)}
    if not listed:
        raise ImageError(f"{images}: no image below this folder but the results in {out}.")
    return listed


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


def _detect_one(
    detector: EfficientAD,
    path: Path,
    name: Path,
    out: Path,
    truth: Path | None,
    scale: plots.Scale,
    save_maps: bool,
    save_masks: bool,
) -> tuple[float, float | None]:
    """Write the results of one image; return its score and the share of its pixels that is marked."""
    image = read_image(path)
    mask = None if truth is None else read_mask(truth, image.shape[1:])
    small = torch.from_numpy(read_image(path, detector.image_size))[None]
    with torch.inference_mode():
        maps = detector.eval()(to_float(small.to(detector.device)))
        heat = F.interpolate(maps.combined, image.shape[1:], mode="bilinear")[0, 0].cpu().numpy()
    score = float(maps.score)
    if not np.isfinite(heat).all():
        raise SettingsError(f"the map of {path} is not finite: this model's training has diverged. Train it again.")
    if save_maps:
        packed = io.BytesIO()
        np.save(packed, heat, allow_pickle=False)
        write_bytes(_inside(out, "maps", f"{name}.npy"), packed.getvalue())
    marked = None if detector.pixel_threshold is None else heat > detector.pixel_threshold
    if save_masks:
        packed = io.BytesIO()
        Image.fromarray(marked.astype(np.uint8) * 255).save(packed, format="PNG")
        write_bytes(_inside(out, "masks", f"{name}.png"), packed.getvalue())
    # A dollar sign in a file's name would start mathematics in matplotlib.
    title = f"{name.as_posix()}: score {score:.3g}".replace("$", r"\$")
    figure = plots.heatmap_panel(
        image, heat, mask, scale=scale, threshold=detector.threshold, marked=marked, title=title
    )
    try:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
    finally:
        plt.close(figure)
    write_bytes(_inside(out, "heatmaps", f"{name}.png"), drawn.getvalue())
    return score, None if marked is None else float(marked.mean())


def _inside(out: Path, kind: str, name: str) -> Path:
    """Return the path of a result; `ImageError` if a link in `out` would lead it elsewhere."""
    path = out / kind / name
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise ImageError(f"{path} would lie outside {out}. Remove the link in it, or choose another folder.")
    return path


def _write_table(rows: list[tuple], out: Path) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"score": float, "threshold": float, "marked": float})
    write_text(out / "scores.csv", table.to_csv(index=False))
    return table
