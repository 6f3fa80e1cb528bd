"""Procedural industrial products with exact defect masks, written in the MVTec AD layout.

Each image is a scene (colour, relief, gloss) seen by a camera (light, lens, noise). A defect changes the scene, not the
picture, so the camera treats it like the rest. A product is one function, registered by
`@product(name)`, a defect another, registered by `@defect(name)`.
"""

from effad_lib.synthesis import board, gasket, logical, surface, textures  # noqa: F401  (they fill the registers)
from effad_lib.synthesis.defects import DEFECTS, defect
from effad_lib.synthesis.products import PRODUCTS, product
from effad_lib.synthesis.rendering import TOLERANCE, SyntheticImage, defect_names, product_names, render
from effad_lib.synthesis.scene import SynthesisError
from effad_lib.synthesis.writer import SynthesisSettings, synthesize, write_dataset

# Flat, textured and full of parts at fixed places: scratches and stains make sense on it, and so does a part that is
# missing or misplaced.
DEFAULT_PRODUCT = "board"

__all__ = [
    "DEFAULT_PRODUCT",
    "DEFECTS",
    "PRODUCTS",
    "TOLERANCE",
    "SynthesisError",
    "SynthesisSettings",
    "SyntheticImage",
    "defect",
    "defect_names",
    "product",
    "product_names",
    "render",
    "synthesize",
    "write_dataset",
]
