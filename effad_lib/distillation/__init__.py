"""Backbone → teacher: a patch description network learns to imitate a pretrained network's features (Algorithm 3)."""

from effad_lib.distillation.loop import distil
from effad_lib.distillation.settings import DistillationSettings
from effad_lib.distillation.targets import Views, channel_statistics, fit_initialisation, prefetched
from effad_lib.distillation.teachers import TEACHERS, load_teacher, read_teacher_card, save_teacher, teacher_files

__all__ = [
    "TEACHERS",
    "DistillationSettings",
    "Views",
    "channel_statistics",
    "distil",
    "fit_initialisation",
    "load_teacher",
    "prefetched",
    "read_teacher_card",
    "save_teacher",
    "teacher_files",
]
