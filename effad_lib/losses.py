"""The four terms of the training loss, each a function of tensors (paper, Sections 3.2 and 3.3, Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = 64
"""Values, a power of two, of which one maximum is taken at a time; the losses are the same with any."""


def hard_feature_loss(teacher: Tensor, student: Tensor, quantile: float = 0.999) -> Tensor:
    """Mean of those squared differences that reach their `quantile`: the student learns only where it is worst.

    `teacher` (normalised) and `student`: [N, C, h, w]. The quantile runs over all elements of the batch, with linear
    interpolation between order statistics; 0 gives the plain mean. Returns a scalar. Paper, Equation 3.
    """
    differences = _in_a_row(teacher) - _in_a_row(student)
    # The elements at or above the interpolated quantile are the k largest (but for exact ties): no quantile needs to be
    # computed, and topk, unlike torch.quantile, takes more than 2^24 elements.
    k = differences.numel() - math.ceil(quantile * (differences.numel() - 1) - 1e-9)
    return _mean_square(differences) if k >= differences.numel() else _largest(differences.square(), k).mean()


def penalty_loss(student_on_natural: Tensor) -> Tensor:
    """Mean squared output of the student's first half on a natural image: it must not imitate the teacher off-topic.

    `student_on_natural`: [N, C, h, w]. Returns a scalar. Paper, Equation 4.
    """
    return _mean_square(_in_a_row(student_on_natural))


def autoencoder_loss(teacher: Tensor, autoencoder: Tensor) -> Tensor:
    """Mean squared difference of the normalised teacher and the autoencoder on an augmented image [N, C, h, w]."""
    return _mean_square(_in_a_row(autoencoder) - _in_a_row(teacher))


def student_autoencoder_loss(autoencoder: Tensor, student: Tensor) -> Tensor:
    """Mean squared difference of the autoencoder and the student's second half [N, C, h, w].

    Its gradient reaches both networks, as in Algorithm 1.
    """
    return _mean_square(_in_a_row(student) - _in_a_row(autoencoder))


def _in_a_row(maps: Tensor) -> Tensor:
    """Return maps [N, C, h, w], or values of any other shape, in one row; half precision becomes float32.

    Maps are taken pixel by pixel, the order in which the networks leave them in memory.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return (maps.permute(0, 2, 3, 1) if maps.dim() == 4 else maps).flatten()


def _mean_square(values: Tensor) -> Tensor:
    """Return the mean of the squares of [n], as a product: on a CPU a quarter of the time of squares and their mean."""
    return torch.dot(values, values) / values.numel()


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the `k` largest of [n]: they are in those `k` pieces that have the largest maxima.

    To find these takes one pass over the values; to find thousands among millions at once takes several.
    """
    pieces = values.view(-1, math.gcd(len(values), PIECE))
    if k < len(pieces):
        with torch.no_grad():
            chosen = torch.topk(pieces.amax(1), k, sorted=False).indices
        values = pieces.index_select(0, chosen).flatten()
    return torch.topk(values, k, sorted=False).values
