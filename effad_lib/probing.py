"""How good are features for finding anomalies? Nearest neighbours answer without any training (after PatchCore)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effad_lib.backbones import Backbone, load_backbone
from effad_lib.datasets import Split, verify
from effad_lib.detector import AnomalyMaps
from effad_lib.distillation import channel_statistics, load_teacher, read_teacher_card, teacher_files
from effad_lib.evaluation import evaluate
from effad_lib.images import Size, check_size, load_images, to_float
from effad_lib.networks import PDN, PDN_LAYERS, Normalise, initialise
from effad_lib.progress import progress
from effad_lib.runs import write_json
from effad_lib.settings import SEEDS, SettingsError

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
        self.register_buffer("norms", bank.square().sum(dim=1))
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
            for batch in progress(images.split(8), desc="features of good images", leave=False):
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
        from torchvision.transforms.v2.functional import gaussian_blur  # slow to import

        features = (self.extractor(images) - self.mean) / self.std
        count, channels, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        # |p − q|² = |p|² + |q|² − 2 p·q: one matrix product, and only its smallest entry of each row goes on.
        nearest = [torch.addmm(self.norms, part, self.bank.T, alpha=-2).amin(dim=1) for part in rows.split(4096)]
        squared = (torch.cat(nearest) + rows.square().sum(dim=1)).clamp(min=0)
        distances = (squared / channels).sqrt().view(count, 1, height, width)
        smooth = gaussian_blur(distances, 2 * round(3 * BLUR) + 1, BLUR)
        maps = _enlarged(smooth, images.shape[-2:])
        return AnomalyMaps(maps, maps, maps)


def _enlarged(cells: Tensor, size: Size) -> Tensor:
    """Interpolate cells [N, 1, h, w] to `size`, cell (i, j) at pixel (i·s, j·s) for a stride s, where it is centred.

    `F.interpolate` alone would take its centre for (i·s + (s − 1) / 2, …) and shift every map by that half cell.
    """
    strides = [-(-side // count) for side, count in zip(size, cells.shape[-2:], strict=True)]
    between = [stride * (count - 1) + 1 for stride, count in zip(strides, cells.shape[-2:], strict=True)]
    maps = F.interpolate(cells, between, mode="bilinear", align_corners=True)
    return F.pad(maps, (0, size[1] - between[1], 0, size[0] - between[0]), mode="replicate")


def spread_out(rows: Tensor, count: int, generator: torch.Generator, dimensions: int = 64) -> Tensor:
    """Return the indices of `count` rows [M, C] of which each was the farthest from those chosen before it.

    Distances are taken after a random projection to `dimensions`, which keeps them roughly. All rows if there are few.
    """
    if len(rows) <= count:
        return torch.arange(len(rows), device=rows.device)
    projection = torch.randn(rows.shape[1], dimensions, generator=generator).to(rows) / dimensions**0.5
    points = rows @ projection
    norms = points.square().sum(dim=1)
    chosen = torch.empty(count, dtype=torch.long, device=rows.device)
    nearest = torch.full((len(points),), float("inf"), device=rows.device)
    last = torch.zeros((), dtype=torch.long, device=rows.device)
    for index in progress(range(count), desc="choosing a bank", leave=False):
        chosen[index] = last
        distances = torch.addmv(norms + norms[last], points, points[last], alpha=-2)  # |p|² + |q|² − 2 p·q
        nearest = torch.minimum(nearest, distances)
        last = nearest.argmax()
    return chosen


METRICS = {"image_auroc": "image AU-ROC", "au_pro": "AU-PRO"}
"""What a probe asks of each data set: which images are defective, and where."""


def probe(
    network: PDN | Backbone, split: Split, image_size: Size, *, bank: int = 5000, seed: int = 0
) -> dict[str, float | None]:
    """Return the `METRICS` that nearest neighbours reach with a network's features on the test images of a split.

    `network` is a padded PDN, which sees the images at `image_size`, or a backbone, which sees them at twice that, as
    in Algorithm 3. AU-PRO is None without masks. See `NearestNeighbours.fit`. Raises `SettingsError` for an empty bank
    or a split whose test images are not both good and defective.
    """
    height, width = check([split], image_size, bank)
    device = next(network.parameters()).device
    extractor, size = nn.Sequential(Normalise(), network).to(device), (height, width)
    if isinstance(network, Backbone):
        extractor, size = network, (2 * height, 2 * width)
    images = load_images([sample.image for sample in split.train], size, description="reading good images")
    detector = NearestNeighbours.fit(extractor.eval(), images.to(device), bank=bank, seed=seed)
    metrics = evaluate(detector, split.test).metrics()
    return {name: metrics[name] for name in METRICS}


def check(splits: Sequence[Split], image_size: Size, bank: int) -> Size:
    """Raise `SettingsError` for what `probe` cannot work with; returns the size."""
    if bank < 1:
        raise SettingsError(f"bank = {bank}: takes a positive number of features.")
    for split in splits:
        if {sample.label for sample in split.test} != {0, 1}:
            raise SettingsError(f"{split.name} has no good or no defective test images to judge by. Name another.")
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        raise SettingsError(f"data sets {', '.join(names)}: each takes a name of its own.")
    return check_size(image_size)


def untrained(size: str, channels: int = 384, *, seed: int = 0) -> PDN:
    """Return a padded PDN that has learned nothing: He weights, each layer scaled to unit variance on noise."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        pdn = PDN(size, channels, padding=True).requires_grad_(False)
        initialise(pdn, torch.randn(4, 3, 128, 128))
    return pdn.eval()


