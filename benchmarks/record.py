"""The form that all benchmarks share: interleaved rounds, medians, ratios with targets, one JSON file.

A reader recomputes every ratio from the file alone: `formulas` names, for each ratio, the two entries of `measured`
that were divided. Every ratio is written so that larger is better, and is met at or above its target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PEERS = ("albumentations", "fastai")

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "birds100"
"""Real photographs of 100 classes beside the repository; a benchmark says so where they are absent."""


@dataclass(frozen=True)
class Ratio:
    """Two entries of `measured`, divided.

    Attributes:
        numerator: Name in `measured`.
        denominator: Name in `measured`.
        target: The least that we want; None for a ratio that is only told.
    """

    numerator: str
    denominator: str
    target: float | None = None


@dataclass(frozen=True)
class Rounds:
    """What interleaved rounds gave.

    Attributes:
        medians: Of each case.
        spread: Least and largest of each case.
        rounds: How many there were.
    """

    medians: dict[str, float]
    spread: dict[str, tuple[float, float]]
    rounds: int


@dataclass
class Findings:
    """What one benchmark found, before it is signed with versions and hardware.

    Attributes:
        measured: Raw medians, with the unit of each in `units`.
        units: Unit of each entry of `measured`.
        ratios: What to divide.
        spread: Least and largest over the rounds, where there were several.
        rounds: Interleaved rounds, by part of the benchmark.
        notes: What a reader must know: photographs used, flags of the peers, what could not run.
        profiles: Where the time goes, {title: {place: share}}; for what misses its target.
    """

    measured: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str) -> None:
        """Record one number."""
        self.measured[name] = float(value)
        self.units[name] = unit

    def add_rounds(self, part: str, rounds: Rounds, unit: str) -> None:
        """Record the medians of interleaved rounds."""
        for name, value in rounds.medians.items():
            self.add(name, value, unit)
        self.spread |= rounds.spread
        self.rounds[part] = rounds.rounds


def interleave(
    cases: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    limit_seconds: float,
    least: int = 1,
    warm_up: bool = False,
) -> Rounds:
    """Measure every case once in each round, so that what disturbs the machine disturbs all alike.

    The order rotates, so that no case always follows the same neighbor.

    Args:
        cases: Each call gives one measurement.
        rounds: The most rounds, at least 1.
        limit_seconds: No round begins that would probably end later than this.
        least: So many rounds run whatever the limit.
        warm_up: Call every case once before, and forget what it gave.
    """
    started = time.perf_counter()
    names = list(cases)
    values: dict[str, list[float]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            cases[name]()
    longest = done = 0
    while done < rounds and (done < least or time.perf_counter() - started + longest < limit_seconds):
        began = time.perf_counter()
        turn = done % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            values[name].append(cases[name]())
        longest = max(longest, time.perf_counter() - began)
        done += 1
    return Rounds(
        medians={name: statistics.median(seen) for name, seen in values.items()},
        spread={name: (min(seen), max(seen)) for name, seen in values.items()},
        rounds=done,
    )


def make_record(name: str, findings: Findings, *, is_quick: bool, load_before: Sequence[float]) -> dict[str, Any]:
    """The content of the JSON file.

    Raises:
        KeyError: A ratio names what was not measured.
    """
    values = findings.measured
    return {
        "benchmark": name,
        "command": f"python -m benchmarks.{name}{' --quick' if is_quick else ''}",
        "is_quick": is_quick,
        "versions": versions(*PEERS),
        "hardware": hardware() | {"load_average_before": list(load_before)},
        "rounds": findings.rounds,
        "measured": values,
        "units": findings.units,
        "spread": findings.spread,
        "formulas": {case: [ratio.numerator, ratio.denominator] for case, ratio in findings.ratios.items()},
        "ratios": {case: values[r.numerator] / values[r.denominator] for case, r in findings.ratios.items()},
        "targets": {case: r.target for case, r in findings.ratios.items() if r.target is not None},
        "notes": findings.notes,
        "profiles": findings.profiles,
    }


def versions(*packages: str) -> dict[str, str]:
    """Python, what Fieldmark stands on, and `packages`; what is not installed is left out."""
    from fieldmark.runs.environment import describe_environment

    more = {package: version for package in packages if (version := _version(package))}
    return describe_environment()["versions"] | more


def hardware() -> dict[str, Any]:
    """The machine, its vector instructions, and how busy it is now."""
    from fieldmark.runs.environment import describe_hardware

    return describe_hardware() | {"instruction_sets": instruction_sets(), "load_average": load_average()}


def instruction_sets() -> list[str]:
    """Vector and matrix instructions of the processor by Linux' names; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "vaes"))]


