"""Photos by the million in Parquet lists: index, split and fingerprint; what an update costs the host; two processes.

    python -m benchmarks.lists [--quick] [--json FILE]

The list names photos by URL, in no order, of 100 classes, with no split. Each size is a process of its own, whose
peak resident memory the system tells; its time is the processor's, which waiting for other work does not lengthen. The
work of the host for an update of 32 photos is all but their pixels: order, share, places of files, random numbers,
mixing. Two processes train ResNet-18 at 64 pixels with 32 photos each, against one with 32.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.memory import peak_mebibytes, python
from benchmarks.photos import find_pictures, link_photos, make_photos
from benchmarks.record import Findings, Ratio, interleave, run_benchmark

CLASSES = 100
BATCH = 32
UPDATES = 200
COLUMNS = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": None}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rows: tuple[int, ...]
    photos: int
    rounds: int
    limit_seconds: float


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores."""
    if is_quick:
        return Plan((1_000, 100_000, 1_000_000), photos=512, rounds=1, limit_seconds=60)
    return Plan((1_000, 10_000, 100_000, 1_000_000, 10_000_000), photos=1024, rounds=3, limit_seconds=1800)


def measure(plan: Plan, folder: Path) -> Findings:
    """Lists of each size, then processes."""
    findings = Findings()
    for rows in plan.rows:
        table = folder / f"{rows}.parquet"
        write_list(table, rows)
        for what, work in (("index, split and fingerprint", "divide_list"), ("updates", "draw_updates")):
            out = folder / f"{rows}-{work}.json"
            peak = peak_mebibytes(python(work, table, out, module="lists"), folder / f"home-{rows}")
            told = json.loads(out.read_text())
            findings.add(f"{rows:,} rows: {what}, memory", peak, "MiB, peak resident")
            for name, (seconds, unit) in told.items():
                findings.add(f"{rows:,} rows: {name}", seconds, unit)
        table.unlink()
    least, most = (f"{rows:,} rows: an update" for rows in (plan.rows[0], plan.rows[-1]))
    findings.ratios[f"update at {plan.rows[0]:,} / at {plan.rows[-1]:,}"] = Ratio(least, most)
    _measure_processes(findings, plan, folder)
    return findings


