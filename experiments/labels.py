"""Which photos to label next: accuracy against the number of labels, by several rules of choice beside chance.

    python -m experiments.labels birds100:300 clothing10:100 --out docs/labels.md --features features

Each data set is a folder of photos and the number of labels that it begins with. Heads on frozen features of
EfficientNet-Lite0 choose photos of a pool; a second part of the photos chooses among the rules, and a third, which has
no part in any choice, says what each is worth. What was computed before is kept in the folder given by --features, so
that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.heads import POOLED, Trial
from experiments.pages import make_parser, write_results
from fieldmark.budget.heads import fit_head
from fieldmark.budget.race import make_folds, stratified_order
from fieldmark.inference.calibration import apply_temperature, fit_temperature, log_probabilities
from fieldmark.inference.triage import cover, rank_by_doubt
from fieldmark.study.statistics import paired_difference

NETWORK = "tf_efficientnet_lite0"
COUNT, ROUNDS, SEEDS = 100, 5, 10
SHARES = (0.6, 0.8)
"""Where the photos are cut into the pool, those that choose the rule, and those that judge it."""

CHANCE = "at random"
Rule = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


def _cover_least_sure(times: int) -> Rule:
    """The photos that stand best for `times` as many, those that the model is least sure of."""

    def choose(probabilities: np.ndarray, features: np.ndarray, count: int, _: np.random.Generator) -> np.ndarray:
        rows = rank_by_doubt(probabilities)[: times * count]
        return rows[cover(features[rows], count)[0]]

    return choose


def _cover_by_doubt(
    probabilities: np.ndarray, features: np.ndarray, count: int, _rng: np.random.Generator
) -> np.ndarray:
    """The photos that stand best for the pool, in which each photo counts as much as the model doubts it."""
    top = np.sort(probabilities, axis=1)[:, -2:]
    doubt = 1 - (top[:, -1] - top[:, 0]).astype(np.float32)
    similar = _cosines(features)
    covered, chosen = np.full(len(features), -1, np.float32), list[int]()
    for _ in range(count):
        gains = np.maximum(similar - covered, 0) @ doubt
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, similar[chosen[-1]])
    return np.asarray(chosen)


def _spread_gradients(
    probabilities: np.ndarray, features: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """BADGE: photos whose gradients of the head are long and far apart, drawn by k-means++.

    Source:
        Ash et al., "Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds", arXiv:1906.03671.
    """
    errors = probabilities.copy()
    errors[np.arange(len(errors)), errors.argmax(1)] -= 1
    lengths = (errors**2).sum(1) * (features**2).sum(1)
    chosen, nearest = [int(lengths.argmax())], np.full(len(lengths), np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        products = (errors @ errors[last]) * (features @ features[last])
        nearest = np.minimum(nearest, np.maximum(lengths + lengths[last] - 2 * products, 0))
        nearest[chosen] = 0
        chosen.append(int(rng.choice(len(nearest), p=nearest / nearest.sum())))
    return np.asarray(chosen)


def _spread(_: np.ndarray, features: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Photos each of which is farthest from those before it (k-center)."""
    similar = _cosines(features)
    chosen = [int(rng.integers(len(features)))]
    while len(chosen) < count:
        chosen.append(int(similar[chosen].max(axis=0).argmin()))
    return np.asarray(chosen)


