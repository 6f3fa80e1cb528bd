"""One step of Algorithm 1: its four loss terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effad_lib import losses
from effad_lib.detector import EfficientAD


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
