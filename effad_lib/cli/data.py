"""Commands that make data."""

from __future__ import annotations

import argparse

from effad_lib.cli.options import Option, add_options, given, settings_options


def synthesize_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad synthesize`."""
    from effad_lib.synthesis import product_names

    parser.add_argument("product", metavar="PRODUCT", help=", ".join(product_names()))
    parser.add_argument("folder", metavar="FOLDER", help="gets the folder PRODUCT, in the layout of MVTec AD")
    add_options(parser, _synthesis_options())


def _synthesis_options() -> list[Option]:
    from effad_lib.synthesis import SynthesisSettings

    arguments = ("product", "photographs", "data_root", "run_folder", "detector_steps")
    return [option for option in settings_options(SynthesisSettings) if option.name not in arguments]


def synthesize(options: argparse.Namespace) -> int:
    """Render a data set of a synthetic product with exact masks."""
    _synthesize(options, product=options.product)
    return 0


def damage_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad damage`."""
    parser.add_argument("photographs", metavar="PHOTOGRAPHS", help="folder of good photographs")
    parser.add_argument("folder", metavar="FOLDER", help="gets the folder `photographs`, in the layout of MVTec AD")
    unused = ("image_size", "train")
    add_options(parser, [option for option in _synthesis_options() if option.name not in unused])


def damage(options: argparse.Namespace) -> int:
    """Put defects with exact masks on good photographs of one's own."""
    from effad_lib.runs import here

    _synthesize(options, photographs=str(here(options.photographs)))
    return 0


def _synthesize(options: argparse.Namespace, **source: str) -> None:
    from effad_lib.runs import here
    from effad_lib.synthesis import SynthesisSettings, synthesize

    folder = str(here(options.folder))
    values = source | {"data_root": folder} | given(options, _synthesis_options())
    print(synthesize(SynthesisSettings.from_mapping(values)))
