"""A synthetic data set on disk, in the MVTec AD layout."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from effad_lib.runs import resolve
from effad_lib.settings import Settings
from effad_lib.synthesis.rendering import (
    TOLERANCE,
    check_product,
    check_seed,
    check_severity,
    check_size,
    defect_names,
    render,
)
from effad_lib.synthesis.scene import SynthesisError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SynthesisSettings(Settings):
    """Settings of a synthetic data set; the defaults make the one that `load_dataset("synthetic")` would make."""

    run_folder: str = "runs/synthesis"  # for figures; the data set goes to data_root
    product: str = "board"  # see `product_names`
    data_root: str = "data/synthetic"  # gets the folder <product>; the default is where dataset "synthetic" looks
    image_size: list[int] = (256, 256)  # height and width in pixels, each at least 64
    train: int = 200  # good images to train on
    test_good: int = 40  # good test images
    test_per_defect: int = 20  # test images of each defect
    severity: list[float] = (0.4, 1.0)  # lowest and highest, above 0 (invisible) and at most 1 (obvious)
    seed: int = 0
    overwrite: bool = False  # replace another synthetic data set in the same folder

    def check(self) -> None:
        check_product(self.product)
        check_size(self.image_size)
        _severity_range(self.severity)
        check_seed(self.seed)

    @property
    def folder(self) -> Path:
        """Where the data set is."""
        return resolve(self.data_root) / self.product


def synthesize(settings: SynthesisSettings) -> Path:
    """Write the data set of `settings` and return its folder; one that is there with the same settings is kept.

    Another one is replaced with `overwrite` and is else a `SynthesisError` that names the differences.
    """
    asked = {
        "product": settings.product,
        "size": list(settings.image_size),
        "seed": settings.seed,
        "severity": list(settings.severity),
        "train": settings.train,
        "test_good": settings.test_good,
        "test_per_defect": settings.test_per_defect,
    }
    manifest = settings.folder / MANIFEST
    if manifest.is_file():
        there = json.loads(manifest.read_text(encoding="utf-8"))
        changed = [
            f"{name}: {there.get(name)} there, {value} now" for name, value in asked.items() if there.get(name) != value
        ]
        if not changed:
            return settings.folder
        if not settings.overwrite:
            raise SynthesisError(
                f"{settings.folder} holds another data set ({'; '.join(changed)}). Set overwrite = True to replace it, "
                "or name another data_root."
            )
    del asked["product"]
    return write_dataset(settings.product, settings.folder, **asked, overwrite=settings.overwrite)


def write_dataset(
    product: str,
    folder: str | Path,
    *,
    size: tuple[int, int] = (256, 256),
    train: int = 200,
    test_good: int = 40,
    test_per_defect: int = 20,
    severity: tuple[float, float] = (0.4, 1.0),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a data set of one product in the MVTec AD layout and return its folder.

    `folder` gets train/good/000.png, test/good/, test/<defect>/000.png, ground_truth/<defect>/000_mask.png (0 or 255)
    and manifest.json, which has the seed and severity of every image, so that `render` makes it again. Severities are
    uniform in `severity` = (lowest, highest). Image i of a class depends on `seed`, its class and i alone, not on the
    counts. The folder appears whole or not at all. An existing folder with something in it is a SynthesisError; with
    `overwrite` it is replaced if it is such a data set.
    """
    check_product(product)
    check_size(size)
    check_seed(seed)
    counts = {"train": train, "test_good": test_good, "test_per_defect": test_per_defect}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise SynthesisError(f"{name} is {count!r}; it must be a whole number of images, 0 or more.")
    lowest, highest = _severity_range(severity)
    folder = Path(folder).absolute()
    _check_target(folder, overwrite)

    groups = [("train", "good", train), ("test", "good", test_good)]
    groups += [("test", defect, test_per_defect) for defect in defect_names(product)]
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        records = []
        with tqdm(total=sum(count for *_, count in groups), desc=f"rendering {product}", unit="image") as progress:
            for part, defect, count in groups:
                for index in range(count):
                    records.append(_write_image(work, product, part, defect, index, size, (lowest, highest), seed))
                    progress.update()
        manifest = {
            "product": product,
            "size": [int(length) for length in size],
            "seed": int(seed),
            "severity": [lowest, highest],
            "mask_tolerance": TOLERANCE,
            **counts,
            "images": records,
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _put_in_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_image(
    root: Path,
    product: str,
    part: str,
    defect: str,
    index: int,
    size: tuple[int, int],
    severity: tuple[float, float],
    seed: int,
) -> dict:
    """Render and write one image (and its mask); return its line of the manifest."""
    source = np.random.SeedSequence((int(seed), crc32(f"{product}/{part}/{defect}".encode()), index))
    image_seed, share = (int(word) for word in source.generate_state(2, np.uint32))
    level = round(severity[0] + (severity[1] - severity[0]) * share / 2**32, 4)
    level = min(max(level, severity[0]), severity[1])
    shot = render(product, defect, size=size, seed=image_seed, severity=level)
    files = {f"{part}/{defect}/{index:03d}.png": shot.image}
    if defect != "good":
        files[f"ground_truth/{defect}/{index:03d}_mask.png"] = shot.mask.astype(np.uint8) * 255
    for name, pixels in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        # Sensor noise hardly compresses: higher levels cost time and save nothing.
        Image.fromarray(pixels).save(root / name, compress_level=1)
    record = {"path": next(iter(files)), "defect": defect, "seed": image_seed}
    return record if defect == "good" else record | {"severity": level, "mask_pixels": int(shot.mask.sum())}


def _severity_range(severity: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(severity, tuple | list) or len(severity) != 2:
        raise SynthesisError(f"severity is {severity!r}; it must be (lowest, highest), e.g. (0.4, 1.0).")
    for level in severity:
        check_severity(level)
    lowest, highest = float(severity[0]), float(severity[1])
    if lowest > highest:
        raise SynthesisError(f"severity is {severity!r}; the lowest must not be above the highest.")
    return lowest, highest


def _check_target(folder: Path, overwrite: bool) -> None:
    """Raise SynthesisError if `folder` holds something that must not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise SynthesisError(f"{folder} is a file; name another folder.")
    if not overwrite:
        raise SynthesisError(f"{folder} is not empty; name another folder, or pass overwrite=True to replace it.")
    if not (folder / MANIFEST).is_file():
        raise SynthesisError(
            f"{folder} has no {MANIFEST}, so it is no synthetic data set and is not replaced; name another."
        )


def _put_in_place(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`, with what was there moved aside first and deleted last."""
    old = work.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
