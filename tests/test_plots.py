"""The figures: what is drawn is what was passed, heat has one scale and a colour bar, and nothing random is used."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from matplotlib.collections import PathCollection
from matplotlib.contour import QuadContourSet

from effad_lib import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 48), dtype=np.uint8))


@pytest.fixture
def mask():
    mask = np.zeros((32, 48), dtype=bool)
    mask[4:10, 30:48] = True  # touches the border
    return mask


def outlines(ax):
    return [child for child in ax.get_children() if isinstance(child, QuadContourSet)]


def panels(fig):
    """The axes with pictures, without the colour bar."""
    return [ax for ax in fig.axes if ax.images]


def render(fig):
    """Draw the figure as a notebook does, warnings being errors, and return its pixels."""
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba()).copy()


def test_the_palette_is_seaborns():
    assert plots.PALETTE == list(sns.color_palette("colorblind"))


def test_images_are_drawn_as_they_are(images, mask):
    fig = plots.plot_images(images, list("abcde"), columns=3, masks=[None, mask, None, None, None])
    assert len(fig.axes) == 6 and len(panels(fig)) == 5
    for ax, image, title in zip(panels(fig), images, "abcde", strict=True):
        assert np.array_equal(ax.images[0].get_array(), image.transpose(1, 2, 0))
        assert ax.get_title() == title
    assert [len(outlines(ax)) for ax in panels(fig)] == [0, 1, 0, 0, 0]
    assert render(fig).shape[1] == 900


def test_every_kind_of_image_is_taken(images):
    floats = torch.from_numpy(images[0]).float() / 255
    grey = images[0][0]
    fig = plots.plot_images([floats, images[0].transpose(1, 2, 0), grey])
    float_shown, hwc_shown, grey_shown = (ax.images[0].get_array() for ax in panels(fig))
    assert np.allclose(float_shown * 255, hwc_shown, atol=1e-3)
    assert np.array_equal(grey_shown[..., 1], grey)
    with pytest.raises(ValueError, match=r"not \(2, 8, 8\)"):
        plots.plot_images([np.zeros((2, 8, 8))])
    with pytest.raises(ValueError, match="no images"):
        plots.plot_images([])
    with pytest.raises(ValueError, match="2 images but 1 titles"):
        plots.plot_images(images[:2], ["one"])


def test_heatmaps_share_one_scale_whatever_their_range(images, mask):
    rng = np.random.default_rng(1)
    maps = {name: [rng.random((8, 12)) * 10.0**k for k in (-3, 0, 3)] for name in ("student–teacher", "combined")}
    fig = plots.plot_heatmaps(images[:3], [None, mask, None], maps, list("abc"), scale=(0.0, 2.0), threshold=1.0)
    assert len(fig.axes) == 4 * 3 + 1  # image, ground truth, two maps; and the colour bar
    drawn = [ax.images[0] for ax in panels(fig)][6:]
    for image, values in zip(drawn, maps["student–teacher"] + maps["combined"], strict=True):
        assert np.array_equal(image.get_array(), values)
        assert image.get_clim() == (0.0, 2.0)
        assert image.get_extent() == [-0.5, 47.5, 31.5, -0.5]  # a smaller map covers the whole image
    assert [len(outlines(ax)) for ax in fig.axes[:12]] == [0, 0, 0, 0, 1, 0] + [0] * 6
    bar = fig.axes[-1]
    assert bar.get_ylabel() == "anomaly score (line: threshold 1)"
    assert any(np.allclose(line.get_ydata(), 1.0) for line in bar.lines)
    assert [fig.axes[3 * row].get_ylabel() for row in range(4)] == ["image", "ground truth", *maps]
    render(fig)


def test_many_heatmaps_stand_in_blocks(images):
    maps = [np.full((32, 48), float(k)) for k in range(9)]
    fig = plots.plot_heatmaps(
        list(images[:1]) * 9, [], {"combined": maps}, [f"no. {k}" for k in range(9)], scale=(0, 9)
    )
    grid = np.array(fig.axes[:-1]).reshape(4, 5)  # images and maps of five, then of four
    assert [ax.get_title() for ax in grid[[0, 2]].flat if ax.get_title()] == [f"no. {k}" for k in range(9)]
    drawn = [ax.images[0].get_array() for ax in grid[[1, 3]].flat if ax.images]
    assert all(np.array_equal(heat, values) for heat, values in zip(drawn, maps, strict=True))
    assert [ax.get_visible() for ax in grid[2:, -1]] == [False, False]
    render(fig)


def test_heatmaps_refuse_what_does_not_fit(images):
    heat = np.zeros((32, 48))
    with pytest.raises(ValueError, match="colour scale"):
        plots.plot_heatmaps(images[:1], [], {"combined": [heat]}, scale=(1.0, 1.0))
    with pytest.raises(ValueError, match="2 images but 1 combined"):
        plots.plot_heatmaps(images[:2], [], {"combined": [heat]}, scale=(0.0, 1.0))


def test_heatmaps_without_masks_have_no_row_of_them(images):
    image, combined, bar = plots.plot_heatmaps(images[:1], [], {"combined": [np.ones((32, 48))]}, scale=(0.0, 1.0)).axes
    assert [ax.get_ylabel() for ax in (image, combined, bar)] == ["image", "combined", "anomaly score"]
    assert np.array_equal(combined.images[0].get_array(), np.ones((32, 48)))


def test_outline_lies_on_the_border_of_the_mask(images, mask):
    coarse = mask[::2, ::2]  # of half the image's size
    for truth in (mask, coarse):
        fig = plots.plot_images(images[:1], masks=[truth])
        (outline,) = outlines(fig.axes[0])
        points = np.concatenate([path.vertices for path in outline.get_paths()])
        tolerance = 0.51 * 32 / len(truth)
        assert points.min(0) == pytest.approx([29.5, 3.5], abs=tolerance)
        assert points.max(0) == pytest.approx([47.5, 9.5], abs=tolerance)
        assert fig.axes[0].get_xlim() == (-0.5, 47.5)


def test_a_large_picture_is_drawn_as_small_as_it_is_seen():
    """The one marked pixel stays outlined, and the map lies over the same part of the picture."""
    image, heat, marked = np.zeros((1500, 2000, 3)), np.zeros((1500, 2000)), np.zeros((1500, 2000), bool)
    image[:750], heat[:750], marked[1200, 1000] = 1, 3, True
    left, right, _ = plots.heatmap_panel(image, heat, scale=(0.0, 4.0), marked=marked).axes
    for ax, high in ((left, 255), (right, 3)):
        shown = ax.images[-1].get_array()
        assert shown.shape[:2] == (675, 900)
        assert (shown[:337] == high).all() and (shown[338:] == 0).all()
    assert right.images[-1].get_extent() == left.images[-1].get_extent()
    (outline,) = right.collections
    (path,) = outline.get_paths()
    assert path.vertices.mean(axis=0) == pytest.approx([450, 540], abs=1)


def test_heatmap_panel_keeps_the_scale_of_the_model(images, mask):
    heat = np.linspace(-1, 5, 32 * 48).reshape(32, 48)
    fig = plots.heatmap_panel(images[0], heat, mask, scale=(0.0, 4.0), threshold=2.0, title="000.png")
    picture, overlay, bar = fig.axes
    assert np.array_equal(picture.images[0].get_array(), images[0].transpose(1, 2, 0))
    drawn = overlay.images[1]
    assert np.array_equal(drawn.get_array(), heat) and drawn.get_clim() == (0.0, 4.0)
    opacity = drawn.get_alpha()
    assert opacity.min() == pytest.approx(0.1) and opacity.max() == pytest.approx(0.9)
    assert opacity[heat <= 0].max() == pytest.approx(0.1)
    assert len(outlines(picture)) == 1 and "2" in bar.get_ylabel()
    assert len(plots.heatmap_panel(images[0], heat, scale=(0.0, 4.0)).axes) == 3
    render(fig)


def test_heat_scale():
    maps = [np.zeros((10, 10)), np.full((10, 10), 3.0)]
    assert plots.heat_scale(maps, threshold=0.25) == (0.0, 0.5)
    assert plots.heat_scale(maps) == (0.0, 3.0)
    assert plots.heat_scale(maps[:1]) == (0.0, 1.0)


def test_score_distribution_shows_every_score():
    rng = np.random.default_rng(2)
    kinds = ["good"] * 20 + ["scratch"] * 10 + ["dent"] * 5
    scores = rng.random(35) + 0.1
    fig = plots.plot_score_distribution(scores, kinds, threshold=0.7)
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good (20)", "dent (5)", "scratch (10)"]
    scatters = [group for group in ax.collections if isinstance(group, PathCollection)]
    points = np.concatenate([np.asarray(group.get_offsets()) for group in scatters])
    assert sorted(points[:, 0]) == pytest.approx(sorted(scores))
    assert sorted(points[np.round(points[:, 1]) == 1, 0]) == pytest.approx(sorted(scores[30:]))
    assert any(list(line.get_xdata()) == [0.7, 0.7] for line in ax.lines)
    by_number = plots.plot_score_distribution(scores, (np.arange(35) >= 20).astype(int), log_scale=True).axes[0]
    assert by_number.get_xscale() == "log"


def test_labels_may_be_numbers_and_nothing_is_random():
    scores, labels = np.linspace(0.1, 1, 12), np.repeat([0, 1], 6)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (render(plots.plot_score_distribution(scores, labels)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    texts = [label.get_text() for label in plots.plot_score_distribution(scores, labels).axes[0].get_yticklabels()]
    assert texts == ["good (6)", "defective (6)"]
    ax = plots.plot_score_distribution(scores, ["good"] * 6 + ["0"] * 3 + ["1"] * 3).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good (6)", "0 (3)", "1 (3)"]


def test_roc_curve():
    ax = plots.plot_roc([5.0, 4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0, 0]).axes[0]
    assert ax.lines[0].get_label() == "AU-ROC 0.833"
    assert ax.lines[0].get_xydata()[[0, -1]].tolist() == [[0, 0], [1, 1]]
    with pytest.raises(ValueError, match="good and defective"):
        plots.plot_roc([1.0, 2.0], [1, 1])


def test_pro_curve_fills_up_to_the_limit():
    fpr, overlap = np.array([0.0, 0.2, 0.4, 1.0]), np.array([0.0, 0.8, 0.9, 1.0])
    ax = plots.plot_pro_curve(fpr, overlap, area=0.5, fpr_limit=0.3).axes[0]
    assert np.array_equal(ax.lines[0].get_xydata(), np.stack([fpr, overlap], 1))
    assert ax.lines[0].get_label() == "AU-PRO 0.500 up to 0.3"
    corners = ax.collections[0].get_paths()[0].vertices
    assert corners[:, 0].max() == pytest.approx(0.3)
    assert corners[:, 1].max() == pytest.approx(0.85)


def test_losses():
    history = pd.DataFrame({"step": [1, 2, 3], "hard": [9.0, 5.0, 2.0], "total": [10.0, 6.0, 3.0]})
    history["validation_hard"] = [np.nan, 6.0, np.nan]
    ax = plots.plot_losses(history).axes[0]
    assert ax.get_yscale() == "log"
    hard, _, validation = ax.lines
    assert hard.get_ydata().tolist() == [9.0, 5.0, 2.0]
    assert validation.get_xydata().tolist() == [[2.0, 6.0]]
    assert hard.get_color() == validation.get_color() and validation.get_linestyle() == "--"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["hard", "total", "validation hard"]
    with pytest.raises(ValueError, match="needs step"):
        plots.plot_losses(history[["hard"]])


def test_feature_pca(images):
    rng = np.random.default_rng(3)
    position = np.linspace(0, 1, 64).reshape(8, 8)
    teacher = rng.normal(size=(16, 1, 1)) * position + rng.normal(scale=1e-3, size=(16, 8, 8))
    fig = plots.plot_feature_pca({"teacher": teacher, "student": -teacher}, images[0], basis="teacher")
    image, first, second = (ax.images[0].get_array() for ax in fig.axes)
    assert np.array_equal(image, images[0].transpose(1, 2, 0))
    assert first.shape == second.shape == (8, 8, 3)
    # The one direction in which the features differ is red, and the mirrored features are mirrored in it.
    assert abs(np.corrcoef(first[..., 0].ravel(), position.ravel())[0, 1]) > 0.99
    assert not np.allclose(first, second)
    own = plots.plot_feature_pca({"teacher": teacher, "again": teacher + 5}, images[0])
    assert np.allclose(own.axes[1].images[0].get_array(), own.axes[2].images[0].get_array(), atol=1e-6)
    with pytest.raises(ValueError, match="basis 'tutor'"):
        plots.plot_feature_pca({"teacher": teacher}, images[0], basis="tutor")
