"""How much a split by chance flatters where one person is on several photos: signs10, by near-duplicates and by person.

    python -m experiments.leakage signs10 --out docs/leakage.md --features features

218 people showed ten digits each, and their photos have consecutive numbers. A fold by chance has the same hand on both
sides, though never with the same digit. Heads on frozen features are cross-validated in folds by chance, in folds that
keep numbers of the same ten together (`data.group_by=pattern`), and in folds that keep a person together as far as the
numbers tell.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.heads import FOLDS, POOLED, Floats, Trial, average
from experiments.pages import make_parser, write_results
from fieldmark.budget.candidates import find_backbones
from fieldmark.budget.heads import fit_head
from fieldmark.budget.race import make_folds
from fieldmark.config import load_config
from fieldmark.runs.environment import processor_name, usable_cores
from fieldmark.training.metrics import wilson_interval

SEEDS = 5
NUMBER = re.compile(r"IMG_(\d+)")
PATTERN = r"IMG_(\d+)\d\.JPG"


def list_groups(trial: Trial) -> dict[str, list[str]]:
    """Groups of the photos by kind of split; "" is alone."""
    paths = [trial.dataset.index.photos[number].path for number in trial.numbers]
    found = [NUMBER.search(path) for path in paths]
    numbers = np.asarray([int(match[1]) if match else -1 for match in found])
    order = np.argsort(numbers, kind="stable")
    # A person begins where the digit does not rise: each showed the digits in order.
    person, people = 0, [""] * len(numbers)
    before = (-1, -1)
    for place in order:
        digit = int(trial.labels[place])
        if digit <= before[0] or numbers[place] > before[1] + 2:
            person += 1
        before = (digit, int(numbers[place]))
        people[place] = str(person)
    return {
        "by chance": [""] * len(numbers),
        "numbers of the same ten together (`data.group_by=pattern`)": [str(number // 10) for number in numbers],
        "each person together, as far as the numbers tell": people,
    }


def measure(trial: Trial, names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each kind of split: accuracy of the first backbone's head, and of the average of all."""
    features = [trial.features(POOLED, name) for name in names]
    num_classes = len(trial.dataset.index.classes)
    rows: list[dict[str, Any]] = []
    for kind, groups in list_groups(trial).items():
        scores: list[list[float]] = []
        for seed in range(SEEDS):
            folds = make_folds(trial.labels, groups, folds=FOLDS, seed=seed)
            answers = [fit_head(each, trial.labels, folds, num_classes=num_classes).out_of_fold for each in features]
            scores.append([top1(answers[0], trial), top1(average(answers), trial)])
        alone, together = np.asarray(scores).T
        low, high = wilson_interval(round(float(together.mean()) * len(trial.labels)), len(trial.labels))
        rows.append(
            {"split": kind, "groups": len(set(groups)), "photos": len(trial.labels), "top1_first": alone.tolist()}
            | {"top1_average": together.tolist(), "low": low, "high": high}
        )
    return rows


def top1(probabilities: Floats, trial: Trial) -> float:
    """Share of photos that are named right."""
    return float((probabilities.argmax(1) == trial.labels).mean())


def write_page(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the rows as a page."""
    lines = [
        "# What a split by chance hides",
        "",
        "Hand signs of ten digits, shown by 218 people, each digit once (signs10). Split by chance, the same hand is",
        f"on both sides. Does that flatter? Converged heads on frozen features, cross-validated in {FOLDS} folds,",
        f"{SEEDS} draws of the folds; {usable_cores()} cores of an {processor_name()}. `python -m experiments.leakage` "
        "writes this page.",
        "",
        f"| Split | Groups | Top-1, {names[0]}, mean (range) | Top-1, average of {len(names)} backbones, mean (range) "
        "| 95 % interval of the photos |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{np.mean(row[key]):.3f} ({min(row[key]):.3f} to {max(row[key]):.3f})"
            for key in ("top1_first", "top1_average")
        ]
        groups = row["groups"] if row["groups"] > 1 else "–"
        lines.append(f"| {row['split']} | {groups} | {cells[0]} | {cells[1]} | {row['low']:.3f} to {row['high']:.3f} |")
    first, last = (float(np.mean(row["top1_average"])) for row in (rows[0], rows[-1]))
    lines += [
        "",
        f"By chance {100 * (1 - first):.1f} % are wrong, with each person on one side {100 * (1 - last):.1f} %: the "
        + (
            f"split by chance flatters by {100 * (first - last):.1f} points."
            if first - last > 0.005
            else "split by chance does not"
        ),
    ]
    if first - last <= 0.005:
        lines += [
            "flatter here. A known hand gives no digit away, as it was seen with nine others. It would where photos of",
            "one thing are of one class: several of one animal, plant, part or scene. `check` names near-duplicates",
            "on both sides, and `data.group_by` keeps together what belongs together, by folder, column or pattern.",
            "Where that is not needed, as here, it costs nothing.",
        ]
    lines += [
        "",
        "The same for a training of your own:",
        "",
        "```text",
        f"fieldmark train signs10 --minutes 3 --set data.group_by=pattern --set 'data.group_pattern={PATTERN}'",
        "```",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page and its rows."""
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path, help="the folder signs10")
    settings = parser.parse_args()
    names = [one.name for one in find_backbones(load_config(None, []))]
    rows = measure(Trial(settings.data, settings.features), names)
    write_results(settings.out, rows, write_page(rows, names))


if __name__ == "__main__":
    main()
