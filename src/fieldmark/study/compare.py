"""Which of these runs is better, and could it be chance? Paired comparisons of settings, with a verdict in words.

Runs that differ in their seed alone are one setting, and runs of the folds of one cross-validation are joined to one.
Shape letters: S runs of a setting (seeds), N photos, E epochs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError
from fieldmark.runs.folder import RunResults, find_runs, flatten, format_value, load_results
from fieldmark.study.statistics import (
    Difference,
    Interval,
    Optimism,
    Scores,
    holm,
    mean_interval,
    optimism_from_history,
    optimism_from_photos,
    paired_difference,
    photos_needed,
    runs_needed,
)

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
        from fieldmark.training.metrics import wilson_interval

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


@dataclass(frozen=True, eq=False)
class Replicate:
    """The runs of one seed, its folds joined: N photos in order of path, with (N,) labels and probabilities."""

    seed: int
    name: str
    photos: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float32]
    prior: NDArray[np.float64]


def join_folds(group: SettingRuns) -> list[Replicate]:
    """One replicate per seed, in order of seed.

    Raises:
        RunError: The same settings, seed and fold twice, or folds of different data.
    """
    by_seed: dict[int, list[RunResults]] = {}
    for run in group.runs:
        by_seed.setdefault(run.config.train.seed, []).append(run)
    return [_join(seed, runs) for seed, runs in sorted(by_seed.items())]


def _join(seed: int, runs: Sequence[RunResults]) -> Replicate:
    photos = [photo for run in runs for photo in run.photos]
    name = runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more folds"
    # Without folds a second run of the same recipe and seed is a repetition or was made on other data: never joined.
    if len({run.config.data.fold for run in runs}) < len(runs) or len(set(photos)) < len(photos):
        names = ", ".join(str(run.path) for run in runs)
        raise RunError(f"{names} have the same settings, seed and fold: give one of them, or runs with other seeds")
    if len({run.classes for run in runs}) > 1:
        raise RunError(f"the folds joined in {name} have different classes: they come from different data")
    order = sorted(range(len(photos)), key=photos.__getitem__)
    return Replicate(
        seed,
        name,
        tuple(photos[number] for number in order),
        np.concatenate([run.labels for run in runs])[order],
        runs[0].classes,
        np.concatenate([run.probabilities for run in runs])[order],
        np.mean([run.prior for run in runs], axis=0),
    )


def refuse_different_photos(joined: Sequence[Sequence[Replicate]]) -> None:
    """Check that all replicates judged the same photos under the same labels.

    Raises:
        RunError: They did not; the message says where they differ.
    """
    first, *others = [replicate for replicates in joined for replicate in replicates]
    for other in others:
        if other.classes != first.classes:
            raise RunError(
                f"{first.name} and {other.name} know different classes ({len(first.classes)} and "
                f"{len(other.classes)}): only runs on the same data can be compared"
            )
        if other.photos != first.photos:
            common = len(set(first.photos) & set(other.photos))
            odd = min(set(first.photos) ^ set(other.photos))
            raise RunError(
                f"{first.name} and {other.name} were judged on different photos ({len(first.photos)} and "
                f"{len(other.photos)}, {common} in common; {odd!r} is in one alone), and accuracies on different "
                "photos cannot be compared. Train both on the same split: same data, data.split_seed and folds"
            )
        if not np.array_equal(other.labels, first.labels):
            place = int(np.flatnonzero(other.labels != first.labels)[0])
            raise RunError(
                f"{first.name} and {other.name} disagree on the label of {first.photos[place]!r}: were labels "
                "corrected between them? Train both on the same labels"
            )


CHANCE = frozenset({"train.seed", "data.fold"})
"""Runs that differ in these alone are runs of one setting."""

NO_EFFECT = frozenset(
    {
        "description",
        "loader.workers",
        "cache.folder",
        "cache.disk_gigabytes",
        "train.threads",
        "train.save_minutes",
        "train.trackers",
    }
)
"""Words, and what changes how fast a run is but not what it learns."""

# Where the photos lie is no setting either: whether they are the same photos is checked by name.
NOT_A_SETTING = CHANCE | NO_EFFECT | {"data.path"}


MOST_WORDS = 6
"""Settings that differ in more keys than this are named by their folders: nobody reads a recipe as a name."""


@dataclass(frozen=True, eq=False)
class SettingRuns:
    """One setting: its runs, and where it differs from the others.

    Attributes:
        name: The changes in words, such as `mix.prob=0.4 optim.lr=0.001`; the folder's name where there are none,
            or too many to read.
        changes: Dotted key to value, of the keys in which not all settings agree.
        runs: In the order given.
    """

    name: str
    changes: Mapping[str, Any]
    runs: tuple[RunResults, ...]


def group_runs(results: Sequence[RunResults]) -> list[SettingRuns]:
    """Put runs together that differ in nothing but chance, in order of first appearance.

    Raises:
        RunError: There are no runs.
    """
    if not results:
        raise RunError("no runs to compare: give run folders, or a folder of them")
    groups: dict[str, list[RunResults]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in results:
        # What was combined has the recipe of one of its members, but is no further run of it.
        own = {"combined": run.summary.get("combined", "none")}
        own |= {key: value for key, value in flatten(run.config).items() if key not in NOT_A_SETTING}
        identity = repr(sorted(own.items()))
        groups.setdefault(identity, []).append(run)
        settings[identity] = own
    differing = differing_keys(list(settings.values()))
    named = [_setting_runs(settings[identity], differing, runs) for identity, runs in groups.items()]
    return named if len(differing) <= MOST_WORDS else _named_by_folder(named)


def named_against(groups: Sequence[SettingRuns], run: Path) -> list[SettingRuns]:
    """The setting of one run first, under that run's name; the others named by what they change of it.

    Raises:
        RunError: The run is not among them.
    """
    wanted = run.resolve()
    found = [group for group in groups if any(one.path.resolve() == wanted for one in group.runs)]
    if not found:
        raise RunError(f"{run} is not among the runs that are compared: name one of them, or add it")
    base = found[0]
    named = [base if len(base.changes) > MOST_WORDS else replace(base, name=wanted.name)]
    for group in groups:
        if group is not base:
            changes = {key: value for key, value in group.changes.items() if value != base.changes[key]}
            named.append(replace(group, name=_words(changes)) if len(changes) <= MOST_WORDS else group)
    return named


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose value is not the same in all settings, in recipe order."""
    first = settings[0]
    return [key for key in first if any(other[key] != first[key] for other in settings[1:])]


