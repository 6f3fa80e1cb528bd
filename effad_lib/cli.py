"""The command line: thin calls of the library, listed by `effad --help`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from effad_lib import __version__

# Everything else is imported by the command that needs it, so that `effad --help` does not wait for torch.

PATHS = frozenset({"run_folder", "data_root", "penalty_images", "images", "backbone_weights"})
"""Settings that are paths: on the command line relative to where one is, in settings relative to the project."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(f"effad: {message}. See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


class Option(NamedTuple):
    """One option made from a field or an argument of the library."""

    name: str
    hint: Any
    default: Any
    help: str = ""


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add `--some-name` for each; only those given on the command line end up in the parsed namespace."""
    for name, hint, default, text in options:
        flag = f"--{name.replace('_', '-')}"
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        text = f"{text} (default: {'none' if shown == '' else shown})".replace("%", "%%").strip()
        common = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(hint) in (list, tuple):
            inner = typing.get_args(hint)[0]
            parser.add_argument(flag, nargs="*", type=inner, metavar=inner.__name__.upper(), **common)
        else:
            parser.add_argument(flag, type=hint, metavar=hint.__name__.upper(), **common)


def settings_options(settings: type) -> list[Option]:
    """Return an option for each field of a settings dataclass, its help taken from the comment beside the field."""
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(settings), re.MULTILINE))
    hints = typing.get_type_hints(settings)
    return [
        Option(field.name, hints[field.name], field.default, comments.get(field.name, ""))
        for field in dataclasses.fields(settings)
    ]


def given(options: argparse.Namespace, known: Iterable[Option]) -> dict[str, Any]:
    """Return the values given on the command line, paths as seen from the project."""
    values = {option.name: getattr(options, option.name) for option in known if hasattr(options, option.name)}
    values |= {name: as_path(values[name]) for name in PATHS & values.keys()}
    if "dataset" in values:
        values["dataset"] = as_dataset(values["dataset"])
    return values | ({"teacher": as_teacher(values["teacher"])} if "teacher" in values else {})


def as_path(path: str) -> str:
    """Return a path as seen from the project; "" stays as it is."""
    from effad_lib.runs import from_project

    return path and from_project(path)


def as_dataset(name: str) -> str:
    """Return a data set's name as it is, the file of "path/to/file.py:name" as seen from the project."""
    file, separator, own = name.rpartition(":")
    return f"{as_path(file)}:{own}" if separator and file.endswith(".py") else name


def as_teacher(name: str) -> str:
    """Return the size of a shipped teacher as it is, a file's path as seen from the project."""
    from effad_lib.networks import PDN_LAYERS

    return name if name.upper() in PDN_LAYERS else as_path(name)


# --- the commands: for each its options and its work ----------------------------------------------------------------


def run_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad run`."""
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles (default: quick)")
    parser.add_argument("--force", action="store_true", help="delete the profile's run folders and do all steps anew")
    parser.add_argument("--runs", help="folder of all runs (default: runs, in the project's folder)")


def run(options: argparse.Namespace) -> int:
    """Execute the notebooks of a profile and print the table of results."""
    from effad_lib.batch import run_profile

    runs = Path(options.runs).expanduser().resolve() if options.runs else "runs"
    run_profile(options.profile, runs=runs, force=options.force)
    return 0


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
    _synthesize(options, photographs=str(Path(options.photographs).expanduser().resolve()))
    return 0


def _synthesize(options: argparse.Namespace, **source: str) -> None:
    from effad_lib.synthesis import SynthesisSettings, synthesize

    folder = str(Path(options.folder).expanduser().resolve())
    values = source | {"data_root": folder} | given(options, _synthesis_options())
    print(synthesize(SynthesisSettings.from_mapping(values)))


def distill_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad distill`."""
    from effad_lib.distillation import RECIPES, DistillationSettings

    known = " or ".join(RECIPES)
    start = f"settings to start from: {known}, under an hour of two cores with a thousand images (default: paper)"
    parser.add_argument("--recipe", default="paper", help=start)
    add_options(parser, settings_options(DistillationSettings))


def distill(options: argparse.Namespace) -> int:
    """Distil a teacher from a pretrained backbone, or continue where it was stopped."""
    from effad_lib.distillation import DistillationSettings, distil, recipe

    values = given(options, settings_options(DistillationSettings))
    settings = DistillationSettings.from_mapping(recipe(options.recipe) | values)
    print(distil(settings).folder / "teacher.safetensors")
    return 0


def probe_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad probe`."""
    parser.add_argument("teachers", nargs="+", metavar="TEACHER", help="a size (the shipped teacher) or a weights file")
    parser.add_argument(
        "--on",
        nargs="+",
        default=["elpv/mono"],
        metavar="DATA",
        help="data sets, each DATASET[/CATEGORY][=FOLDER], such as mvtec_ad/screw=data/mvtec_ad (default: elpv/mono)",
    )
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
    splits = [_data(name, options.seed) for name in options.on]
    table = probing.compare(networks, splits, tuple(options.image_size), bank=options.bank, seed=options.seed)
    print(table.round(3).to_string(na_rep="–"))
    if options.record:
        settings = {name: getattr(options, name) for name in ("image_size", "bank", "backbone", "seed")}
        images = {split.name: {"train": len(split.train), "test": len(split.test)} for split in splits}
        for path in probing.record(teachers, cards, table, {**settings, "images": images}):
            print(path)
    return 0


