"""The distillation itself: steps, checkpoints, TensorBoard, resume (Algorithm 3)."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from effad_lib.backbones import load_backbone
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.distillation.targets import Views, channel_statistics, fit_initialisation
from effad_lib.distillation.teachers import save_teacher
from effad_lib.images import NaturalImages
from effad_lib.networks import PDN
from effad_lib.runs import Run, RunError, finish_step_on_interrupt, resolve
from effad_lib.settings import PRECISIONS, SettingsError, pick_device

LOG_EVERY = 10
"""Steps whose mean loss is one value of the curve: single batches differ too much to be read."""


def learning_rate_factor(step: int, steps: int, schedule: str) -> float:
    """Return the factor on the learning rate at `step` of `steps`."""
    if schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def distil(settings: DistillationSettings) -> Run:
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
    return _distil(settings, run, Views(settings, natural, backbone), held_out, device)


def _distil(
    settings: DistillationSettings, run: Run, views: Views, held_out: NaturalImages, device: torch.device
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
        state = {"step": 0, "mean": mean, "std": std, "seconds": 0.0, "losses": [], "recent": []}
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

    losses: list[float] = state["losses"]  # the mean of each LOG_EVERY steps
    recent: list[Tensor] = [torch.tensor(value, device=device) for value in state["recent"]]  # of the steps since then
    began, saved = time.monotonic() - state["seconds"], time.monotonic()

    def save(step: int) -> None:
        state = {"step": step, "mean": mean.cpu(), "std": std.cpu(), "pdn": pdn.state_dict(), "losses": losses}
        state |= {"recent": [float(value) for value in recent]}
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
            recent.append(loss.detach())
            if (step + 1) % LOG_EVERY == 0 or step == settings.steps - 1:
                losses.append(value := float(torch.stack(recent).mean()))
                recent.clear()
                if not math.isfinite(value):
                    raise RunError(f"{run.folder}: the loss is {value} at step {step + 1}. Lower learning_rate.")
                board.add_scalar("distillation/loss", value, step + 1)
                bar.set_postfix(loss=f"{value:.3f}")
            if interrupted() or time.monotonic() - saved > settings.checkpoint_seconds:
                save(step + 1)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt(f"stopped after step {step + 1}; started again, the run continues there")
    save(settings.steps)
    seconds = time.monotonic() - began
    held_out_loss = _held_out_loss(pdn, views, held_out, mean, std, device) if settings.held_out else None
    metrics = {"loss": sum(losses[-20:]) / len(losses[-20:]), "held_out_loss": held_out_loss}
    save_teacher(run, settings, pdn, metrics | {"seconds": round(seconds, 1)}, len(views.natural))
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
