"""What a chart shows, apart from who draws it: plotly for a screen, matplotlib for paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.plots import new_figure, plain_text
from fieldmark.runs.folder import RunResults
from fieldmark.study.compare import Comparison, Variant
from fieldmark.study.statistics import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, told apart by colour-blind readers too, and a few more; each line also has a dash of its own.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
DASHES = ("solid", "dash", "dot", "dashdot")
MATPLOTLIB_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    """One variant over the epochs: mean of its runs, with a band and a trend; None where there is no value."""

    name: str
    x: Sequence[float]
    y: Values
    low: Values
    high: Values
    trend: Values


@dataclass(frozen=True)
class Dot:
    """One value with its interval, and what to show when it is pointed at."""

    name: str
    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        key: Name of its file and of its place in the page.
        title: In words.
        note: What must be known to read it.
        x_label, y_label: With units.
        is_share: Whether y (or x, of a chart of intervals) is a fraction to be shown in percent.
        lines: Over x.
        dots: With intervals along y; along x where `sideways`.
        sideways: Dots are listed below each other by name, and values run along x.
        bars: (left edges, heights, width) of a histogram.
        is_log_x: Whether x is logarithmic.
        zero: Draw a line at no difference.
    """

    key: str
    title: str
    note: str
    x_label: str
    y_label: str
    is_share: bool = False
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    sideways: bool = False
    bars: tuple[Sequence[float], Sequence[float], float] | None = None
    is_log_x: bool = False
    zero: bool = False


def plotly_chart(chart: Chart) -> dict[str, Any]:
    """Data and layout for plotly.js; colours of ink and paper are set by the page, which knows light from dark."""
    data: list[dict[str, Any]] = []
    # Over bars a line has the second colour, and no points: it is a curve, not epochs.
    for number, line in enumerate(chart.lines, start=1 if chart.bars else 0):
        data += _plotly_line(line, number, marks="" if chart.bars else "+markers")
    if chart.bars:
        edges, heights, width = chart.bars
        centres = [edge + width / 2 for edge in edges]
        bars = {"type": "bar", "x": centres, "y": list(heights), "width": width, "marker": {"color": COLORS[0]}}
        data.insert(0, {**bars, "opacity": 0.6})
    for number, dot in enumerate(chart.dots):
        data.append(_plotly_dot(chart, dot, number))
    value_axis = {"tickformat": ".1~%" if chart.is_share else "", "zeroline": False}
    x_axis: dict[str, Any] = {"title": {"text": chart.x_label}, "automargin": True, "zeroline": False}
    y_axis: dict[str, Any] = {"title": {"text": chart.y_label}, "automargin": True, "zeroline": False}
    (x_axis if chart.sideways else y_axis).update(value_axis)
    if chart.is_log_x:
        x_axis |= {"type": "log", "dtick": 1}
    else:
        x_axis |= _plotly_range(chart)
    if not chart.sideways:
        # No accuracy, loss or rate is below 0, and no share above 1, also where there is one value to make a scale of.
        y_axis |= {"rangemode": "nonnegative"} | ({"autorangeoptions": {"maxallowed": 1.005}} if chart.is_share else {})
    if chart.sideways:
        y_axis |= {"autorange": "reversed", "showticklabels": True}
    layout: dict[str, Any] = {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "showlegend": len(chart.lines) > 1 or (len(chart.dots) > 1 and not chart.sideways),
        "height": max(220, 90 + 34 * len(chart.dots)) if chart.sideways else 360,
    }
    if chart.zero:
        zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"] = [{**zero, "line": {"dash": "dot", "width": 1, "color": "#888888"}}]
    return {"data": data, "layout": layout}


def _plotly_range(chart: Chart) -> dict[str, Any]:
    """How the x axis of a chart that is not logarithmic is divided."""
    epochs = [x for line in chart.lines for x in line.x] if chart.x_label == "epoch" else []
    if epochs and max(epochs) - min(epochs) <= 10:
        return {"dtick": 1, "range": [min(epochs) - 0.5, max(epochs) + 0.5]}  # whole epochs
    return {} if chart.sideways else {"rangemode": "nonnegative"}


def _plotly_line(line: Line, number: int, *, marks: str) -> list[dict[str, Any]]:
    color, dash = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
    name = plotly_text(line.name)
    x = list(line.x)
    traces: list[dict[str, Any]] = []
    if any(low != high for low, high in zip(line.low, line.high, strict=True)):
        hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": name}
        traces.append({**hidden, "x": x, "y": list(line.low)})
        traces.append({**hidden, "x": x, "y": list(line.high), "fill": "tonexty", "fillcolor": color + "33"})
    has_trend = any(value is not None for value in line.trend)
    seen = {"mode": "lines" + marks, "x": x, "y": list(line.y), "name": name, "legendgroup": name}
    seen |= {
        "line": {"color": color, "width": 1 if has_trend else 2, "dash": dash},
        "marker": {"size": 4 if len(x) > 1 else 9},
    }
    traces.append({**seen, "opacity": 0.6 if has_trend else 1.0, "showlegend": not has_trend})
    if has_trend:
        bold = {"color": color, "width": 2.5, "dash": dash}
        traces.append(
            {
                "mode": "lines",
                "x": x,
                "y": list(line.trend),
                "name": name,
                "legendgroup": name,
                "line": bold,
                "hoverinfo": "skip",
            }
        )
    return traces


