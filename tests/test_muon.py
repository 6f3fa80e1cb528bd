"""Muon: orthogonal as the singular value decomposition says, descending as torch's own does."""

import pytest
import torch

from effad_lib.distillation import DistillationSettings, muon
from effad_lib.distillation.loop import optimisers
from effad_lib.networks import PDN


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_orthogonal_is_the_quintic_on_the_singular_values(shape):
    """Against the singular value decomposition, whose values go through the polynomial one by one."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = muon.COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert torch.allclose(muon.orthogonal(matrix), left @ values.diag() @ right, atol=1e-9)
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_descends_as_the_published_one():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 30), torch.randn(4, 12, 30)
    ours = torch.nn.Parameter(start.view(12, 10, 3, 1).clone())
    theirs = torch.nn.Parameter(start.clone())
    optimisers = (
        muon.Muon([ours], lr=0.1, weight_decay=0.05),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.view_as(ours), gradient
        for optimiser in optimisers:
            optimiser.step()
    moved = (theirs - start).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.02 * moved, "but for torch's bfloat16"


@pytest.mark.parametrize("size", ["XS", "S", "M"])
def test_every_weight_has_one_optimiser(size):
    pdn = PDN(size)
    shared = optimisers(pdn, DistillationSettings(size=size, optimiser="muon"))
    held = [weight for optimiser in shared for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, pdn.parameters()))
    kernels = shared[0].param_groups[0]["params"]
    assert all(kernel.dim() == 4 and kernel.shape[1] > 3 for kernel in kernels) and len(kernels) >= 3
    (alone,) = optimisers(pdn, DistillationSettings(size=size))
    assert type(alone) is torch.optim.Adam, "the paper's"
