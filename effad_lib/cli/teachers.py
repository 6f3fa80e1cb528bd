"""Commands that make and judge teachers."""

from __future__ import annotations

import argparse

from effad_lib.cli.options import (
    add_data_sets,
    add_options,
    add_recipes,
    as_path,
    as_split,
    as_teacher,
    given,
    settings_options,
)
from effad_lib.runs import printable


def distill_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad distill`."""
    from effad_lib.distillation import DistillationSettings

    add_recipes(parser, DistillationSettings, "under an hour of two cores with a thousand images")
    add_options(parser, settings_options(DistillationSettings))


def distill(options: argparse.Namespace) -> int:
    """Distil a teacher from a pretrained backbone, or continue where it was stopped."""
    from effad_lib.distillation import DistillationSettings, distil

    values = given(options, settings_options(DistillationSettings))
    settings = DistillationSettings.from_mapping(DistillationSettings.recipe(options.recipe) | values)
    print(distil(settings).folder / "teacher.safetensors")
    return 0


def probe_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad probe`."""
    parser.add_argument("teachers", nargs="+", metavar="TEACHER", help="a size (the shipped teacher) or a weights file")
    add_data_sets(parser)
    parser.add_argument(
        "--image-size", nargs=2, type=int, default=[256, 256], metavar="PIXELS", help="(default: 256 256)"
    )
    parser.add_argument("--bank", type=int, default=5000, help="features that are remembered (default: 5000)")
    parser.add_argument("--backbone", default="", help="also judge this one, at twice the image size (default: none)")
    parser.add_argument("--backbone-weights", default="", help="a local file (default: as published)")
    parser.add_argument("--record", action="store_true", help="write what was found into the cards of the teachers")
    parser.add_argument("--seed", type=int, default=0, help="of splits, banks and untrained networks (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def probe(options: argparse.Namespace) -> int:
    """Judge teachers' features by nearest neighbours on data sets, beside those of untrained networks."""
    from effad_lib import probing
    from effad_lib.settings import pick_device

    device, teachers = pick_device(options.device), [as_teacher(name) for name in options.teachers]
    cards = probing.read_cards(teachers, options.backbone) if options.record else []
    networks = probing.candidates(teachers, options.backbone, as_path(options.backbone_weights), seed=options.seed)
    networks = {name: network.to(device) for name, network in networks.items()}
    splits = [as_split(name, options.seed) for name in options.on]
    table = probing.compare(networks, splits, tuple(options.image_size), bank=options.bank, seed=options.seed)
    print(printable(table.round(3).to_string(na_rep="–"), keep="\n"))
    if options.record:
        settings = {name: getattr(options, name) for name in ("image_size", "bank", "backbone", "seed")}
        images = {split.name: {"train": len(split.train), "test": len(split.test)} for split in splits}
        for path in probing.record(teachers, cards, table, {**settings, "images": images}):
            print(path)
    return 0
