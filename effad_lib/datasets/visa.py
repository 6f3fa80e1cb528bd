"""VisA, as it is published with its file of the split, or put into the layout of MVTec AD."""

from __future__ import annotations

import csv
from pathlib import Path

from effad_lib.datasets.benchmarks import Benchmark
from effad_lib.datasets.folders import Layout
from effad_lib.datasets.split import DatasetError, Sample, Split, hold_out, listed, register
from effad_lib.images import ImageError, find_images

SPLIT_FILE = Path("split_csv", "1cls.csv")

COLUMNS = ("object", "split", "label", "image", "mask")

VALUES = {"split": ("train", "test"), "label": ("normal", "anomaly")}

_VISA = Benchmark(
    "visa",
    "VisA",
    tuple("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split()),
    "https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
    "CC BY 4.0",
    (
        "split_csv/1cls.csv",
        "<category>/Data/Images/Normal/0000.JPG",
        "<category>/Data/Images/Anomaly/000.JPG",
        "<category>/Data/Masks/Anomaly/000.png",
        "or, as its authors' prepare_data.py writes it to VisA_pytorch/1cls:",
        "<category>/train/good/0000.JPG",
        "<category>/test/good/0000.JPG",
        "<category>/test/bad/000.JPG",
        "<category>/ground_truth/bad/000.png",
    ),
    Layout(mask_level=1),
)


@register("visa")
def load_visa(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read one category of VisA in its one-class split, in one of the two layouts in which it goes around.

    `root` holds the category folders and, in the original layout, `split_csv/1cls.csv`. The one class of defects is
    called "bad"; the masks hold numbers of classes, of which any above 0 is defective.
    """
    table = _VISA.root(root) / SPLIT_FILE
    if not table.is_file():
        return _VISA.read(_VISA.folder(root, category), seed, validation_share)
    base = _VISA.folder(root, category, "Data/Images")
    name = f"visa/{base.name}"
    try:
        # The table's file names are looked up here and never opened, so none can lead out of the folder.
        files = {f"{base.name}/{path.relative_to(base).as_posix()}": path for path in find_images(base)}
    except ImageError as error:
        raise DatasetError(f"{name}: {error}") from error
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    missing = []
    for row in _rows(table, base.name):
        label, defect = (1, "bad") if row["label"] == "anomaly" else (0, "good")
        missing += [file for file in (row["image"], row["mask"])[: 1 + label] if file not in files]
        mask = files.get(row["mask"]) if label else None
        parts[row["split"]].append(Sample(files.get(row["image"]), mask, label, defect, _VISA.layout.mask_level))
    if missing:
        raise DatasetError(
            f"{table}: {len(missing)} files that it names are not below {base}. Unpack the archive anew."
            f"{listed([repr(file) for file in missing])}"
        )
    return Split(name, *hold_out(parts["train"], seed, validation_share), tuple(parts["test"]))


def _rows(table: Path, category: str) -> list[dict[str, str]]:
    """The rows of a category. Raises `DatasetError` for a table that is not of the form of VisA's, or has none."""
    remedy = "Unpack it anew from the archive of VisA."
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{table}: cannot be read ({error}). {remedy}") from error
    for number, row in enumerate(rows, start=1):
        if any(row.get(column) is None for column in COLUMNS):
            raise DatasetError(f"{table}: row {number} takes the columns {', '.join(COLUMNS)}. {remedy}")
        for column, known in VALUES.items():
            if row[column] not in known:
                got = f"{column} {row[column]!r}"
                raise DatasetError(f"{table}: row {number} has the {got}, it takes {' or '.join(known)}. {remedy}")
    rows = [row for row in rows if row["object"] == category]
    if not rows:
        raise DatasetError(f"{table}: has no row whose object is {category!r}. {remedy}")
    return rows
