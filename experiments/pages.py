"""What the experiments' command lines and pages share: options, results that are written, and tables of gains."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = {"top1": ("Top-1, points", 100.0, 1), "log_loss": ("Log loss, nats (less is better: shown negated)", 1.0, 3)}

Gain = list[float]
"""Estimate, low and high end of a 95 % interval."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of an experiment that keeps features; `description` is the module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the page; the rows go beside it as JSON")
    parser.add_argument("--features", type=Path, required=True, help="folder for what was computed")
    return parser


def write_results(out: Path, rows: Sequence[dict[str, Any]], page: str) -> None:
    """Write a page, and its rows beside it."""
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    out.write_text(page, encoding="utf-8")


def mean_gain(gains: Sequence[Gain]) -> Gain:
    """Mean over data sets, each of which counts alike, with the interval of independent errors."""
    estimate = sum(gain[0] for gain in gains) / len(gains)
    half = math.sqrt(sum(((gain[2] - gain[1]) / 2) ** 2 for gain in gains)) / len(gains)
    return [estimate, estimate - half, estimate + half]


def judge(gains: Sequence[Gain], mean: Gain) -> str:
    """Say in a few words what the intervals allow."""
    helps, hurts = sum(gain[1] > 0 for gain in gains), sum(gain[2] < 0 for gain in gains)
    if helps and hurts:
        return f"helps on {helps}, hurts on {hurts}"
    if helps == len(gains) or hurts == len(gains):
        return "helps on all" if helps else "hurts on all"
    if mean[1] > 0 or mean[2] < 0:
        where = f", for sure on {helps or hurts}" if helps or hurts else ""
        return ("helps" if mean[1] > 0 else "hurts") + " in the mean" + where
    if helps or hurts:
        return f"{'helps' if helps else 'hurts'} on {helps or hurts}"
    return "not distinguishable"


def begin_gains(metric: str, data: Sequence[str]) -> list[str]:
    """The heading of a table of what changes earn on several data sets."""
    head = f"| Change | {' | '.join(data)} | Mean | Verdict |"
    return ["", f"## {METRICS[metric][0]}", "", head, f"| --- |{' --- |' * (len(data) + 2)}"]


def show_gains(change: str, gains: Sequence[Gain | None], metric: str) -> str:
    """A row of that table; None where a data set was not run."""
    _, scale, digits = METRICS[metric]
    known = [gain for gain in gains if gain]
    mean, cells = mean_gain(known), list[str]()
    for gain in [*gains, mean]:
        shown = [f"{scale * value:+.{digits}f}" for value in gain or ()]
        cells.append("{} ({} to {})".format(*shown) if shown else "not run")
    verdict = judge(known, mean) + ("" if len(known) == len(gains) else f" of {len(known)}")
    return f"| {change.replace('_', chr(92) + '_')} | {' | '.join(cells)} | {verdict} |"
