"""Run folders become a report: one HTML page that needs no network, or Markdown with pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import MissingExtraError, ResourceError, RunError
from fieldmark.experiment.compare import Comparison, Metric, Setting, compare_runs
from fieldmark.experiment.folder import Run
from fieldmark.outputs.charts import Chart, draw_chart, plotly_chart, plotly_text
from fieldmark.outputs.figures import confusion_figure, figure_png
from fieldmark.outputs.report_figures import format_estimate, metric_name, report_charts
from fieldmark.outputs.report_tables import (
    Table,
    class_table,
    confused_pairs,
    environment_rows,
    full_recipe,
    pairs_table,
    pooled_confusion,
    recipe_table,
    settings_table,
)

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
    count = len(comparison.settings)
    heading = title or (f"{count} settings compared" if count > 1 else comparison.settings[0].name)
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
    templates = resources.files("fieldmark.outputs") / "templates"
    page = Environment(
        loader=PackageLoader("fieldmark.outputs", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    best = best_setting(comparison)
    charts = report_charts(comparison)
    live = {chart.key: plotly_chart(chart) for chart in charts} | {"confusion": _plotly_confusion(best)}
    return page.render(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=comparison,
        metric=metric_name(comparison.metric),
        headline=headline(comparison),
        best=best,
        settings=settings_table(comparison),
        pairs=pairs_table(comparison),
        charts=charts,
        static={chart.key: _svg(draw_chart(chart, with_title=False)) for chart in charts},
        confusion=_svg(confusion_figure(pooled_confusion(best), best.runs[0].classes)),
        live=live,
        classes=class_table(best),
        rows_open=ROWS_OPEN,
        confused=confused_pairs(best, with_photos=with_photos),
        changes=recipe_table(comparison.settings),
        recipe=full_recipe(best.runs[0]),
        environment=environment_rows(best.runs[0]),
        css=(templates / "report.css").read_text(encoding="utf-8"),
        js=(templates / "report.js").read_text(encoding="utf-8"),
        plotly=plotly,
    )


def best_setting(comparison: Comparison) -> Setting:
    """The setting with the highest estimate; that it is truly the best is for the verdicts to say."""
    return max(comparison.settings, key=lambda setting: setting.interval.estimate)


def headline(comparison: Comparison) -> str:
    """The result in a sentence or two."""
    best, metric = best_setting(comparison), comparison.metric
    value = best.interval
    low, high = format_estimate(value.low, metric), format_estimate(value.high, metric)
    found = f"{metric_name(metric)} {format_estimate(value.estimate, metric)} ({low} to {high})"
    photos = f"{comparison.num_photos:,} photos"
    if len(comparison.settings) == 1:
        return f"{found} on {photos}."
    rivals = [pair for pair in comparison.pairs if best.name in (pair.first, pair.second)]
    beaten = sum(pair.is_distinguishable for pair in rivals)
    said = {0: "None of the others is distinguishable from it", len(rivals): "It is better than every other setting"}
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


def _plotly_confusion(setting: Setting) -> dict[str, Any]:
    confusion = pooled_confusion(setting)
    classes = [plotly_text(name) for name in setting.runs[0].classes]
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
    best = best_setting(comparison)
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
        markdown_table(settings_table(comparison)),
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
