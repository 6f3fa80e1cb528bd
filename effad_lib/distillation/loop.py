"""The distillation itself: steps, checkpoints, TensorBoard, resume (Algorithm 3)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effad_lib.backbones import file_sha256, load_backbone, weights_file
from effad_lib.checkpoints import broken, check_plain, like, not_finite, readable, restore_optimiser, restore_scaler
from effad_lib.distillation.processes import Processes, joined
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.distillation.targets import Views, channel_statistics, fit_initialisation, photographs, prefetched
from effad_lib.distillation.teachers import save_teacher
from effad_lib.documents import are_numbers, is_seconds, is_whole
from effad_lib.execution import alone_in
from effad_lib.images import NaturalImages, names_sha256
from effad_lib.memory import enough_memory, kept_memory
from effad_lib.networks import PDN, Layers
from effad_lib.optimisers import optimisers, rate_factor
from effad_lib.progress import progress
from effad_lib.runs import Run, RunError, finish_step_on_interrupt, resolve
from effad_lib.settings import SettingsError, pick_device

LOG_EVERY = 10
"""Steps whose mean loss is one value of the curve: single batches differ too much to be read."""


def distil(settings: DistillationSettings) -> Run:
    """Distil a teacher into `settings.run_folder`, or continue one that was interrupted there.

    Writes `teacher.safetensors` with its card `teacher.json`, TensorBoard scalars, a checkpoint now and then, and
    `metrics.json` at the end. Started by `torchrun`, the processes share each batch, and the result is that of one
    process but for rounding. Raises `SettingsError`, `ImageError` or `RunError` before work starts, such as `LockError`
    while another process works in the folder, and `OutOfMemory` when a step takes too much. Algorithm 3.
    """
    run = Run(settings.run_folder)
    with joined(pick_device(settings.device)) as (processes, device):
        if settings.batch_size % processes.count:
            raise SettingsError(
                f"batch_size = {settings.batch_size}: {processes.count} processes cannot share it equally."
            )
        workers = 0 if device.type == "cpu" else (os.cpu_count() or 1) // processes.count
        natural, held_out = photographs(settings, workers)
        backbone = load_backbone(settings.backbone, settings.backbone_weights, width=settings.channels).to(device)
        with alone_in(run.folder) if processes.rank == 0 else nullcontext():
            if processes.rank == 0:
                run.start(settings, sources(settings, [*natural.paths, *held_out.paths]))
            processes.wait()
            if not run.done:
                views = Views(settings, natural, backbone)
                sizes = {name: getattr(settings, name) for name in ("backbone", "size", "image_size", "batch_size")}
                with enough_memory(run.folder, sizes):
                    distiller = Distiller(settings, run, views, device, processes)
                    distiller.loop()
                    if processes.rank == 0:
                        distiller.finish(held_out)
                processes.wait()
    return run


class Distiller:
    """One distillation with everything that a checkpoint has to hold; `loop` runs it to its end.

    `layers` takes the place of those of the settings' size.
    """

    def __init__(
        self,
        settings: DistillationSettings,
        run: Run,
        views: Views,
        device: torch.device,
        processes: Processes,
        layers: Layers | None = None,
    ) -> None:
        self.settings, self.run, self.views, self.device = settings, run, views, device
        self.processes = processes
        self.generator = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        self.pdn = PDN(settings.size, settings.channels, settings.padding, layers).to(device)
        self.dtype = getattr(torch, settings.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # the mean of each LOG_EVERY steps
        self.recent: list[Tensor] = []  # the losses of the steps since then
        self.drawn: list[list] = []  # what the steps of this process since then looked at
        self.unreadable: set[int] = set()  # photographs that no process could read
        shape = (1, settings.channels, 1, 1)
        self.mean, self.std = torch.zeros(shape, device=device), torch.ones(shape, device=device)
        state = run.load_checkpoint("last")
        if state is None:
            self._prepare()
        else:
            with readable(run, state):
                self.pdn.load_state_dict(state["pdn"])
                check_plain(state, {"mean": like(self.mean), "std": like(self.std)})
                self.mean.copy_(state["mean"])
                self.std.copy_(state["std"])
        self.network = processes.wrap(self.pdn)
        self.optimisers = optimisers(
            settings.optimiser,
            self.pdn.parameters(),
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        if state is not None:
            with readable(run, state):
                self._restore(state)

    def _prepare(self) -> None:
        """Take the statistics of the backbone's channels and, where wanted, fit the PDN's last layer."""
        settings = self.settings
        if self.processes.rank == 0:
            mean, std = _target_statistics(self.views, settings, self.device)
            self.mean, self.std = mean.to(self.device), std.to(self.device)
        self.processes.broadcast([self.mean, self.std])
        if settings.initialisation == "fitted":
            images, targets = self.views.draw(settings.fit_views, self.generator, self.device)
            fit_initialisation(self.pdn, images, (targets - self.mean) / self.std, settings.ridge)

    def loop(self) -> None:
        """Distil from the current step to the last one, logging and saving on the way."""
        settings, began = self.settings, time.monotonic() - self.seconds
        saved, first = time.monotonic(), self.processes.rank == 0
        asked, waited = time.monotonic(), 0.0  # for images
        with (
            kept_memory(),
            finish_step_on_interrupt() as interrupted,
            _board(self.run, self.step, first) as write,
            progress(
                initial=self.step, total=settings.steps, desc=f"distilling {settings.size}", disable=not first
            ) as bar,
        ):
            for large, drawn, generator in self._batches():
                self.drawn.append(drawn)
                waited += time.monotonic() - asked
                self.recent.append(self.train_step(large))
                self.step += 1
                bar.update()
                last = self.step == settings.steps
                if self.step % LOG_EVERY == 0 or last:
                    value = self._log()
                    write("distillation/loss", value, self.step)
                    write("distillation/seconds_waited_for_images", waited, self.step)
                    waited = 0.0
                    bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                self.seconds = time.monotonic() - began
                due = time.monotonic() - saved > settings.checkpoint_seconds
                together = self.processes.count == 1 or self.step % LOG_EVERY == 0 or last  # asking the others waits
                stop = together and self.processes.any(interrupted(), self.device)
                self.unreadable.update(self.views.natural.skipped)
                if stop or last:
                    self.unreadable = self.processes.union(self.unreadable)
                if first and (stop or due or last):
                    self._save(generator)
                    saved = time.monotonic()
                if stop and not last:
                    self.processes.wait()  # for the first one to save: torchrun ends all as soon as one has ended
                    raise KeyboardInterrupt(f"stopped after step {self.step}; started again, the run continues there")
                asked = time.monotonic()

    def _batches(self) -> Iterator[tuple[Tensor, list, Tensor]]:
        """Return this process's views of each remaining step, with what was drawn and the generator's state after it.

        On an accelerator the next batches are read while it works on this one.
        """

        def draw() -> tuple[list, Tensor]:
            return self.views.drawn(self.settings.batch_size, self.generator), self.generator.get_state()

        def make(drawn: tuple[list, Tensor]) -> tuple[Tensor, list, Tensor]:
            large = self.views.large(drawn[0][self.processes.share])
            return large.pin_memory() if self.device.type == "cuda" else large, *drawn

        return prefetched(draw, make, self.settings.steps - self.step, ahead=0 if self.device.type == "cpu" else 3)

    def train_step(self, large: Tensor) -> Tensor:
        """Take one step on views [N, 3, 2H, 2W] and return the loss, detached."""
        settings = self.settings
        rate = settings.learning_rate * rate_factor(self.step, settings.steps, settings.schedule)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            images, targets = self.views.pair(large.to(self.device, non_blocking=True))
            loss = F.mse_loss(self.network(images), (targets - self.mean) / self.std)
        self.scaler.scale(loss).backward()
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        return loss.detach()

    def _log(self) -> float:
        """Add the mean loss of the recent steps to the curve and return it. Raises `RunError` if one is not finite."""
        recent = self.processes.mean(torch.stack(self.recent))
        self._check_losses(recent.tolist())
        self.recent.clear()
        self.drawn.clear()
        self.losses.append(float(recent.mean()))
        return self.losses[-1]

    def _save(self, generator: Tensor) -> None:
        """Save the checkpoint `last`, or raise `RunError` if its state is not finite: the one before stays."""
        state = self.state(generator)
        self._check_losses(state["recent"])
        if broken(state):
            raise self._not_finite("a weight or a number of the optimiser's", f"after step {self.step}")
        self.run.save_checkpoint("last", state)

    def _check_losses(self, recent: list[float]) -> None:
        """Raise `RunError` that names the first of the last steps whose loss is not finite, and its photographs."""
        before = len(recent) - len(self.drawn)  # from a checkpoint, which holds finite ones alone
        for place, loss in enumerate(recent):
            if not math.isfinite(loss):
                step, images = self.step - len(recent) + place + 1, self.views.names(self.drawn[place - before])
                raise self._not_finite("the loss", f"at step {step}, on {', '.join(images)}")

    def _not_finite(self, what: str, where: str) -> RunError:
        return not_finite(self.run, what, where, f"learning_rate (now {self.settings.learning_rate:g})")

    def state(self, generator: Tensor) -> dict[str, Any]:
        """Return everything needed to continue; `generator` is its state after the last step's views."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "mean": self.mean.cpu(),
            "std": self.std.cpu(),
            "pdn": self.pdn.state_dict(),
            "losses": self.losses,
            "unreadable": sorted(self.unreadable),
            "recent": [float(value) for value in self.recent],
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": self.scaler.state_dict(),
            "generator": generator,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        steps, photographs = self.settings.steps, len(self.views.natural)

        def is_recent(value: Any) -> bool:
            return are_numbers(value) and len(value) == (state["step"] % LOG_EVERY if state["step"] < steps else 0)

        def is_curve(value: Any) -> bool:
            means = math.ceil((state["step"] - len(state["recent"])) / LOG_EVERY)
            return are_numbers(value) and len(value) == means

        def is_unreadable(value: Any) -> bool:
            return isinstance(value, list) and all(is_whole(one, most=photographs - 1) for one in value)

        check_plain(
            state,
            {
                "step": (partial(is_whole, most=steps), f"a whole number from 0 to {steps}"),
                "seconds": (is_seconds, "seconds"),
                "recent": (is_recent, "a number for each step since the last mean"),
                "losses": (is_curve, f"a mean for each {LOG_EVERY} steps"),
                "unreadable": (is_unreadable, f"numbers of the {photographs} photographs"),
            },
        )
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.unreadable = set(state["unreadable"])
        self.recent = [torch.tensor(value, device=self.device) for value in state["recent"]]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            restore_optimiser(optimiser, kept, self.step, skips=self.scaler.is_enabled())
        restore_scaler(self.scaler, state["scaler"])
        self.generator.set_state(state["generator"])

    def finish(self, held_out: NaturalImages) -> None:
        """Measure the loss on photographs that were held out, write the teacher with its card, and end the run."""
        metrics = {"loss": sum(self.losses[-20:]) / len(self.losses[-20:])}
        held_out_loss, explained = self.judge(held_out) if len(held_out) else (None, [])
        metrics["held_out_loss"] = held_out_loss
        metrics["seconds"] = round(self.seconds, 1)
        metrics["losses"], metrics["explained_variance"] = self.losses, explained
        photographs = len(self.views.natural) - len(self.unreadable)
        save_teacher(self.run, self.settings, self.pdn, metrics, photographs, len(self.unreadable))
        self.run.finish(metrics | {"steps": self.settings.steps})

    @torch.no_grad()
    def judge(self, held_out: NaturalImages) -> tuple[float, list[float]]:
        """Return the mean loss, and the share of each channel's variance that the teacher explains.

        Taken over fixed views of photographs that training never saw, about two for each.
        """
        generator = torch.Generator().manual_seed(2)
        views = Views(self.settings, held_out, self.views.backbone)
        batch, errors = self.settings.batch_size, []

        def targets() -> Iterator[Tensor]:
            for _ in range(max(1, 2 * len(held_out) // batch)):
                images, features = views.draw(batch, generator, self.device)
                wanted = (features - self.mean) / self.std
                errors.append(F.mse_loss(self.pdn(images), wanted, reduction="none").mean((0, 2, 3)))
                yield wanted

        _, deviation = channel_statistics(targets())
        error = torch.stack(errors).mean(0)
        explained = 1 - error / deviation.flatten().square()
        return error.mean().item(), [round(share, 3) for share in explained.tolist()]


def sources(settings: DistillationSettings, paths: list[Path]) -> dict[str, str]:
    """Return what a distillation is made from: the hash of the backbone's file and of the photographs' names."""
    folder = resolve(settings.images) if settings.images else ""
    return {
        "backbone": file_sha256(weights_file(settings.backbone, settings.backbone_weights)),
        "photographs": names_sha256(paths, folder),
    }


@contextmanager
def _board(run: Run, step: int, first: bool) -> Iterator[Callable[[str, float, int], None]]:
    """Yield a function that writes a scalar for TensorBoard, which only the first process does."""
    if not first:
        yield lambda name, value, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run.folder / "tensorboard", purge_step=step + 1) as board:
        yield board.add_scalar


def _target_statistics(views: Views, settings: DistillationSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    sizes = [settings.batch_size] * (settings.statistics_images // settings.batch_size)
    sizes += [settings.statistics_images % settings.batch_size] * (settings.statistics_images % settings.batch_size > 0)
    return channel_statistics(
        views.draw(size, generator, device)[1] for size in progress(sizes, desc="backbone statistics", leave=False)
    )
