"""The interactive viewer: see, decide, find and note, on ipywidgets alone.

`findings` tells what there is to look at, `state` what is shown; `rendering`, `drawings` and `pages` turn both into
bytes and text; `widgets` is the shell. Only the latter needs Jupyter, so it is imported when a viewer is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effad_lib.settings import Settings, pick_device
from effad_lib.viewer.findings import Findings, Picture, of_images, of_maps, of_run
from effad_lib.viewer.notes import VERDICTS, Note, Notes
from effad_lib.viewer.pages import print_png, write_gallery
from effad_lib.viewer.state import State

if TYPE_CHECKING:
    from effad_lib.viewer.widgets import Viewer

__all__ = [
    "VERDICTS",
    "Findings",
    "Note",
    "Notes",
    "Picture",
    "State",
    "ViewerSettings",
    "of_images",
    "of_maps",
    "of_run",
    "open_viewer",
    "print_png",
    "view_images",
    "view_maps",
    "view_run",
    "write_gallery",
]


@dataclass(frozen=True)
class ViewerSettings(Settings):
    """Settings of notebook 05."""

    run_folder: str = "runs/training"  # the folder of an evaluated run
    images: str = ""  # a folder of images of one's own for the run's model to score; "" takes a few test images
    device: str = "auto"

    def check(self) -> None:
        pick_device(self.device)


def open_viewer(findings: Findings, *, panel_width: int = 250) -> Viewer:
    """Return a viewer of what was found; the last line of a cell shows it."""
    from effad_lib.viewer.widgets import Viewer

    return Viewer(findings, panel_width=panel_width)


def view_run(run_folder: str | Path, device: str = "auto") -> Viewer:
    """Return a viewer of an evaluated run. Raises `RunError` as `of_run`."""
    return open_viewer(of_run(run_folder, device))


def view_images(model: str | Path, images: str | Path, masks: str | Path | None = None, device: str = "auto") -> Viewer:
    """Return a viewer of a folder of images, scored by a model while one looks on. Errors as `of_images`."""
    return open_viewer(of_images(model, images, masks, device))


def view_maps(
    maps: str | Path, images: str | Path, masks: str | Path | None = None, model: str | Path | None = None
) -> Viewer:
    """Return a viewer of anomaly maps by any method, beside their images. Errors as `of_maps`."""
    return open_viewer(of_maps(maps, images, masks, model))
