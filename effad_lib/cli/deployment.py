"""Commands that take a detector to a machine."""

from __future__ import annotations

import argparse

from effad_lib.cli.options import add_data_files, add_options, allow_data_files, given, settings_options


def export_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad export`."""
    from effad_lib.export import ExportSettings

    parser.add_argument("run", metavar="RUN", help="the folder of a finished training, or a model.safetensors")
    add_options(parser, settings_options(ExportSettings))
    parser.add_argument(
        "--normals", metavar="FOLDER", help="good images, not from training; default: those that the run held out"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="(default: export/model_PRECISION[_WHAT_ELSE_DIFFERS].onnx or .xml beside the model)",
    )
    parser.add_argument("--force", action="store_true", help="keep an export that differs by more than is allowed")
    add_data_files(parser)


def export(options: argparse.Namespace) -> int:
    """Write a model as one ONNX or OpenVINO file that needs no torch, compared with the model before it is kept."""
    from effad_lib.export import ExportSettings
    from effad_lib.export import export as work
    from effad_lib.runs import check_link, here

    allow_data_files(options)
    if not options.out:
        check_link(options.run)
    settings = ExportSettings.from_mapping(given(options, settings_options(ExportSettings)))
    normals, out = (value and here(value) for value in (options.normals, options.out))
    path, found = work(here(options.run), settings, normals=normals, out=out, force=options.force)
    print(found.as_text())
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)" if path.suffix == ".onnx" else path)
    print(f"To use it: effad detect {path} IMAGE_OR_FOLDER")
    return 0
