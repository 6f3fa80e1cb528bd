"""What the teacher imitates: views of photographs, the backbone's features on them, their statistics."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from effad_lib.backbones import Backbone
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.images import NaturalImages
from effad_lib.networks import PDN, Normalise, feature_size, initialise
from effad_lib.progress import progress
from effad_lib.runs import resolve
from effad_lib.settings import SettingsError

Drawn, Made = TypeVar("Drawn"), TypeVar("Made")


def photographs(settings: DistillationSettings, workers: int = 0) -> tuple[NaturalImages, NaturalImages]:
    """Return the photographs to learn from and those held out, which are the same for every seed.

    Raises `SettingsError` if too few are left to learn from and `ImageError` if none can be read.
    """
    folder = resolve(settings.images) if settings.images else ""
    every = NaturalImages(folder, workers=workers)
    if settings.held_out >= len(every):
        where = f"in {folder}" if folder else "inside the installed packages"
        raise SettingsError(
            f"held_out = {settings.held_out}: only {len(every)} photographs are {where}. Hold out fewer, or name a "
            f"folder of more in images."
        )
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, natural = every.part(order[: settings.held_out]), every.part(sorted(order[settings.held_out :]))
    for some in (natural, held_out) if len(held_out) else (natural,):
        some.check()
    return natural, held_out


class Views:
    """What a distillation looks at: random views of photographs, each for the PDN and, twice the size, the backbone."""

    def __init__(self, settings: DistillationSettings, natural: NaturalImages, backbone: Backbone) -> None:
        self.settings, self.natural, self.backbone = settings, natural, backbone

    def drawn(self, count: int, generator: torch.Generator) -> list:
        """Draw what `count` random views are of; `large` makes them of it, or of a part of it."""
        return self.natural.draw(count, generator)

    def large(self, drawn: list) -> Tensor:
        """Return the views that were `drawn` as the backbone sees them, [N, 3, 2H, 2W] in [0, 1]."""
        height, width = self.settings.image_size
        return self.natural.views(
            drawn,
            (2 * height, 2 * width),
            grayscale=self.settings.grayscale,
            zoom=1.0,
            crop_scale=tuple(self.settings.crop_scale) or None,
        )

    def names(self, drawn: list) -> list[str]:
        """Return what the views that were `drawn` are of, as an error names them."""
        return [str(self.natural.paths[index]) for index, _ in drawn]

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the `pair` of `count` random views."""
        return self.pair(self.large(self.drawn(count, generator)).to(device))

    def pair(self, large: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised PDN images [N, 3, H, W] and raw backbone features on the PDN's own cells [N, C, h, w].

        `large` [N, 3, 2H, 2W] in [0, 1] is what the backbone sees, on its device.
        """
        small = F.interpolate(large, size=tuple(self.settings.image_size), mode="bilinear", antialias=True)
        features = self.backbone(large)
        if not self.settings.padding:
            # The unpadded PDN has no cells in a border of four: there its field would leave the image.
            rows, columns = feature_size(self.settings.image_size, padding=False)
            features = features[..., 4 : 4 + rows, 4 : 4 + columns]
        return Normalise().to(large.device)(small), features


class RecordedViews(Views):
    """Views that are drawn once and kept, in half precision, with what the backbone says of them.

    For several distillations from the same `count` views: each draws from these with replacement. What stands for a
    view between `drawn` and `pair` is its number.
    """

    def __init__(self, views: Views, count: int, device: torch.device) -> None:
        super().__init__(views.settings, views.natural, views.backbone)
        generator, batch = torch.Generator().manual_seed(self.settings.seed), self.settings.batch_size
        sizes = [min(batch, count - start) for start in range(0, count, batch)]
        images, features = [], []
        with torch.no_grad():
            for size in progress(sizes, desc="recording views", leave=False):
                image, feature = views.draw(size, generator, device)
                images.append(image.half())
                features.append(feature.half())
        self.images, self.features = torch.cat(images), torch.cat(features)

    def drawn(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randint(len(self.images), (count,), generator=generator).tolist()

    def names(self, drawn: list[int]) -> list[str]:
        return [f"view {number}" for number in drawn]

    def large(self, drawn: list[int]) -> Tensor:
        return torch.tensor(drawn)

    def pair(self, large: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[large].float(), self.features[large].float()


def prefetched(
    draw: Callable[[], Drawn], make: Callable[[Drawn], Made], count: int, *, ahead: int, workers: int = 1
) -> Iterator[Made]:
    """Yield `make(draw())` `count` times, up to `ahead` of them made in threads before they are asked for.

    `draw` is called here and in order, so that what it draws does not depend on the threads; 0 `ahead` uses none.
    """
    with ThreadPoolExecutor(max_workers=workers) as threads:
        waiting: deque[Future[Made]] = deque()
        try:
            for left in range(count, 0, -1):
                while len(waiting) < min(ahead, left):
                    waiting.append(threads.submit(make, draw()))
                yield waiting.popleft().result() if waiting else make(draw())
        finally:
            threads.shutdown(cancel_futures=True)


def channel_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation [1, C, 1, 1] over feature batches [N, C, h, w], each seen once, on their device.

    Batches are merged by their means and squared deviations in float64 (Chan et al.), so nothing cancels as it would in
    E[x²] − E[x]². A channel that never varies gets deviation 1.
    """
    count, mean, squares, device = 0, torch.zeros(()), torch.zeros(()), torch.device("cpu")
    for batch in batches:
        device = batch.device
        values = batch.transpose(0, 1).flatten(1)
        values = (values.cpu() if device.type == "mps" else values).double()  # MPS has no float64
        new_mean = values.mean(dim=1)
        new_squares = (values - new_mean[:, None]).square().sum(dim=1)
        new = values.shape[1]
        delta = new_mean - mean
        total = count + new
        mean = mean + delta * (new / total)
        squares = squares + new_squares + delta.square() * (count * new / total)
        count = total
    if not count:
        raise SettingsError("no images to take channel statistics from.")
    deviation = (squares / count).sqrt()
    deviation = torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, torch.ones_like(deviation))
    return mean.float().view(1, -1, 1, 1).to(device), deviation.float().view(1, -1, 1, 1).to(device)


@torch.no_grad()
def fit_initialisation(pdn: PDN, images: Tensor, targets: Tensor, ridge: float = 1e-2) -> None:
    """Start the PDN close: scaled He weights, then the last layer by ridge regression on `targets`.

    `images` normalised [N, 3, H, W], `targets` standardised [N, C, h, w]. Ours, for short schedules.
    """
    if pdn.padding:
        raise SettingsError("initialisation = 'fitted' needs padding = False: it regresses on cells with a full field.")
    initialise(pdn, images)
    features = pdn.trunk(images)
    kernel, channels = pdn.head.kernel_size[0], features.shape[1]
    wide = channels * kernel * kernel
    gram = torch.zeros(wide + 1, wide + 1, dtype=torch.float64)
    cross = torch.zeros(wide + 1, targets.shape[1], dtype=torch.float64)
    for one, target in zip(features, targets, strict=True):
        rows = F.unfold(one[None], kernel)[0].T.cpu().double()  # MPS has no float64
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        gram += rows.T @ rows
        cross += rows.T @ target.flatten(1).T.cpu().double()
    gram.diagonal()[:-1].add_(ridge * gram.diagonal()[:-1].mean())
    solution = torch.linalg.solve(gram, cross).to(pdn.head.weight)
    pdn.head.weight.copy_(solution[:-1].T.reshape(pdn.head.weight.shape))
    pdn.head.bias.copy_(solution[-1])
