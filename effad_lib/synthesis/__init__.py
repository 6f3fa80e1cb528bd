"""Procedural industrial products with exact defect masks, written in the MVTec AD layout.

Each image is a scene (colour, relief, gloss) seen by a camera (light, lens, noise). A defect changes the scene, not the
picture, so the camera treats it like the rest. A product is one function, registered by
`@product(name)`, a defect another, registered by `@defect(name)`.
"""

from effad_lib.synthesis import (  # noqa: F401  (they fill the registers)
    blister,
    board,
    breakage,
    connector,
    foreign,
    gasket,
    logical,
    screw,
    surface,
    textures,
    wood,
)
from effad_lib.synthesis.defects import DEFECTS, defect
from effad_lib.synthesis.products import PRODUCTS, product
from effad_lib.synthesis.rendering import (
    TOLERANCE,
    SyntheticImage,
    damage,
    defect_names,
    photograph_defects,
    product_names,
    render,
)
from effad_lib.synthesis.scene import SynthesisError
from effad_lib.synthesis.shots import Shot, SynthesisSettings
from effad_lib.synthesis.writer import MANIFEST, Drawn, draw, put_back, synthesize

# Flat, textured and full of parts at fixed places: scratches and stains make sense on it, and so does a part that is
# missing or misplaced.
DEFAULT_PRODUCT = "board"

__all__ = [
    "DEFAULT_PRODUCT",
    "DEFECTS",
    "MANIFEST",
    "PRODUCTS",
    "TOLERANCE",
    "Drawn",
    "Shot",
    "SynthesisError",
    "SynthesisSettings",
    "SyntheticImage",
    "damage",
    "defect",
    "defect_names",
    "draw",
    "photograph_defects",
    "product",
    "product_names",
    "put_back",
    "render",
    "synthesize",
]
