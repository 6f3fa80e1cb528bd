"""The loop of a training: steps, validation, checkpoints, TensorBoard, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from effad_lib import losses
from effad_lib.checkpoints import broken, check_plain, like, not_finite, readable, restore_optimiser, restore_scaler
from effad_lib.detector import EfficientAD
from effad_lib.distillation import channel_statistics, prefetched
from effad_lib.documents import is_number, is_seconds, is_whole
from effad_lib.images import NaturalImages, change_colour, draw_colours, to_float
from effad_lib.memory import kept_memory
from effad_lib.networks import feature_size, initialise
from effad_lib.optimisers import optimisers, rate_factor
from effad_lib.progress import progress, say
from effad_lib.runs import Run, RunError, finish_step_on_interrupt, write_text
from effad_lib.settings import cores
from effad_lib.training.settings import TrainingSettings
from effad_lib.training.step import Draw, Losses, training_losses

KEPT_CHECKPOINTS = 3
VALIDATION_IMAGES = 64
"""So many held-out images at most enter the validation loss; all of them enter the calibration."""


class Trainer:
    """One training with everything that a checkpoint has to hold; `loop` runs it to its end."""

    def __init__(
        self,
        settings: TrainingSettings,
        run: Run,
        detector: EfficientAD,
        images: Tensor,
        validation: Tensor,
        natural: NaturalImages,
        names: Sequence[str | Path] = (),
    ) -> None:
        self.settings, self.run, self.detector, self.natural = settings, run, detector, natural
        self.device = detector.device
        self.images, self.validation = images.to(self.device), validation.to(self.device)
        self.names = names
        self.drawn: list[list[int]] = []  # the images of each step since the losses were last looked at
        self.first_bad = torch.tensor(-1, device=self.device)  # the first of these steps whose loss is not finite
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.generator_state = self.generator.get_state()  # after the last step, whatever was drawn ahead
        self.step, self.seconds, self.stale = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self.kept: list[tuple[float, int]] = []  # validation loss and step of the best checkpoints, best first
        dtype = getattr(torch, settings.precision)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.losses = torch.compile(training_losses, mode=settings.compiled) if settings.compiled else training_losses
        state = run.load_checkpoint("last")
        if state is None:
            self.teacher_cache = self._ask_teacher(anew=True)
            if settings.initialisation == "scaled":
                first = detector.normalise(to_float(self.images[:8]))
                for network in (detector.student, detector.autoencoder):
                    # From zero: a random last layer is noise to unlearn, by which other layers die on some products.
                    initialise(network, first, deviation=0.0, centred=True)
        self.optimisers = optimisers(
            settings.optimiser,
            [*detector.student.parameters(), *detector.autoencoder.parameters()],
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        if state is not None:
            with readable(run, state):
                self._restore(state)
            self.teacher_cache = self._ask_teacher(anew=False)

    @torch.no_grad()
    def _ask_teacher(self, *, anew: bool) -> Tensor | None:
        """Return T̂ of all training images, which never changes, or None, with a word, if `cache_gb` has no room for it.

        If `anew`, set mean and deviation of the teacher's channels over the images (Algorithm 1, line 3 ff.) as well.
        """
        detector, images, room = self.detector, self.images, self.settings.cache_gb
        shape = len(images), detector.channels, *feature_size(images.shape[2:], detector.padding)
        needed = math.prod(shape) * 4 / 2**30  # in float32
        # Channels last, as is what it is compared with.
        cache = torch.empty(shape, device=self.device, memory_format=torch.channels_last) if needed <= room else None
        if cache is None and room:
            say(
                f"the teacher's features of {len(images)} images take {needed:.1f} GB, cache_gb is {room:g}: each "
                f"step computes those of its images again."
            )

        def outputs() -> Iterator[Tensor]:
            for start in progress(range(0, len(images), 8), desc="teacher features", leave=False):
                output = detector.teacher(detector.normalise(to_float(images[start : start + 8])))
                if cache is not None:
                    cache[start : start + 8] = output
                yield output

        with kept_memory():
            if anew:
                mean, deviation = channel_statistics(outputs())
                detector.teacher_mean.copy_(mean)
                detector.teacher_std.copy_(deviation)
            elif cache is not None:
                for _ in outputs():
                    pass
        return None if cache is None else cache.sub_(detector.teacher_mean).div_(detector.teacher_std)

    def loop(self) -> None:
        """Train from the current step to the last one, validating, logging and saving on the way."""
        from torch.utils.tensorboard import SummaryWriter

        settings, began = self.settings, time.monotonic() - self.seconds
        with (
            kept_memory(),
            finish_step_on_interrupt() as interrupted,
            SummaryWriter(self.run.folder / "tensorboard", purge_step=self.step + 1) as board,
            progress(initial=self.step, total=settings.steps, desc=f"training {settings.size}", unit="step") as bar,
        ):
            for draw in self.draws():
                if self.patience_is_over:
                    break
                terms = self.train_step(draw)
                self.step, self.generator_state = self.step + 1, draw.generator
                last = self.step == settings.steps
                if bar.update() or last:  # it was drawn; asking for the losses waits for the device
                    now = {name: f"{float(value):.3f}" for name, value in terms._asdict().items()}
                    bar.set_postfix(now, refresh=False)
                validated = self.step % settings.validate_every == 0 or last
                self.seconds = time.monotonic() - began
                stop = interrupted()  # once: what is asked for later is done after the next step
                saved = validated or stop or self.step % settings.checkpoint_every == 0
                if saved:
                    self._check_finite()
                if validated:
                    self._write_board(board, self._record(terms))
                if saved:
                    self.run.save_checkpoint("last", self.state())
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; started again, the run continues there")
        if settings.checkpoint == "best":
            best = self.run.load_checkpoint("best")
            with readable(self.run, best):
                self._load_networks(best)

    @property
    def patience_is_over(self) -> bool:
        """Whether as many validations as `patience` allows brought no better loss."""
        return bool(self.settings.patience) and self.stale >= self.settings.patience

    def draws(self) -> Iterator[Draw]:
        """Yield what each of the remaining steps trains on; for an accelerator made ahead, in threads."""
        settings = self.settings

        def draw() -> tuple[Tensor, tuple[Tensor, Tensor], list, Tensor]:
            count, generator = settings.batch_size, self.generator
            chosen = torch.randint(len(self.images), (count,), generator=generator)
            return chosen, draw_colours(count, generator), self.natural.draw(count, generator), generator.get_state()

        def make(drawn: tuple[Tensor, tuple[Tensor, Tensor], list, Tensor]) -> Draw:
            chosen, colours, views, state = drawn
            natural = self.natural.views(views, tuple(settings.image_size), crop_scale=settings.penalty_crops)
            made = Draw(chosen, *colours, natural, state)
            return made.pinned() if self.device.type == "cuda" else made

        workers = 0 if self.device.type == "cpu" else cores()
        return prefetched(draw, make, settings.steps - self.step, ahead=2 * workers, workers=max(1, workers))

    def train_step(self, draw: Draw) -> Losses:
        """Take one step of the optimisers on what was drawn and return the loss terms; nothing waits for the device."""
        settings, detector = self.settings, self.detector
        detector.train()
        self.drawn.append(draw.chosen.tolist())
        here = draw.to(self.device)
        images = to_float(self.images[here.chosen])
        augmented = change_colour(images, here.kinds, here.factors)
        cached = None if self.teacher_cache is None else self.teacher_cache[here.chosen]
        with self.autocast:
            terms = self.losses(
                detector,
                images,
                augmented,
                here.natural,
                hard_quantile=settings.hard_quantile,
                teacher_features=cached,
            )
            total = self.weighted(terms)
        bad = (self.first_bad < 0) & ~total.detach().isfinite()
        self.first_bad = torch.where(bad, len(self.drawn) - 1, self.first_bad)
        rate = settings.learning_rate * rate_factor(self.step, settings.steps, settings.schedule)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        return Losses(*torch.stack([term.detach() for term in terms]))  # a copy: a compiled step reuses its memory

    def _check_finite(self) -> None:
        """Raise `RunError` if a loss since this was last asked, or the state, is not finite: that is never saved."""
        if (first := int(self.first_bad)) >= 0:
            step = self.step - len(self.drawn) + first + 1
            images = ", ".join(str(self.names[k]) if self.names else f"image {k}" for k in self.drawn[first])
            raise self._not_finite("a loss", f"at step {step}, on {images}")
        if broken(self.state()):
            raise self._not_finite("a weight or a number of the optimiser's", f"after step {self.step}")
        self.drawn.clear()

    def _not_finite(self, what: str, where: str) -> RunError:
        rate = f"learning_rate (now {self.settings.learning_rate:g}) or the weights of the losses"
        return not_finite(self.run, what, where, rate)

    @torch.inference_mode()
    def dead_share(self) -> float:
        """Return the share of the student's last hidden channels that are zero on all of the validation images.

        A ReLU that is zero everywhere has no gradient and never comes back; a student of which all are has died.
        """
        alive = torch.zeros(self.detector.student.head.in_channels, dtype=torch.bool, device=self.device)
        for batch in self.validation[:VALIDATION_IMAGES].split(8):
            alive |= (self.detector.student.trunk(self.detector.normalise(to_float(batch))) > 0).any(dim=(0, 2, 3))
        return 1 - alive.float().mean().item()

    def weighted(self, terms: Losses) -> Tensor:
        """Return the total loss: the terms times their weights."""
        settings = self.settings
        weights = (
            settings.weight_hard,
            settings.weight_penalty,
            settings.weight_autoencoder,
            settings.weight_student_autoencoder,
        )
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    @torch.inference_mode()
    def validation_losses(self) -> tuple[float, float, float]:
        """Return hard, autoencoder and student–autoencoder loss on held-out normal images, without augmentation."""
        detector, sums = self.detector.eval(), torch.zeros(3)
        batches = self.validation[:VALIDATION_IMAGES].split(8)
        for batch in batches:
            normalised = detector.normalise(to_float(batch))
            teacher, rebuilt = detector.teacher_features(normalised), detector.autoencoder(normalised)
            by_teacher, by_autoencoder = detector.student(normalised).split(detector.channels, dim=1)
            terms = (
                losses.hard_feature_loss(teacher, by_teacher, self.settings.hard_quantile),
                losses.autoencoder_loss(teacher, rebuilt),
                losses.student_autoencoder_loss(rebuilt, by_autoencoder),
            )
            sums += torch.stack(terms).float().cpu() * len(batch)
        return tuple((sums / sum(len(batch) for batch in batches)).tolist())

    def _record(self, terms: Losses) -> dict[str, float]:
        """Validate, keep the checkpoint if it is among the best, and write `history.csv`."""
        row = {"step": self.step, "seconds": round(self.seconds, 2)}
        row |= {name: float(value) for name, value in terms._asdict().items()}
        row["total"] = float(self.weighted(terms))
        hard, autoencoder, student_autoencoder = self.validation_losses()
        row |= {"validation_hard": hard, "validation_autoencoder": autoencoder}
        row |= {"validation_student_autoencoder": student_autoencoder}
        row["validation"] = hard + autoencoder + student_autoencoder
        if not all(math.isfinite(value) for value in row.values()):
            raise self._not_finite("a loss", f"at step {self.step}: {row}")
        self.history.append(row)
        write_text(self.run.folder / "history.csv", pd.DataFrame(self.history).to_csv(index=False))
        self._keep(row["validation"])
        return row

    def _keep(self, loss: float) -> None:
        """Keep the networks as `best` and among the three best checkpoints if the validation loss earns it."""
        self.stale = 0 if not self.kept or loss < self.kept[0][0] else self.stale + 1
        self.kept = sorted([*self.kept, (loss, self.step)])
        dropped, self.kept = self.kept[KEPT_CHECKPOINTS:], self.kept[:KEPT_CHECKPOINTS]
        state = {"step": self.step, "validation": loss, **self._networks()}
        if (loss, self.step) in self.kept:
            self.run.save_checkpoint(f"step_{self.step:06d}", state)
        if self.kept[0] == (loss, self.step):
            self.run.save_checkpoint("best", state)
        for _, step in dropped:
            (self.run.folder / "checkpoints" / f"step_{step:06d}.pt").unlink(missing_ok=True)

    def _write_board(self, board: Any, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                part = "validation" if name.startswith("validation") else "training"
                board.add_scalar(f"{part}/{name.removeprefix('validation_')}", value, self.step)
        with torch.inference_mode():
            maps = torch.cat(self.detector.raw_maps(to_float(self.validation[:4])), dim=1).float()
        # One scale for the whole run: 1 is the teacher's variance, what a blind student would score.
        board.add_images("student–teacher map, held-out normal", maps[:, :1].clamp(0, 1), self.step)
        board.add_images("student–autoencoder map, held-out normal", maps[:, 1:].clamp(0, 1), self.step)

    def _networks(self) -> dict[str, Any]:
        return {
            "student": self.detector.student.state_dict(),
            "autoencoder": self.detector.autoencoder.state_dict(),
            "teacher_mean": self.detector.teacher_mean.cpu(),
            "teacher_std": self.detector.teacher_std.cpu(),
        }

    def _load_networks(self, state: dict[str, Any]) -> None:
        try:
            self.detector.student.load_state_dict(state["student"])
            self.detector.autoencoder.load_state_dict(state["autoencoder"])
        except RuntimeError as error:
            raise RunError(
                f"{self.run.folder}: its checkpoint is not of size {self.settings.size} with {self.detector.channels} "
                f"channels. Choose another run folder, or delete this one."
            ) from error
        check_plain(state, {name: like(getattr(self.detector, name)) for name in ("teacher_mean", "teacher_std")})
        self.detector.teacher_mean.copy_(state["teacher_mean"])
        self.detector.teacher_std.copy_(state["teacher_std"])

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue bit for bit: tensors and plain types only."""
        return {
            **self._networks(),
            "step": self.step,
            "seconds": self.seconds,
            "stale": self.stale,
            "history": self.history,
            "kept": self.kept,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": self.scaler.state_dict(),
            "generator": self.generator_state,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._load_networks(state)
        steps = self.settings.steps
        check_plain(
            state,
            {
                "step": (partial(is_whole, most=steps), f"a whole number from 0 to {steps}"),
                "seconds": (is_seconds, "seconds"),
                "stale": (is_whole, "a whole number"),
                "history": (_is_history, "rows of numbers"),
                "kept": (_is_kept, "pairs of loss and step"),
            },
        )
        self.step, self.seconds, self.stale = state["step"], state["seconds"], state["stale"]
        self.history, self.kept = state["history"], [tuple(entry) for entry in state["kept"]]
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            restore_optimiser(optimiser, kept, self.step, skips=self.scaler.is_enabled())
        restore_scaler(self.scaler, state["scaler"])
        self.generator.set_state(state["generator"])
        self.generator_state = state["generator"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random_cuda"])


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) and all(map(is_number, row.values())) for row in value)


def _is_kept(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and is_number(pair[0]) and is_whole(pair[1])
        for pair in value
    )
