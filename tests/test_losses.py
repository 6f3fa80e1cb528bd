"""The four loss terms against their literal definitions."""

import literal
import pytest
import torch

from effad_lib import losses


def pair(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("quantile", [0.0, 1e-6, 0.25, 0.5, 0.9, 0.99, 0.999, 0.999999, 1.0])
@pytest.mark.parametrize("shape", [(1, 384, 8, 8), (2, 7, 13, 11), (1, 1, 7, 143), (1, 1, 1, 2), (1, 1, 1, 1)], ids=str)
def test_hard_feature_loss(shape, quantile):
    teacher, student = pair(*shape)
    ours = losses.hard_feature_loss(teacher, student, quantile)
    paper = literal.hard_loss(teacher, student, quantile)
    torch.testing.assert_close(ours, paper, rtol=1e-12, atol=0)
    of_ours, of_paper = (torch.autograd.grad(loss, student)[0] for loss in (ours, paper))
    torch.testing.assert_close(of_ours, of_paper, rtol=1e-10, atol=0)


def test_hard_feature_loss_by_hand():
    differences = torch.arange(1, 1001.0).flip(0).view(1, 10, 10, 10)  # squared: 1, 4, 9 … 1,000,000
    zero = torch.zeros_like(differences)
    # Position 0.999·999 = 998.001 lies between the two largest: only the largest reaches it.
    assert losses.hard_feature_loss(differences, zero).item() == 1000**2
    # Position 0.998·999 = 997.002: the two largest.
    assert losses.hard_feature_loss(differences, zero, 0.998).item() == (1000**2 + 999**2) / 2
    assert losses.hard_feature_loss(zero, zero).item() == 0


def test_hard_feature_loss_takes_the_papers_thousandth():
    teacher, student = pair(1, 384, 56, 56, dtype=torch.float32)
    loss = losses.hard_feature_loss(teacher, student)
    gradient = torch.autograd.grad(loss, student)[0]
    assert (gradient != 0).sum() == 1205  # 0.1 % of 1,204,224 elements: order statistics 1,203,019 and up
    torch.testing.assert_close(loss, literal.hard_loss(teacher, student))


def test_losses_of_other_shapes():
    teacher, student = pair(1, 6, 5, 4)
    as_maps = [losses.hard_feature_loss(teacher, student, 0.9), losses.autoencoder_loss(teacher, student)]
    flat = [tensor.flatten() for tensor in (teacher, student)]
    torch.testing.assert_close([losses.hard_feature_loss(*flat, 0.9), losses.autoencoder_loss(*flat)], as_maps)


def test_hard_feature_loss_with_many_equal_differences():
    teacher = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(1000).view(1, 3, 25, 40)
    student = torch.zeros_like(teacher).requires_grad_()
    loss = losses.hard_feature_loss(teacher, student, 0.9)  # 300 of the thousand 3s
    assert loss.item() == pytest.approx(9, rel=1e-6)
    assert (torch.autograd.grad(loss, student)[0] != 0).sum() == 300


@torch.no_grad()
def test_hard_feature_loss_beyond_the_limit_of_torch_quantile():
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(1, 1, 2**12 + 1, 2**12, generator=generator)  # older torch stops at 2**24 elements
    student = torch.zeros_like(teacher)
    ours = losses.hard_feature_loss(teacher, student)
    torch.testing.assert_close(ours, literal.hard_loss(teacher, student), rtol=1e-5, atol=0)


def test_other_terms_are_mean_squares_and_reach_both_networks():
    first, second = pair(2, 5, 4, 3)
    torch.testing.assert_close(losses.penalty_loss(first), (first**2).sum() / 120)
    torch.testing.assert_close(losses.autoencoder_loss(first.detach(), second), ((first - second) ** 2).sum() / 120)
    loss = losses.student_autoencoder_loss(first, second)
    torch.testing.assert_close(loss, ((first - second) ** 2).sum() / 120)
    of_first, of_second = torch.autograd.grad(loss, (first, second))
    torch.testing.assert_close(of_first, 2 * (first - second) / 120)
    torch.testing.assert_close(of_second, -of_first)
