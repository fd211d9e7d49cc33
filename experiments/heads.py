"""Converged heads on frozen features, cross-validated: what pooling earns on several data sets.

    python -m experiments.heads birds100 signs10 elpv.csv --out docs/pooling.md --features features

Each data set is a folder of photos or a table. Test photos are left out. What was computed before is kept in the folder
given by --features, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fieldmark.budget.candidates import Candidate, find_backbones
from fieldmark.budget.heads import fit_head
from fieldmark.budget.plan import Plan
from fieldmark.budget.race import Course, make_folds, stratified_order
from fieldmark.config import load_config
from fieldmark.progress import Quiet
from fieldmark.runs.dataset import prepare_dataset
from fieldmark.runs.environment import processor_name, usable_cores
from fieldmark.runs.session import setup_fabric
from fieldmark.runs.train import StopRequest
from fieldmark.study.statistics import paired_difference
from fieldmark.training.metrics import log_loss

FOLDS = 3
BEFORE = "average"
POOLS = (BEFORE, "covariance")


def out_of_fold(data: Path, pool: str, folder: Path, names: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return each backbone's (N, K) probabilities of the photos that are not of the test set, and their labels."""
    config = load_config(None, [f'data.path="{data.resolve().as_posix()}"', f'model.pool="{pool}"'])
    fabric, _ = setup_fabric(config)
    dataset = prepare_dataset(config.data, progress=Quiet())
    split = np.asarray([photo.split for photo in dataset.index.photos])
    numbers = np.flatnonzero((split != "test") & (dataset.labels >= 0))
    labels = dataset.labels[numbers]
    course_folder = folder / f"{data.stem}-{pool}"
    course_folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(course_folder / "plan.jsonl", 1e9)
    order = numbers[stratified_order(labels, seed=0)]
    course = Course(config, course_folder, plan, Quiet(), StopRequest(), dataset, fabric, order, numbers[:0])
    groups = [dataset.index.photos[number].group for number in numbers]
    folds = make_folds(labels, groups, folds=FOLDS, seed=0)
    found: dict[str, np.ndarray] = {}
    for backbone in (one for one in find_backbones(config) if not names or one.name in names):
        candidate = Candidate(backbone, backbone.picture.test_size, "whole")
        features = course.collect_features(candidate, numbers).select(numbers)
        found[candidate.key] = fit_head(features, labels, folds, num_classes=course.num_classes).out_of_fold
    if len(found) > 1:
        found["the average of all"] = np.mean(list(found.values()), axis=0)
    return found, labels


def compare(data: Path, folder: Path, names: list[str]) -> list[dict[str, object]]:
    """Return a row for each network: accuracy with both poolings, and the difference with its interval."""
    by_pool = {pool: out_of_fold(data, pool, folder, names) for pool in POOLS}
    rows: list[dict[str, object]] = []
    for name, before in by_pool[BEFORE][0].items():
        labels = by_pool[BEFORE][1]
        after = by_pool[POOLS[1]][0][name]
        hits = [(found.argmax(1) == labels).astype(np.float64)[None] for found in (before, after)]
        gain = paired_difference(*hits, level=0.95).interval
        rows.append(
            {"data": data.stem, "photos": len(labels), "network": name}
            | {f"top1_{pool}": float(hit.mean()) for pool, hit in zip(POOLS, hits, strict=True)}
            | {f"log_loss_{pool}": log_loss(found, labels) for pool, found in zip(POOLS, (before, after), strict=True)}
            | {"gain": gain.estimate, "low": gain.low, "high": gain.high}
        )
    return rows


def write_page(rows: list[dict[str, object]]) -> str:
    """Return the rows as a page."""
    lines = [
        "# What pooling earns",
        "",
        "Converged heads on frozen features of whole photos at each network's test size, cross-validated in "
        f"{FOLDS} folds of",
        f"the photos that are not of the test set. {usable_cores()} cores of an {processor_name()}, one seed. "
        "`python -m experiments.heads` writes this page.",
        "",
        "| Data | Photos | Network | Top-1, mean pooling | Top-1, covariance pooling | Gain in points, 95 % interval |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        gain, low, high = (100 * float(str(row[name])) for name in ("gain", "low", "high"))
        before, after = (float(str(row[f"top1_{pool}"])) for pool in POOLS)
        lines.append(
            f"| {row['data']} | {row['photos']} | {row['network']} | {before:.3f} | {after:.3f} | "
            f"{gain:+.1f} ({low:+.1f} to {high:+.1f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and write the page and its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the page; the rows go beside it as JSON")
    parser.add_argument("--features", type=Path, required=True, help="folder for what was computed")
    parser.add_argument("--network", action="append", default=[], help="only these, by timm's names; may be repeated")
    settings = parser.parse_args()
    rows = [row for data in settings.data for row in compare(data, settings.features, settings.network)]
    settings.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    settings.out.write_text(write_page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
