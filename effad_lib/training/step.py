"""One step of Algorithm 1: its four loss terms and its learning rate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effad_lib import losses
from effad_lib.detector import EfficientAD
from effad_lib.distillation import learning_rate_factor


class Rates(NamedTuple):
    """How many times as fast as the student's other layers learn its last one and the autoencoder; in the paper 1."""

    head: float = 1.0
    autoencoder: float = 1.0


RATES = {"S": Rates(), "M": Rates(), "XS": Rates(head=8.0, autoencoder=0.5)}
"""The rates of each size; those of XS, which is ours, suit short schedules.

A step of Adam moves every weight by about the learning rate, so an output by that times the inputs of its layer:
4×4×256 in the last one of S, 1×1×96 in XS, a 43rd. At one rate XS spends a short schedule on its last layer; at 32
times that rate, channels before it die on textures. In an autoencoder that learns as fast as the student up to three
quarters of a layer's do.
"""


class Losses(NamedTuple):
    """The four terms of one step, each a scalar tensor."""

    hard: Tensor
    penalty: Tensor
    autoencoder: Tensor
    student_autoencoder: Tensor


class Draw(NamedTuple):
    """What one step trains on: which images [N], how their colours change [N] each, and natural images [N, 3, H, W]."""

    chosen: Tensor
    kinds: Tensor
    factors: Tensor
    natural: Tensor
    generator: Tensor  # the state of the generator after this draw

    def to(self, device: torch.device) -> Draw:
        """Return it on a device; from pinned memory nothing waits for that."""
        return Draw(*(value.to(device, non_blocking=True) for value in self[:-1]), self.generator)

    def pinned(self) -> Draw:
        """Return it in memory from which a graphics card fetches by itself."""
        return Draw(*(value.pin_memory() for value in self[:-1]), self.generator)


def training_losses(
    detector: EfficientAD,
    images: Tensor,
    augmented: Tensor,
    natural: Tensor,
    *,
    hard_quantile: float = 0.999,
    teacher_features: Tensor | None = None,
) -> Losses:
    """Return the four loss terms of one step of Algorithm 1.

    `images`, `augmented` and `natural` [N, 3, H, W] in [0, 1]; `teacher_features` is T̂(images) [N, C, h, w] where it is
    known already. The three student passes run as one batch, each through the half of the last layer that it needs.
    """
    with torch.no_grad():
        normalised, changed = detector.normalise(images), detector.normalise(augmented)
        if teacher_features is None:
            both = detector.teacher_features(torch.cat([normalised, changed]))
            teacher_features, teacher_changed = both.split([len(images), len(augmented)])
        else:
            teacher_changed = detector.teacher_features(changed)
    by_teacher, student_changed = detector.student.halves(
        torch.cat([normalised, detector.normalise(natural), changed]), len(images) + len(natural)
    )
    student_images, student_natural = by_teacher.split([len(images), len(natural)])
    rebuilt = detector.autoencoder(changed)
    return Losses(
        losses.hard_feature_loss(teacher_features, student_images, hard_quantile),
        losses.penalty_loss(student_natural),
        losses.autoencoder_loss(teacher_changed, rebuilt),
        losses.student_autoencoder_loss(rebuilt, student_changed),
    )


def step_factor(step: int, steps: int, schedule: str, warm_up: float) -> float:
    """Return the factor on the learning rate at `step`: the paper's ×0.1 after 95 %, or as in distillation."""
    if schedule == "step":
        return 0.1 if step >= 0.95 * steps else 1.0
    return learning_rate_factor(step, steps, schedule, warm_up)
