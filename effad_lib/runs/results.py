"""What this program made of images, told from images: runs, detections and galleries."""

import contextlib
from pathlib import Path

from effad_lib.documents import open_plain

GALLERY = '<meta name="generator" content="effad gallery">'
"""What the page of a gallery begins with, which tells it from the page of somebody else."""

COLUMNS = ("file", "score", "threshold", "decision", "marked", "error")
"""Of the `scores.csv` in which `detect` says what it found."""


RESULT_FOLDERS = ("figures", "gallery", "heatmaps", "masks")
"""Where pictures lie in a run and in what `detect` found."""


def holds_results(folder: Path) -> bool:
    """Whether a folder holds what this program made of images: a run, what `detect` found, or a gallery.

    Nothing that somebody else may have there counts, such as a `scores.csv` with other columns.
    """
    is_run = all((folder / name).is_file() for name in ("parameters.yaml", "sources.json"))
    return is_run or is_gallery(folder) or _begins(folder / "scores.csv", f"{','.join(COLUMNS)}\n")


def is_gallery(folder: Path) -> bool:
    """Whether a folder holds a gallery, finished or not."""
    return _begins(
        folder / "index.html", f'<!doctype html><meta charset="utf-8">{GALLERY}', f"<!doctype html>{GALLERY}"
    )


def _begins(path: Path, *texts: str) -> bool:
    with contextlib.suppress(OSError), open_plain(path) as file:
        return file.read(1000).startswith(tuple(text.encode() for text in texts))
    return False
