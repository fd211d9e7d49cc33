"""docs/performance.md from the records of the benchmarks: nothing in its tables is written by hand.

    python -m benchmarks.tables [--check]

The README's table of what minutes buy, and the chart beside it, are made here, too. What a reader should make of the
numbers is in `results/comments.toml`, one text for each benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
RESULTS = HOME / "benchmarks" / "results"
PAGE = HOME / "docs" / "performance.md"
README = HOME / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.tables -->\n\n", "\n<!-- end -->\n"
CHART = HOME / "docs" / "images" / "budget.svg"
ORDER = ("pipeline", "pipeline-amx", "train", "train-amx", "reach", "memory", "shards", "lists", "startup", "gpu",
         "inference", "serving", "budget", "budget-amx")  # fmt: skip
INTRODUCTION = """# Performance

Made by `python -m benchmarks.tables` from `benchmarks/results/*.json`; do not edit. `make bench` measures everything \
anew but budget, which takes hours; `python -m benchmarks.NAME --quick` is one benchmark within three minutes. Peers \
run beside us, in the same interleaved rounds; every number is a median, and the range over the rounds stands behind \
it. A ratio is larger where we are better, and met at its target or above. Every ratio can be recomputed from the two \
measurements that its row names.
"""


def load_records(folder: Path) -> list[dict[str, Any]]:
    """The records in a folder, in the order of the page, unknown ones last."""
    records: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if {"measured", "ratios", "targets"} <= set(record):
            records.append(record | {"benchmark": file.stem})  # of a second machine: budget-amx
    names = [*ORDER, *sorted(record["benchmark"] for record in records)]
    return sorted(records, key=lambda record: names.index(record["benchmark"]))


def page(records: Sequence[Mapping[str, Any]], comments: Mapping[str, str]) -> str:
    """The whole page, in Markdown."""
    lines = [INTRODUCTION, "## Targets", "", *_targets(records)]
    for record in records:
        lines += ["", *_section(record, comments.get(record["benchmark"], ""))]
    return "\n".join(lines).rstrip() + "\n"


def readme(text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The README with its table of what minutes buy made anew; as it is where that was not measured.

    Args:
        text: The README, with the table between `BEGIN` and `END`.
        records: Of all benchmarks.
    """
    from benchmarks.scoreboard import format_summary

    for record in records:
        if "rows" in record:
            before, _, rest = text.partition(BEGIN)
            _, _, after = rest.partition(END)
            return before + BEGIN + "\n".join(format_summary(record["rows"])) + "\n" + END + after
    return text


def _targets(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [
        [record["benchmark"], case, _number(record["ratios"][case]), _number(target), _verdict(record, case)]
        for record in records
        for case, target in record["targets"].items()
    ]
    yield from table(["benchmark", "ratio", "measured", "target", ""], rows)


def _verdict(record: Mapping[str, Any], case: str) -> str:
    return "met" if record["ratios"][case] >= record["targets"][case] else "**missed**"


def _section(record: Mapping[str, Any], comment: str) -> Iterator[str]:
    yield f"## {record['benchmark']}"
    yield ""
    yield from _circumstances(record)
    if comment:
        yield from ("", comment.strip())
    if "rows" in record:
        from benchmarks.scoreboard import format_table

        if record["benchmark"] == "budget":
            yield from ("", f"![Accuracy against minutes, one line for each contender](images/{CHART.name})")
        yield ""
        yield from format_table(record["rows"])
    values, units, spread = flatten(record["measured"]), record.get("units", {}), record.get("spread", {})
    yield ""
    yield from table(
        ["measured", "median", "range", "unit"],
        [[name, _number(value), _range(spread.get(name)), units.get(name, "")] for name, value in values.items()],
    )
    formulas = record.get("formulas", {})
    rows = [
        [case, _number(value), " / ".join(f"`{name}`" for name in formulas.get(case, ()))]
        for case, value in record["ratios"].items()
    ]
    yield ""
    yield from table(["ratio", "", "of"], rows)
    for title, shares in record.get("profiles", {}).items():
        yield ""
        parts = ", ".join(f"{place} {share:.0%}" for place, share in shares.items())
        yield f"Where the time of *{title}* goes: {parts}."
    notes = record.get("notes", ())
    if notes:
        yield ""
    for note in notes:
        yield f"- {note}"


def _circumstances(record: Mapping[str, Any]) -> Iterator[str]:
    hardware, versions = record["hardware"], record["versions"]
    machine = [f"{hardware.get('cores', '?')} cores of {hardware.get('processor', 'an unknown processor')}"]
    machine += [hardware["cpu_capability"]] if "cpu_capability" in hardware else []
    machine += [f"{hardware['memory_gigabytes']} GB"] if "memory_gigabytes" in hardware else []
    machine += hardware.get("gpus", [])
    if "command" in record:
        yield f"`{record['command']}` on {', '.join(machine)}; {_rounds(record['rounds'])}."
    else:
        yield f"On {', '.join(machine)}; {_rounds(record['rounds'])}."
    before, after = hardware.get("load_average_before"), hardware.get("load_average")
    if before and after:
        yield f"Processes that wanted a core, in the mean over a minute: {before[0]} before, {after[0]} after."
    told = ("python", "torch", "torchvision", "timm", "numpy", "pillow", "albumentations", "fastai")
    yield "Versions: " + ", ".join(f"{name} {versions[name]}" for name in told if name in versions) + "."


def _rounds(rounds: int | Mapping[str, int]) -> str:
    if isinstance(rounds, int):
        return f"{rounds} rounds"
    return (
        "; ".join(f"{name}: {count} round{'s' if count != 1 else ''}" for name, count in rounds.items()) or "one round"
    )


def flatten(measured: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by name, those of nested tables by both names."""
    flat: dict[str, float] = {}
    for name, value in measured.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}: ")
        else:
            flat[prefix + name] = value
    return flat


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table; nothing for no rows."""
    if not rows:
        return
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _range(spread: Sequence[float] | None) -> str:
    return f"{_number(spread[0])} to {_number(spread[1])}" if spread else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _write_chart(records: Sequence[Mapping[str, Any]]) -> None:
    """Draw what minutes buy, where that was measured."""
    from benchmarks.scoreboard import draw

    for record in records:
        if record["benchmark"] == "budget":
            CHART.write_text(draw(record["rows"]), encoding="utf-8")
            print(f"written to {CHART}")


def main() -> None:
    """Write the page, or say whether it is what the records make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    arguments = parser.parse_args()
    comments_file = RESULTS / "comments.toml"
    comments = tomllib.loads(comments_file.read_text(encoding="utf-8")) if comments_file.is_file() else {}
    records = load_records(RESULTS)
    made = {PAGE: page(records, comments), README: readme(README.read_text(encoding="utf-8"), records)}
    for file, text in made.items():
        if not arguments.check:
            file.write_text(text, encoding="utf-8")
            print(f"written to {file}")
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file} is not what the records make: run python -m benchmarks.tables")
    if not arguments.check:
        _write_chart(records)


if __name__ == "__main__":
    main()
