"""Which of these runs is better, and could it be chance? Paired comparisons of variants, with a verdict in words.

A variant is all runs that differ in their seed alone; the folds of one cross-validation are joined into one run.
Shape letters: S runs of a variant (seeds), N photos, E epochs, K classes.
"""

import itertools
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.config import Metric
from fieldmark.errors import RunError
from fieldmark.files import fill_template
from fieldmark.runs.folder import Run, RunResults, find_runs, flatten, format_value
from fieldmark.study import statistics
from fieldmark.study.grid import NO_EFFECT
from fieldmark.study.statistics import EFFECT, SHOWN, Difference, Interval, Scores, Shown
from fieldmark.training.metrics import compare_with_probe

POWER = 0.8  # probability with which a true difference of `EFFECT` is to be seen
MOST_SEEDS = 50  # more are not proposed: nobody trains them to see a point
FEW_PHOTOS = 50  # of fewer a note says that they are few
DRAWS = 2000  # of the bootstrap for the bias of the best epoch
# Runs that differ in chance alone are runs of one variant. Where the photos are stored is no difference either: whether
# they are the same photos is checked by name.
IGNORED = NO_EFFECT | {"train.seed", "data.fold", "data.path"}
MOST_CHANGES = 6  # variants that differ in more keys are named by their folders: nobody reads a recipe as a name


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one variant, in the order given, folds included."""

    name: str  # the changes in words; a folder's name where there are none, or too many to read
    changes: Mapping[str, Any]  # value of each key in which the compared variants differ
    runs: tuple[RunResults, ...]


@dataclass(frozen=True, eq=False)
class Variant(Group):
    """Runs that differ in nothing but chance, with their scores."""

    seeds: tuple[int, ...]  # one for each row of `scores`
    scores: Scores  # (S, N) of each photo by each run, in order of path; higher is better
    interval: Interval  # of the mean over photos and runs
    optimism: float | None  # what choosing the best epoch adds, on average over the runs; None: not known, or nothing

    @property
    def seed_means(self) -> list[float]:
        """Mean score of each run (of each seed's folds together)."""
        return [float(value) for value in self.scores.mean(axis=1)]


@dataclass(frozen=True)
class Pair:
    """Two variants on the same photos; a positive difference favors the second."""

    first: str
    second: str
    difference: Difference
    corrected_p: float
    photos_needed: int | None
    runs_needed: int | None
    is_distinguishable: bool
    verdict: str


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """All variants, and every two of them against each other; or, with a baseline, each against the baseline."""

    metric: Metric
    level: float
    num_photos: int
    variants: tuple[Variant, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    baseline: str | None  # name of the variant that is the first of every pair

    @property
    def shown(self) -> Shown:
        """Return how the metric is shown."""
        return SHOWN[self.metric]

    def __repr__(self) -> str:
        """A table of the variants, and a sentence for every two of them."""
        return fill_template("comparison.md", vars(self))

    def _repr_html_(self) -> str:
        return fill_template("comparison.html", {"comparison": self})

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        variants = [
            {
                "name": variant.name,
                "changes": dict(variant.changes),
                "runs": [str(run.path) for run in variant.runs],
                "seeds": list(variant.seeds),
                self.metric: asdict(variant.interval),
                "by_seed": variant.seed_means,
                "optimism": {
                    "points": variant.optimism or 0.0,
                    "source": "none" if variant.optimism is None else "photos",
                },
            }
            for variant in self.variants
        ]
        return {
            "metric": self.metric,
            "level": self.level,
            "num_photos": self.num_photos,
            "baseline": self.baseline,
            "variants": variants,
            "pairs": [asdict(pair) for pair in self.pairs],
            "notes": list(self.notes),
        }


def compare_runs(
    paths: Sequence[Run | str | Path],
    *,
    metric: Metric = "top1",
    split: str = "val",
    against: str | Path | None = None,
    level: float = 0.95,
) -> Comparison:
    """Compare run folders, or all runs of a sweep.

    Args:
        paths: Runs, run folders, or folders of run folders.
        metric: `top1`; `macro_recall`, where every class counts alike; `prior_top1`, where classes count as they come
            in training; `log_loss` in nats, shown negated so that higher is better.
        split: `val` or `test`.
        against: A run among them: its variant is the baseline that every other is compared with, and no others are,
            so that the p-values are corrected for fewer comparisons (fix it before you look). None compares every two.
        level: Coverage of the intervals, in (0, 1).

    Raises:
        RunError: No runs; runs on different photos, labels or classes; the same run twice; an unfinished run; a
            baseline that is not among them.

    Examples:
        >>> (pair,) = fieldmark.compare_runs(["runs/plain", "runs/mixed"]).pairs
        >>> points = pair.difference.interval
        >>> points.low <= points.estimate <= points.high
        True
    """
    if metric not in SHOWN:
        raise RunError(f"no metric {metric!r} to compare by: choose one of {', '.join(SHOWN)}")
    if not 0 < level < 1:
        raise RunError(f"level is the coverage of the intervals, between 0 and 1; got {level:g}")
    groups = group_runs([RunResults(path, split=split) for path in find_runs(paths)])
    if against is not None:
        groups = name_against(groups, Path(against))
    joined = [join_folds(group) for group in groups]
    check_same_photos([run for runs in joined for run in runs])
    rng, pairs = np.random.default_rng(0), zip(groups, joined, strict=True)
    variants = tuple(_measure(group, runs, metric, level=level, rng=rng) for group, runs in pairs)
    both = list(itertools.combinations(variants, 2))
    if against is not None:
        both = both[: len(variants) - 1]  # those of the first variant, the baseline
    differences = [(a.name, b.name, statistics.paired_difference(a.scores, b.scores, level=level)) for a, b in both]
    return Comparison(
        metric=metric,
        level=level,
        num_photos=variants[0].scores.shape[1],
        variants=variants,
        pairs=decide_together(differences, metric=metric, level=level),
        notes=_notes(variants),
        baseline=None if against is None else variants[0].name,
    )


def group_runs(results: Sequence[RunResults]) -> list[Group]:
    """Put runs together that differ in nothing but chance, in order of first appearance."""
    if not results:
        raise RunError("no runs to compare: give run folders, or a folder of them")
    groups: dict[str, tuple[dict[str, Any], list[RunResults]]] = {}
    for run in results:
        own = {key: value for key, value in flatten(run.config).items() if key not in IGNORED}
        # What was combined has the recipe of one of its members, but is no further run of it.
        # Neither is a run on other photos, or within another time.
        made = {
            "combined": run.summary.get("combined", "none"),
            "minutes": round(run.summary.get("budget_seconds", 0) / 60),
        }
        photos = "" if run.config.data.folds else str(run.data_info.get("fingerprint", ""))[:8]
        own = made | {"photos": photos, **own}
        groups.setdefault(repr(sorted(own.items())), (own, []))[1].append(run)
    settings = [own for own, _ in groups.values()]
    differing = [key for key in settings[0] if any(other[key] != settings[0][key] for other in settings[1:])]
    # The folder of a single run, or the one that holds a variant's runs.
    paths = [(runs[0].path.resolve(), len(runs)) for _, runs in groups.values()]
    folders = [path.name if count == 1 else path.parent.name for path, count in paths]
    by_folder = len(differing) > MOST_CHANGES and len(set(folders)) == len(folders)
    named: list[Group] = []
    for (own, runs), folder in zip(groups.values(), folders, strict=True):
        changes = {key: own[key] for key in differing}
        name = folder if by_folder else _describe(changes) or runs[0].name
        named.append(Group(name, changes, tuple(runs)))
    return named


def name_against(groups: Sequence[Group], run: Path) -> list[Group]:
    """The variant of one run first, under that run's name; the others named by what they change of it."""
    wanted = run.resolve()
    base = next((group for group in groups if any(one.path.resolve() == wanted for one in group.runs)), None)
    if base is None:
        raise RunError(f"{run} is not among the runs that are compared: name one of them, or add it")
    named = [base if len(base.changes) > MOST_CHANGES else replace(base, name=wanted.name)]
    for group in groups:
        if group is not base:
            changes = {key: value for key, value in group.changes.items() if value != base.changes[key]}
            named.append(replace(group, name=_describe(changes)) if len(changes) <= MOST_CHANGES else group)
    return named


def _describe(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={format_value(value)}" for key, value in changes.items())


def join_folds(group: Group) -> list[RunResults]:
    """One run per seed, its folds joined, in order of seed."""
    by_seed: dict[int, list[RunResults]] = {}
    for run in group.runs:
        by_seed.setdefault(run.config.train.seed, []).append(run)
    return [_join(runs) for _, runs in sorted(by_seed.items())]


def _join(runs: Sequence[RunResults]) -> RunResults:
    """The first run with the photos of all."""
    joined, photos = copy(runs[0]), [photo for run in runs for photo in run.photos]
    # Without folds a second run of the same recipe and seed is a repetition or was made on other data: never joined.
    if len({run.config.data.fold for run in runs}) < len(runs) or len(set(photos)) < len(photos):
        names = ", ".join(str(run.path) for run in runs)
        raise RunError(f"{names} have the same settings, seed and fold: give one of them, or runs with other seeds")
    if len({run.classes for run in runs}) > 1:
        raise RunError(f"the folds of {joined.path} have different classes: they come from different data")
    order = sorted(range(len(photos)), key=photos.__getitem__)
    joined.photos = tuple(photos[index] for index in order)
    joined.labels = np.concatenate([run.labels for run in runs])[order]
    joined.probabilities = np.concatenate([run.probabilities for run in runs])[order]
    joined.prior = np.mean([run.prior for run in runs], axis=0)
    return joined


def check_same_photos(runs: Sequence[RunResults]) -> None:
    """Check that all runs scored the same photos under the same labels, or say where they differ."""
    first, *others = runs
    for other in others:
        names = f"{first.name} and {other.name}"
        if other.classes != first.classes:
            raise RunError(
                f"{names} know different classes ({len(first.classes)} and {len(other.classes)}): only runs on the "
                "same data can be compared"
            )
        if other.photos != first.photos:
            common = len(set(first.photos) & set(other.photos))
            odd = min(set(first.photos) ^ set(other.photos))
            raise RunError(
                f"{names} were scored on different photos ({len(first.photos)} and {len(other.photos)}, {common} in "
                f"common; {odd!r} is in one alone), and accuracies on different photos cannot be compared. Train both "
                "on the same split: same data, data.split_seed and folds"
            )
        if not np.array_equal(other.labels, first.labels):
            index = int(np.flatnonzero(other.labels != first.labels)[0])
            raise RunError(
                f"{names} disagree on the label of {first.photos[index]!r}: were labels corrected between them? Train "
                "both on the same labels"
            )


def _measure(
    group: Group, runs: Sequence[RunResults], metric: Metric, *, level: float, rng: np.random.Generator
) -> Variant:
    scores = np.stack([_scores(run, metric) for run in runs])
    num_photos = scores.shape[1]
    if len(runs) == 1 and metric == "top1":
        interval = statistics.widen_to_wilson(Interval(*[float(scores.mean())] * 3), num_photos, level=level)
    else:
        interval = statistics.mean_interval(scores, level=level)
        if metric == "log_loss":
            interval = _open_log_loss(interval, num_photos, len(runs[0].classes))
        else:
            # Student's t of two or three seeds knows no bounds.
            interval = Interval(interval.estimate, max(interval.low, 0.0), min(interval.high, 1.0))
            # As many equally weighted photos are as informative: Kish, "Survey Sampling", 1965, section 11.7.
            effective = float(1 / np.sum(_photo_weights(runs[0], metric) ** 2))
            interval = statistics.widen_to_wilson(interval, effective, level=level)
    optimisms = [_run_optimism(run, rng=rng) for run in group.runs]
    known = [found for found in optimisms if found is not None]
    optimism = sum(known) / len(optimisms) if known else None
    seeds = tuple(run.config.train.seed for run in runs)
    return Variant(group.name, group.changes, group.runs, seeds, scores, interval, optimism)


def _scores(run: RunResults, metric: Metric) -> Scores:
    """(N,) whose mean is the metric: each photo's share is scaled by N, so that one interval serves all metrics."""
    if metric == "log_loss":
        own = run.probabilities[np.arange(len(run.labels)), run.labels].astype(np.float64)
        return np.log(np.clip(own, 1e-12, 1.0))
    is_right = run.probabilities.argmax(axis=1) == run.labels
    return is_right * _photo_weights(run, metric) * len(run.labels)


def _photo_weights(run: RunResults, metric: Metric) -> Scores:
    """(N,) share of each photo in the metric; they sum to 1."""
    counts = np.bincount(run.labels, minlength=len(run.classes))
    by_class = {"top1": counts.astype(np.float64), "prior_top1": run.prior, "macro_recall": np.ones(len(counts))}
    shares = by_class[metric]
    wanted = shares * (counts > 0)
    return (wanted / wanted.sum() / np.maximum(counts, 1))[run.labels]


def _open_log_loss(interval: Interval, num_photos: int, num_classes: int) -> Interval:
    """Equal losses of all photos are no proof either: the interval reaches to one more photo that is a mere guess."""
    estimate, room = interval.estimate, interval.half_width
    if not room:
        room = float(abs(estimate + np.log(num_classes))) / (num_photos + 1)
    return Interval(estimate, estimate - room, min(0.0, estimate + room))


def _run_optimism(run: RunResults, *, rng: np.random.Generator) -> float | None:
    """What choosing the best epoch by top-1 adds to one run's accuracy; None where the last epoch was kept."""
    is_chosen = run.config.train.select == "best" and run.config.train.metric != "log_loss"
    if not is_chosen or run.epoch_predictions is None:
        return None
    return statistics.optimism_from_photos(run.epoch_predictions == run.labels, draws=DRAWS, rng=rng)


def decide_together(
    differences: Sequence[tuple[str, str, Difference]], *, metric: Metric, level: float
) -> tuple[Pair, ...]:
    """Verdicts on differences of a second over a first variant, p-values corrected for their number by Holm."""
    corrected = statistics.holm([difference.p_value for _, _, difference in differences])
    pairs: list[Pair] = []
    strict = 1 - (1 - level) / max(len(differences), 1)  # what Holm asks of the first
    for (first, second, difference), p_value in zip(differences, corrected, strict=True):
        photos = statistics.photos_needed(difference, effect=EFFECT, level=strict, power=POWER)
        runs = statistics.runs_needed(difference, effect=EFFECT, level=strict, power=POWER)
        pair = Pair(first, second, difference, p_value, photos, runs, p_value < 1 - level, verdict="")
        words = verdict(pair, level=level, shown=SHOWN[metric], num_comparisons=len(differences))
        pairs.append(replace(pair, verdict=words))
    return tuple(pairs)


def verdict(pair: Pair, *, level: float, shown: Shown, num_comparisons: int) -> str:
    """One sentence about two variants; the p-value, but not the interval, was corrected for the comparisons."""
    interval = pair.difference.interval
    if pair.is_distinguishable:
        better, worse = (pair.second, pair.first) if interval.estimate > 0 else (pair.first, pair.second)
        size = f"{shown.number(abs(interval.estimate))} ± {shown.number(interval.half_width)}"
        return f"{better} is better than {worse} by {size} {shown.unit}."
    corrected = f"; tested as one of {num_comparisons} comparisons" if num_comparisons > 1 else ""
    size = f"{shown.number(interval.estimate, '+')} ({100 * level:g} % interval {shown.change(interval)} {shown.unit}"
    return f"Not distinguishable: {pair.second} over {pair.first} is {size}{corrected}). {_needed(pair, shown)}"


def _needed(pair: Pair, shown: Shown) -> str:
    num_photos, num_runs = pair.difference.num_photos, min(pair.difference.num_runs)
    photos, runs = pair.photos_needed, pair.runs_needed
    if (photos is not None and photos <= num_photos) or (runs is not None and runs <= num_runs):
        return f"A difference of {shown.effect} would probably have been seen."
    ways: list[str] = []
    if photos is not None:
        more = photos - num_photos
        more = round(more, -max(0, len(str(more)) - 2))  # two digits: the estimate is no better than that
        ways.append(f"{more:,} more photos")
    if runs is not None and (more := runs - num_runs) <= MOST_SEEDS:
        ways.append(f"{more} more {'seed' if more == 1 else 'seeds'} each")
    if not ways:
        return f"Many more seeds, and perhaps photos, would be needed to see a difference of {shown.effect}."
    return f"About {' or '.join(ways)} would be needed to see a difference of {shown.effect}."


def _notes(variants: Sequence[Variant]) -> tuple[str, ...]:
    runs = [(run, run.config.train) for variant in variants for run in variant.runs]
    rows = [(run.name, t.metric, compare_with_probe(run.metrics, metric=t.metric, select=t.select)) for run, t in runs]
    values = {
        "variants": variants,
        "num_photos": variants[0].scores.shape[1],
        "few_photos": FEW_PHOTOS,
        "single": [variant.name for variant in variants if len(variant.seeds) == 1],
        "worst": max(variants, key=lambda variant: variant.optimism or 0.0),
        "probes": [row for row in rows if row[2]],  # those that beat all fine-tuning
    }
    return tuple(filter(None, fill_template("notes.md", values).split("\n")))
