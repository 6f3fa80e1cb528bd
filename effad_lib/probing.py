"""How good are features for finding anomalies? Nearest neighbours answer without any training (after PatchCore)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm.auto import tqdm

from effad_lib.backbones import load_backbone
from effad_lib.datasets import Split
from effad_lib.detector import AnomalyMaps
from effad_lib.distillation import channel_statistics, load_teacher
from effad_lib.evaluation import evaluate
from effad_lib.images import Size, check_size, load_images, to_float
from effad_lib.networks import PDN, Normalise, initialise
from effad_lib.settings import SettingsError

BLUR = 1.0
"""Deviation in cells of the Gaussian that smooths the maps: 4 pixels for a PDN, and the same part of a backbone's."""


class NearestNeighbours(nn.Module):
    """A detector without training: how far is each cell's feature from the nearest one of good images?

    `forward`: images [N, 3, H, W] in [0, 1] → `AnomalyMaps` at the images' size, all three alike, in units of a
    channel's deviation. It has what `evaluation.evaluate` needs of a detector; there is no threshold.
    """

    def __init__(self, extractor: nn.Module, bank: Tensor, mean: Tensor, std: Tensor, image_size: Size) -> None:
        super().__init__()
        self.extractor, self.image_size = extractor, tuple(image_size)
        self.register_buffer("bank", bank)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @classmethod
    @torch.inference_mode()
    def fit(cls, extractor: nn.Module, images: Tensor, *, bank: int = 5000, seed: int = 0) -> NearestNeighbours:
        """Remember good images: uint8 [N, 3, H, W], on the extractor's device.

        `extractor` maps images in [0, 1] to features [N, C, h, w]. Of all cells, ten times as many as the bank will
        hold are drawn at random; of these `bank` are kept so that none is far from a kept one.
        """
        generator = torch.Generator().manual_seed(seed)
        per_image = -(-10 * bank // len(images))
        drawn = []

        def batches():
            for batch in tqdm(images.split(8), desc="features of good images", leave=False):
                features = extractor(to_float(batch))
                rows = features.permute(0, 2, 3, 1).flatten(1, 2)
                for image in rows:
                    chosen = torch.randperm(len(image), generator=generator)[:per_image]
                    drawn.append(image[chosen.to(image.device)])
                yield features

        mean, std = channel_statistics(batches())
        rows = (torch.cat(drawn) - mean.flatten()) / std.flatten()
        return cls(extractor, rows[spread_out(rows, bank, generator)], mean, std, images.shape[-2:]).to(images.device)

    def forward(self, images: Tensor) -> AnomalyMaps:
        features = (self.extractor(images) - self.mean) / self.std
        count, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        nearest = torch.cat([torch.cdist(part, self.bank).amin(dim=1) for part in rows.split(4096)])
        distances = nearest.view(count, 1, height, width) / channels**0.5
        smooth = gaussian_blur(distances, 2 * round(3 * BLUR) + 1, BLUR)
        maps = F.interpolate(smooth, images.shape[-2:], mode="bilinear")
        return AnomalyMaps(maps, maps, maps)


def spread_out(rows: Tensor, count: int, generator: torch.Generator, dimensions: int = 64) -> Tensor:
    """Return the indices of `count` rows [M, C] of which each was the farthest from those chosen before it.

    Distances are taken after a random projection to `dimensions`, which keeps them roughly. All rows if there are few.
    """
    if len(rows) <= count:
        return torch.arange(len(rows), device=rows.device)
    projection = torch.randn(rows.shape[1], dimensions, generator=generator).to(rows) / dimensions**0.5
    points = rows @ projection
    chosen = torch.empty(count, dtype=torch.long, device=rows.device)
    nearest = torch.full((len(points),), float("inf"), device=rows.device)
    last = torch.zeros((), dtype=torch.long, device=rows.device)
    for index in tqdm(range(count), desc="choosing a bank", leave=False):
        chosen[index] = last
        nearest = torch.minimum(nearest, (points - points[last]).square().sum(dim=1))
        last = nearest.argmax()
    return chosen


def probe(
    extractor: nn.Module, split: Split, image_size: Size, *, bank: int = 5000, seed: int = 0
) -> dict[str, float | None]:
    """Return the metrics that nearest neighbours reach with these features on a split's test images.

    See `NearestNeighbours.fit`; the keys are those of `Evaluation.metrics`. Raises `SettingsError` for an empty bank or
    a split without test images.
    """
    if bank < 1:
        raise SettingsError(f"bank = {bank}: takes a positive number of features.")
    if not split.test:
        raise SettingsError(f"{split.name} has no test images to judge by. Name another data set.")
    device = next(extractor.parameters()).device
    images = load_images([sample.image for sample in split.train], image_size, description="reading good images")
    detector = NearestNeighbours.fit(extractor, images.to(device), bank=bank, seed=seed)
    return evaluate(detector, split.test).metrics()


def compare(
    teacher: str | Path,
    split: Split,
    image_size: Size,
    *,
    backbone: str = "",
    backbone_weights: str | Path = "",
    bank: int = 5000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """Return the metrics of a teacher's features between those of an untrained PDN and, if named, of a backbone.

    `teacher` is a size or a file, see `load_teacher`; the backbone sees images of twice the size, as in Algorithm 3.
    """
    height, width = check_size(image_size)
    distilled, card = load_teacher(teacher, padding=True)
    expert = load_backbone(backbone, backbone_weights, width=distilled.out_channels) if backbone else None
    torch.manual_seed(seed)
    untrained = PDN(distilled.size, distilled.out_channels, padding=True).requires_grad_(False)
    initialise(untrained, torch.randn(4, 3, 128, 128))
    rows = {
        f"untrained {card['network']}": (nn.Sequential(Normalise(), untrained), (height, width)),
        f"teacher {card['network']}": (nn.Sequential(Normalise(), distilled), (height, width)),
    }
    if expert is not None:
        rows[f"backbone {backbone}"] = expert, (2 * height, 2 * width)
    found = {
        name: probe(network.eval().to(device), split, size, bank=bank, seed=seed)
        for name, (network, size) in rows.items()
    }
    return pd.DataFrame.from_dict(found, orient="index", dtype=float)
