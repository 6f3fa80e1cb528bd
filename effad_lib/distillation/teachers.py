"""Teachers as files: weights in safetensors, beside them a card that says how they were made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from effad_lib import __version__
from effad_lib.backbones import file_sha256
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.networks import PDN
from effad_lib.runs import PROJECT, Run, resolve, write_json, write_with
from effad_lib.settings import SettingsError

TEACHERS = PROJECT / "data" / "teachers"
"""Where the shipped teachers lie, each `pdn_<size>.safetensors` with its card `pdn_<size>.json`."""


def save_teacher(run: Run, settings: DistillationSettings, pdn: PDN, metrics: dict[str, Any], photographs: int) -> None:
    """Write `teacher.safetensors`, in half precision, and its card `teacher.json` into the run's folder."""
    weights = {name: value.detach().half().contiguous().cpu() for name, value in pdn.state_dict().items()}
    path = write_with(run.folder / "teacher.safetensors", lambda partial: save_file(weights, partial))
    # Names, not paths: a card travels.
    named = replace(settings, backbone_weights=Path(settings.backbone_weights).name, images=Path(settings.images).name)
    local = resolve(settings.backbone_weights) if settings.backbone_weights else None
    card = {
        "network": f"PDN-{settings.size}",
        "size": settings.size,
        "channels": settings.channels,
        "sha256": file_sha256(path),
        "photographs": photographs,
        "backbone_sha256": file_sha256(local) if local else "as published",
        **metrics,
        "command": f"effad distill {named.as_options(leave_out=('run_folder', 'device', 'checkpoint_seconds'))}",
        "settings": {name: value for name, value in named.as_dict().items() if name not in ("run_folder", "device")},
        "versions": {"effad": __version__, "torch": torch.__version__},
    }
    write_json(run.folder / "teacher.json", card)


def load_teacher(source: str | Path, *, padding: bool = False) -> tuple[PDN, dict[str, Any]]:
    """Return a teacher in evaluation mode and its card.

    `source` is a size ("S", "M", "XS": the shipped teacher) or the path of a `.safetensors` file with its card beside
    it. The file's SHA-256 is checked against the card. Raises `SettingsError` if it is missing, altered or unfit.
    """
    shipped = TEACHERS / f"pdn_{str(source).lower()}.safetensors"
    path = shipped if not str(source).endswith(".safetensors") else (PROJECT / source).resolve()
    card_path = path.with_suffix(".json")
    if not path.is_file() or not card_path.is_file():
        there = ", ".join(sorted(p.stem.removeprefix("pdn_").upper() for p in TEACHERS.glob("*.safetensors"))) or "none"
        raise SettingsError(
            f"teacher {str(source)!r}: {path.name} and its card {card_path.name} are not both in {path.parent}. "
            f"Shipped teachers: {there}. Others are made by `effad distill`."
        )
    card = json.loads(card_path.read_text(encoding="utf-8"))
    digest = file_sha256(path)
    if digest != card["sha256"]:
        raise SettingsError(f"teacher {path}: its SHA-256 is {digest}, the card says {card['sha256']}. Fetch it again.")
    pdn = PDN(card["size"], card["channels"], padding)
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    for name, value in pdn.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            got = tuple(weights[name].shape) if name in weights else "nothing"
            raise SettingsError(f"teacher {path}: layer {name} needs shape {tuple(value.shape)}, the file has {got}.")
    pdn.load_state_dict(weights)
    return pdn.eval().requires_grad_(False), card
