"""The charts of a report: each a figure with a title, a note on how to read it, and tooltips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.plots import COLORS, INK, LONGEST_NAME, Tip, draw_lambda, draw_line, dress, new_figure, plain_text
from fieldmark.runs.folder import RunResults
from fieldmark.study.compare import Comparison, Variant
from fieldmark.study.statistics import Interval, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2  # inches: letters stay legible when a phone shows the chart at 4.3
MOST_LINES = 10
TREND_EPOCHS = 5
MIN_TREND = 15
"""Epochs from which on a running mean helps the eye."""
LAMBDA_DRAWS = 4000

Read = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True, eq=False)
class Chart:
    """One picture of a report.

    Attributes:
        key: Name of its file and of its place in the page.
        title: In words.
        note: What must be known to read it.
        figure: Without a title: pages have headings of their own.
        tips: Shown where the pointer is.
    """

    key: str
    title: str
    note: str
    figure: Figure
    tips: tuple[Tip, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line over E epochs: mean of a variant's runs, lowest and highest run, running mean if epochs are enough."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    trend: Sequence[float] | None


@dataclass(frozen=True)
class Row:
    """One interval of a chart of intervals; `dots` are the single values behind it."""

    name: str
    interval: Interval
    text: str
    dots: Sequence[float] = ()


def report_charts(comparison: Comparison) -> list[Chart]:
    """All charts for which the runs have numbers, in the order of the page; of one variant, those that are about it."""
    variants = comparison.variants
    if len(variants) == 1:
        return [*_curve_charts(_run_curves(variants[0])), *lambda_charts(variants)]
    charts = [accuracy_chart(comparison)]
    if comparison.pairs:
        charts.append(difference_chart(comparison))
    shown = most_accurate(variants, MOST_LINES)
    note = f"The {len(shown)} most accurate of {len(variants)} variants." if len(shown) < len(variants) else ""
    charts += _curve_charts(
        (key, title, f"{hint} {note}".strip(), label, is_share, [(one.name, one, read) for one in shown])
        for key, title, hint, label, is_share, read in _CURVES
    )
    return [*charts, *cost_charts(comparison), *lambda_charts(variants)]


def most_accurate(variants: Sequence[Variant], count: int) -> list[Variant]:
    """The `count` variants with the highest estimate, in their own order."""
    best = sorted(variants, key=lambda variant: -variant.interval.estimate)[:count]
    return [variant for variant in variants if variant in best]


def accuracy_chart(comparison: Comparison) -> Chart:
    """Every variant with its interval: the comparison in one picture."""
    rows = [
        Row(variant.name, variant.interval, _describe(variant, comparison.metric), variant.seed_means)
        for variant in most_accurate(comparison.variants, 4 * MOST_LINES)
    ]
    what = metric_name(comparison.metric)
    note = f"{100 * comparison.level:g} % intervals, one variant at a time; small dots are single seeds. "
    note += "Overlapping intervals do not mean equal variants: see the differences."
    figure, tips = _draw_intervals(rows, what, is_share=comparison.metric != "log_loss")
    return Chart("accuracy", f"{what} of every variant", note, figure, tips)


def difference_chart(comparison: Comparison) -> Chart:
    """Paired differences with their intervals; the largest where there are many."""
    pairs = sorted(comparison.pairs, key=lambda pair: -abs(pair.difference.interval.estimate))[: 2 * MOST_LINES]
    rows = [Row(f"{pair.second} − {pair.first}", pair.difference.interval, pair.verdict) for pair in pairs]
    few = f" The {len(pairs)} largest of {len(comparison.pairs)}." if len(pairs) < len(comparison.pairs) else ""
    note = "Paired over the same photos; right of 0 the variant named first is better. Intervals are not corrected for "
    note += f"the number of comparisons; the verdicts are.{few}"
    is_share = comparison.metric != "log_loss"
    label = f"difference in {metric_name(comparison.metric).lower()}, in {'points' if is_share else 'nats'}"
    figure, tips = _draw_intervals(rows, label, is_share=is_share, symbol="")
    figure.axes[0].axvline(0, color="#888888", linestyle=":", linewidth=1)
    return Chart("differences", "Differences between variants", note, figure, tips)


def _draw_intervals(
    rows: Sequence[Row], label: str, *, is_share: bool, symbol: str = "%"
) -> tuple[Figure, tuple[Tip, ...]]:
    """Intervals below each other, each under its name: names may be long, and a phone is narrow."""
    figure = new_figure(WIDTH, 0.6 + 0.42 * len(rows))
    axes = figure.subplots()
    for index, row in enumerate(rows):
        color, value = COLORS[index % len(COLORS)], row.interval
        axes.plot([value.low, value.high], [index, index], color=color, linewidth=2, solid_capstyle="round")
        axes.plot(row.dots, [index] * len(row.dots), "o", color=color, markersize=3, alpha=0.6)
        axes.plot([value.estimate], [index], "o", color=color, markersize=7)
        name = plain_text(row.name, longest=2 * LONGEST_NAME)
        axes.text(0, index - 0.28, name, transform=axes.get_yaxis_transform(), fontsize=9, color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_yticks([])
    dress(axes, "", label)
    axes.spines["left"].set_visible(False)
    _set_percent(axes, "x", symbol) if is_share else None
    span = axes.get_xlim()
    return figure, tuple(Tip(axes, span, (n - 0.5, n + 0.5), row.text) for n, row in enumerate(rows))


def _set_percent(axes: Axes, which: str, symbol: str = "%") -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(7))  # more labels would run into each other
    axis.set_major_formatter(PercentFormatter(1.0, symbol=symbol))


Curves = tuple[str, str, str, str, bool, list[tuple[str, Variant, Read]]]
"""Key, title, note, label of y, whether y is a share, and the lines: name, variant, what to read of an epoch."""


def _curve_charts(curves: Iterable[Curves]) -> list[Chart]:
    charts: list[Chart] = []
    for key, title, note, label, is_share, wanted in curves:
        lines = [line for name, variant, read in wanted if (line := variant_line(variant, read, name))]
        if lines:
            charts.append(curve_chart(key, title, note, label, lines, is_share=is_share))
    return charts


def curve_chart(key: str, title: str, note: str, label: str, lines: Sequence[Line], *, is_share: bool) -> Chart:
    """Lines over the epochs, with one tooltip for each epoch."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(WIDTH, 3.1 + (0.19 * len(lines) if len(lines) > 1 else 0))
    axes = figure.subplots()
    for index, line in enumerate(lines):
        draw_line(axes, line.x, line.y, index=index, label=line.name, band=(line.low, line.high), trend=line.trend)
    dress(axes, "", "epoch", label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:  # one epoch
        axes.set_xlim(low - 0.5, high + 0.5)
    if is_share:
        _set_percent(axes, "y")
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    if len(lines) > 1:
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    shown = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    epochs = sorted({x for found in shown for x in found})
    tips = [
        Tip(axes, (epoch - 0.5, epoch + 0.5), axes.get_ylim(), f"epoch {epoch:g}\n" + "\n".join(
            f"{line.name}: {100 * found[epoch]:.1f} %" if is_share else f"{line.name}: {found[epoch]:.4g}"
            for line, found in zip(lines, shown, strict=True) if epoch in found
        ))
        for epoch in epochs[:: 1 + len(epochs) // 60]
    ]  # fmt: skip
    return Chart(key, title, note, figure, tuple(tips))


def variant_line(variant: Variant, read: Read, name: str = "") -> Line | None:
    """Mean over a variant's runs per epoch, the lowest and highest run, and a running mean; None without numbers."""
    runs = [{int(row["epoch"]): read(row) for row in run.metrics} for run in variant.runs]
    values = {
        epoch: found
        for epoch in sorted({epoch for run in runs for epoch in run})
        if (found := [value for run in runs if (value := run.get(epoch)) is not None])
    }
    if not values:
        return None
    means = [sum(found) / len(found) for found in values.values()]
    trend = smooth(np.array(means), width=TREND_EPOCHS).tolist() if len(means) >= MIN_TREND else None
    low, high = [min(found) for found in values.values()], [max(found) for found in values.values()]
    return Line(name or variant.name, list(values), means, low, high, trend)


# The probe trains the head on features, at a rate of its own: its numbers are no part of a curve.
def _read_tuned(key: str) -> Read:
    return lambda row: None if row.get("is_probe") else row.get(key)


def _read_tuned_val(key: str) -> Read:
    return lambda row: None if row.get("is_probe") else (row.get("val") or {}).get(key)


def _read_probe_val(key: str) -> Read:
    return lambda row: (row.get("val") or {}).get(key) if row.get("is_probe") else None


_BAND = "Band: lowest to highest run of a variant. Bold, in long runs: running mean over five epochs."
_MIXED = "Accuracy on mixed batches is λ-weighted; its ceiling is the mean of max(λ, 1 − λ), well below 100 %."
_CURVES: tuple[tuple[str, str, str, str, bool, Read], ...] = (
    ("val-top1", "Validation accuracy", _BAND, "top-1 accuracy", True, _read_tuned_val("top1")),
    (
        "train-loss",
        "Training loss",
        "Against the targets that were trained on: mixed and smoothed targets have a floor above 0, so that losses of "
        "different mixing say nothing about which model is better. " + _BAND,
        "cross-entropy in nats",
        False,
        _read_tuned("train_loss"),
    ),
    (
        "train-top1-clean",
        "Training accuracy on clean batches",
        "On the batches that were not mixed, with augmentation, while training. " + _BAND,
        "top-1 accuracy",
        True,
        _read_tuned("train_top1_clean"),
    ),
    (
        "train-top1-mixed",
        "Training accuracy on mixed batches",
        f"{_MIXED} {_BAND}",
        "λ-weighted top-1 accuracy",
        True,
        _read_tuned("train_top1_mixed"),
    ),
    (
        "lr",
        "Learning rate",
        "After the last update of each epoch.",
        "learning rate of the head",
        False,
        _read_tuned("lr"),
    ),
)


def _run_curves(variant: Variant) -> list[Curves]:
    """The curves of one variant: training and validation in one picture."""
    mixes = any(row.get("train_top1_mixed") is not None for run in variant.runs for row in run.metrics)
    accuracy: list[tuple[str, Variant, Read]] = [
        ("validation", variant, _read_tuned_val("top1")),
        ("training, clean batches" if mixes else "training", variant, _read_tuned("train_top1_clean")),
        ("training, mixed batches", variant, _read_tuned("train_top1_mixed")),
        ("probe (head alone), validation", variant, _read_probe_val("top1")),
    ]
    losses: list[tuple[str, Variant, Read]] = [
        ("validation", variant, _read_tuned_val("log_loss")),
        ("training", variant, _read_tuned("train_loss")),
        ("probe (head alone), validation", variant, _read_probe_val("log_loss")),
    ]
    floor = "Training loss has a floor above 0 where targets are mixed or smoothed."
    hint = f"Training accuracy is measured with augmentation.{' ' + _MIXED if mixes else ''}"
    rate = [("head", variant, _read_tuned("lr"))]
    return [
        ("accuracy", "Accuracy", hint, "top-1 accuracy", True, accuracy),
        ("loss", "Loss", floor, "cross-entropy in nats", False, losses),
        ("lr", "Learning rate", "After the last update of each epoch.", "learning rate of the head", False, rate),
    ]


def cost_charts(comparison: Comparison) -> list[Chart]:
    """Accuracy over training time, and over parameters where they differ."""
    costs: list[tuple[str, str, str, Callable[[RunResults], float]]] = [
        ("cost-time", "training time in minutes",
         "Mean over a variant's runs; compare times of runs on one machine only.", minutes)
    ]  # fmt: skip
    if len({parameters(variant.runs[0]) for variant in comparison.variants}) > 1:
        costs.append(("cost-parameters", "parameters in millions", "", lambda run: parameters(run) / 1e6))
    charts: list[Chart] = []
    for key, label, note, read in costs:
        spent = [
            (variant, cost)
            for variant in most_accurate(comparison.variants, MOST_LINES)
            if (cost := float(np.mean([read(run) for run in variant.runs]))) > 0
        ]
        if spent:
            title = f"{metric_name(comparison.metric)} against {label.split(' in ')[0]}"
            charts.append(Chart(key, title, note, *_draw_costs(spent, label, comparison.metric)))
    return charts


def _draw_costs(spent: Sequence[tuple[Variant, float]], label: str, metric: str) -> tuple[Figure, tuple[Tip, ...]]:
    figure = new_figure(WIDTH, 3.0 + 0.19 * len(spent))
    axes = figure.subplots()
    for index, (variant, cost) in enumerate(spent):
        value, color = variant.interval, COLORS[index % len(COLORS)]
        axes.plot([cost, cost], [value.low, value.high], color=color, linewidth=2)
        axes.plot([cost], [value.estimate], "o", color=color, markersize=7, label=plain_text(variant.name))
    is_log = max(cost for _, cost in spent) > 20 * min(cost for _, cost in spent)
    if is_log:
        axes.set_xscale("log")
    elif len(spent) > 1:
        axes.set_xlim(left=0)
    dress(axes, "", label, metric_name(metric))
    if metric != "log_loss":
        _set_percent(axes, "y")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    low, high = axes.get_xlim()
    near = (high / low) ** 0.02 if is_log else 0.02 * (high - low)
    tips: list[Tip] = []
    for variant, cost in spent:
        span = (cost / near, cost * near) if is_log else (cost - near, cost + near)
        text = f"{_describe(variant, metric)}, {cost:.3g} {label.split(' in ')[1]}"
        tips.append(Tip(axes, span, (variant.interval.low, variant.interval.high), text))
    return figure, tuple(tips)


def lambda_charts(variants: Sequence[Variant]) -> list[Chart]:
    """λ of each mixing method, drawn as training draws it, for the first variant that mixes."""
    from fieldmark.augment.mixing import lambda_draws
    from fieldmark.runs.build import build_mix_spec

    spec = next((spec for one in variants if (spec := build_mix_spec(one.runs[0].config)).share > 0), None)
    if spec is None:
        return []
    charts: list[Chart] = []
    for method in spec.methods:
        size = variants[0].runs[0].config.augment.size or 224
        values = lambda_draws(spec, method, count=LAMBDA_DRAWS, seed=0, image_size=size)
        low, high = getattr(spec, f"{method}_alpha")
        note = f"Share λ of itself that a photo keeps: {LAMBDA_DRAWS:,} draws with α from {low:g} to {high:g}"
        note += "; of CutMix, the share of pixels kept after clipping." if method == "cutmix" else "."
        figure = new_figure(WIDTH, 2.8)
        draw_lambda(figure.subplots(), values, (low, high), "")
        name = {"mixup": "MixUp", "cutmix": "CutMix"}[method]
        charts.append(Chart(f"lambda-{method}", f"λ of {name}", note, figure))
    return charts


def minutes(run: RunResults) -> float:
    """Wall time of a run, in minutes."""
    return float(run.summary.get("seconds", 0.0)) / 60


def parameters(run: RunResults) -> int:
    """Parameters of a run's model."""
    return int(run.model_info.get("parameters", 0))


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


def format_interval(interval: Interval, metric: str) -> str:
    """An estimate with its interval, such as `91.2 % (88.1 to 93.6)`."""
    scale, digits, unit = (1, 3, "") if metric == "log_loss" else (100, 1, " %")
    low, high = f"{scale * interval.low:.{digits}f}", f"{scale * interval.high:.{digits}f}"
    return f"{scale * interval.estimate:.{digits}f}{unit} ({low} to {high})"


def _describe(variant: Variant, metric: str) -> str:
    runs = f"{len(variant.seeds)} {'run' if len(variant.seeds) == 1 else 'runs'}"
    return f"{variant.name}: {format_interval(variant.interval, metric)}, {runs}"
