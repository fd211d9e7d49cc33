"""Run folders become a report: one HTML page that needs no network, or Markdown with pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import PhotoError, ResourceError, RunError
from fieldmark.models.catalog import describe_pretraining
from fieldmark.plots import confusion_figure, confusion_tips, figure_png, figure_svg, thumbnail
from fieldmark.runs.folder import Run, RunResults, flatten, format_value
from fieldmark.study.charts import (
    Chart,
    format_estimate,
    format_interval,
    metric_name,
    minutes,
    parameters,
    report_charts,
)
from fieldmark.study.compare import Comparison, Metric, Pair, Variant, compare_runs
from fieldmark.training.metrics import confused_pairs, confusion_matrix, wilson_interval

ROWS_OPEN = 12
THUMBNAIL_PIXELS = 140
THUMBNAIL_BYTES = 5000
PAIRS_SHOWN = 6
PHOTOS_SHOWN = 4


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; `numeric` columns are set flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int]


@dataclass(frozen=True)
class ShownPhoto:
    """A photo of the page; `source` is a data URI, "" where the photo is gone."""

    path: str
    source: str


@dataclass(frozen=True)
class Confusion:
    """Photos of one class that were taken for another, and one of that other class to compare with.

    `count` and `out_of` are predictions: a photo counts once for each run.
    """

    true: str
    predicted: str
    count: int
    out_of: int
    photos: tuple[ShownPhoto, ...]
    example: ShownPhoto | None


def write_report(
    runs: Sequence[Run | str | Path],
    path: str | Path,
    *,
    metric: Metric = "top1",
    split: str = "val",
    title: str = "",
    with_photos: bool = True,
) -> list[Path]:
    """Write one page about runs: of one run its results, of several also which is better.

    Args:
        runs: Runs, run folders, or folders of them such as a sweep.
        path: `.html` for one self-contained page; `.md` for Markdown with PNG files in a folder beside it.
        metric: As for `compare_runs`.
        split: As for `compare_runs`.
        title: Heading; "" makes one.
        with_photos: Show the most confused photos, where the files are still there.

    Returns:
        The files written, the page first.

    Raises:
        RunError: The runs cannot be compared, or `path` has another ending.
        ResourceError: The page cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".md"):
        raise RunError(f"a report is .html or .md; got {path.name!r}")
    folders = [run.path if isinstance(run, Run) else run for run in runs]
    comparison = compare_runs(folders, metric=metric, split=split)
    count = len(comparison.variants)
    heading = title or (f"{count} variants compared" if count > 1 else comparison.variants[0].name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".md":
            return _write_markdown(comparison, path, heading)
        page = render_html(comparison, title=heading, with_photos=with_photos)
        # A file name that is not UTF-8 comes as lone surrogates, which no page can hold.
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from None
    return [path]


def render_html(comparison: Comparison, *, title: str, with_photos: bool) -> str:
    """The whole page as text: pictures and photos inside, no script, nothing to load."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("fieldmark.study", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    best = best_variant(comparison)
    charts = report_charts(comparison)
    confusion = confusion_chart(best)
    return page.render(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        is_single=len(comparison.variants) == 1,
        headline=headline(comparison),
        best=best,
        facts=run_facts(best, comparison.metric),
        variants=variants_table(comparison),
        pairs=pairs_table(comparison),
        charts=charts,
        confusion=confusion,
        pictures={chart.key: figure_svg(chart.figure, chart.tips, key=chart.key) for chart in (*charts, confusion)},
        classes=class_table(best),
        rows_open=ROWS_OPEN,
        confused=most_confused(best, with_photos=with_photos),
        changes=recipe_table(comparison.variants),
        recipe=full_recipe(best.runs[0]),
        environment=environment_rows(best.runs[0]),
        css=(resources.files("fieldmark.study") / "templates" / "report.css").read_text(encoding="utf-8"),
    )


def confusion_chart(variant: Variant) -> Chart:
    """The confusion matrix over all runs of a variant."""
    confusion, classes = pooled_confusion(variant), variant.runs[0].classes
    figure = confusion_figure(confusion, classes)
    note = "Rows: the true class. The stronger the color, the larger the share of its photos."
    note += " Over all runs of the variant." if len(variant.runs) > 1 else ""
    tips = confusion_tips(figure, confusion, classes)
    return Chart("confusion", "Confusion matrix", note, figure, tuple(tips))


def best_variant(comparison: Comparison) -> Variant:
    """The variant with the highest estimate; whether it is truly the best, the verdicts say."""
    return max(comparison.variants, key=lambda variant: variant.interval.estimate)


def headline(comparison: Comparison) -> str:
    """The result in a sentence or two."""
    best, metric = best_variant(comparison), comparison.metric
    found = f"{metric_name(metric)} {format_interval(best.interval, metric)}"
    photos = f"{comparison.num_photos:,} photos"
    if len(comparison.variants) == 1:
        return f"{found} on {photos}."
    rivals = [pair for pair in comparison.pairs if best.name in (pair.first, pair.second)]
    beaten = sum(pair.is_distinguishable for pair in rivals)
    said = {0: "None of the others is distinguishable from it", len(rivals): "It is better than every other variant"}
    words = said.get(
        beaten, f"It is better than {beaten} of the {len(rivals)} others and not distinguishable from the rest"
    )
    return f"Highest: {best.name}, {found[0].lower()}{found[1:]} on {photos}. {words}."


def _write_markdown(comparison: Comparison, path: Path, title: str) -> list[Path]:
    folder = path.with_name(path.stem + "_files")
    folder.mkdir(exist_ok=True)
    best = best_variant(comparison)
    pictures = [(chart, folder / f"{chart.key}.png") for chart in (*report_charts(comparison), confusion_chart(best))]
    for chart, target in pictures:
        target.write_bytes(figure_png(chart.figure, dpi=160))
    parts = [
        f"# {markdown_text(title)}",
        markdown_text(headline(comparison)),
        *(f"> {markdown_text(note)}" for note in comparison.notes),
        "## Variants",
        markdown_table(variants_table(comparison)),
        *(["## Verdicts", markdown_table(pairs_table(comparison))] if comparison.pairs else []),
        *(_markdown_picture(chart, f"{folder.name}/{target.name}") for chart, target in pictures),
        f"## Classes of {markdown_text(best.name)}",
        markdown_table(class_table(best)),
        "## Recipe",
        markdown_table(Table(("Key", "Value"), tuple(full_recipe(best.runs[0])), frozenset())),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return [path, *(target for _, target in pictures)]


def _markdown_picture(chart: Chart, link: str) -> str:
    from urllib.parse import quote

    return f"## {chart.title}\n\n![{chart.title}]({quote(link)})\n\n{markdown_text(chart.note)}"


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    rule = ["---:" if number in table.numeric else "---" for number in range(len(table.head))]
    rows = [list(map(markdown_text, table.head)), rule, *(list(map(markdown_text, row)) for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown_text(text: str) -> str:
    """A user's text as Markdown shows it literally, in one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(flat, quote=False))


def variants_table(comparison: Comparison) -> Table:
    """Every variant: accuracy with interval, runs, optimistic bias, and what it cost."""
    interval = f"{100 * comparison.level:g} % interval"
    head = ("Variant", "Score", interval, "Seeds", "Each seed", "Optimistic bias", "Minutes", "Images/s", "Parameters",
            "Weights")  # fmt: skip
    ordered = sorted(comparison.variants, key=lambda variant: -variant.interval.estimate)
    rows = tuple((variant.name, *_variant_cells(variant, comparison.metric)) for variant in ordered)
    return Table(head, rows, frozenset({1, 2, 3, 5, 6, 7, 8}))


def _variant_cells(variant: Variant, metric: str) -> tuple[str, ...]:
    value, optimism = variant.interval, variant.optimism
    bias = "–" if optimism.source == "none" else f"{100 * optimism.points:.1f} points"
    speeds = [row["images_per_second"] for run in variant.runs for row in run.metrics if row.get("images_per_second")]
    return (
        format_estimate(value.estimate, metric),
        f"{format_estimate(value.low, metric)} to {format_estimate(value.high, metric)}",
        str(len(variant.seeds)),
        ", ".join(format_estimate(mean, metric) for mean in variant.seed_means),
        f"≤ {bias}" if optimism.source == "history" else bias,
        _mean_minutes(variant),
        f"{np.mean(speeds):.0f}" if speeds else "–",
        f"{parameters(variant.runs[0]) / 1e6:.1f} M",
        describe_weights(variant.runs[0]),
    )


def run_facts(variant: Variant, metric: str) -> list[tuple[str, str]]:
    """What is worth knowing about one variant: name and value, of its first run where runs differ."""
    run, cells = variant.runs[0], _variant_cells(variant, metric)
    val = run.summary.get("val") or {}
    shares = (("Top-1", "top1"), ("Top-5", "top5"), ("Macro recall", "macro_recall"))
    losses = (("Log loss", "log_loss"), ("Calibration error", "calibration_error"))
    best, epochs = run.summary.get("best_epoch"), run.config.train.epochs
    chosen = "the best" if run.config.train.select == "best" else "the last"
    facts = [
        (metric_name(metric), format_interval(variant.interval, metric)),
        *([("Each seed", cells[3])] if len(variant.seeds) > 1 else []),
        *((name, f"{100 * val[key]:.1f} %") for name, key in shares if key in val and key != metric),
        *((name, f"{val[key]:.3f}") for name, key in losses if key in val and key != metric),
        ("Epochs", f"{epochs}; kept: {chosen}" + (f" ({best})" if best is not None and chosen == "the best" else "")),
        ("Optimistic bias", cells[4]), ("Minutes", cells[5]), ("Images/s", cells[6]), ("Parameters", cells[7]),
        ("Backbone", str(run.model_info.get("create", {}).get("name", run.config.model.name))), ("Weights", cells[8]),
    ]  # fmt: skip
    return [(name, value) for name, value in facts if value != "–"]


def describe_weights(run: RunResults) -> str:
    """Where a run's weights came from, with license and pre-training."""
    weights = run.model_info.get("weights", {})
    tag = str(weights.get("pretraining") or "")
    parts = [weights.get("source"), weights.get("licence"), describe_pretraining(tag, default=tag)]
    return ", ".join(str(part) for part in parts if part) or run.config.model.weights


def effects_table(comparison: Comparison) -> Table:
    """What each change of the baseline did, the best first: score, effect, interval, p-value, and what it cost.

    The comparison needs a baseline.
    """
    interval = f"{100 * comparison.level:g} % interval"
    head = ("Change", "Score", "Effect", interval, "p (Holm)", "Distinguishable", "Minutes")
    base, *others = comparison.variants
    ordered = sorted(zip(others, comparison.pairs, strict=True), key=lambda both: -both[0].interval.estimate)
    start = (f"{base.name} (baseline)", format_estimate(base.interval.estimate, comparison.metric), *["–"] * 4)
    rows = [(*start, _mean_minutes(base))]
    for variant, pair in ordered:
        score = format_estimate(variant.interval.estimate, comparison.metric)
        found = _effect(pair, comparison.metric)
        rows.append((variant.name, score, *found, "yes" if pair.is_distinguishable else "no", _mean_minutes(variant)))
    return Table(head, tuple(rows), frozenset({1, 2, 3, 4, 6}))


def _mean_minutes(variant: Variant) -> str:
    return f"{np.mean([minutes(run) for run in variant.runs]):.1f}"


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
    """Every two variants: difference, interval, p-value and verdict."""
    head = ("Variant", "over", "Difference", f"{100 * comparison.level:g} % interval", "p (Holm)", "Verdict")
    ordered = sorted(comparison.pairs, key=lambda pair: (not pair.is_distinguishable, pair.corrected_p))
    rows = tuple((pair.second, pair.first, *_effect(pair, comparison.metric), pair.verdict) for pair in ordered)
    return Table(head, rows, frozenset({2, 3, 4}))


def class_table(variant: Variant) -> Table:
    """Recall and precision of each class over a variant's runs, worst first; the interval counts each photo once."""
    confusion = pooled_confusion(variant)
    num_runs = len(variant.seeds)
    classes = variant.runs[0].classes
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


def pooled_confusion(variant: Variant) -> NDArray[np.int64]:
    """(K, K) counts over all runs of a variant; row: the true class, column: the predicted one."""
    num_classes = len(variant.runs[0].classes)
    matrices = [confusion_matrix(run.predicted, run.labels, num_classes=num_classes) for run in variant.runs]
    return np.sum(matrices, axis=0)


def most_confused(variant: Variant, *, with_photos: bool) -> list[Confusion]:
    """The classes that were most often taken for each other, with photos that were, where they are still there."""
    runs = variant.runs
    photos = [(run, photo) for run in runs for photo in run.photos]
    labels = np.concatenate([run.labels for run in runs])
    predicted = np.concatenate([run.predicted for run in runs])
    totals = np.bincount(labels, minlength=len(runs[0].classes))
    found: list[Confusion] = []
    for true, other, indices in confused_pairs(labels, predicted)[:PAIRS_SHOWN]:
        # The same photo in another run is the same picture.
        distinct = {photos[index][1]: photos[index] for index in indices[::-1]} if with_photos else {}
        shown = [_shown(*photo) for photo in list(distinct.values())[: -PHOTOS_SHOWN - 1 : -1]]
        example = _example(runs[0], other) if with_photos else None
        names = runs[0].classes[true], runs[0].classes[other]
        found.append(Confusion(*names, len(indices), int(totals[true]), tuple(shown), example))
    return found


def _example(run: RunResults, index: int) -> ShownPhoto | None:
    """The photo of a class that is recognized with the highest probability."""
    found = np.flatnonzero((run.labels == index) & run.correct)
    if not len(found):
        return None
    photo = _shown(run, run.photos[int(found[run.probabilities[found, index].argmax()])])
    return photo if photo.source else None


def _shown(run: RunResults, photo: str) -> ShownPhoto:
    data = run.config.data
    try:
        content = thumbnail(
            Path(str(run.data_info.get("root", ""))) / photo,
            THUMBNAIL_PIXELS,
            background=data.background,
            max_pixels=data.max_pixels,
            max_bytes=THUMBNAIL_BYTES,
        )
    except (PhotoError, OSError, ValueError):
        return ShownPhoto(photo, "")
    return ShownPhoto(photo, "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii"))


def recipe_table(variants: Sequence[Variant]) -> Table:
    """Where the variants differ, one column each."""
    keys = list(variants[0].changes)
    rows = tuple((key, *(format_value(variant.changes[key]) for variant in variants)) for key in keys)
    return Table(("Key", *(f"{number}" for number in range(1, len(variants) + 1))), rows, frozenset())


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
