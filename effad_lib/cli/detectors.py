"""Commands that train, measure and use detectors."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from effad_lib.cli.options import (
    Option,
    add_data_files,
    add_options,
    add_recipes,
    allow_data_files,
    given,
    mute,
    settings_options,
)
from effad_lib.runs import printable


def train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad train`."""
    from effad_lib.training import TrainingSettings

    add_recipes(parser, TrainingSettings, "size XS in seven minutes of two cores at 256×256 pixels")
    add_options(parser, settings_options(TrainingSettings))


def train(options: argparse.Namespace) -> int:
    """Train a detector on good images, or continue where it was stopped."""
    from effad_lib.datasets import load_dataset
    from effad_lib.runs import Run
    from effad_lib.training import TrainingSettings
    from effad_lib.training import train as work

    values = given(options, settings_options(TrainingSettings))
    settings = TrainingSettings.from_mapping(TrainingSettings.recipe(options.recipe) | values)
    split = load_dataset(
        settings.dataset,
        root=settings.data_root,
        category=settings.category,
        seed=settings.seed,
        validation_share=settings.validation_share,
    )
    work(settings, split)
    finished = Run(settings.run_folder)
    print(f"{finished.model}\nTo measure it: effad evaluate {finished.folder}")
    return 0


def evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad evaluate`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folders of finished trainings")
    parser.add_argument(
        "--save-tiffs",
        metavar="FOLDER",
        help="also write the maps as MVTec's evaluation code reads them: into FOLDER/CATEGORY/test, "
        "with several runs into FOLDER/RUN/CATEGORY/test",
    )
    add_data_files(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def evaluate(options: argparse.Namespace) -> int:
    """Measure trained runs on their test images; writes metrics.json, scores.csv, maps and report.html into each."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, no window is opened
    from effad_lib import batch, evaluation, reports
    from effad_lib.execution import alone_in
    from effad_lib.runs import here

    allow_data_files(options)
    folders = [here(run) for run in options.runs]
    splits = [evaluation.data_to_test(folder) for folder in folders]  # all, before the first is evaluated
    targets = _tiff_folders(options.save_tiffs, folders, splits)
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(alone_in(folder))
        for folder, split, target in zip(folders, splits, targets, strict=True):
            detector, _, found = evaluation.evaluate_run(folder, options.device, split)
            result = evaluation.finish_run(folder, detector, found)
            if target:
                found.save_tiffs(target)
            page = reports.write_report(folder, found, detector.image_size, result)
            print(batch.as_text(batch.results([folder])))
            for table in (found.by_defect(), found.decisions()):
                if len(table):
                    print(printable(f"\n{table.round(3).to_string(na_rep='–')}", keep="\n"))
            print(f"\n{result['latency_ms']:.1f} ms an image ({result['latency_on']}); {page}")
            for note in found.notes:
                print(note)
    if len(folders) > 1:
        print(f"\n{reports.beside_published(folders)}")
    return 0


def _tiff_folders(root: str | None, runs: list[Path], splits: list[Any]) -> list[Path | None]:
    """Return where the maps of each run go.

    Raises `EvaluationError` if two maps would be written to the same file or over images, and `RunError` where none
    could be written.
    """
    from effad_lib import evaluation
    from effad_lib.runs import check_writable, here

    if root is None:
        return [None] * len(runs)
    targets: dict[Path, Path] = {}
    for run, split in zip(runs, splits, strict=True):
        above = here(root) / (run.name if len(runs) > 1 else "")
        target = above / split.name.rpartition("/")[2]
        if target in targets:
            raise evaluation.EvaluationError(
                f"{targets[target]} and {run} would both have their maps in {target}. Evaluate them one by one, each "
                f"with a folder of its own for --save-tiffs."
            )
        check_writable(evaluation.tiff_files(split.test, target)[0])
        targets[target] = run
    return list(targets)


def detect_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad detect`."""
    parser.add_argument("model", metavar="MODEL", help="a model.safetensors, or an .onnx or .xml of `effad export`")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image, or a folder with images at any depth")
    parser.add_argument("--out", default="detections", help="folder for the results (default: detections)")
    parser.add_argument("--masks", help="ground truth to outline: a folder with <name>_mask.png, or one mask")
    parser.add_argument(
        "--heatmaps",
        choices=("all", "defective", "none"),
        help="of which images to draw one, the slowest part (default: all, with --watch defective)",
    )
    parser.add_argument("--save-maps", action="store_true", help="also write the raw maps (float32 .npy)")
    parser.add_argument("--save-masks", action="store_true", help="also write what is above the pixel threshold (.png)")
    parser.add_argument(
        "--tile-overlap",
        type=int,
        metavar="PIXELS",
        help="do not resize images to the model's size but cut them into tiles of it that overlap by so many pixels, "
        "40 or more; for models trained on pieces of images at full resolution",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on until Ctrl-C: each image that comes into the folder is judged once, with a results/<name>.json "
        "written last; started again, it continues",
    )
    parser.add_argument(
        "--interval",
        type=float,
        metavar="SECONDS",
        help="of --watch: so long a file must have stayed as it is before it is read (default: 0.5)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps or gpu, by what runs it (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: as many as the runtime likes)")


def _print(text: str) -> None:
    """Print a line at once; if its reader has left, what is watched goes on without one."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        mute()


