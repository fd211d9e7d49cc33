"""A comparison in words that claim no more than the numbers."""

from __future__ import annotations

from typing import Literal

from fieldmark.experiment.statistics import Difference

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
