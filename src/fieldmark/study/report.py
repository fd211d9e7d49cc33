"""Run folders become a report: one HTML page that needs no network, or Markdown with pictures."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import MissingExtraError, PhotoError, ResourceError, RunError
from fieldmark.models.provenance import describe_pretraining
from fieldmark.plots import confusion_figure, figure_png
from fieldmark.runs.folder import Run, RunResults, flatten, format_value
from fieldmark.study.charts import (
    Chart,
    draw_chart,
    format_estimate,
    metric_name,
    minutes,
    parameters,
    plotly_chart,
    plotly_text,
    report_charts,
)
from fieldmark.study.compare import Comparison, Metric, Pair, Variant, compare_runs

ROWS_OPEN = 12
RIGHT, WRONG = "0,114,178", "213,94,0"


def write_report(
    runs: Sequence[Run | str | Path],
    path: str | Path,
    *,
    metric: Metric = "top1",
    split: str = "val",
    title: str = "",
    with_photos: bool = True,
) -> list[Path]:
    """Compare runs and write what came out as a page.

    Args:
        runs: Runs, run folders, or folders of them such as a sweep.
        path: `.html` for one self-contained page; `.md` for Markdown with PNG files in a folder beside it.
        metric: As for `compare_runs`.
        split: As for `compare_runs`.
        title: Heading; "" makes one.
        with_photos: Show the most confused photos, where they are still at their place.

    Returns:
        The files written, the page first.

    Raises:
        RunError: The runs cannot be compared, or `path` has another ending.
        MissingExtraError: plotly is not installed (HTML alone needs it).
        ResourceError: The page cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".md"):
        raise RunError(f"a report is .html or .md; got {path.name!r}")
    folders = [run.path if isinstance(run, Run) else run for run in runs]
    comparison = compare_runs(folders, metric=metric, split=split)
    count = len(comparison.variants)
    heading = title or (f"{count} settings compared" if count > 1 else comparison.variants[0].name)
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
    """The whole page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    plotly = _plotly_js()  # first: it may not be installed, and figures take their time
    templates = resources.files("fieldmark.study") / "templates"
    page = Environment(
        loader=PackageLoader("fieldmark.study", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    best = best_variant(comparison)
    charts = report_charts(comparison)
    live = {chart.key: plotly_chart(chart) for chart in charts} | {"confusion": _plotly_confusion(best)}
    return page.render(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        metric=metric_name(comparison.metric),
        headline=headline(comparison),
        best=best,
        settings=variants_table(comparison),
        pairs=pairs_table(comparison),
        charts=charts,
        static={chart.key: _svg(draw_chart(chart, with_title=False)) for chart in charts},
        confusion=_svg(confusion_figure(pooled_confusion(best), best.runs[0].classes)),
        live=live,
        classes=class_table(best),
        rows_open=ROWS_OPEN,
        confused=confused_pairs(best, with_photos=with_photos),
        changes=recipe_table(comparison.variants),
        recipe=full_recipe(best.runs[0]),
        environment=environment_rows(best.runs[0]),
        css=(templates / "report.css").read_text(encoding="utf-8"),
        js=(templates / "report.js").read_text(encoding="utf-8"),
        plotly=plotly,
    )


def best_variant(comparison: Comparison) -> Variant:
    """The variant with the highest estimate; that it is truly the best is for the verdicts to say."""
    return max(comparison.variants, key=lambda variant: variant.interval.estimate)


def headline(comparison: Comparison) -> str:
    """The result in a sentence or two."""
    best, metric = best_variant(comparison), comparison.metric
    value = best.interval
    low, high = format_estimate(value.low, metric), format_estimate(value.high, metric)
    found = f"{metric_name(metric)} {format_estimate(value.estimate, metric)} ({low} to {high})"
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


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("plotly", "report") from None
    return str(get_plotlyjs())


def _plotly_confusion(variant: Variant) -> dict[str, Any]:
    confusion = pooled_confusion(variant)
    classes = [plotly_text(name) for name in variant.runs[0].classes]
    places = list(range(len(classes)))
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
    told = [
        [f"{count} of {row.sum()} {true} taken for {predicted}" for count, predicted in zip(row, classes, strict=True)]
        for row, true in zip(confusion, classes, strict=True)
    ]
    axis = {"tickvals": places, "ticktext": classes, "automargin": True, "tickfont": {"size": 9}, "showgrid": False}
    is_right = np.eye(len(classes), dtype=bool)
    heats = [
        {"type": "heatmap", "z": _masked(shares.round(4), mask), "text": told, "hoverongaps": False}
        | {
            "hovertemplate": "%{text}<extra></extra>",
            "zmin": 0,
            "zmax": 1,
            "showscale": False,
            "xgap": 0.5,
            "ygap": 0.5,
        }
        | {"colorscale": [[0, f"rgba({color},0.25)"], [1, f"rgba({color},1)"]]}
        for mask, color in ((is_right & (confusion > 0), RIGHT), (~is_right & (confusion > 0), WRONG))
    ]
    side = min(1100, 260 + 14 * len(classes))
    labels_fit = len(classes) <= 60
    layout = {
        "xaxis": axis | {"title": {"text": "predicted class"}, "tickangle": 90, "showticklabels": labels_fit},
        "yaxis": axis | {"title": {"text": "true class"}, "autorange": "reversed", "showticklabels": labels_fit},
        "height": side if labels_fit else 720,
        "showlegend": False,
    }
    return {"data": heats, "layout": layout}


def _masked(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> list[list[float | None]]:
    """Rows with None, which JSON knows, where NaN would stand."""
    rows = zip(values.tolist(), mask.tolist(), strict=True)
    return [[value if kept else None for value, kept in zip(row, keep, strict=True)] for row, keep in rows]


def _svg(figure: Any) -> str:
    """A figure as an inline picture; matplotlib draws all text as paths, so no name becomes markup."""
    import io
    import warnings

    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support .* natively")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _write_markdown(comparison: Comparison, path: Path, title: str) -> list[Path]:
    folder = path.with_name(path.stem + "_files")
    folder.mkdir(exist_ok=True)
    best = best_variant(comparison)
    charts = report_charts(comparison)
    pictures = [(chart, folder / f"{chart.key}.png") for chart in charts]
    for chart, target in pictures:
        target.write_bytes(figure_png(draw_chart(chart, with_title=True), dpi=160))
    confusion = folder / "confusion.png"
    confusion.write_bytes(figure_png(confusion_figure(pooled_confusion(best), best.runs[0].classes), dpi=160))
    parts = [
        f"# {markdown_text(title)}",
        markdown_text(headline(comparison)),
        *(f"> {markdown_text(note)}" for note in comparison.notes),
        "## Settings",
        markdown_table(variants_table(comparison)),
        *(["## Verdicts", markdown_table(pairs_table(comparison))] if comparison.pairs else []),
        *(_markdown_picture(chart, f"{folder.name}/{target.name}") for chart, target in pictures),
        f"## Classes of {markdown_text(best.name)}",
        markdown_table(class_table(best)),
        "## Confusion matrix",
        f"![confusion matrix]({_link(f'{folder.name}/{confusion.name}')})",
        "## Recipe",
        markdown_table(Table(("Key", "Value"), tuple(full_recipe(best.runs[0])), frozenset())),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return [path, *(target for _, target in pictures), confusion]


def _markdown_picture(chart: Chart, link: str) -> str:
    return f"## {chart.title}\n\n![{chart.title}]({_link(link)})\n\n{markdown_text(chart.note)}"


def _link(path: str) -> str:
    from urllib.parse import quote

    return quote(path)


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown."""
    rule = ["---:" if number in table.numeric else "---" for number in range(len(table.head))]
    rows = [list(map(markdown_text, table.head)), rule, *(list(map(markdown_text, row)) for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown_text(text: str) -> str:
    """A user's text as Markdown shows it literally, in one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(flat, quote=False))


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


def variants_table(comparison: Comparison) -> Table:
    """Every variant: accuracy with interval, runs, optimism, and what it cost."""
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
    ordered = sorted(comparison.variants, key=lambda variant: -variant.interval.estimate)
    rows = tuple(_variant_row(variant, comparison.metric) for variant in ordered)
    return Table(head, rows, frozenset({1, 2, 3, 5, 6, 7, 8}))


def _variant_row(variant: Variant, metric: str) -> tuple[str, ...]:
    value, first = variant.interval, variant.runs[0]
    optimism = variant.optimism
    flattery = "–" if optimism.source == "none" else f"{100 * optimism.points:.1f} points"
    if optimism.source == "history":
        flattery = "≤ " + flattery
    speeds = [row["images_per_second"] for run in variant.runs for row in run.metrics if row.get("images_per_second")]
    return (
        variant.name,
        format_estimate(value.estimate, metric),
        f"{format_estimate(value.low, metric)} to {format_estimate(value.high, metric)}",
        str(len(variant.seeds)),
        ", ".join(format_estimate(mean, metric) for mean in variant.seed_means),
        flattery,
        _mean_minutes(variant),
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
    """Every two settings: difference, interval, p-value and verdict."""
    head = ("Setting", "over", "Difference", f"{100 * comparison.level:g} % interval", "p (Holm)", "Verdict")
    ordered = sorted(comparison.pairs, key=lambda pair: (not pair.is_distinguishable, pair.corrected_p))
    rows = tuple((pair.second, pair.first, *_effect(pair, comparison.metric), pair.verdict) for pair in ordered)
    return Table(head, rows, frozenset({2, 3, 4}))


def class_table(variant: Variant) -> Table:
    """Recall and precision of each class over a variant's runs, worst first; the interval counts each photo once."""
    from fieldmark.training.metrics import wilson_interval

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
    from fieldmark.training.metrics import confusion_matrix

    num_classes = len(variant.runs[0].classes)
    matrices = [confusion_matrix(run.predicted, run.labels, num_classes=num_classes) for run in variant.runs]
    return np.sum(matrices, axis=0)


def confused_pairs(variant: Variant, *, with_photos: bool) -> list[ConfusedPair]:
    """The classes that were most often taken for each other, with photos that were, where they are still there."""
    confusion = pooled_confusion(variant)
    off = confusion - np.diag(np.diag(confusion))
    classes = variant.runs[0].classes
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS_SHOWN]
    pairs: list[ConfusedPair] = []
    for true, predicted in zip(*np.unravel_index(order, off.shape), strict=True):
        if not off[true, predicted]:
            break
        photos = tuple(_confused_photos(variant, int(true), int(predicted))) if with_photos else ()
        example = _example(variant, int(predicted)) if with_photos else None
        counts = int(off[true, predicted]), int(confusion[true].sum())
        pairs.append(ConfusedPair(classes[true], classes[predicted], *counts, photos, example))
    return pairs


def _example(variant: Variant, number: int) -> ConfusedPhoto | None:
    """The photo of a class that is recognised with the highest probability."""
    run = variant.runs[0]
    places = np.flatnonzero((run.labels == number) & run.correct)
    if not len(places):
        return None
    surest = int(places[run.probabilities[places, number].argmax()])
    source = thumbnail(Path(str(run.data.get("root", ""))) / run.photos[surest], run)
    return ConfusedPhoto(run.photos[surest], source) if source else None


def _confused_photos(variant: Variant, true: int, predicted: int) -> list[ConfusedPhoto]:
    found: dict[str, ConfusedPhoto] = {}
    for run in variant.runs:
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


def recipe_table(settings: Sequence[Variant]) -> Table:
    """Where the settings differ, one column each."""
    keys = list(settings[0].changes)
    rows = tuple((key, *(format_value(variant.changes[key]) for variant in settings)) for key in keys)
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