def candidates(
    teachers: Sequence[str | Path], backbone: str = "", weights: str | Path = "", *, seed: int = 0
) -> dict[str, PDN | Backbone]:
    """Return teachers by name, each behind an untrained PDN of its size, and a backbone last, if one is named.

    A teacher is a size or a file, see `load_teacher`. Raises `SettingsError` for one that is named twice.
    """
    if seed not in SEEDS:
        raise SettingsError(f"seed = {seed!r}: takes a whole number from 0 to below 2^63.")
    found: dict[str, PDN | Backbone] = {}
    for source in teachers:
        pdn, card = load_teacher(source, padding=True)
        found.setdefault(f"untrained PDN-{card['size']}", untrained(pdn.size, pdn.out_channels, seed=seed))
        if (name := _title(source)) in found:
            raise SettingsError(f"{name} is named twice.")
        found[name] = pdn
    if backbone:
        found[f"backbone {backbone}"] = load_backbone(backbone, weights, width=pdn.out_channels)
    return found


def _title(source: str | Path) -> str:
    """Return the name of a teacher in a table."""
    size = str(source).upper()
    return f"teacher PDN-{size}" if size in PDN_LAYERS else f"teacher {source}"


def compare(
    networks: Mapping[str, PDN | Backbone],
    splits: Sequence[Split],
    image_size: Size,
    *,
    bank: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what `probe` finds: a row for each metric and data set, a column for each network.

    All images are decoded once before the work begins. Raises as `probe`, and `DatasetError` for faulty images.
    """
    check(splits, image_size, bank)
    for split in splits:
        verify(split)
    found: dict[tuple[str, str], dict[str, float]] = {}
    pairs = [(name, split) for split in splits for name in networks]
    for name, split in progress(pairs, desc="probing"):
        for metric, value in probe(networks[name], split, image_size, bank=bank, seed=seed).items():
            if value is not None:
                found.setdefault((METRICS[metric], split.name), {})[name] = value
    return pd.DataFrame.from_dict(found, orient="index")


def read_cards(teachers: Sequence[str | Path], backbone: str) -> list[dict[str, Any]]:
    """Return the cards of teachers in which `record` shall write.

    Raises `SettingsError` for a teacher without one, or that imitates another backbone than the one it is judged with.
    """
    cards = []
    for source in teachers:
        path, card_path = teacher_files(source)
        if not card_path.is_file():
            raise SettingsError(f"teacher {path}: it has no card {card_path.name} beside it to record in.")
        card = read_teacher_card(card_path)
        made = card.get("settings")
        own = made.get("backbone", backbone) if isinstance(made, dict) else backbone
        if backbone not in ("", own):
            raise SettingsError(f"teacher {path} imitates {own}, not {backbone}: record it with its own backbone.")
        cards.append(card)
    return cards


def record(
    teachers: Sequence[str | Path], cards: Sequence[dict[str, Any]], table: pd.DataFrame, settings: Mapping[str, Any]
) -> list[Path]:
    """Write what `compare` found for `candidates` into the teachers' cards, which `read_cards` returned before.

    A card gets `probe`: the settings, and for each row of the table the values of the untrained PDN, of the teacher and
    of its backbone, if that was judged. Returns the cards' paths. Raises `SettingsError` for a teacher that was
    replaced meanwhile.
    """
    paths = []
    for source, before in zip(teachers, cards, strict=True):
        path = teacher_files(source)[1]
        card = read_teacher_card(path)
        if card["sha256"] != before["sha256"]:
            raise SettingsError(
                f"teacher {source} was replaced while it was judged: nothing is recorded. Probe it anew."
            )
        columns = {"untrained": f"untrained PDN-{card['size']}", "teacher": _title(source)}
        if settings["backbone"]:
            columns["backbone"] = f"backbone {settings['backbone']}"
        found = [
            {"metric": metric, "data": data} | {kind: round(row[column], 4) for kind, column in columns.items()}
            for (metric, data), row in table.iterrows()
        ]
        paths.append(write_json(path, card | {"probe": {**settings, "found": found}}))
    return paths
