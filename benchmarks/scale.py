"""What 1 million and 100 million photos cost, from the committed measurements.

    python -m benchmarks.scale [--json FILE]

Reads benchmarks/results/*.json; what has not been measured there is left out, never guessed. Writes the tables of
docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COUNTS = (1_000_000, 100_000_000)
# Bytes per photo; measured by benchmarks/pipeline where it has run, else these sizes of the formats themselves.
STORED_BYTES = {"photos as they come (500×375 JPEG)": 126_000, "JPEG-320 cache": 45_000, "uint8-320 cache": 410_000}
INDEX_BYTES = 300


def rates() -> Iterator[tuple[str, float, int]]:
    """(what, photos per second, cores used) of every committed measurement of throughput."""
    for path in sorted(RESULTS.glob("*.json")):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        units: dict[str, str] = content.get("units", {})
        cores = int(content.get("hardware", {}).get("cores") or 1)
        for name, speed in content.get("measured", {}).items():
            if units.get(name) == "photos per second of the clock":
                yield f"{path.stem}: {name}", float(speed), cores
            elif units.get(name) == "photos per second of processor time":
                yield f"{path.stem}: {name}", float(speed), 1


def cost(speed: float, units: int, photos: int) -> float:
    """Hours of one core (or one GPU) for so many photos."""
    return photos / (speed / units) / 3600


def tables() -> str:
    """Markdown: hours by measurement, and bytes by form."""
    lines = ["| Measured | photos per core-second | core hours for 1 M | for 100 M |", "|---|---|---|---|"]
    for name, speed, units in rates():
        hours = [cost(speed, units, count) for count in COUNTS]
        lines.append(f"| {name} | {speed / units:.1f} | {hours[0]:,.0f} | {hours[1]:,.0f} |")
    if len(lines) == 2:
        lines.append("| nothing yet: run the benchmarks with --json benchmarks/results/NAME.json | | | |")
    lines += ["", "| Stored form | 1 M photos | 100 M photos |", "|---|---|---|"]
    for name, size in {**STORED_BYTES, "index in memory": INDEX_BYTES}.items():
        lines.append(f"| {name} | {_bytes(size * COUNTS[0])} | {_bytes(size * COUNTS[1])} |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def main() -> None:
    """Print the tables; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="as the other benchmarks; changes nothing here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    print(tables())
    if arguments.json is not None:
        rows = [
            {
                "measured": name,
                "per_core_second": speed / units,
                "core_hours": {str(n): cost(speed, units, n) for n in COUNTS},
            }
            for name, speed, units in rates()
        ]
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