def write_list(path: Path, rows: int) -> None:
    """A Parquet list of photos in folders of a thousand, shuffled."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet as pq

    compute, numbers = pyarrow.compute, np.random.default_rng(0).permutation(rows)
    names = pa.array([f"class {number:03d}" for number in range(CLASSES)])
    with pq.ParquetWriter(path, pa.schema({"path": pa.string(), "label": pa.string()})) as writer:
        for start in range(0, rows, 10**6):
            part = numbers[start : start + 10**6]
            texts = (compute.cast(pa.array(values), pa.string()) for values in (part // 1000, part))
            folder, name = (compute.utf8_lpad(text, 8, "0") for text in texts)
            paths = compute.binary_join_element_wise("s3://bucket/", folder, "/", name, ".jpg", "")
            writer.write_table(pa.table({"path": paths, "label": names.take(pa.array(part * 7919 % CLASSES))}))


def divide_list(table: str, out: str) -> None:
    """Index a list, divide it and take its fingerprint, and write how long each took."""
    from fieldmark.data import shards
    from fieldmark.data.index import load_index
    from fieldmark.data.splits import remembered_split

    shards.MOST_LOOKED_UP = 0  # there is no store: each size is taken at its word, as the large ones are
    told: dict[str, tuple[float, str]] = {}
    began, cpu = time.perf_counter(), time.process_time()

    def tell(name: str) -> None:
        nonlocal cpu
        told[name] = (time.process_time() - cpu, "seconds of processor time")
        cpu = time.process_time()

    index = load_index(table, **COLUMNS)
    tell("index")
    home = Path(os.environ["XDG_CACHE_HOME"])
    index = remembered_split(
        index, val_fraction=0.1, test_fraction=0.1, seed=0, groups=None, settings={}, folder=home / "splits"
    )
    tell("split")
    index.fingerprint()
    tell("fingerprint")
    told["index, split and fingerprint"] = (sum(seconds for seconds, _ in told.values()), "seconds of processor time")
    told["index, split and fingerprint, by the clock"] = (time.perf_counter() - began, "seconds")
    Path(out).write_text(json.dumps(told))


def draw_updates(table: str, out: str) -> None:
    """Do what the host does for the updates of an epoch but for pixels, and write what one of them took."""
    import numpy as np

    from fieldmark.augment.mixing import draw_mix
    from fieldmark.config import load_config
    from fieldmark.data import shards
    from fieldmark.data.index import load_index
    from fieldmark.data.loader import shard_plan
    from fieldmark.runs import build
    from fieldmark.runs.dataset import TrainPlan

    shards.MOST_LOOKED_UP = 0
    index = load_index(table, **COLUMNS)
    config = load_config(None, [f"data.path={table}", "model.name=resnet18", "model.weights=random"])
    sizes, reader = np.full((len(index), 2), 256), build.build_reader(config, index)
    prepare = build.build_train_photos(config, build.build_input_config(config), reader, sizes, size=224)
    mix, everything = build.build_mix_spec(config), np.arange(len(index))
    plan = TrainPlan(1, everything, everything[:0], 0, BATCH, BATCH, 1)
    began = time.process_time()
    shares = shard_plan(plan.updates(0), rank=0, processes=1)
    order = (time.process_time() - began) / len(shares)
    began, count = time.process_time(), min(UPDATES, len(shares))
    for step, numbers in enumerate(shares[:count]):
        rows = np.asarray(numbers)
        prepare.params(rows, 0)
        draw_mix(mix, seed=0, epoch=0, step=step, batch_size=len(rows), image_size=224)
        assert all(str(reader.files[number]) for number in numbers)
        assert len(reader.labels[rows]) == len(rows)
    update = order + (time.process_time() - began) / count
    told = {"an update": (update * 1e3, "ms of processor time, of 32 photos"), "of it the order": (order * 1e3, "ms")}
    Path(out).write_text(json.dumps(told))


def _measure_processes(findings: Findings, plan: Plan, folder: Path) -> None:
    """Photos per second of one process and of two."""
    pictures, source = find_pictures(60)
    files, made = make_photos(pictures, folder / "made", count=64, shape=(80, 80, 4_000))
    link_photos(files, folder / "photos", count=plan.photos, classes=4)
    findings.notes.append(f"processes: {plan.photos} links to {made}, mosaics of {source}; one thread each; ideal: 2")
    cases = {f"{count} process{'es' * (count - 1)}": partial(_train, folder, count) for count in (1, 2)}
    # The warm-up fills the cache.
    rounds = interleave(cases, rounds=plan.rounds, limit_seconds=plan.limit_seconds, warm_up=True)
    findings.add_rounds("processes", rounds, "photos per second of the clock")
    findings.ratios["2 processes / 1"] = Ratio("2 processes", "1 process")


def _train(folder: Path, processes: int) -> float:
    """Train some epochs in so many processes; photos per second of the best one after the first."""
    run, recipe = folder / "run", folder / "recipe.toml"
    recipe.write_text('[model]\nname = "resnet18"\nweights = "random"\n')
    settings = ["augment.size=64", "probe.epochs=0", "loader.workers=0", "train.precision=32-true", "cache.mode=uint8"]
    settings += ["data.val_fraction=0.1", "train.threads=1", "train.epochs=4"]
    settings += [f"train.batch_size={BATCH * processes}", f"train.devices={processes}"]
    command = [sys.executable, "-m", "fieldmark", "train", str(folder / "photos"), "--recipe", str(recipe)]
    command += ["--out", str(run), *(word for setting in settings for word in ("--set", setting))]
    peak_mebibytes(command, folder / "home")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    return max(row["images_per_second"] for row in rows[1:])


def main() -> None:
    """Measure and report."""
    run_benchmark("lists", __doc__ or "", make_plan, measure)


if __name__ == "__main__":
    main()
