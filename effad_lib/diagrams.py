"""Drawings that explain: the networks, what one feature sees, how a synthetic defect is made.

Like `plots`, each is a function that returns a matplotlib figure, 9 inches wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

from effad_lib.networks import RECEPTIVE_FIELD, STRIDE
from effad_lib.plots import BARE, HEAT, PALETTE, WIDTH

TEACHER, STUDENT, AUTOENCODER = PALETTE[0], PALETTE[1], PALETTE[2]
"""Colours of the three networks."""


def plot_networks(image: np.ndarray, channels: int, grid: tuple[int, int]) -> Figure:
    """The three networks between an image and its anomaly map, with the shapes that flow between them.

    image uint8 [3, H, W]; channels: of the teacher; grid: height and width of the feature maps. Paper, Figure 3.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.1), layout="constrained")
    ax.set(xlim=(0, 9), ylim=(0, 4.1), aspect="equal")
    ax.axis("off")
    ax.imshow(np.moveaxis(image, 0, -1), extent=(0.05, 1.35, 1.4, 2.7), zorder=2)
    ax.text(0.7, 1.3, f"image\n[3, {image.shape[1]}, {image.shape[2]}]", ha="center", va="top", fontsize=9)
    rows = {"teacher": 3.45, "student": 2.05, "autoencoder": 0.75}
    _box(ax, 2.1, rows["teacher"], 1.7, 0.8, TEACHER, "teacher\nfrozen; sees 33×33 px")
    _box(ax, 2.1, rows["student"], 1.7, 0.8, STUDENT, "student\ntrained; sees 33×33 px")
    _hourglass(ax, 2.1, rows["autoencoder"], 1.7, 0.75)
    ax.text(2.95, 0.05, "autoencoder\ntrained; sees the whole image", ha="center", va="bottom", fontsize=8.5)
    shape = f"[{channels}, {grid[0]}, {grid[1]}]"
    features = {"T": (3.45, TEACHER), "S₁": (2.35, STUDENT), "S₂": (1.75, STUDENT), "A": (0.75, AUTOENCODER)}
    for name, (y, colour) in features.items():
        _box(ax, 4.5, y, 1.35, 0.5, colour, f"{name}  {shape}", alpha=0.15)
    for name, y in rows.items():
        _arrow(ax, (1.4, 2.05), (2.05, y))
        for end in (2.35, 1.75) if name == "student" else (y,):
            _arrow(ax, (3.85, y), (4.45, end))
    maps = {
        "(T − S₁)²": ("student–teacher\nmap", 2.9, 3.45, 2.35),
        "(A − S₂)²": ("student–autoencoder\nmap", 1.25, 0.75, 1.75),
    }
    for formula, (name, y, one, other) in maps.items():
        _box(ax, 6.3, y, 1.45, 0.75, "#888888", f"{formula}\n{name}", alpha=0.15)
        _arrow(ax, (5.9, one), (6.25, y + 0.1 * np.sign(one - y)))
        _arrow(ax, (5.9, other), (6.25, y + 0.1 * np.sign(other - y)))
        _arrow(ax, (7.8, y), (8.1, 2.05 + 0.1 * np.sign(y - 2.05)))
    _box(ax, 8.12, 2.05, 0.84, 0.9, "#d62728", "anomaly\nmap; its\nmaximum is\nthe score", alpha=0.15)
    return fig


