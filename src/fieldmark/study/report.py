"""Run folders become a report: one HTML page that needs no network, or Markdown with pictures."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from fieldmark.config import Metric
from fieldmark.data.shards import locate_photos
from fieldmark.errors import DataError, RunError
from fieldmark.files import fill_template, write_whole
from fieldmark.models.catalog import describe_pretraining
from fieldmark.plots import confusion_figure, figure_png, figure_svg, thumbnail_uri
from fieldmark.runs.folder import Run, RunResults, flatten, format_value
from fieldmark.study.charts import Chart, minutes, parameters, report_charts
from fieldmark.study.compare import Comparison, Pair, Variant, compare_runs
from fieldmark.study.statistics import Shown
from fieldmark.training.metrics import confused_pairs, confusion_matrix, summarize, wilson_interval

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

    Examples:
        >>> [file.name for file in fieldmark.write_report(["runs/plain", "runs/mixed"], "report.html")]
        ['report.html']
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".html", ".md"):
        raise RunError(f"a report is .html or .md; got {path.name!r}")
    comparison = compare_runs(runs, metric=metric, split=split)
    # The highest estimate; whether it is truly the best, the verdicts say.
    best = max(comparison.variants, key=lambda variant: variant.interval.estimate)
    charts = [*report_charts(comparison), _confusion_chart(best)]
    count = len(comparison.variants)
    settings = tuple((key, format_value(value)) for key, value in flatten(best.runs[0].config).items())
    page: dict[str, Any] = {
        "title": title or (f"{count} variants compared" if count > 1 else comparison.variants[0].name),
        "comparison": comparison,
        "best": best,
        "headline": _headline(comparison, best),
        "variants": _variants_table(comparison),
        "pairs": pairs_table(comparison),
        "classes": class_table(best),
        "recipe": Table(("Key", "Value"), settings, frozenset()),
        "charts": charts,
    }
    files: list[Path] = []
    if kind == ".md":
        files = [path.with_name(path.stem + "_files") / f"{chart.key}.png" for chart in charts]
        for file, chart in zip(files, charts, strict=True):
            write_whole(file, figure_png(chart.figure, dpi=160))
        page["pictures"] = {file.stem: quote(f"{file.parent.name}/{file.name}") for file in files}
    else:
        page |= _page_parts(comparison, best, charts, page["variants"], with_photos=with_photos)
    # A file name that is not UTF-8 comes as lone surrogates, which no page can hold.
    write_whole(path, render_template("fieldmark.study", f"report{kind}", page).encode("utf-8", "backslashreplace"))
    return [path, *files]


def render_template(package: str, template: str, page: dict[str, Any]) -> str:
    """Fill in a page's template, which may show text and tables as Markdown."""
    filters = {"text": markdown_text, "table": markdown_table, "json": json.dumps}
    return fill_template(template, page, package=package, filters=filters) + "\n"


