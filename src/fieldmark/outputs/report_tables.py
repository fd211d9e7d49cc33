"""The report's tables: settings, classes, confusions, recipes, machines. Plain rows, laid out by HTML or Markdown.

Shape letters: N photos, K classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import PhotoError
from fieldmark.experiment.compare import Comparison, Pair, Setting
from fieldmark.experiment.results import RunResults
from fieldmark.experiment.settings import flatten, format_value
from fieldmark.outputs.report_figures import format_estimate, minutes, parameters
from fieldmark.vision.provenance import describe_pretraining

THUMBNAIL_PIXELS = 160
THUMBNAIL_BYTES = 20_000
PAIRS_SHOWN = 8
PHOTOS_SHOWN = 4


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; `numeric` columns are set flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int]


@dataclass(frozen=True)
class ConfusedPhoto:
    """A photo that was taken for another class; `source` is a data URI, "" where the photo is gone."""

    path: str
    source: str


@dataclass(frozen=True)
class ConfusedPair:
    """Photos of one class that were taken for another, and one of that other class to compare with.

    `count` and `out_of` are judgements: a photo counts once for each run.
    """

    true: str
    predicted: str
    count: int
    out_of: int
    photos: tuple[ConfusedPhoto, ...]
    example: ConfusedPhoto | None


def settings_table(comparison: Comparison) -> Table:
    """Every setting: accuracy with interval, runs, optimism, and what it cost."""
    interval = f"{100 * comparison.level:g} % interval"
    flattery = "Best epoch flatters by"
    head = (
        "Setting",
        "Score",
        interval,
        "Seeds",
        "Each seed",
        flattery,
        "Minutes",
        "Images/s",
        "Parameters",
        "Weights",
    )
    ordered = sorted(comparison.settings, key=lambda setting: -setting.interval.estimate)
    rows = tuple(_setting_row(setting, comparison.metric) for setting in ordered)
    return Table(head, rows, frozenset({1, 2, 3, 5, 6, 7, 8}))


def _setting_row(setting: Setting, metric: str) -> tuple[str, ...]:
    value, first = setting.interval, setting.runs[0]
    optimism = setting.optimism
    flattery = "–" if optimism.source == "none" else f"{100 * optimism.points:.1f} points"
    if optimism.source == "history":
        flattery = "≤ " + flattery
    speeds = [row["images_per_second"] for run in setting.runs for row in run.metrics if row.get("images_per_second")]
    return (
        setting.name,
        format_estimate(value.estimate, metric),
        f"{format_estimate(value.low, metric)} to {format_estimate(value.high, metric)}",
        str(len(setting.seeds)),
        ", ".join(format_estimate(mean, metric) for mean in setting.seed_means),
        flattery,
        _mean_minutes(setting),
        f"{np.mean(speeds):.0f}" if speeds else "–",
        f"{parameters(first) / 1e6:.1f} M",
        weights_words(first),
    )


def weights_words(run: RunResults) -> str:
    """Where a run's weights came from, with licence and pre-training."""
    weights = run.model.get("weights", {})
    tag = str(weights.get("pretraining") or "")
    described = describe_pretraining(tag)
    parts = [weights.get("source"), weights.get("licence"), tag if described == "unknown" else described]
    return ", ".join(str(part) for part in parts if part) or run.config.model.weights


def effects_table(comparison: Comparison) -> Table:
    """What each change of the baseline did, the best first: score, effect, interval, p-value, and what it cost.

    The comparison needs a baseline.
    """
    interval = f"{100 * comparison.level:g} % interval"
    head = ("Change", "Score", "Effect", interval, "p (Holm)", "Distinguishable", "Minutes")
    base, *others = comparison.settings
    ordered = sorted(zip(others, comparison.pairs, strict=True), key=lambda both: -both[0].interval.estimate)
    start = (f"{base.name} (baseline)", format_estimate(base.interval.estimate, comparison.metric), *["–"] * 4)
    rows = [(*start, _mean_minutes(base))]
    for setting, pair in ordered:
        score = format_estimate(setting.interval.estimate, comparison.metric)
        found = _effect(pair, comparison.metric)
        rows.append((setting.name, score, *found, "yes" if pair.is_distinguishable else "no", _mean_minutes(setting)))
    return Table(head, tuple(rows), frozenset({1, 2, 3, 4, 6}))


def _mean_minutes(setting: Setting) -> str:
    return f"{np.mean([minutes(run) for run in setting.runs]):.1f}"


def _effect(pair: Pair, metric: str) -> tuple[str, str, str]:
    """Difference, interval and p-value in words."""
    scale, digits = (1, 3) if metric == "log_loss" else (100, 1)
    value = pair.difference.interval
    return (
        f"{scale * value.estimate:+.{digits}f}",
        f"{scale * value.low:+.{digits}f} to {scale * value.high:+.{digits}f}",
        f"{pair.corrected_p:.3f}" if pair.corrected_p >= 0.001 else "< 0.001",
    )


