"""Designs of small PDNs, compared: each is distilled briefly from the same views, then measured (ours)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from effad_lib.backbones import load_backbone
from effad_lib.checkpoints import readable
from effad_lib.datasets import Split, verify
from effad_lib.distillation import DistillationSettings
from effad_lib.distillation.loop import Distiller, sources
from effad_lib.distillation.processes import Processes
from effad_lib.distillation.targets import RecordedViews, Views, photographs
from effad_lib.documents import Takes, is_number, is_share, read_json
from effad_lib.execution import alone_in
from effad_lib.images import Size
from effad_lib.networks import OUT, PDN, PDN_LAYERS, Autoencoder, Conv, Layers, Pool, multiply_adds
from effad_lib.probing import METRICS, check, probe
from effad_lib.progress import progress
from effad_lib.runs import Run, RunError, resolve, write_json, write_text
from effad_lib.settings import SettingsError, nearest, pick_device

DESIGNS: dict[str, Layers] = {
    **PDN_LAYERS,
    # XS in half the width of S.
    "XS-wide": (
        *(Conv(4, 64, 3), Pool(), Conv(4, 128, 3), Pool()),
        *(Conv(3, 128, 1), Conv(4, 128, 0, own=True), Conv(1, OUT, 0)),
    ),
    # A convolution followed by pooling becomes one strided convolution of the same 5×5 field.
    "strided": (Conv(5, 64, 4, 2), Conv(5, 128, 4, 2), Conv(3, 128, 1), Conv(4, 128, 0, own=True), Conv(1, OUT, 0)),
    "strided-narrow": (Conv(5, 32, 4, 2), Conv(5, 64, 4, 2), Conv(3, 64, 1), Conv(4, 64, 0, own=True), Conv(1, OUT, 0)),
    "strided-wide": (
        Conv(5, 96, 4, 2),
        Conv(5, 192, 4, 2),
        Conv(3, 192, 1),
        Conv(4, 192, 0, own=True),
        Conv(1, OUT, 0),
    ),
    # One convolution with stride 4 in place of two with stride 2.
    "strided-patches": (Conv(13, 128, 12, 4), Conv(3, 128, 1), Conv(4, 128, 0, own=True), Conv(1, OUT, 0)),
    # Fewer channels into the 4×4 convolution, more out of it.
    "strided-bottleneck": (
        *(Conv(5, 64, 4, 2), Conv(5, 128, 4, 2), Conv(3, 128, 1)),
        *(Conv(1, 64, 0), Conv(4, 192, 0, own=True), Conv(1, OUT, 0)),
    ),
    # Each convolution behind the first split into one channel by channel and a 1×1 across channels, which is wider.
    "strided-depthwise": (
        *(Conv(5, 64, 4, 2), Conv(5, 64, 4, 2, depthwise=True), Conv(1, 256, 0)),
        *(Conv(3, 256, 1, depthwise=True), Conv(1, 256, 0), Conv(4, 256, 0, depthwise=True), Conv(1, OUT, 0)),
    ),
    # S with half its channels.
    "S-half": (Conv(4, 64, 3), Pool(), Conv(4, 128, 3), Pool(), Conv(3, 128, 1), Conv(4, OUT, 0)),
}
"""S, M and XS, and candidates of the same geometry (33×33 pixels, one cell every 4) with the autoencoder of XS."""

EXPLORATION: dict[str, Any] = DistillationSettings.recipe("cpu") | {
    "steps": 600,
    "learning_rate": 2e-3,
    "run_folder": "runs/designs",
}
"""Settings to start from: the recipe for CPUs with the rate of the shipped XS, in few steps."""

DISTILLED: Takes = dict.fromkeys(("held_out_loss", "explained_variance"), (is_number, "a number"))
"""What `metrics.json` of each design says for the table."""


def check_design(name: str) -> str:
    """Return `name` if there is such a design. Raises `SettingsError` that lists the known ones."""
    if name not in DESIGNS:
        raise SettingsError(f"unknown design {name!r}: {nearest(name, DESIGNS)}")
    return name


def base_size(name: str) -> str:
    """Return the size whose autoencoder and settings a design has: its own for S, M and XS, else XS."""
    return name if name in PDN_LAYERS else "XS"


def cost(name: str, channels: int = 384) -> dict[str, float]:
    """Return the 10⁹ multiply-adds at 256×256 pixels of a design's teacher, and of teacher, student and autoencoder."""
    with torch.device("meta"):
        teacher, student = (PDN(base_size(name), channels, layers=DESIGNS[name], targets=k) for k in (1, 2))
        autoencoder = Autoencoder(base_size(name), channels)
    return {
        "teacher_gmac": multiply_adds(teacher) / 1e9,
        "detector_gmac": sum(map(multiply_adds, (teacher, student, autoencoder))) / 1e9,
    }


