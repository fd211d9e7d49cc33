"""Results within budgets: medians over seeds, our errors beside those of the best peer, a table and a chart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.record import Findings, Ratio

if TYPE_CHECKING:
    from benchmarks.labeled import DataSet

OURS, OURS_ALONE, HAND = "ours", "ours, Lite0 alone", "scikit-learn on features"

GRACE_SHARE, GRACE_SECONDS = 0.02, 5.0
"""A result that comes later than this is late, and does not count."""

Row = dict[str, Any]
"""One result, as the JSON file holds it: see `make_row`."""


def make_row(
    contender: str, data: DataSet, minutes: float, seed: int, *, seconds: float, right: int, plan: Mapping[str, Any]
) -> Row:
    """One result, as the JSON file holds it."""
    from fieldmark.training.metrics import wilson_interval

    photos = len(data.truth)
    return {
        "contender": contender,
        "data": data.name,
        "minutes": 0 if contender == HAND else minutes,
        "seed": seed,
        "seconds": round(seconds, 2),
        "top1": right / photos,
        "interval": [round(bound, 4) for bound in wilson_interval(right, photos)],
        "photos": photos,
        "plan": dict(plan),
    }


def is_late(row: Row) -> bool:
    """Whether a result came too late for its budget."""
    budget = 60 * row["minutes"]
    return bool(budget) and row["seconds"] > budget * (1 + GRACE_SHARE) + GRACE_SECONDS


def scores_at(rows: Sequence[Row], data: str, minutes: float, contender: str) -> list[float]:
    """Top-1 of each seed of a contender within a budget; empty where nothing came in time.

    A result without a budget counts for every budget above the time that it took.
    """
    found: list[float] = []
    for row in rows:
        if (row["data"], row["contender"]) == (data, contender):
            limit = 60 * minutes * (1 + GRACE_SHARE) + GRACE_SECONDS
            if row["minutes"] in (0, minutes) and row["seconds"] <= limit:
                found.append(row["top1"])
    return found


def describe(rows: Sequence[Row]) -> Findings:
    """Medians over seeds, and our errors beside those of the best peer at each budget."""
    findings = Findings()
    data_names, budgets, contenders = _axes(rows)
    errors: dict[float, list[tuple[float, float]]] = {}
    for data in data_names:
        for minutes in budgets:
            title = f"{data}, {minutes:g} min"
            medians: dict[str, float] = {}
            for name in contenders:
                if scores := scores_at(rows, data, minutes, name):
                    medians[name] = statistics.median(scores)
                    findings.add(f"{title}: {name}", medians[name], "top-1 accuracy")
                    findings.spread[f"{title}: {name}"] = (min(scores), max(scores))
            peers = {name: score for name, score in medians.items() if name not in (OURS, OURS_ALONE)}
            if OURS in medians and peers:
                best = max(peers, key=lambda name: peers[name])
                pair = (1 - medians[OURS], 1 - peers[best])
                errors.setdefault(minutes, []).append(pair)
                _add_errors(findings, title, pair, f"best peer ({best})", target=1.0)
    for minutes, pairs in errors.items():
        if len(pairs) > 1:
            means = (statistics.fmean(ours for ours, _ in pairs), statistics.fmean(peer for _, peer in pairs))
            _add_errors(findings, f"mean of {len(pairs)} data sets, {minutes:g} min", means, "best peer", target=1.25)
    for minutes in budgets:
        findings.rounds[f"{minutes:g} min"] = len({row["seed"] for row in rows if row["minutes"] == minutes})
    return findings


def _add_errors(findings: Findings, title: str, pair: tuple[float, float], peer: str, *, target: float) -> None:
    ours, theirs = pair
    findings.add(f"{title}: error of ours", ours, "share of test photos")
    findings.add(f"{title}: error of the {peer}", theirs, "share of test photos")
    if ours:
        findings.ratios[f"{title}: error of the best peer / ours"] = Ratio(
            f"{title}: error of the {peer}", f"{title}: error of ours", target
        )


def _axes(rows: Sequence[Row]) -> tuple[list[str], list[float], list[str]]:
    """Data sets in the order of the rows, budgets from small to large, and contenders by name, ours first."""
    first = (OURS, OURS_ALONE, HAND)
    names = sorted({row["contender"] for row in rows})
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    return (
        list(dict.fromkeys(row["data"] for row in rows)),
        sorted({row["minutes"] for row in rows} - {0}),
        names,
    )


def format_table(rows: Sequence[Row]) -> Iterator[str]:
    """The medians as a Markdown table, one row for each contender on each data set."""
    from benchmarks.tables import table

    data_names, budgets, contenders = _axes(rows)
    lines: list[list[str]] = []
    for data in data_names:
        for name in contenders:
            cells = [_cell(rows, data, minutes, name) for minutes in budgets]
            if any(cells):
                lines.append([data, name, *cells, _seconds_taken(rows, data, name)])
    yield from table(["data", "", *(f"{minutes:g} min" for minutes in budgets), "seconds taken"], lines)


def _cell(rows: Sequence[Row], data: str, minutes: float, name: str) -> str:
    """Median, with the Wilson interval of one seed or the range of several."""
    here = [row for row in rows if (row["data"], row["contender"], row["minutes"]) == (data, name, minutes)]
    scores = scores_at(rows, data, minutes, name)
    if not scores:
        return "late" if here else ""
    late = f", {sum(map(is_late, here))} late" if any(map(is_late, here)) else ""
    if len(scores) > 1:
        return f"{statistics.median(scores):.3f} ({min(scores):.3f} to {max(scores):.3f}, {len(scores)} seeds{late})"
    row = next(row for row in rows if (row["data"], row["contender"]) == (data, name) and row["top1"] == scores[0])
    low, high = row["interval"]
    return f"{scores[0]:.3f} ({low:.3f} to {high:.3f}{late})"


def _seconds_taken(rows: Sequence[Row], data: str, name: str) -> str:
    by_budget: dict[float, list[float]] = {}
    for row in rows:
        if (row["data"], row["contender"]) == (data, name):
            by_budget.setdefault(row["minutes"], []).append(row["seconds"])
    return ", ".join(f"{statistics.median(seconds):.0f}" for _, seconds in sorted(by_budget.items()))


def format_summary(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracy on the test photos of all data sets together as a Markdown table, one row for each contender.

    A cell stays empty where a contender was not measured on every data set, and so does a budget without any number.
    """
    from benchmarks.tables import table

    data_names, budgets, contenders = _axes(rows)
    photos = {row["data"]: row["photos"] for row in rows}
    cells = {name: [_pooled(rows, photos, minutes, name) for minutes in budgets] for name in contenders}
    kept = [line for name, line in cells.items() if name != HAND]
    shown = [place for place in range(len(budgets)) if any("%" in line[place] for line in kept)]
    head = f"named right, of {sum(photos.values()):,} test photos of {len(data_names)} data sets"
    lines = [[_full_name(name), *(line[place] for place in shown)] for name, line in cells.items()]
    titles = [f"{budgets[place]:g} minute{'s' if budgets[place] != 1 else ''}" for place in shown]
    yield from table([head, *titles], [line for line in lines if any(line[1:])])


