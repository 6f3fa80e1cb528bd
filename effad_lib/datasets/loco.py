"""MVTec LOCO: logical and structural anomalies, a mask for each region and the share of it that must be found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from effad_lib.datasets.benchmarks import Benchmark
from effad_lib.datasets.folders import Layout
from effad_lib.datasets.split import DatasetError, Saturation, Split, register
from effad_lib.documents import DocumentError, read_json

SATURATION_FILE = "defects_config.json"

_MVTEC_LOCO = Benchmark(
    "mvtec_loco",
    "MVTec LOCO",
    ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
    "https://www.mvtec.com/company/research/datasets/mvtec-loco",
    "CC BY-NC-SA 4.0: no commercial use",
    (
        "<category>/defects_config.json",
        "<category>/train/good/000.png",
        "<category>/validation/good/000.png",
        "<category>/test/good/000.png",
        "<category>/test/logical_anomalies/000.png (and structural_anomalies)",
        "<category>/ground_truth/logical_anomalies/000/000.png, 001.png, ...",
    ),
    Layout(mask_level=1),
)


@register("mvtec_loco")
def load_mvtec_loco(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one category of MVTec LOCO, as `load_mvtec_ad`; its own validation part is held out.

    The mask of an image is a folder, with a file for each region; the pixel value of a region tells its kind, whose
    saturation threshold `defects_config.json` holds. `defect` is "logical_anomalies" or "structural_anomalies".
    """
    base = _MVTEC_LOCO.folder(root, category)
    saturation = MappingProxyType(_read_saturation(base / SATURATION_FILE))
    return replace(_MVTEC_LOCO.read(base, seed, validation_share), saturation=saturation)


def _read_saturation(path: Path) -> dict[int, Saturation]:
    """The saturation of each kind of region by its pixel value."""
    remedy = "Unpack it anew from the archive of MVTec LOCO."
    try:
        entries = read_json(path, list)
    except DocumentError as error:
        raise DatasetError(f"{error} {remedy}") from error
    if not entries:
        raise DatasetError(f"{path}: takes a list of one or more defects. {remedy}")
    found: dict[int, Saturation] = {}
    for number, entry in enumerate(entries, start=1):
        if fault := _fault(entry):
            raise DatasetError(f"{path}: entry {number}, {entry!r}: {fault}. {remedy}")
        if entry["pixel_value"] in found:
            value = entry["pixel_value"]
            raise DatasetError(f"{path}: entry {number} has pixel_value {value}, which an earlier one has. {remedy}")
        found[entry["pixel_value"]] = Saturation(
            entry["defect_name"], entry["saturation_threshold"], entry["relative_saturation"]
        )
    return found


def _fault(entry: object) -> str | None:
    """What is wrong with an entry of the file: the field that has an impossible value, and what it takes."""
    if not isinstance(entry, dict):
        return "an entry takes named fields"
    if not isinstance(entry.get("defect_name"), str):
        return "defect_name takes a name"
    value, threshold, relative = map(entry.get, ("pixel_value", "saturation_threshold", "relative_saturation"))
    if type(value) is not int or not 1 <= value <= 255:  # True would pass as 1
        return "pixel_value takes a whole number from 1 to 255"
    if not isinstance(relative, bool):
        return "relative_saturation takes true or false"
    if type(threshold) not in (int, float) or not 0 < threshold < math.inf or (relative and threshold > 1):
        return f"saturation_threshold takes {'a share above 0, at most 1' if relative else 'pixels, above 0'}"
    return None