def _setting_runs(own: Mapping[str, Any], differing: Sequence[str], runs: Sequence[RunResults]) -> SettingRuns:
    changes = {key: own[key] for key in differing}
    return SettingRuns(_words(changes) or runs[0].name, changes, tuple(runs))


def _named_by_folder(groups: Sequence[SettingRuns]) -> list[SettingRuns]:
    """The folder of a single run, or the one that holds a setting's runs; the changes where that tells none apart."""
    paths = [[run.path.resolve() for run in group.runs] for group in groups]
    folders = [own[0] if len(own) == 1 else own[0].parent for own in paths]
    if len({folder.name for folder in folders}) < len(groups):
        return list(groups)
    return [replace(group, name=folder.name) for group, folder in zip(groups, folders, strict=True)]


def _words(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={format_value(value)}" for key, value in changes.items())


EFFECT = 0.01
"""The smallest difference worth seeing: one point of accuracy, or 0.01 nats of log loss."""

MOST_SEEDS = 50
"""More seeds than this are not proposed: nobody trains them to see a point."""

POWER = 0.8
"""Probability with which a true difference of `EFFECT` is to be seen."""


def verdict(
    first: str,
    second: str,
    difference: Difference,
    *,
    is_distinguishable: bool,
    photos: int | None,
    runs: int | None,
    level: float,
    unit: Literal["points", "nats"],
    num_comparisons: int,
) -> str:
    """One sentence about two settings.

    Args:
        first: Name of the first setting.
        second: Name of the second setting.
        difference: Of the second over the first.
        is_distinguishable: Whether the corrected p-value is below the level.
        photos: Photos needed to see `EFFECT`, or None where photos alone cannot do it.
        runs: Runs per setting needed to see `EFFECT`, or None where runs alone cannot do it.
        level: Coverage of the interval.
        unit: Of the numbers shown.
        num_comparisons: That the p-value, but not the interval, was corrected for.
    """
    scale, digits = (100, 1) if unit == "points" else (1, 3)
    interval = difference.interval
    if is_distinguishable:
        better, worse = (second, first) if interval.estimate > 0 else (first, second)
        size = f"{scale * abs(interval.estimate):.{digits}f} ± {scale * interval.half_width:.{digits}f} {unit}"
        return f"{better} is better than {worse} by {size}."
    span = f"{scale * interval.low:+.{digits}f} to {scale * interval.high:+.{digits}f} {unit}"
    corrected = f"; tested as one of {num_comparisons} comparisons" if num_comparisons > 1 else ""
    found = f"Not distinguishable: {second} over {first} is {scale * interval.estimate:+.{digits}f} "
    return f"{found}({100 * level:g} % interval {span}{corrected}). {_needed(difference, photos, runs, unit)}"


def _needed(difference: Difference, photos: int | None, runs: int | None, unit: str) -> str:
    effect = "1 point" if unit == "points" else f"{EFFECT:g} nats"
    ways: list[str] = []
    if photos is not None:
        ways.append(f"{_round(photos - difference.num_photos):,} more photos")
    more = (runs or 0) - min(difference.num_runs)
    if runs is not None and more <= MOST_SEEDS:
        ways.append(f"{more} more {'seed' if more == 1 else 'seeds'} each")
    if (photos is not None and photos <= difference.num_photos) or (
        runs is not None and runs <= min(difference.num_runs)
    ):
        return f"A difference of {effect} would probably have been seen."
    if not ways:
        return f"Many more seeds, and perhaps photos, would be needed to see a difference of {effect}."
    return f"About {' or '.join(ways)} would be needed to see a difference of {effect}."


def _round(number: int) -> int:
    """Two significant digits: the estimate is no better than that."""
    digits = max(0, len(str(abs(number))) - 2)
    return round(number, -digits)
