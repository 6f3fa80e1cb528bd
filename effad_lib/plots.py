"""Every figure of the workbook, each a function that returns a matplotlib figure.

Heat is drawn with one fixed colour scale per figure, shown by a colour bar, never stretched image by image:
on a scale of its own every good image looks defective. Figures are 9 inches wide, 900 pixels at 100 dpi.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

WIDTH = 9.0
"""Width of a figure in inches."""

MOST_COLUMNS = 8
"""Of a gallery with maps: more would be too small to see a defect in."""

HEAT = "inferno"
"""Perceptually uniform, and readable without colour vision and in print."""

PALETTE = [
    to_rgb(f"#{colour}") for colour in "0173b2 de8f05 029e73 d55e00 cc78bc ca9161 fbafe4 949494 ece133 56b4e9".split()
]
"""Seaborn's "colorblind", written down, since importing seaborn takes more than a second."""
GOOD, DEFECTIVE = PALETTE[0], PALETTE[1]
OUTLINE = "#00e5ff"
"""Of the ground truth: a colour that does not occur in `HEAT`."""
PREDICTED = "white"
"""Of what the detector marks."""

MOST_DRAWN = 900
"""Pixels a side of what a panel shows: no figure has more, and drawing takes its time by the pixel."""

BARE = {"xticks": [], "yticks": [], "frame_on": False}
"""Axes for pictures."""

Scale = tuple[float, float]


def plain(text: str) -> str:
    """Return a text, such as a file's name, for a figure: a dollar sign in it would start mathematics in matplotlib."""
    return text.replace("$", r"\$") if isinstance(text, str) else text


def as_png(figure: Figure, dpi: int = 100) -> bytes:
    """Return a figure as a PNG file's content, to be written whole or not at all, and close it."""
    packed = io.BytesIO()
    try:
        figure.savefig(packed, format="png", dpi=dpi)
    finally:
        plt.close(figure)
    return packed.getvalue()


