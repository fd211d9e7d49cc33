"""A hundred kills and twenty full disks at every stage of a run: it ends as the unbroken one, to the bit.

A process that has imported everything forks one training after another, so that a kill costs no start. Each training
writes which stage it enters, so that kills hit all of them, at random moments within.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark.data.cache import list_stored
from fieldmark.runs.folder import Run
from fieldmark.training.checkpoint import load_checkpoint, load_saved_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="not on this system"),
]

STAGES = ("inspect", "cache", "probe", "epoch", "record", "save", "end")
SETTINGS = (
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "optim.lr=3e-3"),
    *("train.epochs=6", "train.batch_size=8", "train.threads=1", "loader.workers=0", "schedule.warmup_epochs=0"),
    *("probe.epochs=2", "mix.share=0.5", "train.ema_decay=0.9", "train.save_minutes=0.002", "cache.mode=uint8"),
)

FORKER = textwrap.dedent(
    """
    import json, os, sys, traceback
    import fieldmark.runs.build as build
    import fieldmark.runs.dataset as dataset
    import fieldmark.runs.train as runs
    from fieldmark.config import load_config
    from fieldmark.errors import FieldmarkError
    from fieldmark.runs.writer import RunWriter
    import fieldmark.models.classifier, numba, simplejpeg, pyarrow.parquet, safetensors.torch, timm, torchvision

    build.choose_computation = lambda model, wanted, **_: (wanted, "")

    def run(job):
        os.environ["XDG_CACHE_HOME"] = job["cache"]
        marks = os.open(job["marks"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def marked(stage, function):
            def call(*given, **named):
                os.write(marks, stage.encode() + b"\\n")
                return function(*given, **named)
            return call

        dataset.Inspection = marked("inspect", dataset.Inspection)
        build.open_cache = marked("cache", build.open_cache)
        runs._fit_probe = marked("probe", runs._fit_probe)
        runs._iterate_with_stop = marked("epoch", runs._iterate_with_stop)
        RunWriter.record_epoch = marked("record", RunWriter.record_epoch)
        RunWriter.save = marked("save", RunWriter.save)
        runs._write_summary = marked("end", runs._write_summary)
        try:
            out = job["out"]
            for _ in runs.resume(out) if job["resume"] else runs.train(load_config(None, job["settings"]), out):
                pass
            return 0
        except FieldmarkError as error:
            with open(job["marks"] + ".told", "w") as file:
                file.write(str(error))
            return 2
        except BaseException:
            with open(job["marks"] + ".told", "w") as file:
                traceback.print_exc(file=file)
            return 1

    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(run(job))
        print(pid, flush=True)
    """
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(("2", "10", "red deer")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for photo in range(count):
                pixels = np.random.default_rng([number, photo]).integers(0, 120, (60 + photo, 70, 3)).astype(np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / f"{photo}.png")
    return root


@dataclass
class Training:
    """A training in a process of its own."""

    forker: Forker
    pid: int
    marks: Path

    def stages(self) -> list[str]:
        """The stages that it has entered so far."""
        return self.marks.read_text().split() if self.marks.exists() else []

    def kill(self) -> int:
        """Kill it and give its exit code: that of the signal, or its own if it had ended."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Give its exit code once it ends."""
        return int(self.forker.ask({"wait": self.pid}))

    def told(self) -> str:
        """The message or the traceback that it ended with."""
        path = self.marks.with_name(f"{self.marks.name}.told")
        return path.read_text() if path.exists() else ""


class Forker:
    """Starts trainings that have imported everything."""

    def __init__(self, folder: Path, photos: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.folder, self.photos, self.count = folder, photos, 0

    def ask(self, job: dict[str, object]) -> str:
        """Send a job and give the line that comes back."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, out: Path, cache: Path) -> Training:
        """Begin or resume, as a user would by what the folder holds."""
        self.count += 1
        marks = self.folder / f"marks-{self.count}"
        settings = [f"data.path={self.photos}", *SETTINGS]
        job = {"out": str(out), "resume": (out / "recipe.toml").is_file(), "settings": settings}
        pid = int(self.ask({**job, "cache": str(cache), "marks": str(marks)}))
        return Training(self, pid, marks)


@pytest.fixture
def forker(tmp_path, photos) -> Iterator[Forker]:
    (tmp_path / "marks").mkdir()
    made = Forker(tmp_path / "marks", photos)
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture
def unbroken(forker, tmp_path) -> Path:
    training = forker.start(tmp_path / "unbroken", tmp_path / "cache of the unbroken")
    assert training.wait() == 0, training.told()
    assert set(training.stages()) == set(STAGES)
    return tmp_path / "unbroken"


def assert_same_result(one: Path, other: Path) -> None:
    a, b = load_saved_weights(one / "best.safetensors"), load_saved_weights(other / "best.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    x, y = load_checkpoint(one / "last.pt"), load_checkpoint(other / "last.pt")
    assert all(torch.equal(x["model"][name], y["model"][name]) for name in x["model"])
    timings = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in Run(p).metrics] for p in (one, other)]
    assert rows[0] == rows[1]
    np.testing.assert_array_equal(Run(one).predictions().probabilities, Run(other).predictions().probabilities)
    stored = [np.load(path / "predictions/val_epochs.npz")["predicted"] for path in (one, other)]
    np.testing.assert_array_equal(*stored)


def is_finished(out: Path) -> bool:
    return (out / "recipe.toml").is_file() and Run(out).summary["status"] == "finished"


def kill_within(training: Training, stage: str, place: int, delay: float) -> int:
    """Kill a training a moment after it entered a stage for the time `place`, or let it end before that."""
    deadline = time.monotonic() + 120
    while (
        training.stages().count(stage) <= place and not training.marks.with_name(f"{training.marks.name}.told").exists()
    ):
        assert time.monotonic() < deadline, training.told()
        if place and stage == "end":
            break
        if "end" in training.stages() and stage != "end":
            break
        time.sleep(0.002)
    time.sleep(delay)
    return training.kill()


@pytest.mark.parametrize("kills", [100])
def test_killed_at_every_stage_a_run_ends_as_the_unbroken_one(forker, unbroken, tmp_path, kills):
    """Each fifth time two trainings of one folder are killed together, of which one at most was let in."""
    rng = np.random.default_rng(int(os.environ.get("KILLS_SEED", "0")))
    out, cache, hit, finished, begun = tmp_path / "broken", tmp_path / "cache", Counter(), 0, 0
    while sum(hit.values()) < kills:
        if is_finished(out) or not out.exists():
            if out.exists():
                assert_same_result(out, unbroken)
                assert not list(out.rglob("*.part"))
                finished += 1
            shutil.rmtree(out, ignore_errors=True)
            begun += 1
            cache = tmp_path / f"cache-{begun}"
        number = sum(hit.values())
        stage = STAGES[number % len(STAGES)]
        if stage in ("probe",) and (out / "last.pt").is_file():
            stage = "epoch"  # a resumed run has its probe
        trainings = [forker.start(out, cache) for _ in range(2 if number % 5 == 4 else 1)]
        place = int(rng.integers(0, 3)) if stage in ("epoch", "save", "record") else 0
        codes = [kill_within(trainings[0], stage, place, float(rng.exponential(0.01)))]
        codes += [training.kill() for training in trainings[1:]]
        for training, code in zip(trainings, codes, strict=True):
            told = training.told()
            assert code in (-signal.SIGKILL, 0, 2), told
            assert "Traceback" not in told
            if code == 2:  # two at a time: the other one had it
                assert len(trainings) == 2, told
                assert "being trained by another process" in told or "exists and is not empty" in told, told
        hit[stage] += 1
        for place in cache.rglob("*-16*"):
            list_stored(place)
    while not is_finished(out):
        training = forker.start(out, cache)
        assert training.wait() == 0, training.told()
    assert_same_result(out, unbroken)
    assert not list(out.rglob("*.part"))
    assert finished
    assert set(hit) >= {"inspect", "cache", "epoch", "record", "save", "end"}, hit


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of that size at `folder`, where the system lets us make one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("not on this system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)


def test_on_twenty_disks_of_growing_size_a_run_says_so_and_goes_on_once_there_is_room(forker, unbroken, tmp_path):
    """Half of them hold the cache of photos too, which is never a reason to fail."""
    sizes = np.geomspace(8, 4 * _kilobytes(unbroken), 20).astype(int)
    outcomes = Counter()
    for number, kilobytes in enumerate(sizes.tolist()):
        disk = tmp_path / f"disk-{number}"
        with small_disk(disk, kilobytes):
            out, cache = disk / "run", (disk if number % 2 else tmp_path) / f"cache-{number}"
            training = forker.start(out, cache)
            code, told = training.wait(), training.told()
            assert code in (0, 2), told
            if code == 2:
                assert "No space left on device" in told or "the disk is full or failed" in told, told
                assert "Traceback" not in told
                # What is there is whole: nothing half, and either a run that goes on or nothing of one.
                assert not list(out.rglob("*.part"))
                # The room comes a little at a time: the same disk fills again and again.
                for share in (1.2, 1.5):
                    resize(disk, int(kilobytes * share))
                    again = forker.start(out, cache)
                    assert again.wait() in (0, 2), again.told()
                    if is_finished(out):
                        break
                resize(disk, 64 * 1024)
                if not is_finished(out):
                    training = forker.start(out, cache)
                    assert training.wait() == 0, training.told()
            outcomes[code] += 1
            assert_same_result(out, unbroken)
    assert outcomes[2] >= 10, outcomes
    assert outcomes[0] >= 1, outcomes


def test_a_disk_that_fills_between_two_epochs_is_freed_and_the_run_goes_on(forker, unbroken, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 64 * 1024):
        training = forker.start(disk / "run", tmp_path / "cache")
        while "record" not in training.stages():
            time.sleep(0.002)
        with (disk / "filler").open("wb") as file:
            try:
                while file.write(bytes(65536)):
                    file.flush()
            except OSError:
                pass
        code, told = training.wait(), training.told()
        assert code in (0, 2), told
        if code == 2:
            assert "then continue with: fieldmark train --resume" in told
            refused = forker.start(disk / "run", tmp_path / "cache")
            assert refused.wait() == 2, "still full"
            assert "Traceback" not in refused.told()
        (disk / "filler").unlink()
        if not is_finished(disk / "run"):
            training = forker.start(disk / "run", tmp_path / "cache")
            assert training.wait() == 0, training.told()
        assert_same_result(disk / "run", unbroken)


def _kilobytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1024
