"""Which of these runs is better, and could it be chance? Paired comparisons of settings, with a verdict in words.

Runs that differ in their seed alone are one setting, and runs of the folds of one cross-validation are joined to one.
Shape letters: S runs of a setting (seeds), N photos, E epochs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fieldmark.errors import RunError
from fieldmark.experiment.replicates import Replicate, join_folds, refuse_different_photos
from fieldmark.experiment.results import RunResults, find_runs, load_results
from fieldmark.experiment.selection import Optimism, optimism_from_history, optimism_from_photos
from fieldmark.experiment.settings import SettingRuns, group_runs, named_against
from fieldmark.experiment.statistics import (
    Difference,
    Interval,
    Scores,
    holm,
    mean_interval,
    paired_difference,
    photos_needed,
    runs_needed,
)
from fieldmark.experiment.verdict import EFFECT, POWER, verdict

Metric = Literal["top1", "macro_recall", "prior_top1", "log_loss"]


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in nothing but chance.

    Attributes:
        name: What sets it apart, such as `mix.prob=0.4`.
        changes: Dotted key to value, of the keys in which the compared settings differ.
        runs: Its run folders' results, folds included.
        seeds: One for each row of `scores`.
        scores: (S, N) score of each photo by each run, in order of path; higher is better.
        interval: Mean score over photos and runs.
        optimism: What choosing the best epoch adds, on average over the runs.
    """

    name: str
    changes: Mapping[str, Any]
    runs: tuple[RunResults, ...]
    seeds: tuple[int, ...]
    scores: Scores
    interval: Interval
    optimism: Optimism

    @property
    def seed_means(self) -> list[float]:
        """Mean score of each run (of each seed's folds together)."""
        return [float(value) for value in self.scores.mean(axis=1)]


