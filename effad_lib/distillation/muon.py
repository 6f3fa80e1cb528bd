"""Muon: steepest descent under the spectral norm, which makes much more of each step than Adam on short schedules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Odd quintic whose iteration drives singular values in (0, 1] to about 1 in five rounds (Jordan et al., 2024)."""

ADAMS_SIZE = 0.2
"""Root mean square of an update per unit of learning rate: about Adam's, so that both take rates of the same size."""


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
                update = orthogonal(ahead) * (ADAMS_SIZE * max(ahead.shape) ** 0.5)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight), alpha=group["lr"])


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Return `matrix` [m, n] with its singular values brought near 1: about U Vᵀ of its decomposition U S Vᵀ.

    Newton–Schulz: each round multiplies from the left by a polynomial in X Xᵀ. All of them commute, so the product is
    formed in the m×m Gram matrix and the wide matrix is multiplied only twice.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, rounds).T
    a, b, c = COEFFICIENTS
    matrix = matrix / matrix.norm().clamp(min=1e-12)
    gram = matrix @ matrix.T
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = eye
    for _ in range(rounds):
        factor = a * eye + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix
