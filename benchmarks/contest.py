"""Training programs side by side: each in a process of its own that trains one epoch when it is told to.

Starting, importing and building are over before the first epoch that counts, and while one trains the others wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Setup:
    """What a contender trains.

    Attributes:
        kind: `ours`, `ours-model`, `timm`, `torchvision`, `torchvision-model` or `fastai`; `-model` trains on one batch
            that is in memory already, and shows what the model alone would do.
        data: Folder with train/ and val/.
        model: Name in timm.
        size: Side of the images, in pixels.
        batch_size: Photos in an update.
        workers: Loader processes of a peer; ours chooses its own.
        is_tuned: channels_last, and bf16 where the processor computes in it.
        device: `cpu` or `cuda`.
        steps: Updates of an epoch of the `-model` kinds; 0 is as many as the photos make.
        timm_script: timm's train.py.
        more: Further settings of ours, with spaces between them.
    """

    kind: str
    data: str
    model: str
    size: int
    batch_size: int
    workers: int = 0
    is_tuned: bool = False
    device: str = "cpu"
    steps: int = 0
    timm_script: str = ""
    more: str = ""


@dataclass(frozen=True)
class Pace:
    """How fast an epoch went.

    Attributes:
        by_clock: Photos per second.
        by_processor: Photos per second of processor time, of the process and its loaders together: what other work on
            the machine disturbs least.
        gigabytes: Most memory of a GPU that the process took so far.
    """

    by_clock: float
    by_processor: float
    gigabytes: float = 0.0


class ContenderError(Exception):
    """A contender died or is not installed; the message holds the end of what it said."""


class Contender:
    """The parent's end of one contender.

    Args:
        setup: What it trains.
        folder: A folder of its own, for what it writes.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "log.txt"
        home = Path(__file__).resolve().parents[1]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        paths = [str(home), str(home / "src"), environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, "-m", "benchmarks.contender", json.dumps(asdict(setup)), str(folder)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def epoch(self) -> Pace:
        """Train one epoch.

        Raises:
            ContenderError: It is dead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        before = processor_seconds(self._process.pid)
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            seconds, photos, gigabytes = map(float, self._process.stdout.readline().split())
        except (OSError, ValueError):
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ContenderError(" ".join(said[-1:]) or "it said nothing") from None
        used = processor_seconds(self._process.pid) - before
        return Pace(photos / seconds, photos / max(used, 1e-9), gigabytes)

    def close(self) -> None:
        """End it: closing its input asks for that, and what does not listen is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def processor_seconds(pid: int) -> float:
    """Processor time of a process and all that it started, ended or not; 0 if it is gone."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def start_all(setups: dict[str, Setup], folder: Path) -> tuple[dict[str, Contender], dict[str, str]]:
    """Start contenders together and warm each up by one epoch, one after another.

    Returns:
        Those that run, and for each of the others what it died of.
    """
    started = {name: Contender(setup, folder / f"{place:02d}") for place, (name, setup) in enumerate(setups.items())}
    running: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    for name, contender in started.items():
        try:
            contender.epoch()
            running[name] = contender
        except ContenderError as error:
            contender.close()
            failed[name] = str(error)
    return running, failed