def detect(options: argparse.Namespace) -> int:
    """Look for defects in new images; exit code 1 if some of them could not be read, 2 if none could."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, no window is opened
    from effad_lib import detection
    from effad_lib.reading import ImageError
    from effad_lib.runs import here
    from effad_lib.settings import SettingsError

    for name, value in {"IMAGE_OR_FOLDER": options.images, "--out": options.out}.items():
        if not value:
            raise SettingsError(f"{name} is empty: name an image or a folder.")
    detector = detection.open_model(here(options.model), options.device, options.threads)
    runs_on = f"{getattr(detector, 'runtime', 'torch')} on {detector.device}"
    wanted = {"heatmaps": options.heatmaps or ("defective" if options.watch else "all")}
    wanted |= {name: getattr(options, name) for name in ("save_maps", "save_masks", "tile_overlap")}
    if options.watch:
        from effad_lib import watching

        if options.masks:
            raise SettingsError("--masks: of images that are still to come no truth is known. Leave it out.")
        _print(f"watching {options.images} with {runs_on}; results in {options.out}; Ctrl-C ends it")
        how = {} if options.interval is None else {"interval": options.interval}
        wished = detection.Wanted(**wanted)
        count = watching.watch(detector, options.images, options.out, wished, report=_print, **how)
        _print(f"{count} images judged; all results: {Path(options.out) / 'scores.csv'}")
        return 0
    if options.interval is not None:
        raise SettingsError("--interval: is of --watch alone. Leave it out, or add that.")
    table = detection.detect(detector, options.images, options.out, masks=options.masks, **wanted)
    left_out = int((table["error"] != "").sum())
    if left_out == len(table):
        raise ImageError(f"none of {len(table)} images could be read; see {Path(options.out) / 'scores.csv'}.")
    defective = int((table["decision"] == "defective").sum())
    found = f"{len(table) - left_out} images, {defective} defective, {left_out} left out"
    print(f"{found}, by {runs_on}: see {options.out}")
    return 1 if left_out else 0


def threshold_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad threshold`."""
    parser.add_argument("model", metavar="MODEL", help="a model.safetensors")
    add_options(parser, _decision_options())
    parser.add_argument(
        "--normals", metavar="FOLDER", help="good images, not from training; default: those of the model"
    )
    parser.add_argument(
        "--tile-overlap",
        type=int,
        metavar="PIXELS",
        help="for `effad detect --tile-overlap`: cut the good images into tiles that overlap by so many pixels too",
    )
    parser.add_argument("--out", metavar="FILE", help="where to write the model (default: in its place)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def _decision_options() -> list[Option]:
    from effad_lib.training import TrainingSettings

    names = ("false_alarm_rate", "confidence")
    return [option for option in settings_options(TrainingSettings) if option.name in names]


def threshold(options: argparse.Namespace) -> int:
    """Choose a model's thresholds anew, for a false-alarm rate on normal images; its weights stay."""
    from effad_lib import calibration
    from effad_lib.detector import EfficientAD
    from effad_lib.images import find_images, load_images
    from effad_lib.runs import Run, check_link, check_writable, here
    from effad_lib.settings import SettingsError, pick_device
    from effad_lib.tiling import check_overlap
    from effad_lib.training import TrainingSettings

    path = here(options.model)
    out = here(options.out) if options.out else path
    if not options.out:
        check_link(options.model)
    elif out.suffix != ".safetensors":
        raise SettingsError(f"--out {options.out}: a model's file ends in .safetensors.")
    settings = TrainingSettings.from_mapping(given(options, _decision_options()))
    rate, confidence = settings.false_alarm_rate, settings.confidence
    detector, overlap = EfficientAD.load(path, pick_device(options.device)), options.tile_overlap
    if overlap is not None:
        if not options.normals:
            raise SettingsError("--tile-overlap: name the good images that are to be cut into tiles, --normals FOLDER.")
        check_overlap(detector, overlap)
    check_writable(out)
    if options.normals:
        folder = here(options.normals)
        files, source = find_images(folder), calibration.source_of(folder)
        calibration.rank(len(files), rate, confidence)  # refused before any image is read
        if overlap is None:
            how = {"levels": detector.levels, "description": "reading normal images"}
            images = load_images(files, detector.image_size, **how)
            calibration.measure_normals(detector, images.split(8), source=source, names=files)
        else:
            calibration.measure_tiled_normals(detector, files, overlap, source=source)
    calibration.choose_thresholds(detector, rate, confidence)
    saved, chosen = detector.save(out), detector.calibration
    kept = f"; at most {rate:.3g} with confidence {confidence:g}" if rate else ""
    tiled = ", in tiles that overlap by {tile_overlap} pixels".format_map(chosen) if "tile_overlap" in chosen else ""
    above = (chosen["normals"] + 1 - chosen["rank"]) / (chosen["normals"] + 1)
    source = printable(chosen.get("source", "held out from training"))
    print(f"normal images    {chosen['normals']}, {source}{tiled}")
    print(f"rank             {chosen['rank']} of {chosen['normals']}")
    print(f"false alarms     a share of {above:.3g} expected{kept}")
    print(f"image threshold  {detector.threshold:.4g}")
    print(f"pixel threshold  {detector.pixel_threshold:.4g}")
    print(saved)
    run = Run(saved.resolve().parent)
    if run.done and run.model == saved.resolve() and not tiled:
        print(f"It was evaluated with the thresholds before, so evaluate again: effad evaluate {run.folder}")
    return 0


def gallery_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad gallery`."""
    parser.add_argument("run", metavar="RUN", help="the folder of an evaluated run")
    parser.add_argument("--out", metavar="FOLDER", help="where to write it (default: RUN/gallery)")
    add_data_files(parser)


def gallery(options: argparse.Namespace) -> int:
    """Write all test images of a run with their heatmaps as one page, for people without Jupyter."""
    from effad_lib import viewer
    from effad_lib.runs import here

    allow_data_files(options)
    run = here(options.run)
    print(viewer.write_gallery(viewer.of_run(run), here(options.out) if options.out else run / "gallery"))
    return 0
