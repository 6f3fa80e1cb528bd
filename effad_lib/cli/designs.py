"""The command that compares designs of PDNs."""

from __future__ import annotations

import argparse

from effad_lib.cli.options import Option, add_data_sets, add_options, as_split, given, settings_options
from effad_lib.runs import printable


def designs_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad designs`."""
    from effad_lib.designs import DESIGNS

    known = ", ".join(DESIGNS)
    parser.add_argument("names", nargs="*", metavar="DESIGN", default=list(DESIGNS), help=f"{known} (default: all)")
    add_data_sets(parser)
    parser.add_argument("--out", default="designs.csv", metavar="FILE", help="gets the table (default: designs.csv)")
    parser.add_argument("--views", type=int, default=4000, help="that all designs learn from (default: 4000)")
    parser.add_argument(
        "--probe-size", nargs=2, type=int, default=[128, 128], metavar="PIXELS", help="(default: 128 128)"
    )
    parser.add_argument("--bank", type=int, default=2000, help="features that a probe remembers (default: 2000)")
    add_options(parser, _settings_options())


def _settings_options() -> list[Option]:
    """Return the options of a distillation but for its size, with the defaults of a comparison."""
    from effad_lib.designs import EXPLORATION
    from effad_lib.distillation import DistillationSettings

    options = [option for option in settings_options(DistillationSettings) if option.name != "size"]
    return [option._replace(default=EXPLORATION.get(option.name, option.default)) for option in options]


def designs(options: argparse.Namespace) -> int:
    """Distil designs of small networks briefly under equal conditions and compare them: cost, loss, probe."""
    from effad_lib.designs import EXPLORATION, check_design, explore
    from effad_lib.distillation import DistillationSettings

    for name in options.names:
        check_design(name)  # before data sets are rendered
    settings = DistillationSettings.from_mapping(EXPLORATION | given(options, _settings_options()))
    splits = [as_split(name, settings.seed) for name in options.on]
    sizes = {"image_size": tuple(options.probe_size), "bank": options.bank}
    table = explore(options.names, settings, splits, options.out, views=options.views, **sizes)
    print(printable(table.drop(columns="layers").round(3).to_string(index=False, na_rep="–"), keep="\n"))
    print(options.out)
    return 0
