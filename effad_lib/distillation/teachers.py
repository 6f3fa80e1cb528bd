"""Teachers as files: weights in safetensors, beside them a card that says how they were made."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from effad_lib import __version__
from effad_lib.backbones import file_sha256, read_weights
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.documents import Takes, is_count, is_text, is_whole, read_json
from effad_lib.networks import PDN, PDN_LAYERS, Conv, check_network
from effad_lib.runs import PROJECT, Run, resolve, write_bytes, write_json
from effad_lib.settings import SettingsError
from effad_lib.tensors import unsound

TEACHERS = PROJECT / "data" / "teachers"
"""Where the shipped teachers lie, each `pdn_<size>.safetensors` with its card `pdn_<size>.json`."""

CARD: Takes = {
    "size": (is_text, "the name of a network"),
    "channels": (is_count, "a whole number of at least 1"),
    "sha256": (is_text, "a hash"),
    "photographs": (is_whole, "a whole number"),
    "settings": (lambda value: isinstance(value, dict), "names with values"),
}
"""What a teacher's card says; files of other implementations have none, and the first three are always there."""


def save_teacher(
    run: Run, settings: DistillationSettings, pdn: PDN, metrics: dict[str, Any], photographs: int, unreadable: int
) -> None:
    """Write `teacher.safetensors`, in half precision, and its card `teacher.json` into the run's folder."""
    weights = {name: value.detach().half().contiguous().cpu() for name, value in pdn.state_dict().items()}
    path = write_bytes(run.folder / "teacher.safetensors", save(weights))
    # Names, not paths: a card travels.
    named = replace(settings, backbone_weights=Path(settings.backbone_weights).name, images=Path(settings.images).name)
    card = {
        "network": f"PDN-{settings.size}",
        "size": settings.size,
        "channels": settings.channels,
        "sha256": file_sha256(path),
        "photographs": photographs,
        "unreadable": unreadable,
        "photographs_sha256": run.sources["photographs"],  # of their names
        "backbone_sha256": run.sources["backbone"],
        **{name: value for name, value in metrics.items() if name not in ("losses", "explained_variance")},
        "command": f"effad distill {named.as_options(leave_out=('run_folder', 'device', 'checkpoint_seconds'))}",
        "settings": {name: value for name, value in named.as_dict().items() if name not in ("run_folder", "device")},
        "versions": {"effad": __version__, "torch": torch.__version__, "torchvision": metadata.version("torchvision")},
        "losses": curve(metrics["losses"]),
        "explained_variance": metrics["explained_variance"],
    }
    write_json(run.folder / "teacher.json", card)


