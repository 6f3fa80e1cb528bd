"""Teachers as files: those of others load by path, wrong ones name the layer, the shipped ones are good."""

from __future__ import annotations

from collections import OrderedDict

import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from effad_lib.distillation import TEACHERS, DistillationSettings, load_teacher
from effad_lib.networks import PDN
from effad_lib.settings import SettingsError
from effad_lib.synthesis import product_names


def foreign_pdn(size: str, channels: int, layout: str) -> torch.nn.Module:
    """A PDN as others build it: without any of this library's code, its layers named as in their files."""
    kernels = [4, 4, 3, 4] if size == "S" else [4, 4, 1, 3, 4, 1]
    widths = [3, 128, 256, 256, channels] if size == "S" else [3, 256, 512, 512, 512, channels, channels]
    layers = []
    for index, kernel in enumerate(kernels):
        name = f"conv{index + 1}" if layout == "named" else str(len(layers))
        layers.append((name, torch.nn.Conv2d(widths[index], widths[index + 1], kernel)))
        if index + 1 < len(kernels):
            layers.append((f"relu{index}" if layout == "named" else str(len(layers)), torch.nn.ReLU()))
        if index < 2:
            layers.append((f"pool{index}" if layout == "named" else str(len(layers)), torch.nn.AvgPool2d(2, 2)))
    return torch.nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("layout", ["numbered", "named"])  # as nelson1425/EfficientAD and as anomalib write them
@pytest.mark.parametrize("size", ["S", "M"])
def test_public_teachers_are_loaded_by_path(size, layout, tmp_path):
    theirs, path = foreign_pdn(size, 16, layout), tmp_path / "teacher.pth"
    torch.save(theirs.state_dict(), path)
    teacher, card = load_teacher(path)
    assert (card["size"], card["channels"], len(card["sha256"])) == (size, 16, 64)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(teacher(images), theirs(images))
    padded, _ = load_teacher(path, padding=True)
    torch.testing.assert_close(padded(images)[..., 4:-4, 4:-4], teacher(images), rtol=1e-4, atol=1e-5)


def test_our_own_weights_load_without_their_card(tmp_path):
    pdn, path = PDN("XS", 8), tmp_path / "bare.safetensors"
    save_file({name: value.contiguous() for name, value in pdn.state_dict().items()}, path)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_teacher(path)[0](images), pdn(images))


def test_public_files_that_do_not_fit_name_the_layer(tmp_path):
    path = tmp_path / "teacher.pth"
    state = foreign_pdn("S", 16, "named").state_dict()
    torch.save(state | {"conv3.weight": torch.zeros(256, 256, 1, 1)}, path)
    with pytest.raises(
        SettingsError, match=r"conv3\.weight has shape \(256, 256, 1, 1\), PDN-S needs \(256, 256, 3, 3\)"
    ):
        load_teacher(path)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(SettingsError, match=r"not the weights of a PDN.*bn1\.bias"):
        load_teacher(path)
    torch.save(foreign_pdn("S", 16, "named"), path)
    with pytest.raises(SettingsError, match="plain state dict"):  # a pickled module is never unpickled
        load_teacher(path)


@pytest.mark.parametrize("path", sorted(TEACHERS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_teachers_are_whole_and_were_trained(path):
    """A shipped teacher explains its backbone better than no teacher (loss 1) on photographs it never saw."""
    teacher, card = load_teacher(path)
    assert card["held_out_loss"] < 0.9 and card["settings"]["backbone"] and card["command"].startswith("effad distill")
    assert 0 < sum(card["explained_variance"]) / len(card["explained_variance"]) < 1
    features = teacher(torch.randn(1, 3, 64, 64))
    assert torch.isfinite(features).all() and path.stat().st_size < 25e6


@pytest.mark.parametrize("path", sorted(TEACHERS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_teachers_answer_where_something_is(path):
    """Half a cell beside it is the classic silent fault of a distillation."""
    teacher, _ = load_teacher(path)
    corners = [(40, 76), (76, 40), (52, 63), (63, 52)]  # of squares of 8×8 pixels, symmetric about the image's centre
    images = torch.zeros(len(corners) + 1, 3, 128, 128)
    for image, (top, left) in zip(images, corners, strict=False):
        image[:, top : top + 8, left : left + 8] = 1.5
    features = teacher(images)
    change = (features[:-1] - features[-1]).square().sum(1)
    cells = 16 + 4 * torch.arange(24.0)  # the pixels that the cells of the unpadded teacher are centred on
    found = torch.stack([(change.sum(dim) * cells).sum(1) / change.sum((1, 2)) for dim in (2, 1)], dim=1)
    away = (found - (torch.tensor(corners) + 3.5)).mean(0)
    assert away.abs().max() < 1.3, f"on average {away} pixels off; half a cell is 2"


def test_the_shipped_s_follows_the_recipe_for_cpus():
    _, card = load_teacher("S")
    kept, recipe = card["settings"], DistillationSettings.recipe("cpu")
    assert {name: kept[name] for name in recipe} == recipe


@pytest.mark.parametrize("path", sorted(TEACHERS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_teachers_find_anomalies_like_their_backbone_and_untrained_networks_do_not(path):
    """The rule for shipping, on what `effad probe --record` measured: without any training of a detector."""
    card = load_teacher(path)[1]
    kept, found = card["probe"], pd.DataFrame(card["probe"]["found"])
    products = {f"synthetic/{name}" for name in product_names()}
    assert set(found["data"]) == {"elpv/mono", "mvtec_ad/screw", *products}
    assert kept["backbone"] == card["settings"]["backbone"]
    mean = found.groupby("metric")[["untrained", "teacher", "backbone"]].mean()
    assert set(mean.index) == {"image AU-ROC", "AU-PRO"}
    assert (mean["teacher"] > mean["untrained"] + 0.03).all(), "clearly better than random filters"
    assert (mean["teacher"] > mean["backbone"] - 0.03).all(), "near its backbone"
