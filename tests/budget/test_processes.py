"""A budget that two processes spend together: the first decides, both compute."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fieldmark.budget.run import train_within
from fieldmark.config import load_config
from fieldmark.inference.predictor import Predictor
from fieldmark.runs.folder import Run

pytestmark = pytest.mark.slow

SETTINGS = ("model.name=test_resnet", "model.weights=random", "eval.size=32", "augment.size=32", "cache.mode=off",
            "loader.workers=0", "train.threads=1", "train.batch_size=9", "train.device=cpu", "mix.share=0",
            "train.precision=32-true", "train.ema_decay=0.5")  # fmt: skip

# A clock that goes on whenever it is read, so that the first process's decisions are the same each time.
SCRIPT = """
import sys
from itertools import count
from fieldmark.budget.run import resume_within
if __name__ == "__main__":
    ticks = count()
    resume_within(sys.argv[1], minutes=None, clock=lambda: 0.02 * next(ticks))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, color in enumerate(((200, 60, 50), (50, 170, 70), (60, 70, 200))):
        for place in range(30):
            path = root / str(number) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(100 * number + place).normal(color, 90, (36, 48, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def repeat(plan: Path, out: Path, *, processes: int) -> Run:
    """Make the run of a plan again, by so many processes."""
    out.mkdir()
    budget, settings, *others = [json.loads(line) for line in plan.read_text().splitlines()]
    settings["value"]["train"]["devices"] = processes
    (out / "plan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (budget, settings, *others)))
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, "-W", "ignore", script, out], env=one_thread(), check=True, timeout=300)
    return Run(out)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_equal_one_by_the_same_plan_and_repeat_their_own_to_the_bit(photos, tmp_path):
    ticks = iter(0.02 * tick for tick in range(10**6))
    config = load_config(None, [f'data.path="{photos.as_posix()}"', *SETTINGS])
    one = train_within(config, tmp_path / "one", minutes=0.2, clock=lambda: next(ticks))
    two = repeat(one.path / "plan.jsonl", tmp_path / "two", processes=2)
    assert any(row["what"].startswith("fine-tuning of ") for row in one.summary["tried"])
    assert [row["what"] for row in one.summary["tried"]] == [row["what"] for row in two.summary["tried"]]
    for ours, theirs in zip(one.summary["tried"], two.summary["tried"], strict=True):
        for name in {"top1", "log_loss", "updates"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), ours["what"]
    np.testing.assert_allclose(one.predictions().probabilities, two.predictions().probabilities, atol=2e-3)

    again = repeat(two.path / "plan.jsonl", tmp_path / "again", processes=2)
    assert (again.path / "plan.jsonl").read_text() == (two.path / "plan.jsonl").read_text()
    files = [path.relative_to(two.path) for path in two.path.rglob("best.safetensors")]
    assert files
    for file in files:
        ours, theirs = load_file(two.path / file), load_file(again.path / file)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{file} {name}")


def start(photos: Path, out: Path, *words: str) -> list[str]:
    pairs = [f"--set={pair}" for pair in SETTINGS]
    return [sys.executable, *words, "-m", "fieldmark", "train", str(photos), "--out", str(out), *pairs]


def start_fine_tuning(photos: Path, out: Path) -> subprocess.Popen[str]:
    """Two processes that have saved a state."""
    command = [*start(photos, out), "--minutes", "10", "--set=train.devices=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread())
    deadline = time.monotonic() + 120
    while not list(out.glob("tuning/*/last.pt")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def test_a_signal_to_one_of_two_processes_leaves_the_best_and_the_run_goes_on(photos, tmp_path):
    out = tmp_path / "run"
    process = start_fine_tuning(photos, out)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert told.count("which answers. Go on with") == 1
    assert told.count("data: 76 photos") == 1
    assert "Traceback" not in told
    assert Run(out).summary["status"] == "interrupted"
    assert Predictor.load(out).classes == ("0", "1", "2")

    words = ["--resume", str(out), "--minutes", "0.1", "--json"]
    command = [sys.executable, "-m", "fieldmark", "train", *words]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=True, timeout=240)
    assert json.loads(done.stdout)["status"] == "finished"


def test_a_worker_that_is_killed_is_told_of_and_the_folder_answers(photos, tmp_path):
    out = tmp_path / "run"
    process = start_fine_tuning(photos, out)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, told = process.communicate(timeout=120)
    # Lightning looks each five seconds whether all live, and may end the first before it has noticed.
    assert process.returncode in (2, -signal.SIGKILL), told
    assert told.count("error: another process of this training was lost") == (process.returncode == 2)
    assert "Traceback" not in told
    assert Run(out).summary["status"] == "running"
    assert Predictor.load(out).classes == ("0", "1", "2")


def test_torchrun_spends_a_budget_and_tells_its_result_once(photos, tmp_path):
    out = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29541")
    command = [*start(photos, out, *launcher), "--minutes=0.4"]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.count("validation: top-1") == 1
    assert "in each of 2 processes" in done.stderr
    assert Run(out).summary["status"] == "finished"
    shutil.rmtree(out)


def test_what_is_wrong_is_told_once_by_two_processes(photos, tmp_path):
    out = tmp_path / "run"
    for more, message in (
        (["model.min_photos_per_second=1e9"], "1e+09 are wanted"),
        (["model.head=mlp"], "linear head"),
    ):
        command = [*start(photos, out), "--minutes=1", *(f"--set={pair}" for pair in (*more, "train.devices=2"))]
        done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
        assert not out.exists()
