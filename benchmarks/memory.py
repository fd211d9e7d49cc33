"""Peak memory of training and of predict as a data set grows 1x, 10x and 100x, and what an index costs.

    python -m benchmarks.memory [--quick] [--json FILE]

The larger data sets are links to the same photos. Every measurement is a process of its own, whose peak resident memory
the system tells when it ends: shared libraries, weights and the optimizer are in it. Training inspects every photo,
writes a JPEG cache of all of them, and ends after some updates, from where on no photo is new to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.photos import find_pictures, link_photos, make_photos
from benchmarks.record import Findings, Ratio, interleave, run_benchmark

GROWTH = (1, 10, 100)
TARGET = 0.83
UNIT = "MiB, peak resident"
CLASSES = 4
HOME = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    base_photos: int
    updates: int
    rounds: int
    limit_seconds: float
    index_files: int
    check_files: int


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores."""
    if is_quick:
        return Plan(24, updates=8, rounds=2, limit_seconds=90, index_files=20_000, check_files=2_000)
    return Plan(300, updates=40, rounds=3, limit_seconds=3600, index_files=100_000, check_files=30_000)


def measure(plan: Plan, folder: Path) -> Findings:
    """Both verbs at three sizes, then the index."""
    findings = Findings()
    pictures, source = find_pictures(60)
    files, made = make_photos(pictures, folder / "photos", count=plan.base_photos, shape=(320, 240, 40_000))
    findings.notes.append(f"{made}, mosaics of {source}; EfficientNet-Lite0 at 96 pixels, batches of 8")
    data = {growth: folder / f"x{growth}" for growth in GROWTH}
    for growth, place in data.items():
        link_photos(files, place, count=plan.base_photos * growth, classes=CLASSES)
    model = folder / "model"
    peak_mebibytes(python("train_some", data[1], model, 0, folder / "home"), folder / "home")
    cases: dict[str, Callable[[], float]] = {}
    for growth, place in data.items():
        cases[f"train, {growth}x"] = partial(_train_peak, place, folder, plan.updates)
        command = [sys.executable, "-m", "fieldmark", "predict", str(model), str(place)]
        cases[f"predict, {growth}x"] = partial(
            peak_mebibytes, [*command, "--out", str(folder / f"{growth}.csv")], folder / "home"
        )
    findings.add_rounds("peak memory", interleave(cases, rounds=plan.rounds, limit_seconds=plan.limit_seconds), UNIT)
    for verb in ("train", "predict"):
        findings.ratios[f"{verb}: peak at 1x / at 100x"] = Ratio(f"{verb}, 1x", f"{verb}, 100x", TARGET)
    _index(findings, plan, files, folder)
    return findings


def peak_mebibytes(command: Sequence[str], home: Path) -> float:
    """Peak resident memory of a command, in MiB.

    Raises:
        RuntimeError: It failed.
    """
    paths = [str(HOME), str(HOME / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CACHE_HOME": str(home)}
    # A process inherits the peak of the one that started it: so a small one starts it, and tells.
    wrapped = [sys.executable, "-S", "-c", _LAUNCHER, *map(str, command)]
    done = subprocess.run(wrapped, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


_LAUNCHER = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


def python(function: str, *arguments: object, module: str = "memory") -> list[str]:
    """The command that calls a function of a benchmark in a process of its own."""
    quoted = ", ".join(repr(str(value) if isinstance(value, Path) else value) for value in arguments)
    return [sys.executable, "-c", f"from benchmarks.{module} import {function}; {function}({quoted})"]


def _train_peak(data: Path, folder: Path, updates: int) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return peak_mebibytes(python("train_some", data, Path(scratch) / "run", updates, scratch), Path(scratch))


def train_some(data: str, out: str, updates: int, home: str) -> None:
    """Open a run with everything that a user's has, and end it after some updates; 0 trains one epoch to the end."""
    from fieldmark.config import load_config
    from fieldmark.progress import Quiet
    from fieldmark.runs.session import open_session
    from fieldmark.runs.train import train

    settings = ["augment.size=96", "model.name=tf_efficientnet_lite0", "model.weights=random", "train.batch_size=8"]
    settings += [
        f'data.path="{data}"',
        "probe.epochs=0",
        "train.epochs=1",
        "cache.mode=jpeg",
        f'cache.folder="{home}/c"',
    ]
    settings += ["eval.transform=squash", "schedule.warmup_epochs=0"]
    config = load_config(None, settings)
    if not updates:
        for _ in train(config, out):
            pass
        return
    with open_session(config, Path(out), start="new", progress=Quiet()) as session:
        state = session.start_training()
        _update_all(session, state, islice(session.train_batches(0, 0), updates))
        session.writer.save(state)


def _update_all(session: Any, state: Any, batches: Any) -> None:
    from fieldmark.training.evaluate import Validation
    from fieldmark.training.loop import UpdateOptions, train_epochs

    reports = train_epochs(
        session.fabric,
        state,
        epochs=1,
        steps_per_epoch=session.plan.steps_per_epoch,
        batches=lambda epoch, first: batches,
        evaluate=lambda model: Validation(),
        options=UpdateOptions(),
    )
    for _ in reports:
        pass


def _index(findings: Findings, plan: Plan, files: Sequence[Path], folder: Path) -> None:
    """Seconds for 100,000 files: listing and naming them, inspecting each for the first time, and once more."""
    from fieldmark.data.decode import DecodeSpec
    from fieldmark.data.index import load_index
    from fieldmark.data.inspection import Inspection
    from fieldmark.progress import Quiet
    from fieldmark.runs.environment import usable_cores

    large, small = folder / "index", folder / "check"
    link_photos(files, large, count=plan.index_files, classes=100)
    link_photos(files, small, count=plan.check_files, classes=100)
    columns = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": None}
    index = load_index(small, **columns)
    decoding, memory = DecodeSpec((255, 255, 255), 10**9), folder / "inspections"

    def inspect() -> None:
        with Inspection(index.files(), decoding=decoding, with_hash=False, cache_folder=memory) as inspection:
            inspection.finish(threads=usable_cores(), progress=Quiet())

    for name, work, count in (
        ("index", partial(load_index, large, **columns), plan.index_files),
        ("inspection, first", inspect, plan.check_files),
        ("inspection, again", inspect, plan.check_files),
    ):
        began, used = time.perf_counter(), time.process_time()
        work()
        scale = 100_000 / count
        findings.add(f"{name}, 100k files", (time.perf_counter() - began) * scale, "seconds")
        findings.add(
            f"{name}, 100k files, processor", (time.process_time() - used) * scale, "seconds of processor time"
        )
    findings.notes.append(
        f"index and inspection times are scaled from {plan.index_files} and {plan.check_files} files of the same photos"
    )


def main() -> None:
    """Measure and report."""
    run_benchmark("memory", __doc__ or "", make_plan, measure)


if __name__ == "__main__":
    main()
