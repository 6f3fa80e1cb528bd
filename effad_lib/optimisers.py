"""What moves the weights, and how fast: the paper's Adam or, for short schedules, Muon, which learns more per step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

OPTIMISERS = ("adam", "muon")
"""Adam is the paper's."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Odd quintic whose iteration drives singular values in (0, 1] to about 1 in five rounds (Jordan et al., 2024)."""

ADAMS_SIZE = 0.2
"""Root mean square of an update per unit of learning rate: about Adam's, so that both take rates of the same size."""

WARM_UP = 0.05
"""Share of the steps in which the rate of a cosine schedule grows."""

MOST_ROWS = 512
"""A larger matrix is taken in parts: the work grows with the cube of its rows. That of S's and M's student has 768, one
half for the teacher's features, the other for the autoencoder's."""


def optimisers(
    kind: str, weights: Iterable[Tensor], *, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return what learns the weights: Adam alone or, for "muon", Muon and Adam side by side.

    Muon takes the kernels that look at features. Those that look at the image (three channels, so at most three
    directions for each of its pixels) and the biases stay with Adam.
    """
    weights, rates = [*weights], {"lr": learning_rate, "weight_decay": weight_decay}
    by_muon = [kind == "muon" and weight.dim() > 1 and weight.shape[1] > 3 for weight in weights]
    kernels = [weight for weight, muons in zip(weights, by_muon, strict=True) if muons]
    rest = [weight for weight, muons in zip(weights, by_muon, strict=True) if not muons]
    adam = torch.optim.Adam(rest, fused=all(weight.device.type != "mps" for weight in rest), **rates)
    return [Muon(kernels, **rates), adam] if kernels else [adam]


def rate_factor(step: int, steps: int, schedule: str) -> float:
    """Return the factor on the learning rate at `step` of `steps`.

    "constant" is 1; "step" the paper's ×0.1 after 95 %; "cosine", for short schedules, grows for the share `WARM_UP`,
    then falls as half a cosine to zero.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 if step >= 0.95 * steps else 1.0
    warm = max(1, int(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal: all directions of a weight are learned at the same pace.

    For weights of two or more dimensions, read as matrices [out, everything else]. With Nesterov momentum and decoupled
    weight decay. Ours, after Jordan et al. (2024) and, for the size of the update, Liu et al. (arXiv 2502.16982).
    torch's own takes matrices only and works in bfloat16, which a CPU without it is slow to emulate.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"]).flatten(1)
                blocks = ahead.chunk(math.ceil(min(ahead.shape) / MOST_ROWS))
                update = torch.cat([orthogonal(block) * max(block.shape) ** 0.5 for block in blocks])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=group["lr"] * ADAMS_SIZE)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Return `matrix` [m, n] with its singular values brought near 1: about U Vᵀ of its decomposition U S Vᵀ.

    Newton–Schulz: each round multiplies from the left by a polynomial in X Xᵀ. All of them commute, so the product is
    formed in the m×m Gram matrix and the wide matrix is multiplied only twice.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, rounds).T
    matrix = matrix / matrix.norm().clamp(min=1e-12)
    gram = matrix @ matrix.T
    product = factor = _polynomial(gram)
    for _ in range(rounds - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    return product @ matrix


def _polynomial(gram: Tensor) -> Tensor:
    """Return the factor a I + b G + c G² by which a round multiplies."""
    a, b, c = COEFFICIENTS
    factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal().add_(a)
    return factor
