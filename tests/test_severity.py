"""Severity curves: which pieces are drawn, and that each figure is the AU-ROC of the largest value of one map."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from effad_lib.detector import AnomalyMaps
from effad_lib.evaluation import severity
from effad_lib.evaluation.severity import severity_curves
from effad_lib.synthesis import DEFECTS, defect_names


class Reds(torch.nn.Module):
    """Red is the student-teacher map, green the autoencoder's, their mean the combined one."""

    image_size, device = (64, 64), torch.device("cpu")

    def forward(self, images):
        red, green = images[:, :1], images[:, 1:2]
        return AnomalyMaps((red + green) / 2, red, green)


def levels_of(shot):
    """Red grows with the severity, green does not; good pieces differ."""
    chance = shot.seed % 97
    return (chance, chance) if shot.defect == "good" else (40 + 100 * shot.severity, chance)


def test_curves_are_the_au_roc_of_each_map(monkeypatch):
    asked = []

    def draw(settings, shots):
        asked.append((tuple(settings.image_size), shots))
        images = np.zeros((len(shots), 3, *settings.image_size), np.uint8)
        for image, shot in zip(images, shots, strict=True):
            image[0], image[1] = levels_of(shot)
        return SimpleNamespace(images=images)

    monkeypatch.setattr(severity, "draw", draw)
    table = severity_curves(Reds(), "gasket", levels=(0.1, 0.9), size=(80, 96), pieces=5, good=9)

    assert {size for size, _ in asked} == {(80, 96)}
    good, *ladders = (shots for _, shots in asked)
    assert [shot.defect for shot in good] == ["good"] * 9 and len({shot.seed for shot in good}) == 9
    assert [ladder[0].defect for ladder in ladders] == defect_names("gasket")
    for ladder in ladders:
        seeds = [[shot.seed for shot in ladder if shot.severity == level] for level in (0.1, 0.9)]
        assert len(seeds[0]) == 5 and seeds[0] == seeds[1] and not set(seeds[0]) & {shot.seed for shot in good}

    assert list(table["defect"].unique()) == defect_names("gasket") and len(table) == 2 * len(ladders)
    assert dict(zip(table["defect"], table["logical"], strict=True)) == {
        name: DEFECTS[name].logical for name in defect_names("gasket")
    }
    for row in table.itertuples():
        bad = next(
            [s for s in ladder if s.severity == row.severity] for ladder in ladders if ladder[0].defect == row.defect
        )
        truth = [0] * 9 + [1] * 5
        red, green = np.array([[int(level) for level in levels_of(shot)] for shot in [*good, *bad]]).T
        assert row.student_teacher == pytest.approx(roc_auc_score(truth, red))
        assert row.student_autoencoder == pytest.approx(roc_auc_score(truth, green))
        assert row.combined == pytest.approx(roc_auc_score(truth, red + green))


def test_curves_of_a_real_detector(small_detector):
    table = severity_curves(small_detector, "metal", levels=(0.5, 1.0), size=(96, 96), pieces=2, good=3)
    assert table[["combined", "student_teacher", "student_autoencoder"]].stack().between(0, 1).all()
    assert set(table["defect"]) == set(defect_names("metal")) and not table["logical"].any()