def _data(text: str, seed: int) -> Any:
    """Return the `Split` that DATASET[/CATEGORY][=FOLDER] names."""
    from effad_lib.datasets import load_dataset

    name, _, folder = text.partition("=")
    dataset, _, category = name.partition("/")
    return load_dataset(dataset, root=as_path(folder), category=category, seed=seed)


def train_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad train`."""
    from effad_lib.training import TrainingSettings

    add_options(parser, settings_options(TrainingSettings))


def train(options: argparse.Namespace) -> int:
    """Train a detector on good images, or continue where it was stopped."""
    from effad_lib.datasets import load_dataset
    from effad_lib.runs import Run
    from effad_lib.training import TrainingSettings
    from effad_lib.training import train as work

    settings = TrainingSettings.from_mapping(given(options, settings_options(TrainingSettings)))
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
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def evaluate(options: argparse.Namespace) -> int:
    """Measure trained runs on their test images; writes metrics.json, scores.csv, maps and report.html into each."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, no window is opened
    from effad_lib import batch, evaluation, reports

    folders = [Path(run).expanduser().resolve() for run in options.runs]
    splits = [evaluation.data_to_test(folder) for folder in folders]  # all, before the first is evaluated
    targets = _tiff_folders(options.save_tiffs, folders, splits)
    for folder, target in zip(folders, targets, strict=True):
        detector, _, found = evaluation.evaluate_run(folder, options.device)
        if target:
            found.save_tiffs(target)
        result = evaluation.finish_run(folder, detector, found)
        page = reports.write_report(folder, found, detector.image_size, result)
        print(batch.as_text(batch.results([folder])))
        for table in (found.by_defect(), found.decisions()):
            if len(table):
                print(f"\n{table.round(3).to_string(na_rep='–')}")
        print(f"\n{result['latency_ms']:.1f} ms an image ({result['latency_on']}); {page}")
        for note in found.notes:
            print(note)
    if len(folders) > 1:
        print(f"\n{reports.beside_published(folders)}")
    return 0


def _tiff_folders(root: str | None, runs: list[Path], splits: list[Any]) -> list[Path | None]:
    """Return where the maps of each run go; raises `EvaluationError` if two maps would be written to the same file."""
    from effad_lib import evaluation

    if root is None:
        return [None] * len(runs)
    targets: dict[Path, Path] = {}
    for run, split in zip(runs, splits, strict=True):
        evaluation.tiff_places(split.test)
        above = Path(root).expanduser() / (run.name if len(runs) > 1 else "")
        target = above / split.name.rpartition("/")[2]
        if target in targets:
            raise evaluation.EvaluationError(
                f"{targets[target]} and {run} would both have their maps in {target}. Evaluate them one by one, each "
                f"with a folder of its own for --save-tiffs."
            )
        targets[target] = run
    return list(targets)


def detect_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad detect`."""
    parser.add_argument("model", metavar="MODEL", help="a model.safetensors")
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image, or a folder with images at any depth")
    parser.add_argument("--out", default="detections", help="folder for the results (default: detections)")
    parser.add_argument("--masks", help="ground truth to outline: a folder with <name>_mask.png, or one mask")
    parser.add_argument("--save-maps", action="store_true", help="also write the raw maps (float32 .npy)")
    parser.add_argument("--save-masks", action="store_true", help="also write what is above the pixel threshold (.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def detect(options: argparse.Namespace) -> int:
    """Look for defects in new images; exit code 1 if some of them could not be read, 2 if none could."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are written, no window is opened
    from effad_lib import detection
    from effad_lib.detector import EfficientAD
    from effad_lib.images import ImageError
    from effad_lib.settings import pick_device

    detector = EfficientAD.load(Path(options.model).expanduser(), pick_device(options.device))
    wanted = {name: getattr(options, name) for name in ("masks", "save_maps", "save_masks")}
    table = detection.detect(detector, options.images, options.out, **wanted)
    left_out = int((table["error"] != "").sum())
    if left_out == len(table):
        raise ImageError(f"none of {len(table)} images could be read; see {Path(options.out) / 'scores.csv'}.")
    defective = int((table["decision"] == "defective").sum())
    print(f"{len(table) - left_out} images, {defective} defective, {left_out} left out: see {options.out}")
    return 1 if left_out else 0


