"""The input pipeline: photos prepared per second of one core, ours beside torchvision and albumentations.

    python -m benchmarks.pipeline [--quick] [--json FILE]

One thread each, and the processor time of the process instead of the clock, so that other work on the machine
lengthens nothing but the wait. Every case prepares batches of 32 of the same photos by the competition's
augmentation list.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks import pipelines
from benchmarks.photos import LARGE, SMALL, find_pictures, make_photos
from benchmarks.record import Findings, Ratio, interleave, load_average, make_parser, profile_shares, report

UNIT = "photos per second of processor time"
REPORT = "PIL torchvision (the report)"
CASES = (REPORT, "torchvision v2", "albumentations", "full decode", "scaled decode")
OURS = {"no cache": ("off", 320), "JPEG-320 cache": ("jpeg", 320), "uint8-320 cache": ("uint8", 320),
        "uint8-256 cache": ("uint8", 256)}  # fmt: skip
TARGETS = {
    "small": {"no cache": 3.3, "JPEG-320 cache": 5.0, "uint8-320 cache": 10.0},
    "large": {"no cache": 3.3, "JPEG-320 cache": 15.0, "uint8-320 cache": 24.0},
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    small_photos: int
    large_photos: int
    rounds: int
    limit_seconds: float
    first_epoch_rounds: int
    worker_photos: int
    max_workers: int


def make_plan(*, is_quick: bool, cores: int) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores."""
    if is_quick:
        return Plan(
            32, 24, rounds=7, limit_seconds=35, first_epoch_rounds=3, worker_photos=256, max_workers=min(cores, 2)
        )
    return Plan(
        64, 48, rounds=9, limit_seconds=300, first_epoch_rounds=5, worker_photos=1280, max_workers=min(cores, 16)
    )