def _plotly_dot(chart: Chart, dot: Dot, number: int) -> dict[str, Any]:
    color = COLORS[number % len(COLORS)]
    value, along = (dot.x, "x") if chart.sideways else (dot.y, "y")
    error = {"type": "data", "symmetric": False, "array": [dot.high - value], "arrayminus": [value - dot.low]}
    name = plotly_text(dot.name)
    return {
        "mode": "markers",
        "x": [dot.x],
        "y": [name] if chart.sideways else [dot.y],
        f"error_{along}": {**error, "color": color, "thickness": 1.5},
        "marker": {"size": 10, "color": color},
        "name": name,
        "text": [plotly_text(dot.text)],
        "hovertemplate": "%{text}<extra></extra>",
    }


def plotly_text(text: str) -> str:
    """A user's text as plotly shows it literally: it reads some HTML tags otherwise."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def draw_chart(chart: Chart, *, with_title: bool) -> Figure:
    """The same as a matplotlib figure, for print, Markdown and papers; a page has its own headings."""
    height = max(2.2, 0.9 + 0.34 * len(chart.dots)) if chart.sideways else 3.6
    figure = new_figure(6.4, height)
    axes = figure.subplots()
    for number, line in enumerate(chart.lines, start=1 if chart.bars else 0):
        _draw_line(axes, line, number, marker="" if chart.bars else "o")
    if chart.bars:
        edges, heights, width = chart.bars
        axes.bar(list(edges), list(heights), width=width, align="edge", color=COLORS[0], alpha=0.6)
    for number, dot in enumerate(chart.dots):
        _draw_dot(axes, chart, dot, number)
    if chart.sideways:
        axes.set_yticks(range(len(chart.dots)), [plain_text(dot.name) for dot in chart.dots])
        axes.invert_yaxis()
    if chart.zero:
        axes.axvline(0, color="#888888", linestyle=":", linewidth=1)
    _scale(axes, chart)
    axes.set(title=chart.title if with_title else "", xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not chart.sideways and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _scale(axes: Axes, chart: Chart) -> None:
    """What the axes are divided into."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if chart.is_log_x:
        axes.set_xscale("log")
    if chart.is_share:
        axis = axes.xaxis if chart.sideways else axes.yaxis
        axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_major_locator(MaxNLocator(7))  # more labels would run into each other
    if chart.x_label == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        low, high = axes.get_xlim()
        if high - low < 1:  # one epoch
            axes.set_xlim(low - 0.5, high + 0.5)
    if chart.is_share and not chart.sideways:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))


