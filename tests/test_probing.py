"""Nearest neighbours as a probe: exact on small cases, spread out, evaluated like any detector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors as Reference
from torch import nn
from torch.nn import functional as F

from effad_lib.datasets import Sample, Split
from effad_lib.probing import NearestNeighbours, probe, spread_out
from effad_lib.settings import SettingsError


class Pixels(nn.Module):
    """Features that are the means of 4×4 pixels."""

    def forward(self, images):
        return F.avg_pool2d(images, 4)


def good_images(count=6, side=64, seed=0):
    return torch.randint(100, 156, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def test_distances_equal_those_of_scikit_learn():
    images = good_images()
    probe = NearestNeighbours.fit(Pixels(), images, bank=10_000)
    assert probe.bank.shape == (6 * 16 * 16, 3), "few cells are all remembered"
    test = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    cells = (F.avg_pool2d(images / 255, 4) - probe.mean) / probe.std
    known = Reference(n_neighbors=1).fit(cells.permute(0, 2, 3, 1).reshape(-1, 3).numpy())
    rows = ((F.avg_pool2d(test, 4) - probe.mean) / probe.std).permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.from_numpy(known.kneighbors(rows.numpy())[0]).float().view(2, 1, 16, 16) / 3**0.5
    found = probe(test).combined
    assert found.shape == (2, 1, 64, 64)
    # Blurred and enlarged in turn; the mean over an image survives both but for its border.
    torch.testing.assert_close(found.mean((1, 2, 3)), expected.mean((1, 2, 3)), rtol=0.02, atol=0)


def test_remembered_images_are_normal_and_a_spot_is_not():
    images = good_images()
    probe = NearestNeighbours.fit(Pixels(), images, bank=10_000)
    assert probe(images / 255).score.max() < 1e-2
    spotted = images.clone()
    spotted[:, :, 40:48, 16:24] = 255
    maps = probe(spotted / 255)
    assert maps.score.min() > 1
    rows, columns = np.unravel_index(maps.combined[0, 0].argmax().item(), (64, 64))
    assert 38 <= rows <= 49 and 14 <= columns <= 25


def test_what_cannot_be_judged_is_named(tmp_path):
    sample = Sample(tmp_path / "a.png", None, 0, "good")
    with pytest.raises(SettingsError, match="bank = 0"):
        probe(Pixels(), Split("own", (sample,), (), (sample,)), (64, 64), bank=0)
    with pytest.raises(SettingsError, match="own has no test images"):
        probe(Pixels(), Split("own", (sample,), (), ()), (64, 64))


def test_the_bank_is_spread_out_and_the_seed_decides():
    generator = torch.Generator().manual_seed(0)
    crowd, few = torch.randn(500, 80, generator=generator) * 0.01, 5 * torch.eye(80)[:7]
    rows = torch.cat([crowd, few])
    chosen = spread_out(rows, 8, torch.Generator().manual_seed(0))
    assert set(range(500, 507)) <= set(chosen.tolist()), "rare features are kept before more of the same"
    images = good_images()
    one, same, other = (NearestNeighbours.fit(Pixels(), images, bank=50, seed=seed) for seed in (0, 0, 1))
    assert len(one.bank) == 50
    assert torch.equal(one.bank, same.bank) and not torch.equal(one.bank, other.bank)
