"""What each part of the strong recipe earns, one change at a time, on several data sets.

    python -m experiments.choices birds100 clothing10 signs10 elpv.csv --runs sweeps/choices --out docs/choices.md

Each data set is a folder of photos or a table; `python -m experiments.choices --cells elpv.csv` writes that of the
demo's solar cells. Cells that are trained already are read, so an interrupted run goes on. Test photos are left out,
the last epoch is taken, and nothing is chosen on the photos that evaluate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.pages import METRICS, begin_gains, mean_gain, show_gains, write_results
from fieldmark.demo import write_table
from fieldmark.files import digest_file
from fieldmark.runs.environment import processor_name
from fieldmark.study.compare import compare_runs
from fieldmark.study.sweep import run_sweep

GRID = Path(__file__).parent / "grids" / "choices.toml"
BASE = "strong"

INTRODUCTION = """\
What one change of the strong recipe does on each data set: EfficientNet-Lite0, trained at 96 pixels and shown 128,
three epochs after the probe, one fold of three evaluated, one seed, nothing chosen on it, one thread of an
{processor} beside other work. Differences on the same photos with 95 % intervals, which cover the choice of photos
and not the chance of training. The mean counts each data set alike. So few epochs favor what learns fast. `python -m
experiments.choices` writes this page and choices.json, where each run has the digest of its weights.
"""

READING = """\
## What the recipes take from it

Frozen BatchNorm, the probe first, no policy and a linear head stay: none of their opposites helps in the mean, and
BatchNorm that learns costs up to 16 points, no probe up to 9. Larger training images lower the log loss
everywhere, so sizes are what time is spent on once epochs are enough. What goes by the data is left to the user:
mirror images, erasing and a high rate for the backbone help or hurt by points, and `fieldmark check` asks about the
first where classes look like signs. In so few epochs mixing costs more than it earns, if anything: time budgets mix
from ten epochs on, and `check` says so. Label smoothing costs log loss until the temperature is calibrated, and no
points for sure.
"""


def train(data: Path, out: Path, *, jobs: int) -> list[Path]:
    """Train what is not trained yet, and return the run folders, the unchanged recipe first."""
    status = run_sweep(GRID, out, data=data, jobs=jobs, on_status=lambda _: None)
    for cell in status.failed:
        print(f"{data.stem} {cell.name}: {cell.error}", flush=True)
    return sorted(status.runs, key=lambda run: run.name != BASE)


def measure(name: str, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each change: accuracy, what it earned with its interval, minutes, and the run's digest."""
    by_metric = {metric: compare_runs(runs, metric=metric, against=runs[0]) for metric in ("top1", "log_loss")}
    rows: list[dict[str, Any]] = []
    for number, variant in enumerate(by_metric["top1"].variants):
        run = variant.runs[0]
        row: dict[str, Any] = {"data": name, "cell": run.name, "change": variant.name if number else "none"}
        row |= {"photos": len(run.labels), "top1": variant.interval.estimate, "minutes": run.summary["seconds"] / 60}
        row["weights_sha256"] = digest_file(run.path / "best.safetensors")
        for metric, found in by_metric.items():
            pair = found.pairs[number - 1].difference.interval if number else None
            row[f"{metric}_gain"] = [pair.estimate, pair.low, pair.high] if pair else None
        rows.append(row)
    return rows


def write_page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a page: for each metric a table of changes by data sets."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    base = {row["data"]: row for row in rows if row["change"] == "none"}
    lines = [
        "# Our choices on several data sets",
        "",
        INTRODUCTION.format(processor=processor_name()),
        "| Data | Photos evaluated | Top-1 of the strong recipe | Minutes |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in names:
        lines.append(f"| {name} | {base[name]['photos']} | {base[name]['top1']:.3f} | {base[name]['minutes']:.1f} |")
    changes = list(dict.fromkeys(row["change"] for row in rows if row["change"] != "none"))
    found = {(row["data"], row["change"]): row for row in rows}
    for metric in METRICS:
        table: list[tuple[float, str]] = []
        for change in changes:
            gains = [found[name, change][f"{metric}_gain"] if (name, change) in found else None for name in names]
            mean = mean_gain([gain for gain in gains if gain])
            table.append((-mean[0], show_gains(change, gains, metric)))
        lines += [*begin_gains(metric, names), *(text for _, text in sorted(table))]
    lines += ["", READING.rstrip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure, and write the page and its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path)
    parser.add_argument("--cells", type=Path, help="write the table of the demo's solar cells, and end")
    parser.add_argument("--runs", type=Path, default=Path("sweeps/choices"))
    parser.add_argument("--out", type=Path, default=Path("docs/choices.md"), help="the rows go beside it as JSON")
    parser.add_argument("--jobs", type=int, default=1)
    settings = parser.parse_args()
    if settings.cells:
        write_table(settings.cells)
        return
    rows: list[dict[str, Any]] = []
    for data in settings.data:
        rows += measure(data.stem, train(data, settings.runs / data.stem, jobs=settings.jobs))
        write_results(settings.out, rows, write_page(rows))


if __name__ == "__main__":
    main()
