"""What 1 million and 100 million photos cost: docs/how-to/millions.md's tables, from the records of the benchmarks.

    python -m benchmarks.scale [--check] [--json FILE]      the tables, from benchmarks/results/*.json
    python -m benchmarks.scale --weigh                     bytes per photo, into benchmarks/results/storage.json

A row is there if its measurement is; what is missing is named with the command that measures it. Nothing is guessed.
Bytes are the same on every machine; hours are those of the processor that the record names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import table

HOME = Path(__file__).resolve().parents[1]
RESULTS = HOME / "benchmarks" / "results"
PAGE = HOME / "docs" / "how-to" / "millions.md"
BEGIN, END = "<!-- made by python -m benchmarks.scale: do not edit -->", "<!-- end of what was made -->"
COUNTS = (1_000_000, 100_000_000)
SOURCES = ("pipeline", "inference", "gpu", "storage", "lists")
GPU_CASE = "resnet50, 64 photos"  # of gpu.json, at 224 pixels
EPOCHS = 10
TAR_BYTES = 256e6  # of `fieldmark pack`, unless it is told otherwise

Records = Mapping[str, Mapping[str, Any]]


class Step(NamedTuple):
    """Something that is done to each photo, and where its speed is recorded."""

    name: str
    record: str
    entry: str


READ = (
    Step("read, 500×375 JPEG", "pipeline", "small: scaled decode"),
    Step("read, 1600×1200 JPEG", "pipeline", "large: scaled decode"),
)
COMPUTE = tuple(
    Step(f"ResNet-50 at 224, {entry}", "inference", entry)
    for entry in (
        "eager float32",
        "fused, channels last, bf16",
        "OpenVINO",
        "OpenVINO int8",
        "ONNX Runtime float32",
        "ONNX Runtime int8",
    )
)
TRAIN = (
    Step("first epoch, 500×375, uint8 cache written", "pipeline", "small: first epoch, ours, uint8"),
    *(
        Step(f"each epoch, 500×375, {case}", "pipeline", f"small: ours, {case}")
        for case in ("no cache", "JPEG-320 cache", "uint8-320 cache")
    ),
)


def load_records(folder: Path) -> Records:
    """The records that the tables are made from, by name; those that are there."""
    files = {name: folder / f"{name}.json" for name in SOURCES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def per_core(records: Records, step: Step) -> float | None:
    """Photos per second that one core takes, or None if it was not measured."""
    record = records.get(step.record, {})
    speed = record.get("measured", {}).get(step.entry)
    if speed is None:
        return None
    # By the clock all cores of the machine were at work.
    is_by_clock = record["units"][step.entry] == "photos per second of the clock"
    return float(speed) / (int(record["hardware"]["cores"]) if is_by_clock else 1)


def hours(speed: float, photos: int) -> float:
    """Of one core or GPU that takes `speed` photos per second."""
    return photos / speed / 3600


def tables(records: Records) -> str:
    """Markdown: core hours of predicting and of training, GPU hours, bytes."""
    parts = [
        ["**Predicting**, each photo once:", "", *_hours_table("core", _speeds(records, READ + COMPUTE))],
        [
            "**Preparing training photos**, each photo once an epoch:",
            "",
            *_hours_table("core", _speeds(records, TRAIN)),
        ],
        ["**Training on a GPU**, an epoch:", "", *_hours_table("GPU", _gpu_speeds(records))],
        ["**Predicting, read and computed**, 100 M photos of 500×375:", "", *_whole(records)],
        [f"**Training for {EPOCHS} epochs**, 500×375, from tar files in a store:", "", *_training(records)],
        ["**Storage**:", "", *_storage(records)],
        [*_circumstances(records), *_missing(records)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if len(part) > 2 or part is parts[-1])


def _speeds(records: Records, steps: Sequence[Step]) -> list[tuple[str, float]]:
    return [(step.name, speed) for step in steps if (speed := per_core(records, step)) is not None]


def _gpu_speeds(records: Records) -> list[tuple[str, float]]:
    """Whole training epochs of one GPU, by backbone."""
    measured = records.get("gpu", {}).get("measured", {})
    ours = {name: speed for name, speed in measured.items() if name.endswith(": ours")}
    return [(name.removesuffix(": ours").removeprefix("@224: "), float(speed)) for name, speed in ours.items()]


def _hours_table(unit: str, speeds: Sequence[tuple[str, float]]) -> list[str]:
    head = ["Work", f"photos per {unit}-second", *(f"{unit} hours, {_count(n)}" for n in COUNTS)]
    rows = [[name, f"{speed:,.1f}", *(_number(hours(speed, n)) for n in COUNTS)] for name, speed in speeds]
    return list(table(head, rows)) if rows else []


def _whole(records: Records) -> list[str]:
    """Cores that finish in a day: reading and computing share them, so their times add."""
    read = per_core(records, READ[0])
    rows: list[list[str]] = []
    for step in COMPUTE:
        compute = per_core(records, step)
        if read is not None and compute is not None:
            both = 1 / (1 / read + 1 / compute)
            total = hours(both, COUNTS[1])
            rows.append([step.name, f"{both:,.1f}", _number(total), _number(total / 24), f"{both / read:.0%}"])
    head = ["Model", "photos per core-second", "core hours", "cores for a day", "of it reading"]
    return list(table(head, rows)) if rows else []


def _training(records: Records) -> list[str]:
    """What a training takes, each row from the measurements that it names."""
    weights, lists = (records.get(name, {}).get("measured", {}) for name in ("storage", "lists"))
    photo, cached = weights.get("500×375 JPEG"), weights.get("JPEG-320 cache of 500×375 JPEG")
    first, later = (per_core(records, step) for step in (TRAIN[0], TRAIN[2]))
    gpu = dict(_gpu_speeds(records)).get(GPU_CASE)
    rows: list[list[str]] = []

    def add(name: str, form: Callable[[float], str], value: Callable[[int], float], source: str) -> None:
        rows.append([name, *(form(value(count)) for count in COUNTS), source])

    if photo and cached:
        add("read from the store, once", _bytes, lambda n: n * photo, "storage.json")
        add("cache of small JPEGs", _bytes, lambda n: n * cached, "storage.json")
        add("tar files of 256 MB", _number, lambda n: n * photo / TAR_BYTES, "storage.json")
        if gpu:
            add("Gbit/s for each GPU while it reads", _number, lambda _: gpu * photo * 8 / 1e9, "gpu.json")
    if first and later:
        add(
            "core hours to prepare",
            _number,
            lambda n: hours(first, n) + (EPOCHS - 1) * hours(later, n),
            "pipeline.json: first epoch, then JPEG-320 cache",
        )
        if gpu:
            add("cores for each GPU, cached", _number, lambda _: gpu / later, "pipeline.json, gpu.json")
    if gpu:
        add("GPU hours, ResNet-50 at 224", _number, lambda n: EPOCHS * hours(gpu, n), f"gpu.json: {GPU_CASE}")
    many = "10,000,000 rows: index, split and fingerprint"
    if {many, f"{many}, memory", "1,000 rows: index, split and fingerprint, memory"} <= set(lists):
        peak = (lists[f"{many}, memory"] - lists["1,000 rows: index, split and fingerprint, memory"]) * 2**20 / 1e7
        add("memory of a list: index, split, fingerprint", _bytes, lambda n: n * peak, "lists.json, in proportion")
        add("seconds of it", _number, lambda n: lists[many] * n / 1e7, "lists.json, in proportion")
    return list(table(["It takes", *map(_count, COUNTS), "from"], rows)) if len(rows) > 1 else []


def _storage(records: Records) -> list[str]:
    measured = records.get("storage", {}).get("measured", {})
    rows = [[name, _bytes(size), *(_bytes(size * count) for count in COUNTS)] for name, size in measured.items()]
    return list(table(["Form", "a photo", *map(_count, COUNTS)], rows)) if rows else []


def _circumstances(records: Records) -> Iterator[str]:
    for name, record in records.items():
        if name != "storage":
            machine = record["hardware"]
            on = ", ".join([f"{machine['cores']} cores of {machine['processor']}", *_gpu_names(machine)])
            quick = " (quick plan)" if record.get("is_quick") else ""
            yield f"- {name}.json{quick}: {on}, by `{record['command']}`"


def _gpu_names(machine: Mapping[str, Any]) -> list[str]:
    return [gpu["name"] if isinstance(gpu, dict) else str(gpu) for gpu in machine.get("gpus", ())]


def _missing(records: Records) -> Iterator[str]:
    for name in SOURCES:
        if name not in records:
            option = "scale --weigh" if name == "storage" else f"{name} --json benchmarks/results/{name}.json"
            yield f"- Not measured yet: {name}.json (`python -m benchmarks.{option}`)"
    for step in (*READ, *COMPUTE, *TRAIN):
        if step.record in records and per_core(records, step) is None:
            yield f"- Not in {step.record}.json: {step.entry}"


def _count(photos: int) -> str:
    return f"{photos // 1_000_000} M"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def weigh(folder: Path) -> dict[str, Any]:
    """Bytes per photo of each form, as a record."""
    from benchmarks.photos import LARGE, SMALL, find_pictures, make_photos
    from benchmarks.pipelines import Ours
    from benchmarks.record import versions

    pictures, source = find_pictures(200)
    measured: dict[str, float] = {}
    for title, shape in (("500×375 JPEG", SMALL), ("1600×1200 JPEG", LARGE)):
        files, _ = make_photos(pictures, folder / title, count=24, shape=shape)
        measured[title] = _size(folder / title) / len(files)
        for mode, form in (("jpeg", "JPEG-320 cache"), ("uint8", "uint8-320 cache")):
            cache = folder / f"{title}-{mode}"
            Ours(files, cache, mode=mode)
            measured[f"{form} of {title}"] = _size(cache) / len(files)
    measured |= {"row of predictions, 100 classes": _row_bytes(folder), "index in memory": _index_bytes()}
    return {
        "benchmark": "storage",
        "command": "python -m benchmarks.scale --weigh",
        "versions": versions(),
        "measured": measured,
        "units": dict.fromkeys(measured, "bytes per photo"),
        "notes": [f"photos are mosaics, at their own resolution, of {source}"],
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _row_bytes(folder: Path) -> float:
    """A part of 1,024 predictions, as `predict --ray` writes it."""
    import numpy as np

    from fieldmark.inference.predictor import Prediction
    from fieldmark.inference.writers import save_part

    classes = tuple(f"class {number}" for number in range(100))
    rows = np.random.default_rng(0).dirichlet(np.full(100, 0.05), size=1024).astype(np.float32)
    named = [Prediction(f"{n // 1000:03d}/{n:07d}.jpg", classes, row, "") for n, row in enumerate(rows)]
    save_part(folder / "part.parquet", named, classes=classes)
    return (folder / "part.parquet").stat().st_size / len(rows)


def _index_bytes(count: int = 100_000) -> float:
    """Names of photos and what they need in memory."""
    from fieldmark.data.columns import Photos
    from fieldmark.data.folders import Photo

    photos = Photos.of(Photo(f"{n // 1000:03d}/{n:07d}.jpg", "a class", "", "") for n in range(count))
    columns = (photos.paths.array, photos.labels.numbers, photos.splits, photos.groups.numbers)
    return sum(column.nbytes for column in columns) / len(photos)


def with_tables(text: str, made: str) -> str:
    """A page with the part between its marks replaced."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{made}\n\n{END}", text, flags=re.S)


def main() -> None:
    """Write the tables into the page, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    parser.add_argument("--weigh", action="store_true", help="measure bytes per photo first, and record them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write photos per core-second there")
    arguments = parser.parse_args()
    if arguments.weigh:
        with tempfile.TemporaryDirectory() as scratch:
            record = weigh(Path(scratch))
        (RESULTS / "storage.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    records = load_records(RESULTS)
    made = tables(records)
    page = PAGE.read_text(encoding="utf-8")
    if arguments.check:
        if with_tables(page, made) != page:
            sys.exit(f"{PAGE} is not what the records make: run python -m benchmarks.scale")
        return
    PAGE.write_text(with_tables(page, made), encoding="utf-8")
    print(made)
    print(f"\nwritten to {PAGE}")
    if arguments.json is not None:
        speeds = {"core": dict(_speeds(records, READ + COMPUTE + TRAIN)), "gpu": dict(_gpu_speeds(records))}
        arguments.json.write_text(json.dumps(speeds, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