def plot_fields(image: np.ndarray, cells: Sequence[tuple[int, int]]) -> Figure:
    """An image with the pixels that some cells of the unpadded PDN see, and what each of them sees.

    image uint8 [3, H, W]; cells: row and column on the PDN's grid. Cell (i, j) sees 33×33 pixels from (4i, 4j) on.
    """
    picture = np.moveaxis(image, 0, -1)
    corners = [(STRIDE * row, STRIDE * column) for row, column in cells]
    count = len(cells)
    fig = plt.figure(figsize=(WIDTH, 4.0), layout="constrained")
    grid = fig.add_gridspec(2, 2 + (count + 1) // 2)
    whole = fig.add_subplot(grid[:, :2])
    whole.imshow(picture)
    whole.set(xlabel="column (pixels)", ylabel="row (pixels)", title="the image, and what some cells see of it")
    colours = [PALETTE[index % len(PALETTE)] for index in range(1, count + 1)]
    for index, ((top, left), colour) in enumerate(zip(corners, colours, strict=True)):
        side = RECEPTIVE_FIELD
        whole.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, color=colour, linewidth=2))
        ax = fig.add_subplot(grid[index % 2, 2 + index // 2])
        ax.imshow(picture[top : top + side, left : left + side])
        ax.set(xticks=[], yticks=[], title=f"cell {tuple(cells[index])}")
        ax.spines[:].set(color=colour, linewidth=3)
    return fig


def plot_influence(image: np.ndarray, influences: Mapping[str, np.ndarray]) -> Figure:
    """An image beside the pixels that one output cell of each network depends on.

    image uint8 [3, H, W]; influences: for each network its name and the size of the gradient, float [H, W]; each is
    divided by its largest value, and all are drawn on one logarithmic scale.
    """
    fig, axes = plt.subplots(1, 1 + len(influences), figsize=(WIDTH, 3.3), subplot_kw=BARE, layout="compressed")
    axes[0].imshow(np.moveaxis(image, 0, -1))
    axes[0].set_title("image", fontsize=10)
    colours = plt.get_cmap(HEAT).with_extremes(bad="black")  # no influence at all has no logarithm
    for ax, (name, values) in zip(axes[1:], influences.items(), strict=True):
        share = np.asarray(values) / np.max(values)
        drawn = ax.imshow(share, cmap=colours, norm=LogNorm(1e-3, 1))
        rows, columns = np.nonzero(share > 0)
        ax.set_title(f"{name}: {np.ptp(rows) + 1}×{np.ptp(columns) + 1} pixels", fontsize=10)
    fig.colorbar(drawn, ax=axes, label="influence (share of the largest)", extend="min", fraction=0.05)
    return fig


def plot_anatomy(good: np.ndarray, image: np.ndarray, mask: np.ndarray) -> Figure:
    """A synthetic image, its good twin, what the defect changed and the mask; all uint8 [H, W, 3], mask bool [H, W]."""
    fig, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.4), subplot_kw=BARE, layout="compressed")
    change = np.abs(image.astype(int) - good.astype(int)).max(axis=2)
    axes[0].imshow(good)
    axes[1].imshow(image)
    axes[2].imshow(mask, cmap="gray", vmin=0, vmax=1)
    drawn = axes[3].imshow(change, cmap=HEAT, vmin=0, vmax=max(int(change.max()), 1))
    for ax, title in zip(axes, ("good twin", "with the defect", "mask", "difference"), strict=True):
        ax.set_title(title, fontsize=10)
    fig.colorbar(drawn, ax=axes, label="largest change of a channel\n(grey levels of 255)", fraction=0.05)
    return fig


def zoom(image: np.ndarray, mask: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut image [H, W, 3] and mask [H, W] to `side` × `side` pixels around the middle of the mask (of the image)."""
    found = np.argwhere(mask) if mask.any() else np.argwhere(np.ones_like(mask))
    middle = (found.min(axis=0) + found.max(axis=0)) // 2
    top, left = (
        int(np.clip(at - side // 2, 0, max(0, length - side))) for at, length in zip(middle, mask.shape, strict=True)
    )
    return image[top : top + side, left : left + side], mask[top : top + side, left : left + side]


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: object, text: str, alpha: float = 0.4
) -> None:
    """A rounded box whose left edge is at `x` and whose middle is at `y`."""
    shape = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08")
    shape.set(facecolor=(colour, alpha), edgecolor=colour)
    ax.add_patch(shape)
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)


def _hourglass(ax: Axes, x: float, y: float, width: float, height: float) -> None:
    """The autoencoder: wide, a bottleneck of 64 numbers, wide again."""
    for tip, end in ((x + width / 2 + 0.13, x), (x + width / 2 - 0.13, x + width)):
        corners = [(end, y - height / 2), (end, y + height / 2), (tip, y + 0.17), (tip, y - 0.17)]
        ax.add_patch(Polygon(corners, facecolor=(AUTOENCODER, 0.4), edgecolor=AUTOENCODER))
    ax.text(x + width / 2, y, "64", ha="center", va="center", fontsize=8.5)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1})