@dataclass(frozen=True)
class Pair:
    """Two settings on the same photos; a positive difference favours the second."""

    first: str
    second: str
    difference: Difference
    corrected_p: float
    photos_needed: int | None
    runs_needed: int | None
    is_distinguishable: bool
    verdict: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """All settings, and every two of them against each other; or, with a baseline, each against that one."""

    metric: Metric
    level: float
    num_photos: int
    settings: tuple[Setting, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    baseline: str | None = None
    """Name of the setting that is the first of every pair."""

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        settings = [
            {
                "name": setting.name,
                "changes": dict(setting.changes),
                "runs": [str(run.path) for run in setting.runs],
                "seeds": list(setting.seeds),
                self.metric: asdict(setting.interval),
                "by_seed": setting.seed_means,
                "optimism": asdict(setting.optimism),
            }
            for setting in self.settings
        ]
        return {
            "metric": self.metric,
            "level": self.level,
            "num_photos": self.num_photos,
            "baseline": self.baseline,
            "settings": settings,
            "pairs": [asdict(pair) for pair in self.pairs],
            "notes": list(self.notes),
        }


def compare_runs(
    paths: Sequence[str | Path],
    *,
    metric: Metric = "top1",
    split: str = "val",
    against: str | Path | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare run folders, or all runs of a sweep.

    Args:
        paths: Run folders, or folders of run folders.
        metric: `top1`; `macro_recall`, where every class counts alike; `prior_top1`, where classes count as they come
            in training; `log_loss` in nats, shown negated so that higher is better.
        split: `val` or `test`.
        against: A run among them: its setting is the baseline that every other is compared with, and no others are,
            so that the p-values are corrected for fewer comparisons (fix it before you look). None compares every two.
        level: Coverage of the intervals, in (0, 1).
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        RunError: No runs; runs on different photos, labels or classes; the same run twice; an unfinished run; a
            baseline that is not among them.
    """
    if metric not in get_args(Metric):
        raise RunError(f"no metric {metric!r} to compare by: choose one of {', '.join(get_args(Metric))}")
    if not 0 < level < 1:
        raise RunError(f"level is the coverage of the intervals, between 0 and 1; got {level:g}")
    results = [load_results(path, split=split) for path in find_runs(paths)]
    return compare_results(results, metric=metric, level=level, draws=draws, seed=seed, against=against)


def compare_results(
    results: Sequence[RunResults],
    *,
    metric: Metric,
    level: float,
    draws: int,
    seed: int,
    against: str | Path | None = None,
) -> Comparison:
    """Compare runs that were read already; arguments and errors as for `compare_runs`."""
    groups = group_runs(results)
    if against is not None:
        groups = named_against(groups, Path(against))
    rng = np.random.default_rng(seed)
    joined = [join_folds(group) for group in groups]
    refuse_different_photos(joined)
    settings = [
        _setting(group, replicates, metric=metric, level=level, draws=draws, rng=rng)
        for group, replicates in zip(groups, joined, strict=True)
    ]
    both = list(itertools.combinations(settings, 2))
    if against is not None:
        both = both[: len(settings) - 1]  # those of the first setting, the baseline
    pairs = _pairs(both, metric=metric, level=level, draws=draws, rng=rng)
    baseline = None if against is None else settings[0].name
    return Comparison(metric, level, settings[0].scores.shape[1], tuple(settings), pairs, _notes(settings), baseline)


def _setting(
    group: SettingRuns,
    replicates: Sequence[Replicate],
    *,
    metric: Metric,
    level: float,
    draws: int,
    rng: np.random.Generator,
) -> Setting:
    scores = np.stack([_scores(replicate, metric) for replicate in replicates])
    if len(replicates) == 1 and metric == "top1":
        from fieldmark.engine.metrics import wilson_interval

        right, num_photos = int(scores.sum()), scores.shape[1]
        interval = Interval(right / num_photos, *wilson_interval(right, num_photos, confidence=level))
    else:
        interval = mean_interval(scores, level=level, draws=draws, rng=rng)
        if metric != "log_loss":  # Student's t of two or three seeds knows no bounds
            interval = Interval(interval.estimate, max(interval.low, 0.0), min(interval.high, 1.0))
    optimisms = [run_optimism(run, draws=min(draws, 2000), rng=rng) for run in group.runs]
    optimism = Optimism(float(np.mean([found.points for found in optimisms])), optimisms[0].source)
    seeds = tuple(replicate.seed for replicate in replicates)
    return Setting(group.name, group.changes, group.runs, seeds, scores, interval, optimism)


def run_optimism(run: RunResults, *, draws: int, rng: np.random.Generator) -> Optimism:
    """What choosing the best epoch by top-1 adds to one run's accuracy; nothing where the last epoch was kept."""
    if run.config.train.select != "best" or run.config.train.metric == "log_loss":
        return Optimism(0.0, "none")
    if run.epoch_predictions is not None:
        return optimism_from_photos(run.epoch_predictions == run.labels, draws=draws, rng=rng)
    history = [epoch["val"]["top1"] for epoch in run.metrics if epoch.get("val")]
    return optimism_from_history(np.array(history, np.float64), draws=draws, rng=rng)


def _scores(replicate: Replicate, metric: Metric) -> Scores:
    """(N,) whose mean is the metric: each photo's share is scaled by N, so that one bootstrap serves all metrics."""
    own = replicate.probabilities[np.arange(len(replicate.labels)), replicate.labels].astype(np.float64)
    if metric == "log_loss":
        return np.log(np.clip(own, 1e-12, 1.0))
    correct = (replicate.probabilities.argmax(axis=1) == replicate.labels).astype(np.float64)
    if metric == "top1":
        return correct
    counts = np.bincount(replicate.labels, minlength=len(replicate.classes))
    wanted = (replicate.prior if metric == "prior_top1" else np.ones(len(counts))) * (counts > 0)
    weights = wanted / wanted.sum() / np.maximum(counts, 1)
    return correct * weights[replicate.labels] * len(correct)


def _pairs(
    both: Sequence[tuple[Setting, Setting]], *, metric: Metric, level: float, draws: int, rng: np.random.Generator
) -> tuple[Pair, ...]:
    differences = [paired_difference(a.scores, b.scores, level=level, draws=draws, rng=rng) for a, b in both]
    named = [
        (first.name, second.name, difference) for (first, second), difference in zip(both, differences, strict=True)
    ]
    return judge_together(named, metric=metric, level=level)


def judge_together(
    differences: Sequence[tuple[str, str, Difference]], *, metric: Metric, level: float
) -> tuple[Pair, ...]:
    """Verdicts on differences that are looked at together: their p-values are corrected for that number, by Holm.

    Args:
        differences: The names of two settings, and the difference of the second over the first.
        metric: Of which they are.
        level: Coverage of their intervals.
    """
    corrected = holm([difference.p_value for _, _, difference in differences])
    pairs: list[Pair] = []
    for (first, second, difference), p_value in zip(differences, corrected, strict=True):
        photos = photos_needed(difference, effect=EFFECT, level=level, power=POWER)
        runs = runs_needed(difference, effect=EFFECT, level=level, power=POWER)
        is_distinguishable = p_value < 1 - level
        words = verdict(
            first,
            second,
            difference,
            is_distinguishable=is_distinguishable,
            photos=photos,
            runs=runs,
            level=level,
            unit="nats" if metric == "log_loss" else "points",
            num_comparisons=len(differences),
        )
        pairs.append(Pair(first, second, difference, p_value, photos, runs, is_distinguishable, words))
    return tuple(pairs)


def _notes(settings: Sequence[Setting]) -> tuple[str, ...]:
    notes: list[str] = []
    if len(settings) == 1:
        notes.append("All runs have the same settings but for chance: there is nothing to compare them with.")
    single = [setting.name for setting in settings if len(setting.seeds) == 1]
    if single:
        names = ", ".join(single) if len(single) < len(settings) else "Every setting"
        notes.append(
            f"{names}: one run only. Intervals cover the choice of photos, not the chance of training; "
            "runs with other seeds would tell."
        )
    flattering = [setting for setting in settings if setting.optimism.points >= 0.0005]
    if flattering:
        worst = max(flattering, key=lambda setting: setting.optimism.points)
        bound = "at most about" if worst.optimism.source == "history" else "about"
        notes.append(
            f"The best epoch was chosen on these photos, which flatters an accuracy by {bound} "
            f"{100 * worst.optimism.points:.1f} points (largest: {worst.name})."
        )
    return tuple(notes)
