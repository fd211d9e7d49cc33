"""Numbers become matplotlib figures. Nothing here opens files, shows windows or touches pyplot's global state.

Shape letters: K classes, N values.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK = "#22303c"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers too (Okabe and Ito, 2008)
LONGEST_NAME = 32


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="white")


def figure_png(figure: Figure, *, dpi: int = 120) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in any script; a glyph that the font lacks is drawn as a box, and that is all.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plain_text(name: str) -> str:
    """A user's name as matplotlib shows it literally: no mathematics, no line breaks, not too long."""
    shown = "".join(letter if letter.isprintable() else "�" for letter in name)
    shown = shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 1] + "…"
    return shown.replace("$", r"\$")


def confusion_figure(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Confusion matrix as a heat map: rows are the true classes, colours the share of the row.

    Args:
        confusion: (K, K) counts; row: the true class, column: the predicted one.
        classes: K names.
    """
    num_classes = len(classes)
    side = float(np.clip(2.5 + 0.16 * num_classes, 4.5, 24.0))
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = float(np.clip(72 * side / (num_classes + 8), 3.0, 10.0))
    names = [plain_text(name) for name in classes]
    axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(num_classes), names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if num_classes <= 25:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=size, color=color)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class")
    return figure


def training_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate per epoch.

    Args:
        metrics: One object per epoch, as in a run's metrics.jsonl.
    """
    figure = new_figure(11, 3.4)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in metrics]
    _draw_line(loss, epochs, [row.get("train_loss") for row in metrics], "training", COLORS[0])
    _draw_line(loss, epochs, [row["val"].get("log_loss") for row in metrics], "validation", COLORS[1])
    _draw_line(accuracy, epochs, [row.get("train_top1_clean") for row in metrics], "training, clean batches", COLORS[0])
    _draw_line(accuracy, epochs, [row.get("train_top1_mixed") for row in metrics], "training, mixed", COLORS[2])
    _draw_line(accuracy, epochs, [row["val"].get("top1") for row in metrics], "validation", COLORS[1])
    # The probe's rate is of another scale, and not of this schedule.
    _draw_line(rate, epochs, [None if row.get("is_probe") else row.get("lr") for row in metrics], "head", COLORS[3])
    for axes, title in ((loss, "loss"), (accuracy, "top-1 accuracy"), (rate, "learning rate")):
        _dress(axes, title, "epoch")
        axes.locator_params(axis="x", integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_line(axes: Axes, epochs: Sequence[int], values: Sequence[float | None], label: str, color: str) -> None:
    points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=color)


def draw_lambda(axes: Axes, values: NDArray[np.float64], alpha: tuple[float, float], title: str) -> None:
    """Histogram of λ with its density, and the Beta density that λ was drawn from.

    Args:
        axes: Where to draw.
        values: (N,) λ in [0, 1].
        alpha: Range that α was drawn from evenly.
        title: Above the axes.
    """
    from scipy.stats import beta, gaussian_kde

    axes.hist(values, bins=40, range=(0, 1), density=True, color=COLORS[0], alpha=0.35)
    grid = np.linspace(0, 1, 201)
    if np.ptp(values) > 0:
        # Mirrored at both ends: a plain kernel estimate would sink where most of the mass lies.
        mirrored = np.concatenate([-values, values, 2 - values])
        axes.plot(grid, 3 * gaussian_kde(mirrored, bw_method=0.03)(grid), color=COLORS[0], label="density of λ")
    inside = grid[1:-1]
    drawn = np.mean([beta.pdf(inside, a, a) for a in np.linspace(*alpha, 25)], axis=0)
    axes.plot(inside, drawn, "--", color=COLORS[1], linewidth=1, label="Beta(α, α) drawn from")
    axes.set_ylim(0, 4)
    axes.legend(frameon=False, fontsize=8)
    _dress(axes, title, "λ")


def draw_rate(axes: Axes, epochs: NDArray[np.float64], rates: Mapping[str, NDArray[np.float64]], title: str) -> None:
    """Learning rates over the epochs of a run, one line per name."""
    for (name, values), color in zip(rates.items(), COLORS, strict=False):
        axes.plot(epochs, values, label=name, color=color)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    if len(rates) > 1:
        axes.legend(frameon=False, fontsize=8)
    _dress(axes, title, "epoch")


def draw_photo(axes: Axes, pixels: NDArray[np.uint8], caption: str, *, color: str = INK) -> None:
    """One photo with lines of text under it; the caption is shown literally."""
    axes.imshow(pixels, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    lines = [plain_text(line) for line in caption.split("\n")]
    axes.set_xlabel("\n".join(lines), fontsize=7.5, color=color, labelpad=3)


def photo_grid(photos: Sequence[NDArray[np.uint8]], captions: Sequence[str], colors: Sequence[str]) -> Figure:
    """Photos in rows of at most six, each with its caption in its colour."""
    columns = min(len(photos), 6)
    rows = math.ceil(len(photos) / columns)
    figure = new_figure(2.1 * columns, 2.55 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(photos) :]:
        axes.set_visible(False)
    for axes, pixels, caption, color in zip(grid.flat, photos, captions, colors, strict=False):
        draw_photo(axes, pixels, caption, color=color)
    return figure


def _dress(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.2)
