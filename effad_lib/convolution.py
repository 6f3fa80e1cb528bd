"""Convolution by Winograd's minimal filtering: the same sums with a fifth of the multiplications, for CPUs.

A PDN spends nearly all its time in convolutions of 3×3 and 4×4, and those of oneDNN already run at the peak of a CPU:
only fewer multiplications are faster. Of an input tile X of 7×7 pixels, m×m outputs of an r×r kernel W (m = 8 − r) take
49 multiplications for each pair of channels instead of m²r² (Winograd 1980; for 3×3 Lavin and Gray, arXiv 1509.09308):

    Y = Aᵀ [ (G W Gᵀ) ⊙ (Bᵀ X B) ] A

The sums over channels are 49 matrix products, which oneDNN takes as one convolution of 1×1 in 49 groups: MKL, which
torch asks for products, reaches half the speed of an AMD Zen 5 with them. (Transforms and gradients of weights are such
products still.) Tiles are taken in bands, large ones, as oneDNN arranges the kernels anew for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE = 7
"""Pixels of an input tile in a row and in a column. With more there are fewer multiplications, but larger kernels to
move and more rounding."""

POINTS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0)
"""Where the polynomials of tile and kernel are evaluated, beside infinity: small numbers keep the rounding small."""

BAND = 450
"""About so many tiles at a time."""

LEAST_CHANNELS = 48
"""With fewer channels in or out, moving the tiles costs more than the multiplications that are saved."""

LEAST_TILES, LEAST_SUMS = {3: 64, 4: 36}, 2**20
"""With fewer tiles in an image, by side of the kernels, moving those costs more, or with fewer of tiles times pairs of
channels. An image is computed alike alone and in a batch."""


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, quicker where `pays` says so, for square kernels without dilation; weights as there."""

    _kept: tuple[Tensor, Tensor] | None = None
    """A copy of frozen weights, as a teacher's are or those of a detector that has learned, and these `transformed`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        if plain and bias is not None and self.padding == self.padding[:1] * 2:  # alike on all sides, not "same"
            return convolve(input, weight, bias, self.padding[0], self._transformed)
        return super()._conv_forward(input, weight, bias)

    def _transformed(self, weight: Tensor) -> Tensor:
        if weight.requires_grad:
            self._kept = None
            return transformed(weight)
        # Compared, which takes a ninth of the time: a fused step of Adam, for one, makes no new version of a tensor.
        if self._kept is None or not torch.equal(self._kept[0], weight):
            with torch.inference_mode(False):
                self._kept = weight.detach().clone(), transformed(weight)
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # not for copies


def convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int = 0,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return `F.conv2d` with stride 1, by Winograd's method where it `pays`.

    `images` [N, C, H, W], `weight` [K, C, r, r], `bias` [K] → [N, K, H + 2 padding − r + 1, W + 2 padding − r + 1].
    `transform` gives G W Gᵀ; None for `transformed`.
    """
    if not pays(images, weight, padding):
        return F.conv2d(images, weight, bias, padding=padding)
    kernels = (transform or transformed)(weight)
    return _Winograd.apply(F.pad(images, (padding,) * 4) if padding else images, weight, bias, kernels)


def pays(images: Tensor, weight: Tensor, padding: int = 0) -> bool:
    """Whether Winograd's method is the quicker one and may be used: float32 on an x86 CPU, enough channels and tiles.

    Compilers and exporters get the convolution itself, which they know better, and autocast its lower precision.
    """
    channels, kernel = weight.shape[:2], weight.shape[2:]
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or kernel not in ((3, 3), (4, 4)):
        return False
    return (
        images.device.type == "cpu"
        and images.dim() == 4
        and len(images) > 0
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # oneDNN's groups are quick there
        and images.dtype == weight.dtype == torch.float32
        and min(channels) >= LEAST_CHANNELS
        and (tiles := math.prod(tiles_of(images.shape[-2:], kernel[0], padding))) >= LEAST_TILES[kernel[0]]
        and tiles * math.prod(channels) >= LEAST_SUMS
    )


