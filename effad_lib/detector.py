"""`EfficientAD`: the three networks with their normalisation; image in, anomaly maps and score out; save and load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from effad_lib import __version__
from effad_lib.cards import read_card
from effad_lib.engines import Inspection
from effad_lib.images import Levels, Size, check_levels, check_size, to_float
from effad_lib.networks import PDN, Autoencoder, Normalise
from effad_lib.runs import write_bytes
from effad_lib.settings import SettingsError
from effad_lib.tensors import unsound

CARD_FIELDS = ("size", "channels", "padding", "image_size")


class AnomalyMaps(NamedTuple):
    """Anomaly maps [N, 1, H, W] on the model's scale: 0 and 0.1 are the 0.9 and 0.995 quantiles of normal images."""

    combined: Tensor
    student_teacher: Tensor
    student_autoencoder: Tensor

    @property
    def score(self) -> Tensor:
        """The image scores [N]: the largest value of the combined map, not clamped."""
        return self.combined.amax(dim=(1, 2, 3))

    def as_arrays(self) -> Inspection:
        """Return maps [N, H, W] and scores as arrays."""
        return Inspection(*(maps[:, 0].cpu().numpy() for maps in self), self.score.cpu().numpy())


class EfficientAD(nn.Module):
    """EfficientAD of size S, M or XS: teacher, student with twice the channels, autoencoder, and all normalisation.

    `forward`: images [N, 3, H, W] in [0, 1] → `AnomalyMaps` at the images' size, any H and W of at least 64.
    `image_size` is the size it is trained for. Before calibration both maps are on their raw scale. Algorithm 2.
    """

    def __init__(
        self, size: str = "S", channels: int = 384, padding: bool = False, image_size: Size = (256, 256)
    ) -> None:
        super().__init__()
        self.size, self.channels, self.padding = size, channels, padding
        self.image_size = check_size(image_size)
        self.normalise = Normalise()
        self.teacher = PDN(size, channels, padding).requires_grad_(False)
        self.student = PDN(size, channels, padding, targets=2)
        self.autoencoder = Autoencoder(size, channels, padding)
        self.levels: Levels | None = None  # of 16-bit images, see `images.read_image`
        self.threshold: float | None = None  # of the image score
        self.pixel_threshold: float | None = None  # of the combined map
        self.calibration: dict[str, Any] = {}  # what the thresholds were chosen from, see `calibration`
        self.card: dict[str, Any] = {}
        self.register_buffer("teacher_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, channels, 1, 1))
        # Rows: student–teacher, student–autoencoder; columns: q_a and q_b. (0, 0.1) leaves the raw maps as they are.
        self.register_buffer("quantiles", torch.tensor([[0.0, 0.1], [0.0, 0.1]]))

    def teacher_features(self, normalised: Tensor) -> Tensor:
        """Return the teacher's output, standardised per channel: T̂ = (T − μ)/σ, [N, C, h, w]."""
        return (self.teacher(normalised) - self.teacher_mean).div_(self.teacher_std)

    def raw_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student–teacher and student–autoencoder maps [N, 1, h, w] on the PDN's grid, not normalised."""
        normalised = self.normalise(images)
        by_teacher, by_autoencoder = self.student(normalised).split(self.channels, dim=1)
        differences = (
            F.mse_loss(self.teacher_features(normalised), by_teacher, reduction="none"),
            F.mse_loss(self.autoencoder(normalised), by_autoencoder, reduction="none"),
        )
        student_teacher, student_autoencoder = (squares.mean(dim=1, keepdim=True) for squares in differences)
        return student_teacher, student_autoencoder

    def forward(self, images: Tensor) -> AnomalyMaps:
        return self.finished(torch.cat(self.raw_maps(images), dim=1).float(), (images.shape[-2], images.shape[-1]))

    def finished(self, maps: Tensor, size: Size) -> AnomalyMaps:
        """Return both raw maps [N, 2, h, w] padded, brought to height and width `size`, on the model's scale."""
        if not self.padding:
            # Raw zeros mean "no difference"; padded after normalisation, the border would be brighter than the rest.
            maps = F.pad(maps, (4, 4, 4, 4))
        maps = F.interpolate(maps, size, mode="bilinear")
        low, high = self.quantiles.T.reshape(2, 1, 2, 1, 1)
        # A map that is constant on normal images has q_a = q_b; the smallest step keeps it finite.
        maps = 0.1 * (maps - low) / (high - low).clamp(min=1e-8)
        student_teacher, student_autoencoder = maps.split(1, dim=1)
        return AnomalyMaps(0.5 * student_teacher + 0.5 * student_autoencoder, student_teacher, student_autoencoder)

    def inspect(self, images: np.ndarray) -> Inspection:
        """Return maps and scores of images uint8 [N, 3, H, W] as arrays; the detector is in evaluation mode then."""
        with torch.inference_mode():
            found = self.eval()(to_float(torch.from_numpy(np.ascontiguousarray(images)).to(self.device)))
            return found.as_arrays()

    @property
    def input_size(self) -> Size:
        """The size to which an image is brought before it is inspected: the one that the detector is trained for."""
        return self.image_size

    @property
    def device(self) -> torch.device:
        """The device that the networks are on."""
        return self.teacher_mean.device

    @property
    def identity(self) -> str:
        """The SHA-256 of all that its decisions depend on: weights, sizes, levels and thresholds."""
        plain = [getattr(self, name) for name in (*CARD_FIELDS, "levels", "threshold", "pixel_threshold")]
        digest = hashlib.sha256(json.dumps(plain).encode())
        for value in self.state_dict().values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path, card: dict[str, Any] | None = None) -> Path:
        """Save weights and card in one safetensors file, whole or not at all; the card is readable JSON metadata.

        Raises `SettingsError` for a card that `load` would refuse.
        """
        try:
            self.card = read_card(text := json.dumps(self.card_now(card)))
        except ValueError as error:
            raise SettingsError(f"model {path}: it would be saved with what no model takes, {error}.") from error
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        return write_bytes(path, save(weights, {"effad_card": text}))

    def card_now(self, card: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the card with what the detector is now: its size, thresholds and what they were chosen from."""
        card = (self.card if card is None else card) | {name: getattr(self, name) for name in CARD_FIELDS}
        card |= {"threshold": self.threshold, "pixel_threshold": self.pixel_threshold}
        card |= {"levels": list(self.levels or ())}
        return card | {"calibration": self.calibration, "effad": __version__}

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> EfficientAD:
        """Load a detector in evaluation mode, its weights frozen.

        Raises `SettingsError` if the file is not a whole effad model.
        """
        path = Path(path)
        if not path.is_file():
            raise SettingsError(f"model {path}: there is no such file. Train one with `effad train`.")
        try:
            with safe_open(path, "pt") as file:
                card = read_card((file.metadata() or {})["effad_card"])
                weights = {name: file.get_tensor(name) for name in file.keys()}
            if (measured := weights["teacher_mean"].numel()) != card["channels"]:  # before so many are made
                raise ValueError(f"its card has {card['channels']} channels, its weights {measured}")
            if wrong := unsound(weights):
                raise ValueError(wrong)
            detector = cls(card["size"], card["channels"], card["padding"], tuple(card["image_size"]))
            detector.load_state_dict(weights)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            # Of weights that do not fit torch says which in the second line.
            reason = " ".join(map(str.strip, str(error).splitlines()[:2])) or type(error).__name__
            raise SettingsError(
                f"model {path}: not a whole effad model ({reason}). Fetch it again, or train it again "
                f"if it is of an earlier version."
            ) from error
        detector.levels = check_levels(card.get("levels", ()))
        detector.card, detector.threshold = card, card["threshold"]
        detector.pixel_threshold, detector.calibration = card.get("pixel_threshold"), card.get("calibration", {})
        return detector.eval().requires_grad_(False).to(device)
