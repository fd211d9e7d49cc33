"""Classes with few photos beside classes with many: weights and prior correction, measured on frozen features.

    python -m experiments.uneven birds100 clothing10 --out docs/uneven.md --features features

birds100 is drawn unevenly: its classes keep from all of their photos down to a few, by a geometric row. clothing10 is
uneven as it is. Heads are converged and cross-validated. A photo's weight is the largest class's count over its own
class's, to a power; rounded, since a head on repeated photos is the head with that weight, which a sampler gives too.
Prior correction divides the answers by the class shares of training, to a power (Menon et al., arXiv:2007.07314).

Shape letters: N photos, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.heads import FOLDS, POOLED, Floats, Trial
from experiments.pages import make_parser, write_results
from fieldmark.budget.candidates import find_backbones
from fieldmark.budget.heads import fit_head
from fieldmark.budget.race import make_folds
from fieldmark.config import load_config
from fieldmark.runs.environment import processor_name, usable_cores
from fieldmark.study.statistics import paired_difference

LEAST = 4
"""Photos that the smallest class of an uneven draw keeps."""

Numbers = NDArray[np.int64]


def draw_uneven(labels: Numbers) -> Numbers:
    """(N,) places of an uneven draw: class by class, in an order of chance, fewer photos, down to `LEAST`."""
    rng = np.random.default_rng(0)
    counts = np.bincount(labels)
    wanted = np.geomspace(counts.min(), LEAST, len(counts)).round().astype(int)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(rng.permutation(len(counts)), wanted, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def answer(features: Floats, labels: Numbers, folds: Numbers, power: float) -> Floats:
    """(N, K) out-of-fold probabilities of heads that weigh each photo by its class's rarity to a power."""
    counts = np.bincount(labels)
    repeats = np.maximum(((counts.max() / counts) ** power).round().astype(int), 1)[labels]
    rows = np.repeat(np.arange(len(labels)), repeats)
    head = fit_head(features[rows], labels[rows], folds[rows], num_classes=len(counts))
    first = np.concatenate([[0], np.cumsum(repeats)[:-1]])
    return head.out_of_fold[first]


def correct(probabilities: Floats, labels: Numbers, power: float) -> Floats:
    """(N, K) probabilities divided by the class shares to a power."""
    shares = np.bincount(labels) / len(labels)
    found = probabilities / shares**power
    return (found / found.sum(1, keepdims=True)).astype(np.float32)


def measure(trial: Trial, name: str, *, is_drawn: bool) -> list[dict[str, Any]]:
    """Return a row for each way: top-1 and macro recall, and their differences from plain heads."""
    places = draw_uneven(trial.labels) if is_drawn else np.arange(len(trial.labels))
    features, labels = trial.features(POOLED, name)[places], trial.labels[places]
    counts = np.bincount(labels)
    folds = make_folds(labels, [""] * len(labels), folds=FOLDS, seed=0)
    plain = answer(features, labels, folds, 0.0)
    ways = {"plain": plain}
    ways |= {f"weights to the power {power}": answer(features, labels, folds, power) for power in (0.5, 1.0)}
    ways |= {f"prior correction to the power {power}": correct(plain, labels, power) for power in (0.5, 1.0)}
    by_photo = {"top1": np.ones(len(labels)), "macro_recall": len(labels) / len(counts) / counts[labels]}
    rows: list[dict[str, Any]] = []
    for way, found in ways.items():
        row: dict[str, Any] = {"data": trial.data.stem + (", drawn unevenly" if is_drawn else ""), "way": way}
        row |= {"photos": len(labels), "smallest": int(counts.min()), "largest": int(counts.max())}
        for metric, weights in by_photo.items():
            hits = [(each.argmax(1) == labels) * weights for each in (plain, found)]
            gain = paired_difference(hits[0][None], hits[1][None], level=0.95).interval
            row |= {metric: float(hits[1].mean()), f"{metric}_gain": [gain.estimate, gain.low, gain.high]}
        rows.append(row)
    return rows


def write_page(rows: list[dict[str, Any]], name: str) -> str:
    """Return the rows as a page."""
    lines = [
        "# Classes of uneven sizes",
        "",
        f"Converged heads on frozen features of {name}, cross-validated in {FOLDS} folds, one seed, {usable_cores()} "
        f"cores of an {processor_name()}.",
        "Differences from plain heads in points, with 95 % intervals; macro recall counts every class alike. A photo's "
        "weight is",
        "(largest class / its class) to the power given; prior correction divides the answers by the class shares of "
        "training.",
        "`python -m experiments.uneven` writes this page.",
        "",
        "| Data | Photos of a class | Way | Top-1 | Change | Macro recall | Change |",
        "| --- | --- | --- | ---: | --- | ---: | --- |",
    ]
    for row in rows:
        cells: list[str] = []
        for metric in ("top1", "macro_recall"):
            estimate, low, high = (100 * value for value in row[f"{metric}_gain"])
            is_base = row["way"] == "plain"
            cells += [f"{row[metric]:.3f}", "–" if is_base else f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"]
        lines.append(f"| {row['data']} | {row['smallest']} to {row['largest']} | {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page and its rows."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+", type=Path, help="birds100 is drawn unevenly, others stay as they are")
    settings = parser.parse_args()
    name = find_backbones(load_config(None, []))[0].name
    rows: list[dict[str, Any]] = []
    for data in settings.data:
        rows += measure(Trial(data, settings.features), name, is_drawn=data.stem == "birds100")
    write_results(settings.out, rows, write_page(rows, name))


if __name__ == "__main__":
    main()
