"""Teacher → student and autoencoder: settings, step, schedule and loop (Algorithm 1)."""

from __future__ import annotations

import warnings

import torch

from effad_lib.calibration import calibrate, rank
from effad_lib.datasets import Split, verify_masks
from effad_lib.detector import EfficientAD
from effad_lib.distillation import load_teacher
from effad_lib.execution import alone_in
from effad_lib.images import NaturalImages, check_levels, image_size, load_images, names_sha256
from effad_lib.memory import enough_memory
from effad_lib.provenance import note_provenance
from effad_lib.runs import Run, resolve
from effad_lib.settings import SettingsError, pick_device
from effad_lib.training.settings import TrainingSettings
from effad_lib.training.step import Draw, Losses, training_losses
from effad_lib.training.trainer import KEPT_CHECKPOINTS, VALIDATION_IMAGES, Trainer

__all__ = [
    "KEPT_CHECKPOINTS",
    "VALIDATION_IMAGES",
    "Draw",
    "Losses",
    "Trainer",
    "TrainingSettings",
    "train",
    "training_losses",
]


def train(settings: TrainingSettings, split: Split) -> EfficientAD:
    """Train a detector on the normal images of `split` in `settings.run_folder`, or continue there.

    Writes `parameters.yaml`, `provenance.json`, checkpoints (last, best, the three best by validation loss),
    TensorBoard scalars and maps, `history.csv` and at the end `model.safetensors`. A finished training is loaded. A
    resumed one ends with the same weights as an undisturbed one, bit for bit on the CPU. Raises `SettingsError`,
    `ImageError`, `DatasetError` or `RunError` before long work starts, such as `LockError` while another process works
    in the folder or for a folder whose training had other settings, images or another teacher, and `OutOfMemory` when a
    step takes too much.
    """
    device = pick_device(settings.device)
    run = Run(settings.run_folder)
    teacher, teacher_card = load_teacher(settings.teacher or settings.size, padding=settings.padding)
    if teacher.size != settings.size:
        raise SettingsError(
            f"teacher {settings.teacher}: of size {teacher.size}, the training of size {settings.size}."
        )
    # Before the folder takes the settings, or it would refuse those with a wish that can be kept.
    rank(len(split.validation), settings.false_alarm_rate, settings.confidence)
    sources = {"teacher": teacher_card["sha256"], "training_images": split.learned_from}
    if run.model.is_file():
        run.check(settings, sources)
        return EfficientAD.load(run.model, device)
    with alone_in(run.folder):
        photographs = resolve(settings.penalty_images) if settings.penalty_images else ""
        natural = NaturalImages(photographs)
        natural.check()
        run.start(settings, sources | {"penalty_images": names_sha256(natural.paths, photographs)})
        verify_masks(split)
        made_from = {"data": split.fingerprint, "teacher": teacher_card["sha256"]}
        note_provenance(run.folder, device, seed=settings.seed, **made_from)
        size, levels = tuple(settings.image_size), check_levels(settings.levels)
        torch.manual_seed(settings.seed)
        detector = EfficientAD(settings.size, teacher.out_channels, settings.padding, size)
        detector.levels = levels
        detector.teacher.load_state_dict(teacher.state_dict())
        shapes = [image_size(sample.image, levels) for sample in (*split.train, *split.validation)]
        aspects = [width / height for height, width in shapes]
        sizes = {name: getattr(settings, name) for name in ("size", "image_size", "batch_size", "cache_gb")}
        with enough_memory(run.folder, sizes):
            trainer = Trainer(
                settings,
                run,
                detector.to(device),
                *(
                    load_images([one.image for one in part], size, levels=levels, description=f"reading {name} images")
                    for name, part in (("training", split.train), ("validation", split.validation))
                ),
                natural,
                [sample.image for sample in split.train],
            )
            trainer.loop()
        if (dead := trainer.dead_share()) > 0.9:
            warnings.warn(
                f"{run.folder}: {100 * dead:.0f} % of the student's last hidden channels are zero on every held-out "
                f"image: it has died and sees next to nothing. Train in a new run folder with a lower learning_rate "
                f"(here {settings.learning_rate:g}).",
                stacklevel=2,
            )
        detector.card = {
            "data": split.name,
            "training_images": len(split.train),
            "validation_images": len(split.validation),
            "aspects": [min(aspects), max(aspects)],
            "teacher": {name: teacher_card.get(name) for name in ("network", "sha256")},
            "natural_images": len(natural) - len(natural.skipped),
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "dead_channels": round(dead, 4),
            "settings": settings.as_dict() | {"run_folder": run.folder.name, "data_root": "", "penalty_images": ""},
            "torch": torch.__version__,
        }
        decision = {name: getattr(settings, name) for name in ("false_alarm_rate", "confidence")}
        calibrate(detector, trainer.validation, **decision)
        detector.save(run.model)
        return detector.eval().requires_grad_(False)
