"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from effad_lib.images import check_levels, check_size
from effad_lib.networks import check_network
from effad_lib.optimisers import OPTIMISERS
from effad_lib.settings import PRECISIONS, SEEDS, Settings, pick_device

PACKAGED_CROPS = (0.05, 0.5)
"""Random crops of the photographs inside installed packages: fourteen fixed views would soon be known by heart."""


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Settings of a training; the defaults are the paper's (Algorithm 1), on the first synthetic product."""

    MAY_CHANGE = frozenset({"run_folder", "device", "compiled", "data_root", "penalty_images", "teacher"})
    BEFORE = MappingProxyType({"levels": [], "compiled": "", "optimiser": "adam"})
    RECIPES = MappingProxyType(
        {
            "paper": {},
            "cpu": {
                "size": "XS",
                "steps": 1500,
                "optimiser": "muon",
                "learning_rate": 2e-3,
                "schedule": "cosine",
                "initialisation": "scaled",
                "hard_quantile": 0.99,
                "validate_every": 100,
                "checkpoint_every": 100,
            },
        }
    )
    """The paper's, which is the defaults, and ours for a CPU, much as in the quick profile."""

    run_folder: str = "runs/training"  # a finished run in it is loaded, an interrupted one continued
    dataset: str = "synthetic"  # folder, elpv, synthetic, mvtec_ad(_2), mvtec_loco, visa, btad, or path/to/file.py:name
    category: str = ""  # which category, product or kind of cell; "" takes the data set's default
    data_root: str = ""  # folder of the data set; "" takes the default under data/
    size: str = "S"  # S or M (paper), XS (for CPUs)
    teacher: str = ""  # a file of `effad distill` or public weights, or a size; "" takes the shipped one of this size
    padding: bool = False  # the paper's headline figures use the unpadded networks
    image_size: list[int] = (256, 256)  # height and width in pixels
    levels: list[float] = ()  # of 16-bit grey images: the values that become black and white; [] refuses such images
    steps: int = 70_000  # optimiser steps
    batch_size: int = 1  # images in a step
    optimiser: str = "adam"  # or "muon": a quarter of the steps (ours, for short schedules)
    learning_rate: float = 1e-4  # of the optimiser
    weight_decay: float = 1e-5  # of the optimiser
    schedule: str = "step"  # ×0.1 after 95 % of the steps (paper), or "cosine": 5 % warm-up, then a half cosine to zero
    initialisation: str = "default"  # torch's, or "scaled": mean 0, variance 1, last layer 0; for short schedules
    hard_quantile: float = 0.999  # share of the student–teacher differences that is left out of the loss
    weight_hard: float = 1.0  # of the hard feature loss
    weight_penalty: float = 1.0  # of the pretraining penalty
    weight_autoencoder: float = 1.0  # of the autoencoder's loss
    weight_student_autoencoder: float = 1.0  # of the loss by which the student imitates the autoencoder
    penalty_images: str = ""  # folder of natural images; "" takes the photographs inside installed packages
    penalty_crop_scale: list[float] = ()  # [low, high]: random crops of this share; [] see `penalty_crops`
    validation_share: float = 0.1  # of the training images, held out for calibration and checkpoints
    false_alarm_rate: float = 0.0  # of new normal images at most, for the threshold; 0: the highest held-out score
    confidence: float = 0.95  # with which the false-alarm rate is kept
    validate_every: int = 1000  # steps between validation losses
    patience: int = 0  # stop after so many validations without a better loss; 0 never does
    checkpoint: str = "last"  # which weights become the model: "last" (paper) or "best" validation loss
    checkpoint_every: int = 1000  # steps between checkpoints
    cache_gb: float = 2.0  # room for the teacher's output on the training images, computed once if it fits
    ablation_steps: int = 0  # steps of a second training without the penalty that notebook 03 compares with; 0 skips it
    seed: int = 0  # of everything random
    precision: str = "float32"  # float32, bfloat16 or float16
    compiled: str = ""  # for graphics cards: a mode of torch.compile, default, reduce-overhead or max-autotune
    device: str = "auto"  # auto, cpu, cuda or mps

    def check(self) -> None:
        check_network(self.size)
        check_size(self.image_size)
        check_levels(self.levels)
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            self.require(getattr(self, name) >= 1, name, "a whole number of at least 1")
        self.require(self.optimiser in OPTIMISERS, "optimiser", f"one of {', '.join(OPTIMISERS)}")
        self.require(0 < self.learning_rate < 1, "learning_rate", "a number between 0 and 1")
        self.require(0 <= self.weight_decay < 1, "weight_decay", "a number from 0 to below 1")
        self.require(self.schedule in ("step", "cosine", "constant"), "schedule", "'step', 'cosine' or 'constant'")
        self.require(self.initialisation in ("default", "scaled"), "initialisation", "'default' or 'scaled'")
        self.require(0 <= self.hard_quantile < 1, "hard_quantile", "a share in [0, 1)")
        for name in ("weight_hard", "weight_penalty", "weight_autoencoder", "weight_student_autoencoder"):
            self.require(getattr(self, name) >= 0, name, "a weight of zero or more")
        crop = self.penalty_crop_scale
        sound = not crop or (len(crop) == 2 and 0 < crop[0] <= crop[1] <= 1)
        self.require(sound, "penalty_crop_scale", "[] or two shares of the area, 0 < low <= high <= 1")
        self.require(0 < self.validation_share < 1, "validation_share", "a share between 0 and 1")
        self.require(0 <= self.false_alarm_rate < 1, "false_alarm_rate", "a share from 0 to below 1")
        self.require(0 < self.confidence < 1, "confidence", "a probability between 0 and 1")
        self.require(self.ablation_steps >= 0, "ablation_steps", "zero or a number of steps")
        self.require(self.cache_gb >= 0, "cache_gb", "zero or more gigabytes")
        self.require(self.patience >= 0, "patience", "zero or a number of validations")
        self.require(self.checkpoint in ("last", "best"), "checkpoint", "'last' or 'best'")
        self.require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        self.require(self.seed in SEEDS, "seed", "a whole number from 0 to below 2^63")
        modes = ("", "default", "reduce-overhead", "max-autotune")
        self.require(self.compiled in modes, "compiled", "'' or a mode: 'default', 'reduce-overhead' or 'max-autotune'")
        pick_device(self.device)

    @property
    def penalty_crops(self) -> tuple[float, float] | None:
        """The share of a photograph's area in a random crop for the penalty; None for the paper's centre crop.

        A folder of photographs is shown as in the paper unless `penalty_crop_scale` says otherwise; of the few in
        installed packages, random crops make more.
        """
        if self.penalty_crop_scale:
            return tuple(self.penalty_crop_scale)
        return None if self.penalty_images else PACKAGED_CROPS