def load_average() -> list[float]:
    """Processes that wanted a core, over 1, 5 and 15 minutes; empty where the system does not tell."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def make_parser(description: str) -> argparse.ArgumentParser:
    """The two options that every benchmark has; `description` is the module's docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller plan that ends within 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to this file")
    return parser


def add_timm_script(parser: argparse.ArgumentParser, *, is_required: bool = False) -> None:
    """The option that names timm's script: a file that is there, or "" without it."""

    def find(given: str) -> str:
        if (given or is_required) and not Path(given).is_file():
            raise argparse.ArgumentTypeError(f"{given}: no such file")
        return given

    text = "train.py of pytorch-image-models"
    parser.add_argument("--timm-script", default="", required=is_required, type=find, metavar="FILE", help=text)


def parse_arguments(description: str) -> argparse.Namespace:
    """Read the command line of a benchmark that has no options of its own."""
    return make_parser(description).parse_args()


def interleaved(cases: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median wall seconds of each case over interleaved rounds, after one that is not counted."""

    def timed(case: Callable[[], object]) -> float:
        began = time.perf_counter()
        case()
        return time.perf_counter() - began

    timers = {name: (lambda case=case: timed(case)) for name, case in cases.items()}
    return interleave(timers, rounds=rounds, limit_seconds=float("inf"), warm_up=True).medians


def finish(record: Mapping[str, Any], json_file: Path | None, lines: Sequence[str]) -> None:
    """Print the lines and the ratios against their targets, and write the file if one was asked for."""
    for line in [*lines, "", *format_ratios(record), "", *(f"note: {note}" for note in record.get("notes", ()))]:
        print(line)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written to {json_file}")


def report(
    name: str, findings: Findings, *, is_quick: bool, json_file: Path | None, load_before: Sequence[float]
) -> None:
    """Print what was found, and write the file if one was asked for."""
    record = make_record(name, findings, is_quick=is_quick, load_before=load_before)
    values, units = record["measured"], record["units"]
    width = max(map(len, values), default=0)
    finish(record, json_file, [f"{key:<{width}}  {value:10.4g}  {units[key]}" for key, value in values.items()])


def run_benchmark(
    name: str, description: str, make_plan: Callable[..., Any], measure: Callable[[Any, Path], Findings]
) -> None:
    """Do what a benchmark without options of its own does on the command line; `description` is its docstring."""
    arguments, before = parse_arguments(description), load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as folder:
        findings = measure(make_plan(is_quick=arguments.quick), Path(folder))
    report(name, findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


def format_ratios(record: Mapping[str, Any]) -> list[str]:
    """One line for each ratio: its target, and whether it is met."""
    width = max(map(len, record["ratios"]), default=0)
    lines: list[str] = []
    for case, value in record["ratios"].items():
        target = record["targets"].get(case)
        verdict = "" if target is None else f"  target {target:g}: {'met' if value >= target else 'MISSED'}"
        lines.append(f"{case:<{width}}  {value:10.3f}{verdict}")
    return lines


def profile_shares(work: Callable[[], object], *, most: int = 8) -> dict[str, float]:
    """Share of the time of `work` that was spent in each function itself, the largest first."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(work)
    stats = pstats.Stats(profiler)
    own = {place: entry[2] for place, entry in stats.stats.items()}  # type: ignore[attr-defined]
    total = sum(own.values()) or 1.0
    ranked = sorted(own, key=lambda place: -own[place])[:most]
    shares = {_place(place): round(own[place] / total, 3) for place in ranked}
    shares["everything else"] = round(1 - sum(shares.values()), 3)
    return shares


def plan_lines(plan: Any) -> str:
    """A plan in one line, for the notes."""
    return ", ".join(f"{key} {value}" for key, value in asdict(plan).items())


def _place(place: tuple[str, int, str]) -> str:
    file, _, function = place
    return function if file == "~" else f"{Path(file).stem}.{function}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