def explore(
    names: Sequence[str],
    settings: DistillationSettings,
    splits: Sequence[Split],
    out: str | Path,
    *,
    views: int = 4000,
    image_size: Size = (128, 128),
    bank: int = 2000,
) -> pd.DataFrame:
    """Distil designs under equal conditions, probe them, and write a table to `out` (CSV), the cheapest design first.

    `settings` are those of each distillation, in a folder of the design's name below `run_folder`; `size` does not
    matter. All see the same `views`, for which the backbone answers once. `image_size` and `bank` as in
    `probing.probe`. The table is written anew after each design; a finished distillation or probe is not done again,
    and an interrupted distillation continues. Columns: design, layers, teacher_gmac and detector_gmac (`cost`), steps,
    held_out_loss, explained_variance (its mean over channels), and each of `probing.METRICS` for each split that has
    it. Raises `SettingsError`, `ImageError`, `DatasetError` or `RunError` before work starts, such as `LockError` while
    another process works in the folder.
    """
    for name in names:
        check_design(name)
    if len(set(names)) < len(names) or not names:
        raise SettingsError(f"designs {', '.join(names) or '[]'}: takes one name or more, each once.")
    settings.require(settings.held_out > 0, "held_out", "one photograph or more to compare designs by")
    if views < settings.batch_size:
        raise SettingsError(f"views = {views}: takes a batch or more, {settings.batch_size}.")
    out = Path(out)
    if out.is_dir():
        raise SettingsError(f"{out} is a folder: name the file that gets the table.")
    check(splits, image_size, bank)
    for split in splits:
        verify(split)
    device = pick_device(settings.device)
    natural, held_out = photographs(settings)
    backbone = load_backbone(settings.backbone, settings.backbone_weights, width=settings.channels).to(device)
    costs = {name: cost(name, settings.channels) for name in names}
    names = sorted(names, key=lambda name: costs[name]["detector_gmac"])
    made_from = sources(settings, [*natural.paths, *held_out.paths]) | {"views": str(views)}
    with ExitStack() as held:
        held.enter_context(alone_in(settings.run_folder))
        runs = {}
        for name in names:
            layers = hashlib.sha256(repr(DESIGNS[name]).encode()).hexdigest()
            own = replace(settings, size=base_size(name), run_folder=str(resolve(settings.run_folder) / name))
            held.enter_context(alone_in(own.run_folder))
            runs[name] = Run(own.run_folder), own
            runs[name][0].start(own, made_from | {"layers": layers})
        recorded, rows = None, []
        for name in progress(names, desc="designs"):
            run, own = runs[name]
            if not run.done:
                recorded = recorded or RecordedViews(Views(settings, natural, backbone), views, device)
                distiller = Distiller(own, run, recorded, device, Processes(), DESIGNS[name])
                distiller.loop()
                loss, explained = distiller.judge(held_out)
                seconds = round(distiller.seconds, 1)
                run.finish(
                    {"held_out_loss": loss, "explained_variance": sum(explained) / len(explained), "seconds": seconds}
                )
            found = read_json(run.folder / "metrics.json", takes=DISTILLED, needed=DISTILLED)
            found = {metric: found[metric] for metric in DISTILLED}
            found |= _probed(name, run, own, splits, {"image_size": list(image_size), "bank": bank, "seed": own.seed})
            rows.append({"design": name, "layers": describe(DESIGNS[name]), **costs[name], "steps": own.steps, **found})
            write_text(out, pd.DataFrame(rows).round(4).to_csv(index=False, lineterminator="\n"))
        return pd.DataFrame(rows)


def _probed(
    name: str, run: Run, settings: DistillationSettings, splits: Sequence[Split], how: dict[str, Any]
) -> dict[str, float]:
    """Return what probes find of a distilled design, each kept in the run's `probe.json` and taken from there."""
    path = run.folder / "probe.json"
    takes = dict.fromkeys((split.name for split in splits), (_is_probed, f"found values of {', '.join(METRICS)}"))
    kept = read_json(path, takes=takes) if path.is_file() else {}
    pdn, state = PDN(settings.size, settings.channels, True, DESIGNS[name]), run.load_checkpoint()
    if state is None:
        raise RunError(f"{run.folder} has lost its checkpoint. Delete the run to distil this design anew.")
    with readable(run, state):
        pdn.load_state_dict(state["pdn"])
    pdn = pdn.to(pick_device(settings.device)).eval().requires_grad_(False)
    found = {}
    for split in splits:
        exactly = how | {"train": len(split.train), "test": len(split.test)}
        if kept.get(split.name, {}).get("how") != exactly:
            values = probe(pdn, split, how["image_size"], bank=how["bank"], seed=how["seed"])
            kept[split.name] = {"how": exactly, "found": values}
            write_json(path, kept)
        for metric, value in kept[split.name]["found"].items():
            if value is not None:
                found[f"{METRICS[metric]} {split.name}"] = value
    return found


def _is_probed(value: Any) -> bool:
    found = value.get("found") if isinstance(value, dict) else None
    return isinstance(found, dict) and found.keys() == METRICS.keys() and all(map(is_share, found.values()))


def describe(layers: Layers) -> str:
    """Return layers in words: "5×5/2 64" is a convolution 5×5 with stride 2 to 64 channels."""
    words = []
    for layer in layers:
        if isinstance(layer, Pool):
            words.append("pool")
            continue
        kernel = f"{layer.kernel}×{layer.kernel}" + f"/{layer.stride}" * (layer.stride > 1)
        channels = "each channel" if layer.depthwise else "out" if layer.channels == OUT else layer.channels
        words.append(f"{kernel} {channels}")
    return ", ".join(words)
