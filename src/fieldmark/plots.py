"""Numbers become matplotlib figures, and figures become PNG, SVG or what a notebook shows. No window is opened.

Shape letters: K classes, N values.
"""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
from numpy.typing import NDArray

from fieldmark.data.decode import DecodeSpec
from fieldmark.data.shards import PhotoFile
from fieldmark.errors import PhotoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22303c"
# Okabe and Ito's colors, which color-blind readers distinguish too, and a few more.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
LONGEST_NAME = 32
MOST_CLASSES = 120  # a confusion matrix of more classes shows those with the most mistakes


@dataclass(frozen=True)
class Tip:
    """Text that a page shows while the pointer is in a rectangle, given in data coordinates of `axes`."""

    axes: Axes
    x: tuple[float, float]
    y: tuple[float, float]
    text: str


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="white")


@contextmanager
def _any_script() -> Generator[None]:
    """Class names may be in any script: a glyph that the font lacks is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        yield


def figure_png(figure: Figure, *, dpi: int = 120) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    with _any_script():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def figure_svg(figure: Figure, tips: Sequence[Tip] = (), *, key: str) -> str:
    """The figure, which loses its background, as an inline picture: real text, the page's own ink, and tooltips.

    `key` is a name that no other picture of the page has.
    """
    import matplotlib as mpl

    figure.set_dpi(72)  # the unit of an SVG is a point
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    with _any_script(), mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"#000000|#22303c", "currentColor", text).replace(" xmlns:xlink=", " data-xlink=")
    text = text.replace("xlink:href", "href")
    family = r"font(-family)?: ([\d.]+px )?['\"]?DejaVu Sans[^;\"]*"  # the page has a font of its own
    text = re.sub(family, lambda found: f"font-size: {found[2]}".strip() if found[2] else "font-family: inherit", text)
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    overlay = "".join(_overlay(tip, figure.bbox.height) for tip in tips)
    return text[: text.rindex("</svg>")] + f'<g class="tips">{overlay}</g></svg>'


def _overlay(tip: Tip, height: float) -> str:
    corners = tip.axes.transData.transform(list(zip(tip.x, tip.y, strict=True)))
    (left, right), (low, high) = sorted(corners[:, 0]), sorted(corners[:, 1])
    box = f'x="{left:.1f}" y="{height - high:.1f}" width="{right - left:.1f}" height="{high - low:.1f}"'
    return f"<rect {box}><title>{html.escape(_printable(tip.text))}</title></rect>"


def _printable(text: str) -> str:
    """The text without what no page can hold, such as half a character; line breaks stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


def plain_text(name: str, *, longest: int = LONGEST_NAME) -> str:
    """A user's name as matplotlib shows it literally: no mathematics, no line breaks, not too long."""
    shown = _printable(name).replace("\n", "�")
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return shown.replace("$", r"\$")


def confusion_figure(confusion: NDArray[np.int64], classes: Sequence[str]) -> tuple[Figure, list[Tip]]:
    """Confusion matrix: rows of (K, K) counts are the true classes; the stronger the color, the larger the share."""
    from matplotlib.colors import to_rgb

    # Of many classes those with the most mistakes.
    mistakes = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * np.diag(confusion)
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES])
    counts, names = confusion[np.ix_(shown, shown)], [plain_text(classes[int(index)]) for index in shown]
    shares = counts / np.maximum(confusion.sum(axis=1, keepdims=True)[shown], 1)
    has_counts = len(names) <= 25
    cell, size = (19.0, 8.0) if has_counts else (7.6, 6.4)  # in points: 100 classes are legible, and fit a page
    labels = 12 + 0.55 * size * max(map(len, names), default=0)
    side = (max(cell * len(names), 150) + labels + 40) / 72
    figure = new_figure(side, side)
    axes = figure.subplots()
    colors = np.zeros((*counts.shape, 4))
    colors[..., :3] = to_rgb(COLORS[1])
    colors[np.arange(len(names)), np.arange(len(names)), :3] = to_rgb(COLORS[0])
    colors[..., 3] = np.where(counts > 0, 0.2 + 0.8 * shares, 0.0)
    axes.imshow(colors, interpolation="none")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    few = "" if len(shown) == len(classes) else f"the {len(shown)} of {len(classes)} classes with the most mistakes\n"
    axes.set_title(f"{few}blue: right, orange: mistakes", fontsize=9, loc="left")
    if not has_counts:
        axes.set_xticks(np.arange(len(names)) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(names)) + 0.5, minor=True)
        axes.grid(which="minor", linewidth=0.3, alpha=0.4)
        axes.tick_params(which="minor", length=0)
    tips: list[Tip] = []
    for row, column in zip(*np.nonzero(counts), strict=True):
        true, predicted, count = int(shown[row]), int(shown[column]), str(counts[row, column])
        text = f"{classes[true]} → {classes[predicted]}: {count} of {confusion[true].sum()}"
        tips.append(Tip(axes, (column - 0.5, column + 0.5), (row - 0.5, row + 0.5), text))
        if has_counts:
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, count, ha="center", va="center", fontsize=size, color=color)
    return figure, tips


def draw_lambda(axes: Axes, values: NDArray[np.float64], alpha: tuple[float, float], title: str) -> None:
    """Histogram of (N,) values of λ, and the Beta density of α, drawn evenly from a range."""
    axes.hist(values, bins=40, range=(0, 1), density=True, color=COLORS[0], alpha=0.5, label="λ")
    inside = np.linspace(0, 1, 201)[1:-1]
    drawn = np.mean([scipy.stats.beta.pdf(inside, a, a) for a in np.linspace(*alpha, 25)], axis=0)
    axes.plot(inside, drawn, "--", color=COLORS[1], linewidth=1, label="Beta(α, α) drawn from")
    axes.set_ylim(0, 4)
    axes.legend(frameon=False, fontsize=8)
    dress(axes, title, "λ")


def fill_grid(
    grid: Any,
    per_row: int,
    photos: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    colors: Iterable[str] = repeat(INK),
) -> None:
    """Draw photos into an array of axes, `per_row` beside each other; the axes that are left stay empty."""
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (pixels, caption, color) in enumerate(zip(photos, captions, colors, strict=False)):
        axes = grid[number // per_row, number % per_row]
        axes.set_visible(True)
        axes.imshow(pixels, interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        lines = [plain_text(line) for line in caption.split("\n")]  # literally
        axes.set_xlabel("\n".join(lines), fontsize=7.5, color=color, labelpad=3)


def dress(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    """Give the axes the look that all charts share: a small title, a faint grid, no box."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.2)


def thumbnail(photo: PhotoFile, side: int, decoding: DecodeSpec, *, max_bytes: int | None = None) -> bytes:
    """Make a JPEG of a photo, its long side at most `side` pixels, if possible of `max_bytes`; raises PhotoError."""
    from PIL import Image

    image = Image.fromarray(decoding.read(photo, min_short_side=side))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    content = b""
    for quality in (82, 65, 45, 25, 10):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        content = buffer.getvalue()
        if max_bytes is None or len(content) <= max_bytes:
            break
    return content


def thumbnail_uri(photo: PhotoFile, side: int, decoding: DecodeSpec, *, max_bytes: int | None = None) -> str:
    """A `thumbnail` as a data URI for a page; "" where the photo is gone or cannot be read."""
    try:
        content = thumbnail(photo, side, decoding, max_bytes=max_bytes)
    except (PhotoError, OSError, ValueError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
