"""The four terms of the training loss, each a function of tensors (paper, Sections 3.2 and 3.3, Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def hard_feature_loss(teacher: Tensor, student: Tensor, quantile: float = 0.999) -> Tensor:
    """Mean of those squared differences that reach their `quantile`: the student learns only where it is worst.

    `teacher` (normalised) and `student`: [N, C, h, w]. The quantile runs over all elements of the batch, with linear
    interpolation between order statistics; 0 gives the plain mean. Returns a scalar. Paper, Equation 3.
    """
    differences = (teacher - student).square().flatten()
    # The elements at or above the interpolated quantile are the k largest (but for exact ties): no quantile needs to be
    # computed, and topk, unlike torch.quantile, takes more than 2^24 elements.
    k = differences.numel() - math.ceil(quantile * (differences.numel() - 1) - 1e-9)
    return differences.mean() if k >= differences.numel() else torch.topk(differences, k, sorted=False).values.mean()


def penalty_loss(student_on_natural: Tensor) -> Tensor:
    """Mean squared output of the student's first half on a natural image: it must not imitate the teacher off-topic.

    `student_on_natural`: [N, C, h, w]. Returns a scalar. Paper, Equation 4.
    """
    return student_on_natural.square().mean()


def autoencoder_loss(teacher: Tensor, autoencoder: Tensor) -> Tensor:
    """Mean squared difference of the normalised teacher and the autoencoder on an augmented image [N, C, h, w]."""
    return F.mse_loss(autoencoder, teacher)


def student_autoencoder_loss(autoencoder: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of the autoencoder and the student's second half [N, C, h, w].

    Its gradient reaches both networks, as in Algorithm 1.
    """
    return F.mse_loss(student, autoencoder)
