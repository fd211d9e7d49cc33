"""The charts of a report: each a figure with a title, a note on how to read it, and tooltips.

A row is the object of one epoch in a run's metrics.jsonl; a history is all rows of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.plots import COLORS, INK, LONGEST_NAME, Tip, draw_lambda, dress, new_figure, plain_text
from fieldmark.runs.folder import RunResults, flatten
from fieldmark.study.compare import Comparison, Variant
from fieldmark.study.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.2  # inches: letters stay legible when a phone shows the chart at 4.3
MOST_LINES = 10
DASHES = ("-", "--", ":", "-.")  # of lines that have one color
LAMBDA_DRAWS = 4000

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Chart:
    """One picture of a report; the figure has no title, since pages have headings of their own."""

    key: str  # name of its file and of its section in the page
    title: str
    note: str  # what must be known to read it
    figure: Figure
    tips: tuple[Tip, ...] = ()


@dataclass(frozen=True)
class Curves:
    """Holds what one chart shows over the epochs: the key of each line in a row, flattened, by the line's name.

    The probe trains the head on features, at a rate of its own: its numbers are no part of a curve, and their keys
    begin with `probe.`.
    """

    key: str
    title: str
    note: str
    label: str
    is_share: bool
    lines: Mapping[str, str]


def list_curves(histories: Sequence[History]) -> list[Curves]:
    """The charts over epochs of these runs: training and validation in one picture."""
    mixes = any(row.get("train_top1_mixed") is not None for rows in histories for row in rows)
    accuracies = {
        "validation": "val.top1",
        "training, clean batches" if mixes else "training": "train_top1_clean",
        "training, mixed batches": "train_top1_mixed",
        "probe (head alone), validation": "probe.val.top1",
    }
    losses = {"validation": "val.log_loss", "training": "train_loss",
              "probe (head alone), validation": "probe.val.log_loss"}  # fmt: skip
    hint = "Training accuracy is measured with augmentation."
    if mixes:
        hint += " On mixed batches it is λ-weighted; its ceiling is the mean of max(λ, 1 − λ), well below 100 %."
    floor = "Training loss has a floor above 0 where targets are mixed or smoothed, so that losses of different mixing "
    floor += "say nothing about which model is better."
    rate = "After the last update of each epoch."
    return [
        Curves("accuracy", "Accuracy", hint, "top-1 accuracy", True, accuracies),
        Curves("loss", "Loss", floor, "cross-entropy in nats", False, losses),
        Curves("lr", "Learning rate", rate, "learning rate of the head", False, {"head": "lr"}),
    ]


def report_charts(comparison: Comparison) -> list[Chart]:
    """All charts for which the runs have numbers, in the order of the page; of one variant, those that are about it."""
    variants = comparison.variants
    shown = _most_accurate(variants, MOST_LINES)
    histories = {one.name: [run.metrics for run in one.runs] for one in shown}
    every = list_curves([rows for several in histories.values() for rows in several])
    if len(variants) == 1:
        [(_, own)] = histories.items()
        charts = [curve_chart(one, {name: read_epochs(key, own) for name, key in one.lines.items()}) for one in every]
    else:
        few = f" The {len(shown)} most accurate of {len(variants)} variants." if len(shown) < len(variants) else ""
        charts: list[Chart | None] = [accuracy_chart(comparison), difference_chart(comparison)]
        for whole, name, key in ((one, *line) for one in every for line in one.lines.items()):
            if not key.startswith("probe."):
                title, note = f"{whole.title}, {name}", f"{whole.note} Band: lowest to highest run of a variant.{few}"
                curves = replace(whole, key=key.replace(".", "-"), title=title, note=note)
                charts.append(curve_chart(curves, {one: read_epochs(key, rows) for one, rows in histories.items()}))
        note = "Mean over a variant's runs; compare times of runs on one machine only."
        charts.append(cost_chart(comparison, "cost-time", "training time in minutes", note, minutes))
        if len({parameters(one.runs[0]) for one in variants}) > 1:
            label = "parameters in millions"
            charts.append(cost_chart(comparison, "cost-parameters", label, "", lambda run: parameters(run) / 1e6))
    return [chart for chart in charts if chart] + lambda_charts(variants)


def _most_accurate(variants: Sequence[Variant], count: int) -> list[Variant]:
    """The `count` variants with the highest estimate, in their own order."""
    best = sorted(variants, key=lambda variant: -variant.interval.estimate)[:count]
    return [variant for variant in variants if variant in best]


def accuracy_chart(comparison: Comparison) -> Chart:
    """Every variant with its interval: the comparison in one picture."""
    variants = _most_accurate(comparison.variants, 4 * MOST_LINES)
    note = f"{100 * comparison.level:g} % intervals, one variant at a time; small dots are single seeds. "
    note += "Overlapping intervals do not mean equal variants: see the differences."
    title = comparison.shown.title
    figure, tips = _draw_intervals(
        {variant.name: variant.interval for variant in variants},
        [_describe(variant, comparison) for variant in variants],
        label=title,
        symbol=None if comparison.metric == "log_loss" else "%",
        dots=[variant.seed_means for variant in variants],
    )
    return Chart("accuracy", f"{title} of every variant", note, figure, tips)


def difference_chart(comparison: Comparison) -> Chart:
    """Paired differences with their intervals; the largest where there are many."""
    shown = comparison.shown
    pairs = sorted(comparison.pairs, key=lambda pair: -abs(pair.difference.interval.estimate))[: 2 * MOST_LINES]
    few = f" The {len(pairs)} largest of {len(comparison.pairs)}." if len(pairs) < len(comparison.pairs) else ""
    note = "Paired over the same photos; right of 0 the variant named first is better. Intervals are not corrected for "
    note += f"the number of comparisons; the verdicts are.{few}"
    figure, tips = _draw_intervals(
        {f"{pair.second} − {pair.first}": pair.difference.interval for pair in pairs},
        [pair.verdict for pair in pairs],
        label=f"difference in {shown.title.lower()}, in {shown.unit}",
        symbol=None if comparison.metric == "log_loss" else "",
    )
    figure.axes[0].axvline(0, color="#888888", linestyle=":", linewidth=1)
    return Chart("differences", "Differences between variants", note, figure, tips)


def _draw_intervals(
    intervals: Mapping[str, Interval],
    texts: Sequence[str],
    *,
    label: str,
    symbol: str | None,
    dots: Sequence[Sequence[float]] = (),
) -> tuple[Figure, tuple[Tip, ...]]:
    """Intervals below each other, each under its name: names may be long, and a phone is narrow.

    `dots` are the single values behind an interval, `symbol` is behind shares in percent.
    """
    figure = new_figure(WIDTH, 0.6 + 0.42 * len(intervals))
    axes = figure.subplots()
    for index, (name, value) in enumerate(intervals.items()):
        color = COLORS[index % len(COLORS)]
        axes.plot([value.low, value.high], [index, index], color=color, linewidth=2, solid_capstyle="round")
        if dots:
            axes.plot(dots[index], [index] * len(dots[index]), "o", color=color, markersize=3, alpha=0.6)
        axes.plot([value.estimate], [index], "o", color=color, markersize=7)
        name = plain_text(name, longest=2 * LONGEST_NAME)
        axes.text(0, index - 0.28, name, transform=axes.get_yaxis_transform(), fontsize=9, color=INK)
    axes.set_ylim(len(intervals) - 0.5, -0.75)
    axes.set_yticks([])
    dress(axes, "", label)
    axes.spines["left"].set_visible(False)
    if symbol is not None:
        _set_percent(axes.xaxis, symbol)
    span = axes.get_xlim()
    return figure, tuple(Tip(axes, span, (n - 0.5, n + 0.5), text) for n, text in enumerate(texts))


def _set_percent(axis: Any, symbol: str = "%") -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(7))  # more labels would run into each other
    axis.set_major_formatter(PercentFormatter(1.0, symbol=symbol))


def curve_chart(curves: Curves, named: Mapping[str, Mapping[int, Sequence[float]]]) -> Chart | None:
    """Means over runs in each epoch, between the lowest and the highest, with a tooltip; None without numbers."""
    from matplotlib.ticker import MaxNLocator

    lines = {name: values for name, values in named.items() if values}
    if not lines:
        return None
    figure = new_figure(WIDTH, 3.1 + (0.19 * len(lines) if len(lines) > 1 else 0))
    axes = figure.subplots()
    texts: dict[int, list[str]] = {}
    for index, (name, values) in enumerate(lines.items()):
        color, dash = COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]
        epochs, means = list(values), [sum(several) / len(several) for several in values.values()]
        low, high = ([pick(several) for several in values.values()] for pick in (min, max))
        if low != high:
            axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(epochs, means, dash, color=color, marker="o", markersize=3, linewidth=1.6, label=plain_text(name))
        for epoch, mean in zip(epochs, means, strict=True):
            text = f"{name}: {100 * mean:.1f} %" if curves.is_share else f"{name}: {mean:.4g}"
            texts.setdefault(epoch, [f"epoch {epoch}"]).append(text)
    dress(axes, "", "epoch", curves.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:  # one epoch
        axes.set_xlim(low - 0.5, high + 0.5)
    if curves.is_share:
        _set_percent(axes.yaxis)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    if len(lines) > 1:
        figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    span = axes.get_ylim()
    tips = [Tip(axes, (epoch - 0.5, epoch + 0.5), span, "\n".join(texts[epoch])) for epoch in sorted(texts)]
    return Chart(curves.key, curves.title, curves.note, figure, tuple(tips[:: 1 + len(tips) // 60]))


def read_epochs(key: str, histories: Sequence[History]) -> dict[int, list[float]]:
    """The numbers of all runs in each epoch that has any, in order."""
    found: dict[int, list[float]] = {}
    for row in (row for rows in histories for row in rows):
        if (value := flatten(row, "probe." if row.get("is_probe") else "").get(key)) is not None:
            found.setdefault(int(row["epoch"]), []).append(value)
    return dict(sorted(found.items()))


def cost_chart(
    comparison: Comparison, key: str, label: str, note: str, read: Callable[[RunResults], float]
) -> Chart | None:
    """Accuracy over a cost, such as training time; None where it is not known."""
    variants = _most_accurate(comparison.variants, MOST_LINES)
    costs = {one.name: float(np.mean([read(run) for run in one.runs])) for one in variants}
    variants = [one for one in variants if costs[one.name] > 0]
    if not variants:
        return None
    title, (what, unit), tips = comparison.shown.title, label.split(" in "), list[Tip]()
    figure = new_figure(WIDTH, 3.0 + 0.19 * len(variants))
    axes = figure.subplots()
    for index, one in enumerate(variants):
        value, cost, color = one.interval, costs[one.name], COLORS[index % len(COLORS)]
        text = f"{_describe(one, comparison)}, {cost:.3g} {unit}"
        tips.append(Tip(axes, (0.95 * cost, 1.05 * cost), (value.low, value.high), text))
        axes.plot([cost, cost], [value.low, value.high], color=color, linewidth=2)
        axes.plot([cost], [value.estimate], "o", color=color, markersize=7, label=plain_text(one.name))
    spent = [costs[one.name] for one in variants]
    if max(spent) > 20 * min(spent):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    dress(axes, "", label, title)
    if comparison.metric != "log_loss":
        _set_percent(axes.yaxis)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return Chart(key, f"{title} against {what}", note, figure, tuple(tips))


def lambda_charts(variants: Sequence[Variant]) -> list[Chart]:
    """λ of each mixing method, drawn as training draws it, for the first variant that mixes."""
    from fieldmark.augment.mixing import lambda_draws
    from fieldmark.runs.build import build_mix_spec

    run = next((one.runs[0] for one in variants if build_mix_spec(one.runs[0].config).share > 0), None)
    if run is None:
        return []
    spec, size = build_mix_spec(run.config), run.config.augment.size or 224
    charts: list[Chart] = []
    for method in spec.methods:
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
    """Wall time of a run."""
    return float(run.summary.get("seconds", 0.0)) / 60


def parameters(run: RunResults) -> int:
    """Parameters of a run's model."""
    return int(run.model_info.get("parameters", 0))


def _describe(variant: Variant, comparison: Comparison) -> str:
    runs = f"{len(variant.seeds)} {'run' if len(variant.seeds) == 1 else 'runs'}"
    return f"{variant.name}: {comparison.shown.interval(variant.interval)}, {runs}"
