"""The explaining drawings: they show the pixels, the shapes and the one scale that they claim to show."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from effad_lib import diagrams
from effad_lib.networks import PDN


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (3, 96, 128), dtype=np.uint8)


def test_networks_names_every_part_and_its_shape(image):
    texts = "\n".join(text.get_text() for text in diagrams.plot_networks(image, 8, (16, 24)).axes[0].texts)
    for part in ("teacher", "student", "autoencoder", "anomaly", "[3, 96, 128]"):
        assert part in texts
    assert texts.count("[8, 16, 24]") == 4  # T, S₁, S₂, A


def test_fields_shows_what_a_cell_really_sees(image):
    cell = (3, 7)
    whole, crop = diagrams.plot_fields(image, [cell]).axes
    shown = crop.images[0].get_array()
    assert np.array_equal(shown, np.moveaxis(image, 0, -1)[12:45, 28:61])
    box = whole.patches[0]
    assert (box.get_x(), box.get_y(), box.get_width()) == (27.5, 11.5, 33)

    pixels = torch.from_numpy(image)[None].double().requires_grad_()
    PDN("XS", 4).double()(pixels)[0, :, cell[0], cell[1]].sum().backward()
    rows, columns = np.nonzero(pixels.grad[0].abs().sum(dim=0).numpy())
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (12, 45, 28, 61)


def test_influence_has_one_scale_and_says_how_far_it_reaches(image):
    near = np.zeros((96, 128))
    near[10:43, 20:53] = 5.0
    fig = diagrams.plot_influence(image, {"near": near, "all": np.full((96, 128), 1e-6)})
    assert [ax.get_title() for ax in fig.axes[:3]] == ["image", "near: 33×33 pixels", "all: 96×128 pixels"]
    first, second = (ax.images[0] for ax in fig.axes[1:3])
    assert first.get_clim() == second.get_clim() == (1e-3, 1)
    assert first.get_array().max() == second.get_array().max() == 1
    assert "influence" in fig.axes[3].get_ylabel()


def test_anatomy_draws_the_largest_change_of_a_channel():
    good = np.full((20, 30, 3), 100, np.uint8)
    image = good.copy()
    image[5, 6] = (90, 140, 100)
    mask = (image != good).any(axis=2)
    panels = [ax.images[0].get_array() for ax in diagrams.plot_anatomy(good, image, mask).axes[:4]]
    assert np.array_equal(panels[0], good) and np.array_equal(panels[1], image) and np.array_equal(panels[2], mask)
    assert panels[3][5, 6] == 40 and panels[3].sum() == 40


@pytest.mark.parametrize("at", [(5, 5), (30, 40), (59, 79)])
def test_zoom_keeps_its_size_at_the_border(at):
    picture, mask = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), bool)
    mask[at], picture[at] = True, 255
    cut, cut_mask = diagrams.zoom(picture, mask, 16)
    assert cut.shape == (16, 16, 3) and cut_mask.sum() == 1 and (cut[cut_mask] == 255).all()
    assert diagrams.zoom(picture, np.zeros_like(mask), 16)[0].shape == (16, 16, 3)