def plot_images(
    images: Sequence[np.ndarray],
    titles: Sequence[str] = (),
    columns: int = 6,
    masks: Sequence[np.ndarray | None] = (),
) -> Figure:
    """Images in a grid, with the outline of their defects where masks are given.

    images: each uint8 or float in [0, 1], [3, H, W], [H, W, 3] or grey [H, W], arrays or CPU tensors; titles, masks:
    none, or one for each image, masks bool [H, W] of any size, or None. Raises ValueError if counts differ.
    """
    count = _same_count(images=images, titles=titles, masks=masks)
    columns = min(columns, count)
    rows = -(-count // columns)
    shown = [_picture(image) for image in images]
    figsize = (WIDTH, rows * _row_height(shown[0], columns))
    fig, axes = plt.subplots(rows, columns, figsize=figsize, squeeze=False, subplot_kw=BARE, layout="constrained")
    for index, (ax, picture) in enumerate(zip(axes.flat, shown, strict=False)):
        ax.imshow(picture)
        _outline(ax, masks[index] if len(masks) else None, picture.shape)
        if len(titles):
            ax.set_title(plain(titles[index]), fontsize=9)
    return fig


def plot_heatmaps(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    maps: Mapping[str, Sequence[np.ndarray]],
    titles: Sequence[str] = (),
    *,
    scale: Scale,
    threshold: float | None = None,
) -> Figure:
    """Images side by side, below each its ground truth and its anomaly maps, all maps on one scale; many in blocks.

    images as in `plot_images`; masks bool [H, W] or None, [] leaves their row out; maps: for each row its name and a
    map [H, W] for each image; scale: the values drawn darkest and brightest, beyond which colours saturate, as
    `heat_scale` gives. A line on the colour bar marks the threshold. Raises ValueError if counts differ or the scale is
    empty.
    """
    count = _same_count(images=images, masks=masks, titles=titles, **maps)
    norm = _norm(scale)
    shown = [_picture(image) for image in images]
    pictures = ["image", "ground truth"] if len(masks) else ["image"]
    names = [*pictures, *maps]
    blocks = -(-count // MOST_COLUMNS)
    columns, rows = -(-count // blocks), blocks * len(names)
    figsize = (WIDTH, rows * _row_height(shown[0], max(columns, 4) + 1.1, gap=0.07) + 0.2)
    fig, axes = plt.subplots(rows, columns, figsize=figsize, squeeze=False, subplot_kw=BARE, layout="compressed")
    for index, image in enumerate(shown):
        block, column = divmod(index, columns)
        cells = axes[block * len(names) : (block + 1) * len(names), column]
        for ax in cells[: len(pictures)]:
            ax.imshow(image)
        if len(masks):
            _outline(cells[1], masks[index], image.shape)
        for ax, values in zip(cells[len(pictures) :], maps.values(), strict=True):
            ax.imshow(np.asarray(values[index]), cmap=HEAT, norm=norm, extent=_extent(image))
        if len(titles):
            cells[0].set_title(plain(titles[index]), fontsize=9)
    for ax, name in zip(axes[:, 0], names * blocks, strict=True):
        ax.set_ylabel(name, fontsize=9 if columns < 6 else 7)  # no longer than its picture is tall
    for ax in axes[-len(names) :, 1 + (count - 1) % columns :].flat:
        ax.set_visible(False)
    _heat_bar(fig, axes[-1, 0].images[0], list(axes.flat), threshold)
    return fig


def heatmap_panel(
    image: np.ndarray,
    heat: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: Scale,
    threshold: float | None = None,
    marked: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """One image and the same image under its anomaly map, with the outline of the truth if there is a mask.

    image as in `plot_images`; heat [H, W], of any size; scale, threshold as in `plot_heatmaps`; marked: the mask that
    the detector predicts, outlined on the map. The overlay grows from clear to opaque along the scale, so that cold
    areas of the image stay visible. What is larger than it can be seen is reduced to `MOST_DRAWN` pixels a side.
    """
    norm = _norm(scale)
    picture, heat = _reduced(_picture(image)), _reduced(np.asarray(heat))
    mask, marked = (None if area is None else _reduced(np.asarray(area, np.float32)) > 0 for area in (mask, marked))
    height = min(WIDTH / 2.15 * picture.shape[0] / picture.shape[1] + 0.4, WIDTH)
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, height), subplot_kw=BARE, layout="constrained")
    names = "image" if mask is None else "image, ground truth", "anomaly map" + ("" if marked is None else ", marked")
    for ax, name in zip(axes, names, strict=True):
        ax.imshow(picture)
        ax.set_title(name, fontsize=10)
    opacity = 0.1 + 0.8 * np.clip(norm(heat), 0, 1).filled(1)
    drawn = axes[1].imshow(heat, cmap=HEAT, norm=norm, extent=_extent(picture), alpha=opacity)
    _outline(axes[0], mask, picture.shape)
    _outline(axes[1], marked, picture.shape, PREDICTED)
    _heat_bar(fig, drawn, [axes[1]], threshold)
    if title:
        fig.suptitle(plain(title), fontsize=11)
    return fig


def heat_scale(maps: Sequence[np.ndarray], threshold: float | None = None) -> Scale:
    """A scale for many maps together: from 0 to twice the threshold, or without one to their 99.9 % quantile.

    Twice the threshold puts the decision in the middle of the colours, for every image of a detector the same.
    """
    if threshold is not None and threshold > 0:
        return 0.0, 2 * float(threshold)
    high = float(np.quantile(np.concatenate([np.asarray(heat).ravel() for heat in maps]), 0.999))
    return (0.0, high) if high > 0 else (0.0, 1.0)


def with_width(low: float, high: float) -> Scale:
    """Return a scale from `low` to `high`, or where they are equal to one that float32 can tell from it."""
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def plot_score_distribution(
    scores: np.ndarray, labels: Sequence, threshold: float | None = None, *, log_scale: bool = False
) -> Figure:
    """Image scores of good and defective images, or of each type of defect: every image, density and quartiles.

    scores float [N]; labels [N]: 0 and 1, or names of defects with "good" for good images; a defect may be called "0".
    A logarithmic scale, for positive scores only, keeps those near the threshold apart when a few are much larger.
    """
    import seaborn as sns  # slow to import

    words = {0: "good", 1: "defective"}  # a text never equals one of these numbers
    named = [plain(str(words.get(label, label))) for label in labels]
    kinds = sorted(set(named), key=lambda kind: (kind != "good", kind))
    table = pd.DataFrame({"score": np.asarray(scores, dtype=float), "kind": named})
    colours = {kind: GOOD if kind == "good" else DEFECTIVE for kind in kinds}
    fig, ax = plt.subplots(figsize=(WIDTH, 1.0 + 0.6 * len(kinds)), layout="constrained")
    style = {
        "palette": colours,
        "legend": False,
        "inner": "quart",
        "fill": False,
        "linewidth": 1,
        "log_scale": log_scale,
    }
    shape = {"order": kinds, "cut": 0, "density_norm": "width", "width": 0.85}
    sns.violinplot(table, x="score", y="kind", hue="kind", ax=ax, **shape, **style)
    for row, kind in enumerate(kinds):
        found = table.loc[table["kind"] == kind, "score"]
        spread = 0.4 * (np.arange(len(found)) * 0.618 % 1 - 0.5)  # even and, unlike random, the same each time
        ax.scatter(found, row + spread, s=14, alpha=0.6, linewidth=0, color=colours[kind])
    ax.set_yticks(range(len(kinds)), [f"{kind} ({named.count(kind)})" for kind in kinds])
    ax.set(xlabel="image score (maximum of the anomaly map)", ylabel="")
    if log_scale:
        ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
    if threshold is not None:
        ax.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    ax.grid(axis="x", alpha=0.3)
    return fig


def plot_roc(scores: np.ndarray, labels: np.ndarray) -> Figure:
    """ROC curve of the image scores and the area under it; scores float [N], labels [N] 0 good, 1 defective.

    Raises ValueError if there is no good or no defective image.
    """
    if len(set(np.asarray(labels).tolist())) != 2:
        raise ValueError("a ROC curve needs good and defective images; one of the two is missing")
    from sklearn.metrics import auc, roc_curve  # scikit-learn takes a second

    fpr, tpr, _ = roc_curve(labels, scores)
    axes = ("good images called defective (share)", "defective images found (share)")
    return _curve(fpr, tpr, f"AU-ROC {auc(fpr, tpr):.3f}", *axes)


def plot_pro_curve(fpr: np.ndarray, overlap: np.ndarray, area: float | None = None, fpr_limit: float = 0.3) -> Figure:
    """Per-region overlap against false-positive rate, filled up to the limit that AU-PRO is computed to.

    fpr, overlap: float [V] from `FoundShares.pro_curve`; area: the value of its `au_pro`, for the legend.
    """
    label = "overlap" if area is None else f"AU-PRO {area:.3f} up to {fpr_limit:g}"
    axes = ("normal pixels called defective (share)", "overlap with a region (mean over regions)")
    fig = _curve(fpr, overlap, label, *axes)
    ax, inside = fig.axes[0], fpr <= fpr_limit
    y = np.append(overlap[inside], np.interp(fpr_limit, fpr, overlap))
    ax.fill_between(np.append(fpr[inside], fpr_limit), y, color=GOOD, alpha=0.25, linewidth=0)
    ax.axvline(fpr_limit, color="black", linestyle="--", linewidth=1)
    return fig


def plot_losses(history: pd.DataFrame) -> Figure:
    """Training losses against steps, on a logarithmic axis.

    history: column `step`, and a column for each loss (hard, penalty, autoencoder, student_autoencoder, total).
    A column `validation_<loss>` is drawn dashed in the colour of its loss; missing values are left out.
    Raises ValueError without a column `step` or without any loss.
    """
    names = [name for name in history.columns if name != "step"]
    if "step" not in history or not names:
        raise ValueError(f"history has columns {list(history.columns)}; it needs step and at least one loss")
    losses = dict.fromkeys(name.removeprefix("validation_") for name in names)
    colours = dict(zip(losses, itertools.cycle(PALETTE), strict=False))
    fig, ax = plt.subplots(figsize=(WIDTH, 4.0), layout="constrained")
    for name in names:
        curve = history[["step", name]].dropna()
        loss = name.removeprefix("validation_")
        style = {"linestyle": "-"} if loss == name else {"linestyle": "--", "marker": "o", "markersize": 4}
        style |= {"linewidth": 2.2 if loss == "total" else 1.3, "color": colours[loss]}
        ax.plot(curve["step"], curve[name], label=name.replace("_", " "), **style)
    ax.set(yscale="log", xlabel="training step", ylabel="loss (mean squared error of features)")
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return fig


def plot_feature_pca(features: Mapping[str, np.ndarray], image: np.ndarray, *, basis: str = "") -> Figure:
    """What networks see: the three main directions of their features, drawn as red, green and blue.

    features: for each network its name and its output [C, h, w]; image as in `plot_images`. Each network has
    its own principal directions and colour range, unless `basis` names the one whose are used for all; then
    equal colours mean equal features (a student beside its teacher). Raises ValueError for an unknown `basis`.
    """
    if basis and basis not in features:
        raise ValueError(f"basis {basis!r} is not among the features: {', '.join(features)}")
    arrays = {name: np.asarray(values) for name, values in features.items()}
    drawn = [_pca_colours(arrays[basis or name], values) for name, values in arrays.items()]
    return plot_images([_picture(image), *drawn], ["image", *arrays], columns=1 + len(drawn))


def _pca_colours(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Features [C, h, w] as RGB [h, w, 3] in [0, 1], by the principal directions and range of the reference."""
    vectors, others = (array.reshape(len(array), -1).T for array in (reference, values))
    from sklearn.decomposition import PCA

    pca = PCA(3, svd_solver="full").fit(vectors)
    low, high = np.quantile(pca.transform(vectors), [0.01, 0.99], axis=0)
    colours = (pca.transform(others) - low) / np.maximum(high - low, 1e-12)
    return np.clip(colours, 0, 1).reshape(*values.shape[1:], 3)


def _curve(x: np.ndarray, y: np.ndarray, label: str, xlabel: str, ylabel: str) -> Figure:
    fig, ax = plt.subplots(figsize=(WIDTH / 2, WIDTH / 2), layout="constrained")
    ax.plot(x, y, color=GOOD, linewidth=2, label=label)
    ax.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="chance")
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=9)
    return fig


def _picture(image: np.ndarray) -> np.ndarray:
    """An image as [H, W, 3], uint8 or float in [0, 1], as matplotlib takes it."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image is [3, H, W], [H, W, 3] or [H, W], not {image.shape}")
    return image if image.dtype == np.uint8 else np.clip(image, 0, 1)


def _reduced(values: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] or a map [H, W] as means over squares, where it has more than `MOST_DRAWN` pixels a side."""
    if max(values.shape[:2]) <= MOST_DRAWN:
        return values
    if values.dtype != np.uint8:
        values = np.rint(255 * values).astype(np.uint8) if values.ndim == 3 else values.astype(np.float32)
    drawn = Image.fromarray(values)
    drawn.thumbnail((MOST_DRAWN, MOST_DRAWN), Image.Resampling.BOX)
    return np.asarray(drawn)


def _same_count(images: Sequence, **others: Sequence) -> int:
    """The number of images; ValueError if there are none, or if anything that is given has another number."""
    if len(images) == 0:
        raise ValueError("no images to draw")
    for name, items in others.items():
        left_out = len(items) == 0 and name in ("titles", "masks")
        if len(items) != len(images) and not left_out:
            raise ValueError(f"{len(images)} images but {len(items)} {name}")
    return len(images)


def _norm(scale: Scale) -> Normalize:
    low, high = scale
    if not low < high:
        raise ValueError(f"colour scale {scale}: its first value must be below its second; see heat_scale")
    return Normalize(low, high)


def _row_height(picture: np.ndarray, columns: float, gap: float = 0.2) -> float:
    return WIDTH / columns * picture.shape[0] / picture.shape[1] + gap


def _extent(picture: np.ndarray) -> tuple[float, float, float, float]:
    """Where to draw a map of any size so that it covers the picture."""
    return -0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5


def _outline(ax: Axes, mask: np.ndarray | None, shape: Sequence[int], colour: str = OUTLINE) -> None:
    """Draw the border of a mask of any size over a picture of this shape."""
    if mask is None or not np.any(mask):
        return
    padded = np.pad(np.asarray(mask, dtype=float), 1)  # so that the border closes at the image's edge
    y, x = ((np.arange(-1, side + 1) + 0.5) * to / side - 0.5 for side, to in zip(np.shape(mask), shape, strict=False))
    ax.autoscale(False)
    ax.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.2)


def _heat_bar(fig: Figure, drawn: AxesImage, axes: Sequence[Axes], threshold: float | None) -> None:
    bar = fig.colorbar(drawn, ax=axes, label="anomaly score", extend="both", fraction=0.05, aspect=40)
    if threshold is not None:
        bar.ax.axhline(threshold, color=OUTLINE, linewidth=2)
        bar.set_label(f"anomaly score (line: threshold {threshold:.3g})")
