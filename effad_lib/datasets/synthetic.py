"""Rendered products."""

from __future__ import annotations

from pathlib import Path

from effad_lib.datasets.folders import read_layout
from effad_lib.datasets.split import DatasetError, Split, register
from effad_lib.runs import resolve
from effad_lib.settings import nearest


def place_of(root: str | Path | None, category: str) -> Path:
    """Return the folder of a product, rendered or not, as `load_synthetic` reads it."""
    from effad_lib import synthesis  # only this data set needs its drawing libraries

    return resolve(root or "data/synthetic") / (category or synthesis.DEFAULT_PRODUCT)


def is_rendered(root: str | Path | None, category: str) -> bool:
    """Whether a product is there, so that `load_synthetic` only reads it."""
    from effad_lib import synthesis

    return (place_of(root, category) / synthesis.MANIFEST).is_file()


def check_rendered(root: str | Path | None, category: str) -> None:
    """Raise `DatasetError` for a product that is not rendered yet, which a file from anybody may not ask for."""
    from effad_lib import synthesis

    synthesis.put_back(place_of(root, category))
    if not is_rendered(root, category):
        folder = place_of(root, category)
        raise DatasetError(f"no manifest.json in {folder}. Make it: effad synthesize {folder.name} {folder.parent}")


@register("synthetic")
def load_synthetic(root: Path | None, category: str, seed: int, validation_share: float) -> Split:
    """Read a synthetic product in MVTec layout, rendered first if its folder has no `manifest.json` yet.

    `category` "photographs" reads those that `effad damage` made.
    """
    from effad_lib import synthesis

    category = category or synthesis.DEFAULT_PRODUCT
    folder = place_of(root, category)
    synthesis.put_back(folder)
    if not is_rendered(root, category):
        if category == "photographs":
            raise DatasetError(
                f"no {folder / synthesis.MANIFEST}. Make it: effad damage YOUR_GOOD_PHOTOGRAPHS {folder.parent}"
            )
        if category not in synthesis.product_names():
            raise DatasetError(f"unknown product {category!r}: {nearest(category, synthesis.product_names())}")
        synthesis.synthesize(synthesis.SynthesisSettings(product=category, data_root=str(folder.parent)))
    return read_layout(folder, f"synthetic/{category}", seed, validation_share)
