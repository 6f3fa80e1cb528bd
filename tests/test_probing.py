"""Nearest neighbours as a probe: exact on small cases, spread out, evaluated like any detector; all in one table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors as Reference
from torch import nn
from torch.nn import functional as F

from effad_lib.datasets import DatasetError, Sample, Split, load_dataset
from effad_lib.images import ImageError
from effad_lib.networks import PDN, feature_size
from effad_lib.probing import (
    NearestNeighbours,
    _enlarged,
    candidates,
    compare,
    probe,
    read_cards,
    record,
    spread_out,
    untrained,
)
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


def test_what_cannot_be_judged_is_named_before_anything_is_read(tmp_path):
    sample = Sample(tmp_path / "absent.png", None, 0, "good")
    bad = replace(sample, label=1)
    good, one_sided = Split("good", (sample,), (), (sample, bad)), Split("own", (sample,), (), (sample,))
    pdn = {"untrained": untrained("XS", 8)}
    with pytest.raises(SettingsError, match="bank = 0"):
        compare(pdn, [good], (64, 64), bank=0)
    with pytest.raises(SettingsError, match="own has no good or no defective test images"):
        compare(pdn, [good, one_sided], (64, 64))
    with pytest.raises(SettingsError, match="data sets good, good: each takes a name of its own"):
        compare(pdn, [good, good], (64, 64))
    with pytest.raises(DatasetError, match=r"absent\.png"):
        compare(pdn, [good], (64, 64))
    with pytest.raises(ImageError, match="at least 64 pixels"):
        compare(pdn, [good], (32, 64))


def test_every_network_is_asked_for_every_data_set(tmp_path, picture):
    folder, masked = tmp_path / "own", tmp_path / "masked"
    for place in (folder, masked):
        for index in range(13):
            picture(place / "train" / "good" / f"{index}.png", seed=index)
        picture(place / "test" / "good" / "0.png", seed=20)
        picture(place / "test" / "hole" / "0.png", seed=21)
    (masked / "ground_truth" / "hole").mkdir(parents=True)
    Image.fromarray(np.eye(80, 96, dtype=np.uint8) * 255).save(masked / "ground_truth" / "hole" / "0.png")
    splits = [load_dataset("folder", root=root) for root in (folder, masked)]
    networks = {"one": untrained("XS", 8), "two": untrained("XS", 8, seed=1)}
    table = compare(networks, splits, (64, 96), bank=50)
    assert list(table.index) == [
        ("image AU-ROC", "folder/own"), ("image AU-ROC", "folder/masked"), ("AU-PRO", "folder/masked")
    ]  # fmt: skip
    alone = probe(networks["two"], splits[1], (64, 96), bank=50)
    assert table["two"]["AU-PRO", "folder/masked"] == alone["au_pro"] != table["one"]["AU-PRO", "folder/masked"]


def test_a_backbone_sees_twice_the_size_and_its_maps_have_that_of_the_images(tmp_path, picture):
    for place in (*(f"train/good/{index}" for index in range(13)), "test/good/0", "test/hole/0"):
        picture(tmp_path / "own" / f"{place}.png", seed=len(place))
    split = load_dataset("folder", root=tmp_path / "own")
    seen = []
    backbone = candidates(["XS"], "efficientnet_lite2")["backbone efficientnet_lite2"]
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    table = compare({"backbone": backbone}, [split], (64, 96), bank=20)
    assert set(seen) == {(128, 192)} and list(table.index) == [("image AU-ROC", "folder/own")]


@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_maps_have_their_peak_where_the_cell_is_centred(size):
    """Cell (i, j) of a padded PDN looks at pixel (4i, 4j): no half cell beside it."""
    rows, columns = feature_size(size, padding=True)
    cells = torch.zeros(1, 1, rows, columns)
    cells[0, 0, 9, 5] = 1
    maps = _enlarged(cells, size)
    assert maps.shape[-2:] == size and divmod(maps.argmax().item(), size[1]) == (36, 20) and maps.max() == 1
    assert maps[0, 0, 38, 20] == pytest.approx(0.5)
    corner = torch.zeros(1, 1, rows, columns)
    corner[0, 0, -1, -1] = 1
    assert _enlarged(corner, size)[0, 0, -1, -1] == 1


def test_a_teacher_that_changed_meanwhile_or_has_another_backbone_is_not_recorded(tmp_path):
    path = tmp_path / "teacher.safetensors"
    card = {"size": "XS", "channels": 8, "sha256": "a", "settings": {"backbone": "resnet18"}}
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(SettingsError, match="imitates resnet18, not efficientnet_lite2"):
        read_cards([path], "efficientnet_lite2")
    cards = read_cards([path], "resnet18")
    row = {"untrained PDN-XS": 0.5, f"teacher {path}": 0.75, "backbone resnet18": 0.87654}
    table = pd.DataFrame(row, index=pd.MultiIndex.from_tuples([("AU-PRO", "own")]))
    record([path], cards, table, {"backbone": "resnet18"})
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["probe"]["found"] == [
        {"metric": "AU-PRO", "data": "own", "untrained": 0.5, "teacher": 0.75, "backbone": 0.8765}
    ]
    path.with_suffix(".json").write_text(json.dumps(card | {"sha256": "b"}))
    with pytest.raises(SettingsError, match="replaced while it was judged"):
        record([path], cards, table, {"backbone": "resnet18"})


def test_untrained_networks_follow_their_seed_and_leave_the_global_one_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (untrained("XS", 8, seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())
    assert untrained("XS", 8)(torch.randn(8, 3, 128, 128)).std() == pytest.approx(1, abs=0.2), "of unit variance"


def test_candidates_stand_behind_an_untrained_network_of_their_size(tmp_path):
    own = tmp_path / "own.safetensors"
    save_file({name: value.contiguous() for name, value in PDN("XS").state_dict().items()}, own)
    networks = candidates(["XS", own, "S"], "efficientnet_lite2")
    names = ["untrained PDN-XS", "teacher PDN-XS", f"teacher {own}", "untrained PDN-S", "teacher PDN-S"]
    with pytest.raises(SettingsError, match="teacher PDN-XS is named twice"):
        candidates(["XS", "xs"])
    assert list(networks) == [*names, "backbone efficientnet_lite2"]
    assert all(networks[name].padding for name in names)


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