def curve(losses: list[float], most: int = 150) -> list[float]:
    """Return at most so many means of equally many neighbouring losses: a curve that fits on a card."""
    width = -(-len(losses) // most)
    groups = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [round(sum(group) / len(group), 4) for group in groups]


def teacher_files(source: str | Path) -> tuple[Path, Path]:
    """Return where a teacher's weights and its card should lie; `source` is a size or the path of a file."""
    known = str(source).upper() in PDN_LAYERS
    path = TEACHERS / f"pdn_{str(source).lower()}.safetensors" if known else resolve(source)
    return path, path.with_suffix(".json")


def load_teacher(source: str | Path, *, padding: bool = False) -> tuple[PDN, dict[str, Any]]:
    """Return a teacher in evaluation mode and its card.

    `source` is a size ("S", "M", "XS": the shipped teacher) or the path of a file. With a card beside it, the file's
    SHA-256 is checked against the card. Without one it is taken for a teacher of another implementation: a plain state
    dict (.pth, .pt or .safetensors) of convolutions in the PDN's order, as nelson1425/EfficientAD and anomalib publish
    them; size and channels follow from its layers. Raises `SettingsError` if it is missing, altered or unfit.
    """
    path, card_path = teacher_files(source)
    known = str(source).upper() in PDN_LAYERS
    if not path.is_file() or (known and not card_path.is_file()):
        there = ", ".join(sorted(p.stem.removeprefix("pdn_").upper() for p in TEACHERS.glob("*.safetensors"))) or "none"
        raise SettingsError(
            f"teacher {str(source)!r}: there is no {path}{' with a card beside it' if known else ''}. "
            f"Shipped teachers: {there}. Others are made by `effad distill`."
        )
    digest = file_sha256(path)
    if card_path.is_file():
        card = read_teacher_card(card_path)
        if digest != card["sha256"]:
            raise SettingsError(
                f"teacher {path}: its SHA-256 is {digest}, the card says {card['sha256']}. Fetch it again."
            )
        weights = read_weights(path)
    else:
        weights, card = _in_our_names(read_weights(path), path)
        card |= {"sha256": digest}
    if wrong := unsound(weights):
        raise SettingsError(f"teacher {path}: {wrong}. Distil or fetch it again.")
    if (channels := len(weights.get("head.bias", ()))) != card["channels"]:  # before so many are made
        raise SettingsError(f"teacher {path}: its card has {card['channels']} channels, its weights {channels}.")
    pdn = PDN(card["size"], card["channels"], padding)
    for name, value in pdn.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            got = tuple(weights[name].shape) if name in weights else "nothing"
            raise SettingsError(f"teacher {path}: layer {name} needs shape {tuple(value.shape)}, the file has {got}.")
    if more := sorted(weights.keys() - pdn.state_dict().keys()):
        raise SettingsError(f"teacher {path}: {more[0]} is no layer of PDN-{card['size']}. Fetch it again.")
    pdn.load_state_dict(weights)
    return pdn.eval().requires_grad_(False), card


def read_teacher_card(path: Path) -> dict[str, Any]:
    """Return a teacher's card. Raises `DocumentError` or `SettingsError` for one that does not say what it has to."""
    card = read_json(path, takes=CARD, needed=("size", "channels", "sha256"))
    check_network(card["size"])
    return card


def _in_our_names(weights: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of another implementation under this library's names, and a card of what they show.

    A PDN is a chain, so its convolutions in order are all there is to know: "0.weight", "3.weight" … in an
    `nn.Sequential`, "conv1.weight", "conv2.weight" … elsewhere.
    """
    layers = sorted((name for name in weights if name.endswith(".weight")), key=_natural)
    sizes = {sum(isinstance(layer, Conv) for layer in table): size for size, table in PDN_LAYERS.items()}
    if len(layers) not in sizes or set(weights) != {*layers, *(_bias(name) for name in layers)}:
        wanted = ", ".join(f"{count} for {size}" for count, size in sizes.items())
        raise SettingsError(
            f"teacher {path}: not the weights of a PDN. Its entries are {', '.join(sorted(weights, key=_natural)[:6])} "
            f"…; a PDN has weight and bias of each convolution and nothing else ({wanted})."
        )
    size, channels = sizes[len(layers)], len(weights[layers[-1]])
    pdn = PDN(size, channels)
    own = [name for name in pdn.state_dict() if name.endswith(".weight")]
    renamed = {}
    for theirs, ours in zip(layers, own, strict=True):
        for name, mine in ((theirs, ours), (_bias(theirs), _bias(ours))):
            needed = pdn.state_dict()[mine].shape
            if weights[name].shape != needed:
                raise SettingsError(
                    f"teacher {path}: layer {name} has shape {tuple(weights[name].shape)}, "
                    f"PDN-{size} needs {tuple(needed)}."
                )
            renamed[mine] = weights[name]
    return renamed, {"network": f"PDN-{size}", "size": size, "channels": channels}


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _natural(name: str) -> tuple[bool, list[int], str]:
    """Sort key by the numbers in a name, so that conv10 follows conv9; names without any, such as head, come last."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return not numbers, numbers, name
