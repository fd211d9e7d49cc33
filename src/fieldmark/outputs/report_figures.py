"""The report's figures, from a comparison: what is shown, not how it is drawn.

Shape letters: E epochs, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fieldmark.experiment.compare import Comparison, Setting
from fieldmark.experiment.results import RunResults
from fieldmark.experiment.selection import smooth
from fieldmark.outputs.charts import Chart, Dot, Line

MOST_LINES = 10
TREND_EPOCHS = 5
LAMBDA_DRAWS = 4000

Read = Callable[[Mapping[str, Any]], float | None]


def report_charts(comparison: Comparison) -> list[Chart]:
    """All charts for which the runs have figures, in the order of the page."""
    shown = most_accurate(comparison.settings, MOST_LINES)
    left_out = len(comparison.settings) - len(shown)
    note = f" The {len(shown)} most accurate of {len(comparison.settings)} settings." if left_out else ""
    charts = [accuracy_chart(comparison)]
    if comparison.pairs:
        charts.append(difference_chart(comparison))
    for key, title, y_label, is_share, hint, read in _CURVES:
        lines = tuple(line for setting in shown if (line := setting_line(setting, read)))
        if lines:
            charts.append(Chart(key, title, hint + note, "epoch", y_label, is_share=is_share, lines=lines))
    charts += cost_charts(comparison)
    charts += lambda_charts(comparison.settings)
    return charts


def most_accurate(settings: Sequence[Setting], count: int) -> list[Setting]:
    """The `count` settings with the highest estimate, in their own order."""
    best = sorted(settings, key=lambda setting: -setting.interval.estimate)[:count]
    return [setting for setting in settings if setting in best]


def setting_line(setting: Setting, read: Read) -> Line | None:
    """Mean over a setting's runs per epoch, a band from the lowest to the highest run, and a running mean."""
    runs = [{int(row["epoch"]): read(row) for row in run.metrics} for run in setting.runs]
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
    return Line(setting.name, epochs, means, low, high, trend)


def _validation(row: Mapping[str, Any]) -> float | None:
    return row["val"].get("top1") if row.get("val") else None


_BAND = "Band: lowest to highest run of a setting. Bold: running mean over five epochs."
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
    """Every setting with its interval: the comparison in one picture."""
    dots = tuple(
        Dot(setting.name, value.estimate, 0.0, value.low, value.high, _words(setting, comparison.metric))
        for setting in most_accurate(comparison.settings, 4 * MOST_LINES)
        for value in [setting.interval]
    )
    what = metric_name(comparison.metric)
    note = f"{100 * comparison.level:g} % intervals, one setting at a time. Overlap says little: see the differences."
    is_share = comparison.metric != "log_loss"
    return Chart("accuracy", f"{what} of every setting", note, what, "", is_share=is_share, dots=dots, sideways=True)


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
    if len({parameters(setting.runs[0]) for setting in comparison.settings}) > 1:
        costs.append(("cost-parameters", "parameters in millions", lambda run: parameters(run) / 1e6))
    charts: list[Chart] = []
    for key, label, read in costs:
        dots = tuple(
            Dot(setting.name, cost, value.estimate, value.low, value.high, _words(setting, comparison.metric))
            for setting in most_accurate(comparison.settings, MOST_LINES)
            for value, cost in [(setting.interval, float(np.mean([read(run) for run in setting.runs])))]
            if cost > 0
        )
        if dots:
            spread = max(dot.x for dot in dots) / min(dot.x for dot in dots)
            what = metric_name(comparison.metric)
            title = f"{what} against {label.split(' in ')[0]}"
            note = "Mean over a setting's runs; times compare only runs of one machine."
            charts.append(Chart(key, title, note if key == "cost-time" else "", label, what,
                                is_share=comparison.metric != "log_loss", dots=dots, is_log_x=spread > 20))  # fmt: skip
    return charts


def lambda_charts(settings: Sequence[Setting]) -> list[Chart]:
    """Histograms of λ of both methods, drawn as training draws them, for the first setting that mixes."""
    config = next((setting.runs[0].config for setting in settings if setting.runs[0].config.mix.prob > 0), None)
    if config is None:
        return []
    from fieldmark.vision.mixing import MixSpec, lambda_draws

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


def _words(setting: Setting, metric: str) -> str:
    value = setting.interval
    low, high = format_estimate(value.low, metric), format_estimate(value.high, metric)
    runs = f"{len(setting.seeds)} {'run' if len(setting.seeds) == 1 else 'runs'}"
    return f"{setting.name}: {format_estimate(value.estimate, metric)} ({low} to {high}), {runs}"