def _cosines(features: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit @ unit.T


RULES: dict[str, Rule] = {
    CHANCE: lambda probabilities, _, count, rng: rng.permutation(len(probabilities))[:count],
    "uncertainty alone: smallest margin": lambda probabilities, _f, count, _r: rank_by_doubt(probabilities)[:count],
    "stand for the 5 x least sure": _cover_least_sure(5),
    "coverage alone: stand for the pool": lambda _p, features, count, _r: np.asarray(cover(features, count)[0]),
    "stand for the 3 x least sure": _cover_least_sure(3),
    "stand for the 10 x least sure": _cover_least_sure(10),
    "stand for the pool, weighted by uncertainty": _cover_by_doubt,
    "BADGE": _spread_gradients,
    "coverage alone: far apart (k-center)": _spread,
}


@dataclass(frozen=True)
class Photos:
    """Features and labels, cut in three."""

    name: str
    features: np.ndarray  # (N, F)
    labels: np.ndarray  # (N,)
    pool: np.ndarray  # rows to choose from
    choosing: np.ndarray  # rows that choose the rule
    judging: np.ndarray  # rows that took no part in any choice

    @classmethod
    def load(cls, data: Path, folder: Path) -> Photos:
        """Compute the features of a data set's photos that are not of its test set, or read what was computed."""
        trial = Trial(data, folder)
        parts = np.split(stratified_order(trial.labels, seed=0), [int(share * len(trial.labels)) for share in SHARES])
        return cls(data.stem, trial.features(POOLED, NETWORK), trial.labels, *parts)


def label_by(rule: Rule, photos: Photos, start: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose in rounds; return whether each choosing and each judging photo is right, (ROUNDS + 1, N) each."""
    rng = np.random.default_rng([seed, start])
    features, labels, pool = photos.features, photos.labels, photos.pool
    known = pool[stratified_order(labels[pool], seed=seed)][:start]
    strengths: dict[str, tuple[float, ...]] = {}
    right: list[np.ndarray] = []
    for _ in range(ROUNDS + 1):
        folds = make_folds(labels[known], [""] * len(known), folds=3, seed=seed)
        head = fit_head(features[known], labels[known], folds, num_classes=int(labels.max()) + 1, **strengths)
        strengths = {"strengths": (head.l2,)}  # chosen once: a grid step is a factor of ten
        logits = features @ head.weight.numpy().T + head.bias.numpy()
        right.append(logits.argmax(1) == labels)
        rest = np.setdiff1d(pool, known)
        temperature = fit_temperature(log_probabilities(head.out_of_fold), labels[known])
        chosen = rule(apply_temperature(logits[rest], temperature), features[rest], COUNT, rng)
        known = np.concatenate([known, rest[chosen]])
    both = np.stack(right)
    return both[:, photos.choosing], both[:, photos.judging]


def measure(photos: Photos, start: int, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return by rule whether photos are right, (SEEDS, ROUNDS + 1, N), of those that choose and those that judge."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, rule in RULES.items():
        runs: list[tuple[np.ndarray, np.ndarray]] = []
        for seed in range(SEEDS):
            file = folder / f"{photos.name}-{start}-{name.replace(' ', '_').replace(':', '')}-{seed}.npz"
            if not file.is_file():
                choosing, judging = label_by(rule, photos, start, seed)
                np.savez(file, choosing=choosing, judging=judging)
            with np.load(file) as stored:
                runs.append((stored["choosing"], stored["judging"]))
        choosing, judging = (np.stack(part) for part in zip(*runs, strict=True))
        print(f"{photos.name}, {name}: {choosing[:, 1:].mean():.4f}", flush=True)
        found[name] = choosing, judging
    return found


def summarize(photos: Photos, start: int, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Return a row for each rule: accuracies, the gain over chance, and the labels to reach where chance ends."""
    rows: list[dict[str, Any]] = []
    counts = start + COUNT * np.arange(ROUNDS + 1)
    goal = found[CHANCE][1][:, -1].mean()
    for name, (choosing, judging) in found.items():
        scores = [part[1][:, 1:].mean(axis=1) for part in (found[CHANCE], found[name])]
        gain = paired_difference(*scores, level=0.95).interval
        curve = judging.mean(axis=(0, 2))
        reached = float(np.interp(goal, np.maximum.accumulate(curve), counts)) if curve.max() >= goal else None
        rows.append(
            {"data": photos.name, "photos": len(photos.judging), "rule": name, "labels": counts.tolist()}
            | {"choosing": float(choosing[:, 1:].mean()), "top1": curve.tolist()}
            | {"gain": gain.estimate, "low": gain.low, "high": gain.high, "reached": reached}
        )
    return rows


def choose_rule(rows: list[dict[str, Any]]) -> str:
    """Return the rule with the highest mean over the data sets on the photos that choose."""
    return max(RULES, key=lambda name: sum(row["choosing"] for row in rows if row["rule"] == name))


def write_page(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a page."""
    best = choose_rule(rows)
    lines = [
        "# Which photos to label next",
        "",
        f"Accuracy against the number of labels, {COUNT} more in each of {ROUNDS} rounds, mean of {SEEDS} seeds. A",
        f"converged head on frozen features of EfficientNet-Lite0 ({POOLED} pooling), calibrated on its out-of-fold",
        f"answers, chooses photos of a pool: {SHARES[0]:.0%} of the photos that are not of the test set. Half of the",
        "others chose the rule, by the mean accuracy after each round over the data sets (column *Chose*). The other",
        "half took no part in any choice, and all other columns are of it. Gains over chance are means over the",
        "rounds, with 95 % intervals over photos and seeds. *Labels* is how many a rule needs for the accuracy that",
        "chance reaches at the end. `python -m experiments.labels` writes this page.",
        "",
        f"**The rule that chose itself so, and that `fieldmark suggest` follows: {best}.**",
    ]
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name]
        counts: list[int] = own[0]["labels"]
        lines += [
            "",
            f"## {name}, judged on {own[0]['photos']} photos",
            "",
            f"| Rule | Chose | {' | '.join(f'{count} labels' for count in counts)} | Gain in points | Labels |",
            f"| --- | ---: | {' | '.join('---:' for _ in counts)} | --- | ---: |",
        ]
        for row in own:
            gain, low, high = (100 * row[key] for key in ("gain", "low", "high"))
            rule = f"**{row['rule']}**" if row["rule"] == best else row["rule"]
            earned = "–" if row["rule"] == CHANCE else f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"
            reached = "not reached" if row["reached"] is None else f"{row['reached']:.0f}"
            figures = " | ".join(f"{value:.3f}" for value in row["top1"])
            lines.append(f"| {rule} | {row['choosing']:.3f} | {figures} | {earned} | {reached} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page and its rows."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+", help="FOLDER:LABELS, the photos and the number of labels to begin with")
    settings = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for given in settings.data:
        path, _, start = given.rpartition(":")
        photos = Photos.load(Path(path), settings.features)
        rows += summarize(photos, int(start), measure(photos, int(start), settings.features))
    write_results(settings.out, rows, write_page(rows))


if __name__ == "__main__":
    main()