def _page_parts(
    comparison: Comparison, best: Variant, charts: Sequence[Chart], table: Table, *, with_photos: bool
) -> dict[str, Any]:
    """Return what a page has and Markdown has not: pictures and photos inside, no script, nothing to load."""
    variants = comparison.variants
    # Where the variants differ, one column each.
    rows = tuple((key, *(format_value(one.changes[key]) for one in variants)) for key in variants[0].changes)
    changes = Table(("Key", *map(str, range(1, len(variants) + 1))), rows, frozenset())
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "is_single": len(variants) == 1,
        "is_running": best.runs[0].summary["status"] == "running",
        "facts": _run_facts(best, table),
        "pictures": {chart.key: figure_svg(chart.figure, chart.tips, key=chart.key) for chart in charts},
        "rows_open": ROWS_OPEN,
        "confused": most_confused(best, with_photos=with_photos),
        "changes": changes,
        "environment": flatten(best.runs[0].environment),
    }


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    rule = ["---:" if number in table.numeric else "---" for number in range(len(table.head))]
    rows = [list(map(markdown_text, table.head)), rule, *(list(map(markdown_text, row)) for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown_text(text: str) -> str:
    """A user's text as Markdown shows it literally, in one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(flat, quote=False))


def _headline(comparison: Comparison, best: Variant) -> str:
    """The result in a sentence or two."""
    rivals = [pair for pair in comparison.pairs if best.name in (pair.first, pair.second)]
    values = {"comparison": comparison, "shown": comparison.shown, "best": best, "rivals": rivals}
    return fill_template("headline.md", values, package="fieldmark.study")


def _confusion_chart(variant: Variant) -> Chart:
    """The confusion matrix over all runs of a variant."""
    figure, tips = confusion_figure(pooled_confusion(variant), variant.runs[0].classes)
    note = "Rows: the true class. The stronger the color, the larger the share of its photos."
    note += " Over all runs of the variant." if len(variant.runs) > 1 else ""
    return Chart("confusion", "Confusion matrix", note, figure, tuple(tips))


def _variants_table(comparison: Comparison) -> Table:
    """Every variant, the best first: accuracy with interval, runs, optimistic bias, and what it cost."""
    shown, rows = comparison.shown, list[dict[str, str]]()
    for variant in sorted(comparison.variants, key=lambda variant: -variant.interval.estimate):
        value, run = variant.interval, variant.runs[0]
        speeds = [row.get("images_per_second") for one in variant.runs for row in one.metrics]
        known = [speed for speed in speeds if speed]
        weights = run.model_info.get("weights", {})
        tag = str(weights.get("pretraining") or "")
        origin = [weights.get("source"), weights.get("license"), describe_pretraining(tag, default=tag)]
        rows.append(
            {
                "Variant": variant.name,
                "Score": shown.value(value.estimate),
                f"{100 * comparison.level:g} % interval": f"{shown.value(value.low)} to {shown.value(value.high)}",
                "Seeds": str(len(variant.seeds)),
                "Each seed": ", ".join(map(shown.value, variant.seed_means)),
                "Optimistic bias": "–" if variant.optimism is None else f"{100 * variant.optimism:.1f} points",
                "Minutes": _mean_minutes(variant),
                "Images/s": f"{np.mean(known):.0f}" if known else "–",
                "Parameters": f"{parameters(run) / 1e6:.1f} M",
                "Weights": ", ".join(str(part) for part in origin if part) or run.config.model.weights,
            }
        )
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows), frozenset({1, 2, 3, 5, 6, 7, 8}))


def _run_facts(variant: Variant, table: Table) -> dict[str, str]:
    """What is worth knowing about one variant, of its first run where runs differ; `table` is that of the variants."""
    run = variant.runs[0]
    val = summarize(run.probabilities, run.labels, run.prior)  # of the split that the page is about
    best = f"the best ({run.summary.get('best_epoch')})" if run.config.train.select == "best" else "the last"
    # Of one run the score is that of its one seed, and the accuracy that the headline has; of few classes top-5 is 1.
    left_out = {"top1", "top5"} if len(run.classes) <= 5 else {"top1"}
    scores = {key: value for key, value in val.items() if isinstance(value, float) and key not in left_out}
    names = {"prior_top1": "Accuracy under the training prior"}
    facts = {
        **dict(zip(table.head[1:], table.rows[0][1:], strict=True)),
        **{names.get(key, key.replace("_", " ").capitalize()): f"{value:.3f}" for key, value in scores.items()},
        "Epochs": f"{run.config.train.epochs}; kept: {best}" if run.config.train.epochs else "–",
        "Backbone": str(run.model_info.get("create", {}).get("name", run.config.model.name)),
    }
    if len(variant.seeds) == 1:
        facts |= {"Seeds": "–", "Each seed": "–"}
    if kept := run.summary.get("kept"):  # the plan of a budget chose, not the settings
        facts |= {"Epochs": "–", "Backbone": "–", "Kept": kept}
    return {name: value for name, value in facts.items() if value != "–"}


def effects_table(comparison: Comparison) -> Table:
    """Return what each change of the comparison's baseline did, the best first, and what it cost."""
    interval, shown = f"{100 * comparison.level:g} % interval", comparison.shown
    head = ("Change", "Score", "Effect", interval, "p (Holm)", "Distinguishable", "Minutes")
    base, *others = comparison.variants
    rows = [(f"{base.name} (baseline)", shown.value(base.interval.estimate), *["–"] * 4, _mean_minutes(base))]
    for variant, pair in sorted(zip(others, comparison.pairs, strict=True), key=lambda row: -row[0].interval.estimate):
        is_clear = "yes" if pair.is_distinguishable else "no"
        score = shown.value(variant.interval.estimate)
        rows.append((variant.name, score, *_effect(pair, shown), is_clear, _mean_minutes(variant)))
    return Table(head, tuple(rows), frozenset({1, 2, 3, 4, 6}))


def _mean_minutes(variant: Variant) -> str:
    return f"{np.mean([minutes(run) for run in variant.runs]):.1f}"


def _effect(pair: Pair, shown: Shown) -> tuple[str, str, str]:
    """Difference, interval and p-value in words."""
    value = pair.difference.interval
    p_value = f"{pair.corrected_p:.3f}" if pair.corrected_p >= 0.001 else "< 0.001"
    return shown.number(value.estimate, "+"), shown.change(value), p_value


def pairs_table(comparison: Comparison) -> Table:
    """Every two variants: difference, interval, p-value and verdict."""
    head = ("Variant", "over", "Difference", f"{100 * comparison.level:g} % interval", "p (Holm)", "Verdict")
    ordered = sorted(comparison.pairs, key=lambda pair: (not pair.is_distinguishable, pair.corrected_p))
    rows = tuple((pair.second, pair.first, *_effect(pair, comparison.shown), pair.verdict) for pair in ordered)
    return Table(head, rows, frozenset({2, 3, 4}))


def class_table(variant: Variant) -> Table:
    """Recall and precision of each class over a variant's runs, worst first; the interval counts each photo once."""
    confusion, num_runs = pooled_confusion(variant), len(variant.seeds)
    totals, predicted, right = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    recall = np.where(totals > 0, right / np.maximum(totals, 1), 2.0)  # classes without photos come last
    rows: list[tuple[str, ...]] = []
    for number in np.argsort(recall, kind="stable"):
        photos, cells = int(totals[number]) // num_runs, ("–", "–", "–")
        if photos:
            low, high = wilson_interval(round(int(right[number]) / num_runs), photos)
            precision = f"{100 * right[number] / predicted[number]:.0f} %" if predicted[number] else "–"
            cells = (f"{100 * recall[number]:.0f} %", f"{100 * low:.0f} to {100 * high:.0f} %", precision)
        rows.append((variant.runs[0].classes[number], str(photos), *cells))
    head = ("Class", "Photos", "Recall", "95 % interval", "Precision")
    return Table(head, tuple(rows), frozenset({1, 2, 3, 4}))


def pooled_confusion(variant: Variant) -> NDArray[np.int64]:
    """(K, K) counts over all runs of a variant; row: the true class, column: the predicted one."""
    num_classes = len(variant.runs[0].classes)
    matrices = [confusion_matrix(run.predicted, run.labels, num_classes=num_classes) for run in variant.runs]
    return np.sum(matrices, axis=0)


def most_confused(variant: Variant, *, with_photos: bool) -> list[dict[str, Any]]:
    """The classes that were most often taken for each other, over all runs, with photos that were, and one of that."""
    runs, classes = variant.runs, variant.runs[0].classes
    photos = [(run, photo) for run in runs for photo in run.photos]
    labels = np.concatenate([run.labels for run in runs])
    predicted = np.concatenate([run.predicted for run in runs])
    totals = np.bincount(labels, minlength=len(classes))
    found: list[dict[str, Any]] = []
    for true, other, indices in confused_pairs(labels, predicted)[:PAIRS_SHOWN]:
        pair = {"true": classes[true], "predicted": classes[other], "count": len(indices), "out_of": int(totals[true])}
        # The same photo in another run is the same picture.
        distinct = {photos[index][1]: photos[index] for index in indices[::-1]} if with_photos else {}
        shown = [_show_photo(*photo) for photo in list(distinct.values())[: -PHOTOS_SHOWN - 1 : -1]]
        found.append(pair | {"photos": shown, "example": _show_example(runs[0], other) if with_photos else None})
    return found


def _show_example(run: RunResults, index: int) -> dict[str, str] | None:
    """The photo of a class that is recognized with the highest probability."""
    found = np.flatnonzero((run.labels == index) & run.correct)
    if not len(found):
        return None
    return _show_photo(run, run.photos[int(found[run.probabilities[found, index].argmax()])])


def _show_photo(run: RunResults, photo: str) -> dict[str, str]:
    """The `path` of a photo, and it as a data URI in `source`, "" where it is gone."""
    try:
        [file] = locate_photos(str(run.data_info.get("root", "")), [photo])
    except (DataError, OSError, ValueError):
        return {"path": photo, "source": ""}
    source = thumbnail_uri(file, THUMBNAIL_PIXELS, run.decode_spec(), max_bytes=THUMBNAIL_BYTES)
    return {"path": photo, "source": source}