def tiles_of(size: Sequence[int], r: int, padding: int = 0) -> tuple[int, int]:
    """Return how many tiles an image of height and width `size` has in a column and in a row for kernels of r×r."""
    rows, columns = (-(-(side + 2 * padding - r + 1) // (TILE + 1 - r)) for side in size)
    return rows, columns


@cache
def transforms(r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Aᵀ [m², 49], G [49, r²] and Bᵀ [49, 49] for kernels of r×r, rows and columns in one matrix each.

    Two polynomials with m and r coefficients are multiplied by evaluating both at as many points as the product has
    coefficients, and interpolating; a correlation is the transpose of that (Toom and Cook).
    """

    def evaluated(coefficients: int) -> np.ndarray:
        at_infinity = np.eye(coefficients)[-1:]  # only the last coefficient counts there
        return np.vstack([np.vander(POINTS, coefficients, increasing=True), at_infinity])

    def both(matrix: np.ndarray) -> Tensor:
        return torch.from_numpy(np.kron(matrix, matrix)).float()

    return both(evaluated(TILE + 1 - r).T), both(evaluated(r)), both(np.linalg.inv(evaluated(TILE)).T)


class _Winograd(torch.autograd.Function):
    """images [N, C, H, W], weight [K, C, r, r], bias [K] → [N, K, h, w] with h = H − r + 1; no padding, stride 1.

    `kernels` are those weights `transformed`, [49, K, C].
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: torch.autograd.function.FunctionCtx, images: Tensor, weight: Tensor, bias: Tensor, kernels: Tensor
    ) -> Tensor:
        images = images.permute(0, 2, 3, 1)
        (count, height, width, _), (out_channels, _, r, _) = images.shape, weight.shape
        to_output, _, _ = transforms(r)
        m = TILE + 1 - r
        padded, rows, columns = _in_whole_tiles(images, r)
        shape = (count, out_channels, rows * m, columns * m)
        output = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
        blocks = output.permute(0, 2, 3, 1).view(count, rows, m, columns, m, out_channels)
        for where in _bands(count, rows, columns):
            part = blocks[where]
            sums = _each(to_output, _products(_tiles(padded, where, r), kernels))
            sums = sums.view(*part.shape[:2], columns, m, m, out_channels)
            torch.add(sums.permute(0, 1, 3, 2, 4, 5), bias, out=part)
        ctx.save_for_backward(images, kernels)
        ctx.side = r
        # Not a view, so that what follows may change it in place.
        output_size = height - r + 1, width - r + 1
        if output.shape[2:] == output_size:
            return output
        return output[..., : output_size[0], : output_size[1]].clone(memory_format=torch.channels_last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # in float32 even where autocast is on by then
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, kernels = ctx.saved_tensors
        for_images, for_weight, for_bias, _ = ctx.needs_input_grad
        gradient = gradient.permute(0, 2, 3, 1)
        (count, height, width, channels), (_, out_channels, _), r = images.shape, kernels.shape, ctx.side
        to_output, of_kernel, of_tile = transforms(r)
        m = TILE + 1 - r
        padded, rows, columns = _in_whole_tiles(images, r)
        missing = (0, 0, 0, columns * m - gradient.shape[2], 0, rows * m - gradient.shape[1])
        blocks = F.pad(gradient, missing).contiguous().view(count, rows, m, columns, m, out_channels)
        kernels_gradient = None  # of the first band, to which the others are added
        # Neighbouring tiles overlap: each is added to its own block of m×m pixels and to those behind it.
        sums = images.new_zeros((count, rows + 1, m, columns + 1, m, channels) if for_images else 0)
        for where in _bands(count, rows, columns):
            part = blocks[where]
            products = _each(to_output.T, part.permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m, out_channels))
            if for_weight:
                pair = products.permute(1, 2, 0), _tiles(padded, where, r).transpose(0, 1)
                kernels_gradient = torch.bmm(*pair) if kernels_gradient is None else kernels_gradient.baddbmm_(*pair)
            if for_images:
                tiles = _each(of_tile.T, _products(products, kernels, F.conv_transpose2d))
                tiles = tiles.view(*part.shape[:2], columns, TILE, TILE, channels).permute(0, 1, 3, 2, 4, 5)
                which, band = where
                for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    own = tiles[:, :, m * down : m * (down + 1), :, m * right : m * (right + 1)]
                    below = slice(band.start + down, band.stop + down)
                    sums[which, below, : own.shape[2], right : columns + right, : own.shape[4]] += own
        if for_images:
            sums = sums.view(count, (rows + 1) * m, (columns + 1) * m, channels)
            sums = sums[:, :height, :width].permute(0, 3, 1, 2)
        if for_weight:
            kernels_gradient = of_kernel.T @ kernels_gradient.view(TILE**2, -1)
        return (
            sums if for_images else None,
            kernels_gradient.view(r, r, out_channels, channels).permute(2, 3, 0, 1) if for_weight else None,
            gradient.sum((0, 1, 2)) if for_bias else None,
            None,
        )


@torch.no_grad()
def transformed(weight: Tensor) -> Tensor:
    """Return G W Gᵀ of all kernels of `weight` [K, C, r, r] as [49, K, C]; gradients do not pass."""
    out_channels, channels, r, _ = weight.shape
    _, of_kernel, _ = transforms(r)
    return (of_kernel @ weight.permute(2, 3, 0, 1).reshape(r * r, -1)).view(TILE**2, out_channels, channels)


def _in_whole_tiles(images: Tensor, r: int) -> tuple[Tensor, int, int]:
    """Return images [N, H, W, C] with zeros below and right of them, and the rows and columns of their tiles."""
    m, (rows, columns) = TILE + 1 - r, tiles_of(images.shape[1:3], r)
    missing = [tiles * m + r - 1 - side for tiles, side in zip((rows, columns), images.shape[1:3], strict=True)]
    return F.pad(images, (0, 0, 0, missing[1], 0, missing[0])).contiguous(), rows, columns


def _bands(count: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield images and rows of tiles: several small images at a time, or a part of one."""
    images, high = max(1, BAND // (rows * columns)), min(rows, max(1, BAND // columns))
    for first in range(0, count, images):
        for top in range(0, rows, high):
            yield slice(first, min(first + images, count)), slice(top, min(top + high, rows))


def _tiles(padded: Tensor, where: tuple[slice, slice], r: int) -> Tensor:
    """Return Bᵀ X B of all tiles of a band as [T, 49, C]; `padded` [N, H, W, C] in whole tiles."""
    m, (which, band) = TILE + 1 - r, where
    part = padded[which, band.start * m : band.stop * m + r - 1]
    tiles = part.unfold(1, TILE, m).unfold(2, TILE, m)  # [n, rows, columns, C, 7, 7]
    _, _, of_tile = transforms(r)
    return _each(of_tile, tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, TILE**2, part.shape[-1]))


def _each(matrix: Tensor, tiles: Tensor) -> Tensor:
    """Return `matrix` [a, b] times each of the tiles [T, b, C] as [T, a, C]."""
    return torch.bmm(matrix.expand(len(tiles), -1, -1), tiles)


def _products(tiles: Tensor, kernels: Tensor, convolution: Callable[..., Tensor] = F.conv2d) -> Tensor:
    """Return the sums over channels of tiles [T, 49, C] times kernels [49, K, C] as [T, 49, K].

    With `F.conv_transpose2d` tiles have K channels and the sums C. The dilation of a single weight changes nothing, but
    with it torch asks oneDNN with one thread, too.
    """
    count, points, channels = tiles.shape
    pixels = tiles.view(1, 1, count, points * channels).permute(0, 3, 1, 2)
    sums = convolution(pixels, kernels.view(-1, kernels.shape[-1], 1, 1), dilation=(2, 1), groups=points)
    return sums.permute(0, 2, 3, 1).view(count, points, -1)
