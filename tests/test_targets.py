"""What a distillation learns from: statistics of the targets, a fitted start, batches that are made ahead."""

import time

import pytest
import torch

from effad_lib.distillation import channel_statistics, fit_initialisation
from effad_lib.distillation.targets import prefetched
from effad_lib.networks import PDN


def test_channel_statistics_are_exact_far_from_zero():
    """E[x²] − E[x]² in float32 would lose every digit of a deviation of 0.01 around 1,000."""
    torch.manual_seed(0)
    values = torch.randn(7, 3, 5, 4) * torch.tensor([0.01, 1.0, 0.0]).view(3, 1, 1) + 1000
    mean, deviation = channel_statistics(values.split(3))
    expected = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten().double(), expected.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(deviation.flatten()[:2].double(), expected.std(1, correction=0)[:2], rtol=1e-5, atol=0)
    assert deviation.flatten()[2] == 1, "a channel that never varies must not divide by zero"


def test_fitted_initialisation_starts_close():
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(6, 3, 96, 96), 9, 1, 4) * 9
    targets = torch.nn.functional.avg_pool2d(images, 5, 4)[..., 4:20, 4:20].repeat(1, 2, 1, 1)
    targets = (targets - targets.mean()) / targets.std()
    pdn = PDN("XS", 6)
    before = torch.nn.functional.mse_loss(pdn(images), targets)
    fit_initialisation(pdn, images, targets)
    after = torch.nn.functional.mse_loss(pdn(images), targets)
    assert before > 0.9 and after < 0.5


@pytest.mark.parametrize("ahead, workers", [(0, 1), (1, 1), (3, 1), (3, 4), (20, 4)])
def test_batches_are_read_ahead_in_order_and_not_too_far(ahead, workers):
    drawn, how = [], {"ahead": ahead, "workers": workers}

    def draw():
        drawn.append(len(drawn))
        return drawn[-1]

    def make(number):
        time.sleep(0.002 * (number % 3))  # later ones may be ready first
        return 10 * number

    batches = prefetched(draw, make, 10, **how)
    assert next(batches) == 0 and len(drawn) <= max(1, ahead)
    assert list(batches) == list(range(10, 100, 10)) and len(drawn) == 10
    assert list(prefetched(drawn.pop, make, 0, **how)) == []
    broken = prefetched(draw, lambda number: 1 / 0, 10, **how)
    with pytest.raises(ZeroDivisionError):
        next(broken)
