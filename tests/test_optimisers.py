"""Schedules; Muon: orthogonal as the singular value decomposition says, descending as torch's own does."""

import pytest
import torch

from effad_lib.checkpoints import restore_optimiser
from effad_lib.networks import PDN
from effad_lib.optimisers import COEFFICIENTS, MOST_ROWS, Muon, optimisers, orthogonal, rate_factor


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_orthogonal_is_the_quintic_on_the_singular_values(shape):
    """Against the singular value decomposition, whose values go through the polynomial one by one."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert torch.allclose(orthogonal(matrix), left @ values.diag() @ right, atol=1e-9)
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_descends_as_the_published_one():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    torch.manual_seed(0)
    start, gradients = torch.randn(12, 30), torch.randn(4, 12, 30)
    ours = torch.nn.Parameter(start.view(12, 10, 3, 1).clone())
    theirs = torch.nn.Parameter(start.clone())
    both = (
        Muon([ours], lr=0.1, weight_decay=0.05),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.view_as(ours), gradient
        for optimiser in both:
            optimiser.step()
    moved = (theirs - start).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.02 * moved, "but for torch's bfloat16"


def test_the_halves_of_a_large_kernel_move_as_kernels_of_their_own():
    torch.manual_seed(0)
    start, gradient = torch.randn(2, MOST_ROWS + 88, 100, 3, 3)
    whole, *halves = (torch.nn.Parameter(part.clone()) for part in (start, *start.chunk(2)))
    for weight, its in ((whole, gradient), *zip(halves, gradient.chunk(2), strict=True)):
        weight.grad = its.clone()
        Muon([weight], lr=0.1, weight_decay=0.05).step()
    torch.testing.assert_close(whole, torch.cat(halves))


def test_what_muon_learned_is_taken_over_if_it_fits():
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    weight.grad = torch.ones_like(weight)
    (muon := Muon([weight])).step()
    kept = muon.state_dict()
    restore_optimiser(other := Muon([weight]), kept, 1, skips=False)
    assert torch.equal(other.state[weight]["average"], muon.state[weight]["average"])
    for wrong, says in (({}, "has no average"), ({"average": torch.zeros(3)}, "which takes numbers of shape")):
        with pytest.raises(ValueError, match=f"of weight 0 its optimiser .*{says}"):
            restore_optimiser(Muon([weight]), kept | {"state": {0: wrong}}, 1, skips=False)


def test_schedules():
    assert [rate_factor(step, 70_000, "step") for step in (0, 66_499, 66_500, 69_999)] == [1, 1, 0.1, 0.1]
    assert [rate_factor(step, 100, "cosine") for step in (0, 4, 5)] == [0.2, 1.0, 1.0]
    assert 0 < rate_factor(99, 100, "cosine") < 0.001 < rate_factor(90, 100, "cosine") < 0.03
    assert {rate_factor(step, 100, "constant") for step in (0, 99)} == {1.0}


@pytest.mark.parametrize("size", ["XS", "S", "M"])
def test_every_weight_has_one_optimiser(size):
    pdn = PDN(size)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.0}
    shared = optimisers("muon", pdn.parameters(), **rates)
    held = [weight for optimiser in shared for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, pdn.parameters()))
    kernels = shared[0].param_groups[0]["params"]
    assert all(kernel.dim() == 4 and kernel.shape[1] > 3 for kernel in kernels) and len(kernels) >= 3
    (alone,) = optimisers("adam", pdn.parameters(), **rates)
    assert type(alone) is torch.optim.Adam, "the paper's"
