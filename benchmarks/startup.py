"""The wait before anything happens: `--help`, the first batch, the first update, and a resumed run's.

    python -m benchmarks.startup [--quick] [--json FILE]

Seconds of the clock from the start of the process. `new` finds neither inspection nor cache of the photos, `again`
finds both, as a second run on the same photos does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.photos import SMALL, find_pictures, link_photos, make_photos
from benchmarks.record import Findings, Ratio, interleave, run_benchmark

LIMIT_SECONDS = 0.5
ENDLESS = 10**6
HOME = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    photos: int
    help_rounds: int
    rounds: int
    limit_seconds: float


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores."""
    if is_quick:
        return Plan(photos=200, help_rounds=9, rounds=3, limit_seconds=90)
    return Plan(photos=2000, help_rounds=21, rounds=7, limit_seconds=900)


def measure(plan: Plan, folder: Path) -> Findings:
    """`--help` apart from the rest, since it is short."""
    findings = Findings()
    fieldmark = [sys.executable, "-m", "fieldmark"]
    cases: dict[str, Callable[[], float]] = {
        "python alone": partial(seconds_of, [sys.executable, "-c", "pass"], folder),
        "fieldmark --help": partial(seconds_of, [*fieldmark, "--help"], folder),
        "fieldmark train --help": partial(seconds_of, [*fieldmark, "train", "--help"], folder),
        "import torch and timm": partial(seconds_of, [sys.executable, "-c", "import torch, timm"], folder),
    }
    short = interleave(cases, rounds=plan.help_rounds, limit_seconds=plan.limit_seconds / 3, warm_up=True)
    findings.add_rounds("help", short, "seconds")
    busy = {f"{name}, by processor time": partial(processor_seconds_of, case) for name, case in cases.items()}
    processor = interleave(busy, rounds=3, limit_seconds=plan.limit_seconds / 6)
    findings.add_rounds("help, by processor time", processor, "seconds of processor time")
    findings.add("limit of --help", LIMIT_SECONDS, "seconds")
    for verb in ("fieldmark --help", "fieldmark train --help"):
        findings.ratios[f"{LIMIT_SECONDS} s / {verb}"] = Ratio("limit of --help", verb, 1.0)
        spent = f"{verb}, by processor time"
        findings.ratios[f"{LIMIT_SECONDS} s / {spent}"] = Ratio("limit of --help", spent)
    pictures, source = find_pictures(60)
    files, made = make_photos(pictures, folder / "photos", count=min(plan.photos, 50), shape=SMALL)
    data = folder / "data"
    link_photos(files, data, count=plan.photos, classes=4)
    findings.notes.append(f"{plan.photos} links to {made}, mosaics of {source}; EfficientNet-Lite0 at 160 pixels")
    again = folder / "again"
    seconds_of(_call("run_one_epoch", data, folder / "run"), again)
    longer = {
        "first batch, new": lambda: _fresh("first_batch", data, folder),
        "first batch, again": lambda: _scratch("first_batch", data, folder, again),
        "first update, new": lambda: _fresh("first_update", data, folder),
        "first update, again": lambda: _scratch("first_update", data, folder, again),
        "first update, resumed": partial(seconds_of, _call("first_resumed_update", folder / "run"), again),
    }
    rounds = interleave(longer, rounds=plan.rounds, limit_seconds=plan.limit_seconds)
    findings.add_rounds("first batch, update, resume", rounds, "seconds")
    name = "first update, again"
    busy = {f"{name}, by processor time": partial(processor_seconds_of, longer[name])}
    processor = interleave(busy, rounds=plan.rounds, limit_seconds=plan.limit_seconds / 3)
    findings.add_rounds("first update, by processor time", processor, "seconds of processor time")
    return findings


def seconds_of(command: list[str], home: Path) -> float:
    """Seconds of the clock that a command takes.

    Raises:
        RuntimeError: It failed.
    """
    paths = [str(HOME), str(HOME / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CACHE_HOME": str(home)}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return seconds


def processor_seconds_of(case: Callable[[], float]) -> float:
    """Seconds of processor time of the commands that `case` runs: on a busy machine, what they would take alone."""
    before = os.times()
    case()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _call(function: str, *arguments: Path) -> list[str]:
    quoted = ", ".join(repr(str(value)) for value in arguments)
    return [sys.executable, "-c", f"from benchmarks.startup import {function}; {function}({quoted})"]


def _fresh(function: str, data: Path, folder: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as home:
        return _scratch(function, data, folder, Path(home))


def _scratch(function: str, data: Path, folder: Path, home: Path) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return seconds_of(_call(function, data, Path(out) / "run"), home)


def _settings(data: str, epochs: int) -> list[str]:
    settings = ["augment.size=160", "model.name=tf_efficientnet_lite0", "model.weights=random", "cache.mode=uint8"]
    return [*settings, f'data.path="{data}"', "probe.epochs=0", f"train.epochs={epochs}", "schedule.warmup_epochs=0"]


class FirstUpdate:
    """Progress that ends the process after the first update: everything before it is what is measured."""

    def __init__(self) -> None:
        self.is_training = False

    def start(self, total: int, done: int) -> None:
        """Only training has so much to do."""
        self.is_training = total >= ENDLESS

    def advance(self, n: int) -> None:
        """An update is over, or a photo inspected."""
        if self.is_training:
            os._exit(0)

    def message(self, text: str) -> None:
        """Nothing."""


def first_batch(data: str, out: str) -> None:
    """From the settings to the first batch of training images."""
    from fieldmark.config import load_config
    from fieldmark.progress import Quiet
    from fieldmark.runs.session import open_session

    config = load_config(None, _settings(data, ENDLESS))
    with open_session(config, Path(out), start="new", progress=Quiet()) as session:
        session.start_training()
        next(iter(session.train_batches(0, 0)))
        os._exit(0)


def first_update(data: str, out: str) -> None:
    """From the command to the end of the first update."""
    recipe = Path(f"{out}.toml")
    recipe.touch()
    settings = [word for setting in _settings(data, ENDLESS) for word in ("--set", setting)]
    _run_command("train", "--recipe", str(recipe), "--out", out, *settings)


def run_one_epoch(data: str, out: str) -> None:
    """Leave a run that can be resumed."""
    from fieldmark.config import load_config
    from fieldmark.runs.train import train

    next(train(load_config(None, _settings(data, ENDLESS)), out))


def first_resumed_update(out: str) -> None:
    """From the command to the end of the run's next update; its folder stays as it is."""
    _run_command("train", "--resume", out)


def _run_command(*words: str) -> None:
    from fieldmark.cli import app, train

    train.open_progress = lambda title: nullcontext(FirstUpdate())  # type: ignore[assignment]
    sys.argv = ["fieldmark", *words]
    app.main()


def main() -> None:
    """Measure and report."""
    run_benchmark("startup", __doc__ or "", make_plan, measure)


if __name__ == "__main__":
    main()