def threshold_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad threshold`."""
    parser.add_argument("model", metavar="MODEL", help="a model.safetensors")
    add_options(parser, _decision_options())
    parser.add_argument(
        "--normals", metavar="FOLDER", help="good images, not from training; default: those of the model"
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
    from effad_lib.runs import Run
    from effad_lib.settings import pick_device
    from effad_lib.training import TrainingSettings

    path = Path(options.model).expanduser()
    settings = TrainingSettings.from_mapping(given(options, _decision_options()))
    rate, confidence = settings.false_alarm_rate, settings.confidence
    detector = EfficientAD.load(path, pick_device(options.device))
    if options.normals:
        folder = Path(options.normals).expanduser().resolve()
        files = find_images(folder)
        calibration.rank(len(files), rate, confidence)  # refused before any image is read
        images = load_images(files, detector.image_size, description="reading normal images")
        calibration.measure_normals(detector, images, source=folder.name, names=files)
    calibration.choose_thresholds(detector, rate, confidence)
    chosen = detector.calibration
    kept = f"; at most {rate:.3g} with confidence {confidence:g}" if rate else ""
    above = (chosen["normals"] + 1 - chosen["rank"]) / (chosen["normals"] + 1)
    print(f"normal images    {chosen['normals']}, {chosen.get('source', 'held out from training')}")
    print(f"rank             {chosen['rank']} of {chosen['normals']}")
    print(f"false alarms     a share of {above:.3g} expected{kept}")
    print(f"image threshold  {detector.threshold:.4g}")
    print(f"pixel threshold  {detector.pixel_threshold:.4g}")
    saved = detector.save(Path(options.out).expanduser() if options.out else path)
    print(saved)
    run = Run(saved.resolve().parent)
    if run.done and run.model == saved.resolve():
        print(f"It was evaluated with the thresholds before, so evaluate again: effad evaluate {run.folder}")
    return 0


def gallery_options(parser: argparse.ArgumentParser) -> None:
    """Options of `effad gallery`."""
    parser.add_argument("run", metavar="RUN", help="the folder of an evaluated run")
    parser.add_argument("--out", metavar="FOLDER", help="where to write it (default: RUN/gallery)")


def gallery(options: argparse.Namespace) -> int:
    """Write all test images of a run with their heatmaps as one page, for people without Jupyter."""
    from effad_lib import viewer

    run = Path(options.run).expanduser().resolve()
    print(viewer.write_gallery(viewer.of_run(run), Path(options.out).expanduser() if options.out else run / "gallery"))
    return 0


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

COMMANDS: dict[str, Command] = {
    "run": (run_options, run),
    "synthesize": (synthesize_options, synthesize),
    "damage": (damage_options, damage),
    "distill": (distill_options, distill),
    "probe": (probe_options, probe),
    "train": (train_options, train),
    "evaluate": (evaluate_options, evaluate),
    "gallery": (gallery_options, gallery),
    "threshold": (threshold_options, threshold),
    "detect": (detect_options, detect),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line; only the chosen command's options are built, as making them may need torch."""
    parser = Parser("effad", description="EfficientAD: anomaly detection trained on good images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"effad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name, (add, work) in COMMANDS.items():
        text = inspect.getdoc(work)
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(work=work)
        if name == chosen:
            add(command)
            asked = command
    options, extra = parser.parse_known_args(arguments)
    if extra:
        from effad_lib.settings import nearest

        wrong = next((argument for argument in extra if argument.startswith("-")), extra[0])
        known = set(re.findall(r"--[a-z][a-z-]*", asked.format_help()))
        asked.error(f"unknown argument {wrong}: {nearest(wrong, known).rstrip('.')}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after an error of the user's, or 130 after Ctrl-C."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"effad: {message}", file=sys.stderr)
        try:
            options = parse(sys.argv[1:] if arguments is None else arguments)
            return options.work(options)
        except KeyboardInterrupt as interrupt:
            print(f"\neffad: {str(interrupt) or 'stopped: what was finished before is kept.'}", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (OSError, ValueError, RuntimeError) as error:
            # Our own errors are written for people; those from deeper are faults and keep their traceback.
            if not isinstance(error, OSError) and not type(error).__module__.startswith("effad_lib"):
                raise
            print(f"effad: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
