"""What each part of the strong recipe earns, one change at a time, on several data sets.

    python -m experiments.choices birds100 clothing10 signs10 elpv.csv --runs sweeps/choices --out docs/choices.md
    python -m experiments.choices birds100 clothing10 signs10 elpv.csv --fold 1      (and 2: what fold 0 left open)

Each data set is a folder of photos or a table; `python -m experiments.choices --cells elpv.csv` writes that of the
demo's solar cells. Cells that are trained already are read, so an interrupted run goes on. Test photos are left out,
the last epoch is taken, and nothing is chosen on the photos that evaluate.
"""

from __future__ import annotations

import argparse
import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.pages import METRICS, Gain, begin_gains, mean_gain, show_gains, write_results
from fieldmark.demo import write_table
from fieldmark.files import digest_file
from fieldmark.runs.environment import processor_name
from fieldmark.study.compare import compare_runs
from fieldmark.study.sweep import run_sweep

GRID = Path(__file__).parent / "grids" / "choices.toml"
BASE = "strong"

INTRODUCTION = """\
What one change of the strong recipe does on each data set: EfficientNet-Lite0, trained at 96 pixels and shown 128,
three epochs after the probe, nothing chosen on the photos that evaluate, one thread of an {processor} beside other
work. Folds of three: each change was tried on the first, and again on the second and third, with a seed each, where
the mean over the data sets left its effect open. Differences on the same photos with 95 % intervals. The values of a
change on three folds spread more, or less, than the choice of photos explains; where it is more, by the factor above
a table, all its intervals are wider by that factor, and so cover the chance of training too. The mean counts each
data set alike. So few epochs favor what learns fast. `python -m experiments.choices` writes this page and
choices.json, where each run has the digest of its weights.
"""

READING = """\
## What the recipes take from it

Frozen BatchNorm, the probe first and a low rate for the backbone stay: BatchNorm that learns costs up to 16 points, no
probe up to 9, the high rate a point in the mean. In so few epochs mixing costs a point in the mean: time budgets mix
from ten epochs on, and `check` says so; the strong recipe, which has thirty, keeps it. Larger training images lower
the log loss, for sure on three, so sizes are what time is spent on once epochs are enough. A policy costs points if
anything, and is off. Mirror images, erasing, label smoothing, the head, the average, the whole photo and frozen stages
make no difference of more than 1.3 points in the mean, and none for sure on any data set: there the recipes stay as
they were. Smoothing costs log loss until the temperature is calibrated.

One fold and seed mislead. On the first fold alone, whose intervals hold the choice of photos and nothing else, mirror
images helped birds and clothes and hurt solar cells, and erasing helped clothes and hurt solar cells, each for sure.
Three folds leave none of it: the chance of training is larger than that of the photos.
"""


def train(data: Path, out: Path, *, fold: int, changes: Collection[str] | None, jobs: int) -> list[Path]:
    """Train what is not trained yet, and return the run folders, the unchanged recipe first.

    A fold is which third of the photos evaluates, and the seed of its runs; changes are names of cells, None is all.
    """
    grid = tomllib.loads(GRID.read_text(encoding="utf-8")) | {"seeds": [fold]}
    grid["cells"] = [cell for cell in grid["cells"] if changes is None or cell["name"] in {BASE, *changes}]
    status = run_sweep(grid, out, data=data, overrides=[f"data.fold={fold}"], jobs=jobs, on_status=lambda _: None)
    for cell in status.failed:
        print(f"{data.stem} {cell.name}: {cell.error}", flush=True)
    if not any(run.name == BASE for run in status.runs):
        raise SystemExit(f"{data.stem}: the unchanged recipe could not be trained, so nothing can be compared with it")
    return sorted(status.runs, key=lambda run: run.name != BASE)