def _full_name(contender: str) -> str:
    return contender.replace(OURS, "Fieldmark", 1) if contender in (OURS, OURS_ALONE) else contender


def _pooled(rows: Sequence[Row], photos: Mapping[str, int], minutes: float, name: str) -> str:
    """Share of all photos named right, with its Wilson interval, or on how many data sets the answer came too late."""
    from fieldmark.training.metrics import wilson_interval

    scores = {data: scores_at(rows, data, minutes, name) for data in photos}
    run = {row["data"] for row in rows if row["contender"] == name and row["minutes"] in (0, minutes)}
    if late := [data for data in run if not scores[data]]:
        return f"late on {len(late)} of {len(run)}"
    if len(run) < len(photos):
        return ""
    right = sum(statistics.median(scores[data]) * count for data, count in photos.items())
    total = sum(photos.values())
    low, high = wilson_interval(round(right), total)
    return f"{right / total:.1%} ({100 * low:.1f} to {100 * high:.1f})".replace("%", " %")


def draw(rows: Sequence[Row]) -> str:
    """Accuracy against minutes as an SVG: one field for each data set, one line for each contender."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from fieldmark.plots import COLORS, dress, figure_svg, new_figure

    data_names, budgets, contenders = _axes(rows)
    columns = min(len(data_names), 2)
    figure = new_figure(4.6 * columns, 3.4 * math.ceil(len(data_names) / columns) + 0.6)
    fields = figure.subplots(math.ceil(len(data_names) / columns), columns, squeeze=False)
    for axes, data in zip(fields.flat, data_names, strict=False):
        for index, name in enumerate(contenders):
            if points := _points(rows, data, name):
                x, y = zip(*points, strict=True)
                color = COLORS[index % len(COLORS)]
                axes.plot(x, y, color=color, marker="o", markersize=3, linewidth=1.6, label=_full_name(name))
        dress(axes, data, "minutes", "top-1 accuracy")
        axes.set_xscale("log")
        axes.set_xticks(budgets)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in fields.flat[len(data_names) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes in fields.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    # A file stands alone: what a page gives a picture within it is said here.
    look = 'style="background: white; color: #22303c; font-family: sans-serif"'
    return figure_svg(figure, key="budget").replace("<svg", f"<svg {look}", 1) + "\n"


def _points(rows: Sequence[Row], data: str, name: str) -> list[tuple[float, float]]:
    """Minutes taken and top-1, in the median over seeds, for each budget."""
    groups: dict[float, list[Row]] = {}
    for row in rows:
        if (row["data"], row["contender"]) == (data, name):
            groups.setdefault(row["minutes"], []).append(row)
    return [
        (statistics.median(row["seconds"] / 60 for row in group), statistics.median(row["top1"] for row in group))
        for _, group in sorted(groups.items())
    ]