def measure(plan: Plan, folder: Path) -> Findings:
    """All parts."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    findings = Findings()
    pictures, source = find_pictures(200)
    findings.notes.append(f"photos are mosaics, at their own resolution, of {source}")
    findings.notes += pipelines.DIFFERENCES
    for name, count, shape in (("small", plan.small_photos, SMALL), ("large", plan.large_photos, LARGE)):
        files, made = make_photos(pictures, folder / name, count=count, shape=shape)
        findings.notes.append(f"{name}: {made}")
        _per_core(findings, plan, name, files, folder)
        _first_epoch(findings, plan, name, files, folder)
        if name == "small":
            _workers(findings, plan, files, folder)
    return findings


def _per_core(findings: Findings, plan: Plan, name: str, files: list[Path], folder: Path) -> None:
    ours = {
        case: pipelines.Ours(files, folder / "cache", mode=mode, short_side=side) for case, (mode, side) in OURS.items()
    }
    peers = (pipelines.pil_torchvision(), pipelines.torchvision_v2(), pipelines.albumentations())
    work = dict(zip(CASES, (*peers, pipelines.full_decode, pipelines.scaled_decode), strict=True))
    work |= {f"ours, {case}": prepare for case, prepare in ours.items()}
    cases = {f"{name}: {case}": partial(speed, prepare, files) for case, prepare in work.items()}
    rounds = interleave(cases, rounds=plan.rounds, limit_seconds=plan.limit_seconds, least=3, warm_up=True)
    findings.add_rounds(f"per core, {name}", rounds, UNIT)
    for case in ("torchvision v2", "albumentations"):
        findings.ratios[f"{name}: {case} / report"] = Ratio(f"{name}: {case}", f"{name}: {REPORT}")
    for case in OURS:
        target = TARGETS[name].get(case)
        findings.ratios[f"{name}: ours, {case} / report"] = Ratio(f"{name}: ours, {case}", f"{name}: {REPORT}", target)
    for case in ("no cache", "JPEG-320 cache", "uint8-320 cache"):
        findings.profiles[f"{name}: ours, {case}"] = profile_shares(
            lambda case=case: [ours[case](files) for _ in range(4)]
        )


def speed(prepare: pipelines.Pipeline, files: Sequence[Path], batch_size: int = 32) -> float:
    """Photos per second of processor time, all files once."""
    began = time.process_time()
    for start in range(0, len(files), batch_size):
        prepare(files[start : start + batch_size])
    return len(files) / (time.process_time() - began)


def _first_epoch(findings: Findings, plan: Plan, name: str, files: list[Path], folder: Path) -> None:
    """Processor time of a first epoch: every photo inspected, the cache written, every photo prepared from it."""
    reference = pipelines.pil_torchvision()
    cases: dict[str, Callable[[], float]] = {f"{name}: first epoch, report": partial(speed, reference, files)}
    for mode in ("jpeg", "uint8"):
        case = f"{name}: first epoch, ours, {mode}"
        stages = findings.profiles.setdefault(case, {})
        cases[case] = partial(_first_epoch_speed, files, folder / "first", mode, stages)
    rounds = interleave(cases, rounds=plan.first_epoch_rounds, limit_seconds=20, least=3)
    findings.add_rounds(f"first epoch, {name}", rounds, UNIT)
    for mode in ("jpeg", "uint8"):
        case = f"{name}: first epoch, ours, {mode}"
        target = 1.5 if name == "small" else 1.6
        findings.ratios[f"{case} / report"] = Ratio(case, f"{name}: first epoch, report", target)


def _first_epoch_speed(files: list[Path], folder: Path, mode: str, stages: dict[str, float]) -> float:
    """Photos per second of processor time; `stages` becomes the share of each stage."""
    from fieldmark.data.decode import DecodeSpec
    from fieldmark.data.inspection import Inspection
    from fieldmark.progress import Quiet

    shutil.rmtree(folder, ignore_errors=True)
    times = [time.process_time()]
    decoding = DecodeSpec((0, 0, 0), 10**9)
    with Inspection(files, decoding=decoding, with_hash=False, cache_folder=folder / "inspections") as inspection:
        ours = pipelines.Ours(files, folder / "photos", mode=mode, inspection=inspection)
        inspection.finish(threads=1, progress=Quiet())
    times.append(time.process_time())
    for start in range(0, len(files), 32):
        ours(files[start : start + 32])
    times.append(time.process_time())
    seconds = np.diff(times)
    names = ("inspecting every photo and writing the cache", "preparing from the cache")
    stages.update(zip(names, (seconds / seconds.sum()).round(3).tolist(), strict=True))
    return len(files) / float(seconds.sum())


def _workers(findings: Findings, plan: Plan, files: list[Path], folder: Path) -> None:
    """Photos per second of the clock as workers are added, theirs and ours, each started before the clock."""
    ours = pipelines.Ours(files, folder / "cache", mode="uint8")
    uncached = pipelines.Ours(files, folder / "cache", mode="off")
    counts = [count for count in (1, 2, 4, 8, 16) if count <= plan.max_workers]
    cases: dict[str, Callable[[], float]] = {}
    for count in counts:
        cases[f"workers {count}: report, DataLoader"] = partial(_data_loader_speed, files, plan.worker_photos, count)
        cases[f"workers {count}: ours, no cache"] = partial(_loader_speed, uncached, plan.worker_photos, count)
        cases[f"workers {count}: ours, uint8-320 cache"] = partial(_loader_speed, ours, plan.worker_photos, count)
    rounds = interleave(cases, rounds=3, limit_seconds=plan.limit_seconds)
    findings.add_rounds("workers", rounds, "photos per second of the clock")
    for kind in ("report, DataLoader", "ours, no cache", "ours, uint8-320 cache"):
        for count in counts[1:]:
            case = f"workers {count} / 1: {kind}"
            findings.ratios[case] = Ratio(f"workers {count}: {kind}", f"workers 1: {kind}")


def _plan(count: int, num_files: int) -> list[list[int]]:
    numbers = np.resize(np.arange(num_files), count)
    return [numbers[start : start + 32].tolist() for start in range(0, count, 32)]


def _loader_speed(ours: pipelines.Ours, count: int, workers: int) -> float:
    from fieldmark.data.loader import Loader

    plan = _plan(count, len(ours.numbers))
    with Loader(workers=workers, threads=1) as loader:
        for _ in loader.batches(ours.prepare, plan[:workers], epoch=0):
            pass
        began = time.perf_counter()
        for _ in loader.batches(ours.prepare, plan, epoch=1):
            pass
        return count / (time.perf_counter() - began)


class _ReportPhotos:
    """The competition's data set, which torch's DataLoader sends to its workers."""

    def __init__(self, files: Sequence[Path], count: int) -> None:
        self.files = [files[number % len(files)] for number in range(count)]
        self.transform: Any = pipelines.report_transforms(pipelines.SIZE)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.files[number]).convert("RGB"))


def _data_loader_speed(files: Sequence[Path], count: int, workers: int) -> float:
    from torch.utils.data import DataLoader

    photos: Any = _ReportPhotos(files, count)
    loader = DataLoader(photos, batch_size=32, num_workers=workers, persistent_workers=True)
    batches = iter(loader)
    next(batches)  # the workers run, and have photos ready: two batches each are in flight
    ready = 1 + 2 * workers
    began = time.perf_counter()
    done = 1 + sum(1 for _ in batches)
    return max(done - ready, 1) * 32 / (time.perf_counter() - began)


def main() -> None:
    """Measure and report."""
    from fieldmark.runs.environment import usable_cores

    arguments = make_parser(__doc__ or "").parse_args()
    before = load_average()
    plan = make_plan(is_quick=arguments.quick, cores=usable_cores())
    one_thread = patch.dict(os.environ, OMP_NUM_THREADS="1")  # torch is imported within, here and in the workers
    with one_thread, tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as folder:
        findings = measure(plan, Path(folder))
    report("pipeline", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