def _draw_line(axes: Axes, line: Line, number: int, *, marker: str) -> None:
    color = COLORS[number % len(COLORS)]
    style = MATPLOTLIB_DASHES[DASHES[number // len(COLORS) % len(DASHES)]]
    nan = float("nan")

    def drawn(values: Values) -> list[float]:
        return [nan if value is None else value for value in values]

    has_trend = any(value is not None for value in line.trend)
    label = plain_text(line.name)
    axes.fill_between(list(line.x), drawn(line.low), drawn(line.high), color=color, alpha=0.15, linewidth=0)
    thin: dict[str, Any] = (
        {"linewidth": 0.8, "alpha": 0.6} if has_trend else {"linewidth": 1.8, "marker": marker, "markersize": 3}
    )
    axes.plot(list(line.x), drawn(line.y), style, color=color, label=None if has_trend else label, **thin)
    if has_trend:
        axes.plot(list(line.x), drawn(line.trend), style, color=color, label=label, linewidth=2)


def _draw_dot(axes: Axes, chart: Chart, dot: Dot, number: int) -> None:
    color = COLORS[number % len(COLORS)]
    value = dot.x if chart.sideways else dot.y
    error = [[value - dot.low], [dot.high - value]]
    bars: dict[str, Any] = {"fmt": "o", "color": color, "capsize": 3}
    if chart.sideways:
        axes.errorbar([dot.x], [number], xerr=error, **bars)
    else:
        axes.errorbar([dot.x], [dot.y], yerr=error, label=plain_text(dot.name), **bars)


MOST_LINES = 10
TREND_EPOCHS = 5
LAMBDA_DRAWS = 4000

Read = Callable[[Mapping[str, Any]], float | None]


def report_charts(comparison: Comparison) -> list[Chart]:
    """All charts for which the runs have figures, in the order of the page."""
    shown = most_accurate(comparison.variants, MOST_LINES)
    left_out = len(comparison.variants) - len(shown)
    note = f" The {len(shown)} most accurate of {len(comparison.variants)} settings." if left_out else ""
    charts = [accuracy_chart(comparison)]
    if comparison.pairs:
        charts.append(difference_chart(comparison))
    for key, title, y_label, is_share, hint, read in _CURVES:
        lines = tuple(line for variant in shown if (line := variant_line(variant, read)))
        if lines:
            charts.append(Chart(key, title, hint + note, "epoch", y_label, is_share=is_share, lines=lines))
    charts += cost_charts(comparison)
    charts += lambda_charts(comparison.variants)
    return charts


def most_accurate(settings: Sequence[Variant], count: int) -> list[Variant]:
    """The `count` settings with the highest estimate, in their own order."""
    best = sorted(settings, key=lambda variant: -variant.interval.estimate)[:count]
    return [variant for variant in settings if variant in best]


def variant_line(variant: Variant, read: Read) -> Line | None:
    """Mean over a variant's runs per epoch, a band from the lowest to the highest run, and a running mean."""
    runs = [{int(row["epoch"]): read(row) for row in run.metrics} for run in variant.runs]
    epochs = sorted({epoch for run in runs for epoch in run})
    values = [[value for run in runs if (value := run.get(epoch)) is not None] for epoch in epochs]
    if not any(values):
        return None
    means = [sum(found) / len(found) if found else None for found in values]
    present = [mean for mean in means if mean is not None]
    trend: list[float | None] = [None] * len(means)
    if len(present) == len(means) and len(means) > TREND_EPOCHS:
        trend = [float(value) for value in smooth(np.array(present), width=TREND_EPOCHS)]
    low, high = [min(found, default=None) for found in values], [max(found, default=None) for found in values]
    return Line(variant.name, epochs, means, low, high, trend)


def _validation(row: Mapping[str, Any]) -> float | None:
    return row["val"].get("top1") if row.get("val") else None


_BAND = "Band: lowest to highest run of a variant. Bold: running mean over five epochs."
_CURVES: tuple[tuple[str, str, str, bool, str, Read], ...] = (
    ("val-top1", "Validation accuracy", "top-1 accuracy", True, _BAND, _validation),
    (
        "train-loss",
        "Training loss",
        "cross-entropy in nats",
        False,
        "Against the targets that were trained on: mixed and smoothed targets have a floor above 0, so that losses of "
        "different mixing say nothing about which model is better. " + _BAND,
        lambda row: row.get("train_loss"),
    ),
    (
        "train-top1-clean",
        "Training accuracy on clean batches",
        "top-1 accuracy",
        True,
        "On the batches that were not mixed, with augmentation, while training. " + _BAND,
        lambda row: row.get("train_top1_clean"),
    ),
    (
        "train-top1-mixed",
        "Training accuracy on mixed batches",
        "λ-weighted top-1 accuracy",
        True,
        "Its ceiling is the mean of max(λ, 1 − λ), well below 100 %: not to be compared with the clean one. " + _BAND,
        lambda row: row.get("train_top1_mixed"),
    ),
    ("lr", "Learning rate", "learning rate of the head", False, "After the last update of each epoch.",
     lambda row: row.get("lr")),
)  # fmt: skip


def accuracy_chart(comparison: Comparison) -> Chart:
    """Every variant with its interval: the comparison in one picture."""
    dots = tuple(
        Dot(variant.name, value.estimate, 0.0, value.low, value.high, _words(variant, comparison.metric))
        for variant in most_accurate(comparison.variants, 4 * MOST_LINES)
        for value in [variant.interval]
    )
    what = metric_name(comparison.metric)
    note = f"{100 * comparison.level:g} % intervals, one variant at a time. Overlap says little: see the differences."
    is_share = comparison.metric != "log_loss"
    return Chart("accuracy", f"{what} of every variant", note, what, "", is_share=is_share, dots=dots, sideways=True)


def difference_chart(comparison: Comparison) -> Chart:
    """Paired differences with their intervals; the largest where there are many."""
    pairs = sorted(comparison.pairs, key=lambda pair: -abs(pair.difference.interval.estimate))[: 2 * MOST_LINES]
    dots = tuple(
        Dot(f"{pair.second} − {pair.first}", value.estimate, 0.0, value.low, value.high, pair.verdict)
        for pair in pairs
        for value in [pair.difference.interval]
    )
    few = f" The {len(pairs)} largest of {len(comparison.pairs)}." if len(pairs) < len(comparison.pairs) else ""
    note = "Paired over the same photos; right of 0 the first named is better. Intervals are not corrected for the "
    note += f"number of comparisons; the verdicts are.{few}"
    what = f"difference in {metric_name(comparison.metric).lower()}"
    is_share = comparison.metric != "log_loss"
    return Chart("differences", "Differences between settings", note, what, "", is_share=is_share, dots=dots,
                 sideways=True, zero=True)  # fmt: skip


def cost_charts(comparison: Comparison) -> list[Chart]:
    """Accuracy over training time, and over parameters where they differ."""
    costs: list[tuple[str, str, Callable[[RunResults], float]]] = [("cost-time", "training time in minutes", minutes)]
    if len({parameters(variant.runs[0]) for variant in comparison.variants}) > 1:
        costs.append(("cost-parameters", "parameters in millions", lambda run: parameters(run) / 1e6))
    charts: list[Chart] = []
    for key, label, read in costs:
        dots = tuple(
            Dot(variant.name, cost, value.estimate, value.low, value.high, _words(variant, comparison.metric))
            for variant in most_accurate(comparison.variants, MOST_LINES)
            for value, cost in [(variant.interval, float(np.mean([read(run) for run in variant.runs])))]
            if cost > 0
        )
        if dots:
            spread = max(dot.x for dot in dots) / min(dot.x for dot in dots)
            what = metric_name(comparison.metric)
            title = f"{what} against {label.split(' in ')[0]}"
            note = "Mean over a variant's runs; times compare only runs of one machine."
            charts.append(Chart(key, title, note if key == "cost-time" else "", label, what,
                                is_share=comparison.metric != "log_loss", dots=dots, is_log_x=spread > 20))  # fmt: skip
    return charts


def lambda_charts(settings: Sequence[Variant]) -> list[Chart]:
    """Histograms of λ of both methods, drawn as training draws them, for the first variant that mixes."""
    config = next((variant.runs[0].config for variant in settings if variant.runs[0].config.mix.share > 0), None)
    if config is None:
        return []
    from fieldmark.augment.mixing import MixSpec, lambda_draws

    spec = MixSpec(**config.mix.model_dump(exclude={"off_epochs"}))
    charts: list[Chart] = []
    for method in spec.methods:
        values = lambda_draws(spec, method, count=LAMBDA_DRAWS, seed=0, image_size=config.augment.size or 224)
        heights, edges = np.histogram(values, bins=40, range=(0, 1), density=True)
        low, high = getattr(spec, f"{method}_alpha")
        name = {"mixup": "MixUp", "cutmix": "CutMix"}[method]
        note = f"{LAMBDA_DRAWS:,} draws with α from {low:g} to {high:g}"
        note += "; of CutMix, the share of pixels kept after clipping." if method == "cutmix" else "."
        bars = (edges[:-1].tolist(), heights.tolist(), float(edges[1] - edges[0]))
        lines = (_density(values.tolist()),)
        charts.append(Chart(f"lambda-{method}", f"λ of {name}", note, "λ, share of the photo itself", "density",
                            bars=bars, lines=lines))  # fmt: skip
    return charts


def _density(values: Sequence[float]) -> Line:
    """Kernel density of λ, reflected at 0 and 1 so that no mass leaves the interval."""
    from scipy.stats import gaussian_kde

    seen = np.asarray(values)
    grid = np.linspace(0, 1, 101)
    density = gaussian_kde(np.concatenate([-seen, seen, 2 - seen]), bw_method=0.03)(grid) * 3
    none: list[float | None] = [None] * len(grid)
    return Line("density", grid.tolist(), [float(value) for value in density], none, none, none)


def minutes(run: RunResults) -> float:
    """Wall time of a run, in minutes."""
    return float(run.summary.get("seconds", 0.0)) / 60


def parameters(run: RunResults) -> int:
    """Parameters of a run's model."""
    return int(run.model.get("parameters", 0))


def metric_name(metric: str) -> str:
    """A metric in words."""
    return {
        "top1": "Top-1 accuracy",
        "macro_recall": "Macro recall",
        "prior_top1": "Accuracy under the training prior",
        "log_loss": "Negated log loss",
    }[metric]


def format_estimate(value: float, metric: str) -> str:
    """A value of a metric as people read it."""
    return f"{value:.3f}" if metric == "log_loss" else f"{100 * value:.1f} %"


def _words(variant: Variant, metric: str) -> str:
    value = variant.interval
    low, high = format_estimate(value.low, metric), format_estimate(value.high, metric)
    runs = f"{len(variant.seeds)} {'run' if len(variant.seeds) == 1 else 'runs'}"
    return f"{variant.name}: {format_estimate(value.estimate, metric)} ({low} to {high}), {runs}"