def pairs_table(comparison: Comparison) -> Table:
    """Every two settings: difference, interval, p-value and verdict."""
    head = ("Setting", "over", "Difference", f"{100 * comparison.level:g} % interval", "p (Holm)", "Verdict")
    ordered = sorted(comparison.pairs, key=lambda pair: (not pair.is_distinguishable, pair.corrected_p))
    rows = tuple((pair.second, pair.first, *_effect(pair, comparison.metric), pair.verdict) for pair in ordered)
    return Table(head, rows, frozenset({2, 3, 4}))


def class_table(setting: Setting) -> Table:
    """Recall and precision of each class over a setting's runs, worst first; the interval counts each photo once."""
    from fieldmark.engine.metrics import wilson_interval

    confusion = pooled_confusion(setting)
    num_runs = len(setting.seeds)
    classes = setting.runs[0].classes
    predicted = confusion.sum(axis=0)
    rows: list[tuple[float, tuple[str, ...]]] = []
    for number, name in enumerate(classes):
        total, right = int(confusion[number].sum()), int(confusion[number, number])
        if not total:
            rows.append((2.0, (name, "0", "–", "–", "–")))
            continue
        photos = total // num_runs
        low, high = wilson_interval(round(right / num_runs), photos)
        precision = f"{100 * right / predicted[number]:.0f} %" if predicted[number] else "–"
        share = right / total
        rows.append((share, (name, str(photos), f"{100 * share:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %",
                             precision)))  # fmt: skip
    rows.sort(key=lambda row: row[0])
    head = ("Class", "Photos", "Recall", "95 % interval", "Precision")
    return Table(head, tuple(row for _, row in rows), frozenset({1, 2, 3, 4}))


def pooled_confusion(setting: Setting) -> NDArray[np.int64]:
    """(K, K) counts over all runs of a setting; row: the true class, column: the predicted one."""
    from fieldmark.engine.metrics import confusion_matrix

    num_classes = len(setting.runs[0].classes)
    matrices = [confusion_matrix(run.predicted, run.labels, num_classes=num_classes) for run in setting.runs]
    return np.sum(matrices, axis=0)


def confused_pairs(setting: Setting, *, with_photos: bool) -> list[ConfusedPair]:
    """The classes that were most often taken for each other, with photos that were, where they are still there."""
    confusion = pooled_confusion(setting)
    off = confusion - np.diag(np.diag(confusion))
    classes = setting.runs[0].classes
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS_SHOWN]
    pairs: list[ConfusedPair] = []
    for true, predicted in zip(*np.unravel_index(order, off.shape), strict=True):
        if not off[true, predicted]:
            break
        photos = tuple(_confused_photos(setting, int(true), int(predicted))) if with_photos else ()
        example = _example(setting, int(predicted)) if with_photos else None
        counts = int(off[true, predicted]), int(confusion[true].sum())
        pairs.append(ConfusedPair(classes[true], classes[predicted], *counts, photos, example))
    return pairs


def _example(setting: Setting, number: int) -> ConfusedPhoto | None:
    """The photo of a class that is recognised with the highest probability."""
    run = setting.runs[0]
    places = np.flatnonzero((run.labels == number) & run.correct)
    if not len(places):
        return None
    surest = int(places[run.probabilities[places, number].argmax()])
    source = thumbnail(Path(str(run.data.get("root", ""))) / run.photos[surest], run)
    return ConfusedPhoto(run.photos[surest], source) if source else None


def _confused_photos(setting: Setting, true: int, predicted: int) -> list[ConfusedPhoto]:
    found: dict[str, ConfusedPhoto] = {}
    for run in setting.runs:
        for number in np.flatnonzero((run.labels == true) & (run.predicted == predicted)):
            path = run.photos[number]
            if path not in found and len(found) < PHOTOS_SHOWN:
                found[path] = ConfusedPhoto(path, thumbnail(Path(str(run.data.get("root", ""))) / path, run))
    return list(found.values())


def thumbnail(path: Path, run: RunResults) -> str:
    """A photo as a data URI of at most 20 kB; "" where it is gone or broken."""
    from PIL import Image

    from fieldmark.data.decode import decode_reduced

    data = run.config.data
    try:
        reduced = decode_reduced(
            path, min_short_side=THUMBNAIL_PIXELS, background=data.background, max_pixels=data.max_pixels
        )
    except (PhotoError, OSError, ValueError):
        return ""
    image = Image.fromarray(reduced.pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    for quality in (80, 60, 40, 20):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def recipe_table(settings: Sequence[Setting]) -> Table:
    """Where the settings differ, one column each."""
    keys = list(settings[0].changes)
    rows = tuple((key, *(format_value(setting.changes[key]) for setting in settings)) for key in keys)
    return Table(("Key", *(f"{number}" for number in range(1, len(settings) + 1))), rows, frozenset())


def full_recipe(run: RunResults) -> list[tuple[str, str]]:
    """All settings of a run."""
    return [(key, format_value(value)) for key, value in flatten(run.config).items()]


def environment_rows(run: RunResults) -> list[tuple[str, str]]:
    """Versions, hardware and command, flattened."""
    return _rows(run.environment, "")


def _rows(table: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(table, dict):
        return [row for key, value in table.items() for row in _rows(value, f"{prefix}{key}.")]
    text = " ".join(map(str, table)) if isinstance(table, list) else str(table)
    return [(prefix.rstrip("."), text)]
