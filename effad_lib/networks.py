"""The networks: patch description networks (teacher and student) as a table, and the autoencoder for any image size."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effad_lib.convolution import Conv2d, convolve
from effad_lib.images import Size, check_size
from effad_lib.settings import SettingsError, nearest


class Conv(NamedTuple):
    """A convolution `kernel` × `kernel` to `channels`; `padding` holds in the padded variant only.

    `depthwise`: each channel is filtered by itself, so there are as many as before. `own`: what a student has once for
    each of its two targets, as it has all layers behind.
    """

    kernel: int
    channels: int
    padding: int
    stride: int = 1
    depthwise: bool = False
    own: bool = False


class Pool(NamedTuple):
    """Average pooling 2×2 with stride 2; `padding` holds in the padded variant only."""

    padding: int = 1


OUT = -1
"""Stands for the network's number of output channels in the tables."""

Layers = tuple[Conv | Pool, ...]
"""The layers of a PDN, the last of them a convolution to `OUT` channels."""

PDN_LAYERS: dict[str, Layers] = {
    # The paper's Tables 4 and 5.
    "S": (Conv(4, 128, 3), Pool(), Conv(4, 256, 3), Pool(), Conv(3, 256, 1), Conv(4, OUT, 0)),
    "M": (
        *(Conv(4, 256, 3), Pool(), Conv(4, 512, 3), Pool()),
        *(Conv(1, 512, 0), Conv(3, 512, 1), Conv(4, OUT, 0), Conv(1, OUT, 0)),
    ),
    # Ours, for CPUs: S in three eighths of its width, and the many output channels behind a convolution of 1×1. As that
    # sees 96 channels only, where S sees 4,096, teacher and autoencoder are imitated from 96 of their own.
    "XS": (Conv(4, 48, 3), Pool(), Conv(4, 96, 3), Pool(), Conv(3, 96, 1), Conv(4, 96, 0, own=True), Conv(1, OUT, 0)),
}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation by which images in [0, 1] are normalised before any of the networks."""


class Normalise(nn.Module):
    """Subtract a mean and divide by a deviation per colour; ImageNet's unless told otherwise.

    `forward`: images [N, 3, H, W] in [0, 1] → the same shape, channels last in memory, the order in which convolutions
    are quickest and which all layers keep; compilers choose their own. The two are buffers, so no step copies them.
    """

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - self.mean) / self.std
        if torch.compiler.is_compiling():
            return normalised
        return normalised.contiguous(memory_format=torch.channels_last)


STRIDE = 4
RECEPTIVE_FIELD = 33


def check_network(size: str) -> str:
    """Return `size` if there is such a network. Raises `SettingsError` that lists the known sizes."""
    if size not in PDN_LAYERS:
        raise SettingsError(f"unknown network size {size!r}: {nearest(size, PDN_LAYERS)}")
    return size


def feature_size(image_size: Size, padding: bool) -> Size:
    """Return height and width of the PDN's output: one cell every 4 pixels, 8 cells fewer without padding."""
    height, width = check_size(image_size)
    if padding:
        return -(-height // STRIDE), -(-width // STRIDE)
    return (height - RECEPTIVE_FIELD) // STRIDE + 1, (width - RECEPTIVE_FIELD) // STRIDE + 1


class PDN(nn.Module):
    """Patch description network of the given size: each output vector describes 33×33 pixels, one every 4 pixels.

    `forward`: normalised images [N, 3, H, W] → features [N, out_channels, h, w] with (h, w) = `feature_size`. The
    padded and the unpadded variant share weights: cell (i, j) of the unpadded one is cell (i+4, j+4) of the padded one.
    `layers` takes the place of the size's own, see `effad_lib.designs`. A student has two `targets`, teacher and
    autoencoder, and [N, 2 out_channels, h, w] in that order. Raises `SettingsError` for an unknown size. Paper, Section
    3.1 and Tables 4 and 5.
    """

    def __init__(
        self,
        size: str = "S",
        out_channels: int = 384,
        padding: bool = False,
        layers: Layers | None = None,
        targets: int = 1,
    ) -> None:
        super().__init__()
        self.size, self.out_channels, self.padding = check_network(size), out_channels, padding
        modules: list[nn.Module] = []
        channels, parts = 3, 1  # parts: one for all targets, then one for each
        for layer in layers or PDN_LAYERS[size]:
            pad = layer.padding if padding else 0
            if isinstance(layer, Pool):
                modules.append(nn.AvgPool2d(2, stride=2, padding=pad))
                continue
            groups = channels if layer.depthwise else parts
            if parts == 1:
                self.shared = len(modules)  # those before this layer are
                parts = targets if layer.own else 1
            out = out_channels * targets if layer.channels == OUT else layer.channels * parts
            modules += [Conv2d(channels, out, layer.kernel, layer.stride, pad, groups=groups), nn.ReLU(inplace=True)]
            channels = out
        *trunk, head, _ = modules
        self.trunk, self.head = nn.Sequential(*trunk), head
        self.to(memory_format=torch.channels_last)  # as images are; else every call would reorder the kernels

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def halves(self, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Run one batch through what both targets share and each image through what is for one target only.

        The first `count` images get the half that imitates the teacher [count, out_channels, h, w], the others the one
        that imitates the autoencoder. Without batch normalisation this equals separate passes.
        """
        features = self.trunk[: self.shared](images)
        first, second = features.split([count, len(images) - count])
        return self._half(first, 0), self._half(second, 1)

    def _half(self, features: Tensor, target: int) -> Tensor:
        for layer in (*self.trunk[self.shared :], self.head):
            if isinstance(layer, Conv2d):
                weight, bias = layer.weight.chunk(2)[target], layer.bias.chunk(2)[target]
                features = convolve(features, weight, bias, layer.padding[0])
            else:
                features = layer(features)
        return features


class AutoencoderLayers(NamedTuple):
    """Channels of most layers, steps of the decoder, and inputs and kernel of the last convolution: Table 6."""

    width: int = 64
    steps: int = 6
    inputs: int = 64
    kernel: int = 3


AUTOENCODERS: dict[str, AutoencoderLayers] = {
    "S": AutoencoderLayers(),
    "M": AutoencoderLayers(),
    # Ours, for CPUs: half as wide, without the last step, from which the paper's decoder resizes down again, and, as in
    # the PDN, with the many output channels behind a convolution of 1×1 with 96 inputs.
    "XS": AutoencoderLayers(width=32, steps=5, inputs=96, kernel=1),
}


class Autoencoder(nn.Module):
    """The autoencoder: a whole image through a bottleneck of one 64-vector (for 256×256) to the teacher's feature map.

    `forward`: normalised images [N, 3, H, W] → [N, out_channels, h, w] with (h, w) = `feature_size`, for any H and W of
    at least 64. No skip connections. Paper, Table 6; other sizes scale the decoder's steps: H/64−1, H/32, H/16−1, H/8,
    H/4−1, H/2−1. `AUTOENCODERS` says what XS does otherwise.
    """

    def __init__(self, size: str = "S", out_channels: int = 384, padding: bool = False) -> None:
        super().__init__()
        self.size, self.padding = check_network(size), padding
        width, steps, inputs, kernel = AUTOENCODERS[size]
        channels = (3, width // 2, width // 2, width, width, width)
        encoder: list[nn.Module] = []
        for before, after in pairwise(channels):
            encoder += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, 64, 8))
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(64 if i == 0 else width, width, 4, padding=2), nn.ReLU(inplace=True), nn.Dropout(0.2)
            )
            for i in range(steps)
        )
        self.last = nn.Sequential(
            nn.Conv2d(width, inputs, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(inputs, out_channels, kernel, padding=kernel // 2),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2], images.shape[-1]
        cells = feature_size(size, self.padding)
        features = self.encode(images)
        for step, block in zip(decoder_sizes(size)[: len(self.decoder)], self.decoder, strict=True):
            features = block(F.interpolate(features, step, mode="bilinear"))
        return self.last(F.interpolate(features, cells, mode="bilinear"))

    def encode(self, images: Tensor) -> Tensor:
        """Return the bottleneck: one 64-vector for each 32 pixels beyond the first 224 in a row or column.

        Images under 256 pixels leave the last convolution fewer than 8×8 cells; they are filled up with zeros to 8×8.
        """
        *convolutions, bottleneck = self.encoder
        features = images
        for layer in convolutions:
            features = layer(features)
        missing = [max(0, 8 - side) for side in features.shape[-2:]]
        if any(missing):
            top, left = missing[0] // 2, missing[1] // 2
            features = F.pad(features, (left, missing[1] - left, top, missing[0] - top))
        return bottleneck(features)


def decoder_sizes(image_size: Size) -> list[Size]:
    """Return the six sizes to which the decoder resizes in turn: 3, 8, 15, 32, 63, 127 for 256 pixels."""
    scales = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1))
    return [tuple(max(1, side // divisor - less) for side in image_size) for divisor, less in scales]


def multiply_adds(network: nn.Module, image_size: Size = (256, 256)) -> int:
    """Return the multiplications, each with its addition, that the convolutions of a network take for one image.

    Counted as the layers say, whatever method computes them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).to("meta")(torch.empty((1, 3, *image_size), device="meta"))
    return counter.get_total_flops() // 2


@torch.no_grad()
def initialise(network: PDN | Autoencoder, images: Tensor, deviation: float = 1.0, *, centred: bool = False) -> None:
    """Give a network He weights, each convolution scaled to unit variance on `images` (normalised [N, 3, H, W]).

    The last one's output gets the standard deviation `deviation`; 0 lets it begin at zero, the mean of what it learns.
    With `centred` the biases bring each channel's mean to zero first: images of one product differ so little that most
    of a random channel is its mean, and one whose mean is below zero is cut off by the ReLU on nearly all of them.
    Ours, for short schedules: torch's default initialisation passes on so little variance that the first hundreds of
    steps are spent on growing it.
    """

    def draw(layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        layer.weight.copy_(nn.init.kaiming_normal_(torch.empty(layer.weight.shape)))  # whatever its order in memory
        nn.init.zeros_(layer.bias)
        outputs = layer.forward(*inputs)
        means = outputs.mean(dim=(0, 2, 3)) * centred
        scale = (outputs - means[:, None, None]).std()
        scale = torch.where(scale > 1e-3, scale, 1.0)  # of images without anything on them only rounding is left
        layer.weight /= scale
        layer.bias -= means / scale

    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(draw) for layer in convolutions]
    network(images)
    for hook in hooks:
        hook.remove()
    for value in convolutions[-1].parameters():
        value *= deviation
