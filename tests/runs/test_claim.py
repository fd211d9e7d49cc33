"""A run folder has one training at a time, and a beginning that failed leaves it as it was."""

from __future__ import annotations

import errno
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.errors import FieldmarkError, InterruptedRunError, ResourceError, RunError
from fieldmark.runs.folder import Run
from fieldmark.runs.train import resume, train
from fieldmark.runs.writer import LOCK, claim_folder

TINY = (
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=1"),
    *("train.batch_size=8", "train.threads=1", "loader.workers=0", "schedule.warmup_epochs=0", "cache.mode=off"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for photo in range(8):
            pixels = np.random.default_rng([number, photo]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{photo}.png")
    return root


def tiny(photos: Path, *overrides: str):
    return load_config(None, [f"data.path={photos}", *TINY, *overrides])


HOLDER = """
import sys, time
from pathlib import Path
from fieldmark.runs.writer import claim_folder
with claim_folder(Path(sys.argv[1]), is_new=False):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_is_trained_in_is_refused_until_its_holder_dies(photos, tmp_path):
    """Also to a resume; a holder that was killed frees it, and what it had begun to write goes."""
    out = tmp_path / "run"
    config = tiny(photos, "train.epochs=2")
    next(train(config, out))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        part = out / f"best.safetensors.{holder.pid}.part"
        part.write_bytes(b"half")
        before = (out / "metrics.jsonl").read_text()
        for begin in (lambda: resume(out), lambda: train(config, out)):
            with pytest.raises(
                RunError, match=r"being trained by another process: wait|exists and is not empty"
            ) as told:
                list(begin())
            assert "\n" not in str(told.value)
        assert (out / "metrics.jsonl").read_text() == before
        assert part.exists()  # its writer lives
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert [report.epoch for report in resume(out)] == [2]
    assert [row["epoch"] for row in Run(out).metrics] == [1, 2]
    assert not list(out.rglob("*.part"))


def test_two_new_trainings_of_one_folder_at_once_are_one(photos, tmp_path):
    with (
        claim_folder(tmp_path / "run", is_new=True),
        pytest.raises(RunError, match="is being trained by another process"),
    ):
        next(train(tiny(photos), tmp_path / "run"))


@pytest.mark.parametrize(
    "settings",
    [("data.path=nowhere",), ("model.name=resnet5",), ("model.weights=/gone/w.pth",), ("train.trackers=nobody",)],
)
def test_a_refused_training_leaves_no_folder(photos, tmp_path, settings):
    with pytest.raises(FieldmarkError):
        list(train(tiny(photos, *settings), tmp_path / "runs" / "run"))
    assert not (tmp_path / "runs" / "run").exists()


def test_a_refused_training_leaves_a_users_file_alone(photos, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists and is not empty. Choose another --out"):
        list(train(tiny(photos), tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != LOCK] == ["note.txt"]


def test_a_finished_run_is_offered_for_use_and_not_for_resuming(photos, tmp_path):
    list(train(tiny(photos), tmp_path / "run"))
    with pytest.raises(RunError, match=r"holds a finished run: use it \(fieldmark evaluate") as told:
        list(train(tiny(photos), tmp_path / "run"))
    assert "--resume" not in str(told.value)
    with pytest.raises(RunError, match="is finished: there is nothing to resume"):
        list(resume(tmp_path / "run"))


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x"] * 3000)])
def test_a_name_that_no_folder_can_have_is_one_sentence(photos, tmp_path, name):
    with pytest.raises(ResourceError, match="cannot be used as a run folder: File name too long") as told:
        list(train(tiny(photos), tmp_path / name))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("first", range(7))
def test_a_disk_that_is_full_at_any_of_the_first_files_leaves_nothing_half(photos, tmp_path, monkeypatch, first):
    """The run resumes to what it would have been, or may begin again in the same place: no third state."""
    config, out = tiny(photos), tmp_path / "run"
    write, left = Path.write_bytes, iter(range(100))

    def full(self, data):
        if out in self.parents and next(left) == first:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            list(train(config, out))
    assert not list(out.rglob("*.part")) if out.exists() else True
    if out.exists():
        assert Run(out).config == config
        list(resume(out))
    else:
        list(train(config, out))
    assert Run(out).summary["status"] == "finished"


@pytest.mark.parametrize(
    "files", [(), ("log.txt", "split.csv"), ("split.csv", "classes.json", "data.json.999999999.part")]
)
def test_what_a_kill_before_the_recipe_left_is_begun_again(photos, tmp_path, files):
    """It can be resumed by nobody, so it must not stand in the way."""
    out = tmp_path / "run"
    out.mkdir()
    for name in (LOCK, *files):
        (out / name).write_text("half")
    list(train(tiny(photos), out))
    assert Run(out).summary["status"] == "finished"
    assert "half" not in (out / "split.csv").read_text()
    assert not list(out.rglob("*.part"))


def test_an_empty_recipe_is_no_run(tmp_path):
    """As a full disk left it before recipes were whole or absent."""
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(RunError, match=r"is not a run: its recipe.toml is empty") as told:
        Run(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("stage", ["runs.dataset.Inspection", "runs.build.open_cache", "runs.build.load_weights"])
def test_a_signal_before_the_first_update_says_so_and_leaves_what_can_go_on(photos, tmp_path, monkeypatch, stage):
    target = f"fieldmark.{stage}"
    original = pkgutil.resolve_name(target)

    def stopped(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return original(*arguments, **named)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(target, stopped)
        with pytest.raises(
            InterruptedRunError, match=r"stopped by SIGTERM before the first update\. Nothing was written"
        ):
            list(train(tiny(photos, "cache.mode=uint8"), tmp_path / "run"))
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_probe_is_fitted_names_the_way_on_which_works(photos, tmp_path, monkeypatch):
    def stopped(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fieldmark.runs.session.Session.predict", stopped)
        with pytest.raises(InterruptedRunError, match=re.escape(f"Begin again with: fieldmark train --resume {out}")):
            list(train(tiny(photos, "probe.epochs=2"), out))
    assert [report.epoch for report in resume(out)] == [0, 1]


def test_parts_of_the_dead_go_and_those_of_the_living_and_of_others_stay(tmp_path):
    (tmp_path / "predictions").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not psutil.pid_exists(dead.pid)
    for name in (f"last.pt.{dead.pid}.part", f"predictions/val.parquet.{dead.pid}.part"):
        (tmp_path / name).touch()
    kept = {f"last.pt.{os.getpid()}.part", "mine.part", ".part"}
    for name in kept:
        (tmp_path / name).touch()
    with claim_folder(tmp_path, is_new=False):
        pass
    assert {path.name for path in tmp_path.rglob("*.part")} == kept