def measure(name: str, fold: int, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each change: accuracy, what it earned with its interval, minutes, and the run's digest."""
    by_metric = {metric: compare_runs(runs, metric=metric, against=runs[0]) for metric in ("top1", "log_loss")}
    rows: list[dict[str, Any]] = []
    for number, variant in enumerate(by_metric["top1"].variants):
        run = variant.runs[0]
        row: dict[str, Any] = {
            "data": name,
            "fold": fold,
            "cell": run.name,
            "change": variant.name if number else "none",
        }
        row |= {"photos": len(run.labels), "top1": variant.interval.estimate, "minutes": run.summary["seconds"] / 60}
        row["weights_sha256"] = digest_file(run.path / "best.safetensors")
        for metric, found in by_metric.items():
            pair = found.pairs[number - 1].difference.interval if number else None
            row[f"{metric}_gain"] = [pair.estimate, pair.low, pair.high] if pair else None
        rows.append(row)
    return rows


def group_gains(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, dict[str, list[Gain]]]:
    """What each change earned on each data set, a gain for each fold."""
    found: dict[str, dict[str, list[Gain]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if gain := row[f"{metric}_gain"]:
            found[row["change"]][row["data"]].append(gain)
    return found


def find_spread(found: dict[str, dict[str, list[Gain]]]) -> float:
    """By how much gains on several folds spread more than their intervals say; 1 where that is less, or not known.

    The square root of the mean squared deviation in units of the interval: the ratio of R. T. Birge, The calculation
    of errors by the method of least squares, 1932.
    """
    square, freedom = 0.0, 0
    for gains in (gains for data in found.values() for gains in data.values() if len(gains) > 1):
        mean = mean_gain(gains)[0]
        square += sum((1.96 * (gain[0] - mean) / ((gain[2] - gain[1]) / 2)) ** 2 for gain in gains)
        freedom += len(gains) - 1
    return max(math.sqrt(square / freedom), 1.0) if freedom else 1.0


def widen(gains: Sequence[Gain], spread: float) -> Gain | None:
    """The mean over folds with an interval that is wider by a factor; None without gains."""
    if not gains:
        return None
    estimate, low, high = mean_gain(gains)
    return [estimate, estimate - spread * (estimate - low), estimate + spread * (high - estimate)]


def find_open(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The cells whose effect on accuracy, in the mean over data sets, fold 0 leaves open."""
    found = group_gains([row for row in rows if row["fold"] == 0], "top1")
    means = {change: mean_gain([gains[0] for gains in data.values()]) for change, data in found.items()}
    undecided = {change for change, (_, low, high) in means.items() if low <= 0 <= high}
    return {row["cell"] for row in rows if row["change"] in undecided}


def write_page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a page: for each metric a table of changes by data sets."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    base = {row["data"]: row for row in rows if row["change"] == "none" and row["fold"] == 0}
    lines = [
        "# Our choices on several data sets",
        "",
        INTRODUCTION.format(processor=processor_name()),
        "| Data | Photos of a fold | Top-1 of the strong recipe | Minutes |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in names:
        lines.append(f"| {name} | {base[name]['photos']} | {base[name]['top1']:.3f} | {base[name]['minutes']:.1f} |")
    for metric in METRICS:
        found = group_gains(rows, metric)
        spread = find_spread(found)
        table: list[tuple[float, str]] = []
        for change, data in found.items():
            gains = [widen(data[name], spread) for name in names]
            folds = max(len(data[name]) for name in names)
            title = change + (f" ({folds} folds)" if folds > 1 else "")
            table.append((-mean_gain([gain for gain in gains if gain])[0], show_gains(title, gains, metric)))
        heading = begin_gains(metric, names)
        lines += [
            *heading[:2],
            "",
            f"Intervals are {spread:.2f} times as wide as the photos alone would have them.",
            *heading[2:],
        ]
        lines += [text for _, text in sorted(table)]
    lines += ["", READING.rstrip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure, and write the page and its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path)
    parser.add_argument("--cells", type=Path, help="write the table of the demo's solar cells, and end")
    parser.add_argument("--runs", type=Path, default=Path("sweeps/choices"))
    parser.add_argument("--out", type=Path, default=Path("docs/choices.md"), help="the rows go beside it as JSON")
    parser.add_argument("--fold", type=int, default=0, choices=(0, 1, 2), help="its runs join those of the page")
    parser.add_argument("--jobs", type=int, default=1)
    settings = parser.parse_args()
    if settings.cells:
        write_table(settings.cells)
        return
    kept = settings.out.with_suffix(".json")
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    tried = {row["data"] for row in rows if row["fold"] == 0}
    if settings.fold and (missing := [data.stem for data in settings.data if data.stem not in tried]):
        parser.error(f"fold 0 says what is open, and was not run on {', '.join(missing)}")
    changes = find_open(rows) if settings.fold else None
    for data in settings.data:
        out = settings.runs / (f"{data.stem}-fold-{settings.fold}" if settings.fold else data.stem)
        runs = train(data, out, fold=settings.fold, changes=changes, jobs=settings.jobs)
        rows = [row for row in rows if (row["data"], row["fold"]) != (data.stem, settings.fold)]
        rows += measure(data.stem, settings.fold, runs)
        write_results(settings.out, rows, write_page(rows))


if __name__ == "__main__":
    main()
