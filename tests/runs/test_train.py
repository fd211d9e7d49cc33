"""The laws of whole runs, on generated photos and a tiny network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fieldmark.config import load_config
from fieldmark.data import index as photo_index
from fieldmark.data.columns import Categories
from fieldmark.errors import ConfigError, DataError, InterruptedRunError, ResourceError, RunError, TrainingError
from fieldmark.inference.evaluation import evaluate
from fieldmark.progress import Quiet
from fieldmark.runs import build, session
from fieldmark.runs.dataset import cut_updates, prepare_dataset
from fieldmark.runs.folder import Run
from fieldmark.runs.train import resume, train
from fieldmark.runs.writer import RunWriter
from fieldmark.serve.review import open_review
from fieldmark.study.report import write_report
from fieldmark.training.checkpoint import load_checkpoint, load_saved_weights
from fieldmark.training.metrics import summarize

TINY = (
    "model.name=test_resnet",
    "model.weights=random",
    "augment.size=32",
    "eval.size=32",
    "optim.lr=3e-3",
    "optim.backbone_lr_scale=1",
    "train.epochs=3",
    "train.batch_size=8",
    "train.threads=1",
    "loader.workers=0",
    "schedule.warmup_epochs=0",
    "mix.share=0.5",
    "augment.erase=0.3",
    "train.ema_decay=0.9",
    "model.head=mlp",
)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three classes by color, 12 photos each for training and 4 for validation, of odd sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for number, name in enumerate(("2", "10", "red deer")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for photo in range(count):
                pixels = rng.integers(0, 120, (40 + photo, 50, 3)).astype(np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / f"{photo}.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny(photos: Path, *overrides: str):
    return load_config(None, [f"data.path={photos}", *TINY, *overrides])


def assert_same_result(first: Path, second: Path) -> None:
    a, b = load_saved_weights(first / "best.safetensors"), load_saved_weights(second / "best.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    x, y = load_checkpoint(first / "last.pt"), load_checkpoint(second / "last.pt")
    assert all(torch.equal(x["model"][name], y["model"][name]) for name in x["model"])
    assert x["best"] == y["best"]
    timings = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in Run(p).metrics] for p in (first, second)]
    assert rows[0] == rows[1]
    np.testing.assert_array_equal(Run(first).predictions().probabilities, Run(second).predictions().probabilities)
    for path in (first, second):
        stored = np.load(path / "predictions/val_epochs.npz")["predicted"]
        assert len(stored) == len(rows[0])


def test_a_run_folder_holds_all_that_it_promises(photos, tmp_path):
    out = tmp_path / "run"
    reports = list(train(tiny(photos, "probe.epochs=3"), out))
    assert [report.epoch for report in reports] == [0, 1, 2, 3]
    run = Run(out)
    assert run.classes == ("2", "10", "red deer")
    assert [row["epoch"] for row in run.metrics] == [0, 1, 2, 3]
    assert run.summary["status"] == "finished"
    assert run.config == tiny(photos, "probe.epochs=3")
    assert run.model_info["parameters"] == sum(p.numel() for p in run.load_model().parameters())
    assert run.prior.tolist() == pytest.approx([1 / 3] * 3)
    assert torch.__version__.startswith(run.environment["versions"]["torch"])
    assert len(run.split.photos) == 48
    log = (out / "log.txt").read_text()
    assert "data: 48 photos of 3 classes" in log
    assert "epoch 3: train loss" in log


def test_predicting_the_validation_photos_reproduces_the_logged_figures_exactly(photos, tmp_path):
    out = tmp_path / "run"
    list(train(tiny(photos), out))
    moved = shutil.move(out, tmp_path / "moved elsewhere")
    stored = Run(moved).predictions()
    logged = max(row["val"]["top1"] for row in Run(moved).metrics)
    again = evaluate(Run(moved))
    assert again.metrics["top1"] == logged == summarize(stored.probabilities, stored.labels, Run(moved).prior)["top1"]
    np.testing.assert_array_equal(again.predictions.probabilities, stored.probabilities)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(photos, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        list(train(tiny(photos, f"train.seed={seed}", "train.epochs=2"), tmp_path / name))
    assert_same_result(tmp_path / "a", tmp_path / "b")
    weights = [load_saved_weights(tmp_path / name / "best.safetensors") for name in "ac"]
    assert not torch.equal(weights[0]["backbone.conv1.0.weight"], weights[1]["backbone.conv1.0.weight"])


def test_workers_do_not_change_the_run(photos, tmp_path):
    for workers in (0, 2):
        list(train(tiny(photos, f"loader.workers={workers}", "train.epochs=1"), tmp_path / str(workers)))
    assert_same_result(tmp_path / "0", tmp_path / "2")


def test_every_executor_trains_on_the_same_pictures(photos, tmp_path):
    """To within filtering: the same random numbers, so nearly the same loss on the first updates."""
    losses = {}
    for executor in ("fast", "reference"):
        out = tmp_path / executor
        list(train(tiny(photos, f"augment.executor={executor}", "train.epochs=1", "optim.lr=1e-5"), out))
        losses[executor] = Run(out).metrics[0]["train_loss"]
    other = tmp_path / "other"
    list(train(tiny(photos, "augment.executor=reference", "train.epochs=1", "optim.lr=1e-5", "mix.share=0"), other))
    assert losses["fast"] == pytest.approx(losses["reference"], rel=0.01)
    assert Run(other).metrics[0]["train_loss"] != pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.parametrize("select", ["best", "last"])
def test_best_is_the_maximum_and_last_is_the_last(photos, tmp_path, select, monkeypatch):
    """The code behind the report never updated its maximum, so its "best" was its last."""
    values = iter([0.2, 0.9, 0.5, 0.9])
    out = tmp_path / "run"
    monkeypatch.setattr("fieldmark.runs.session.metrics.summarize", lambda *_: {"top1": next(values), "log_loss": 1.0})
    kept = []
    for report in train(tiny(photos, "train.epochs=4", f"train.select={select}", "train.ema_decay=0"), out):
        best = load_saved_weights(out / "best.safetensors")
        last = load_checkpoint(out / "last.pt")["model"]
        kept.append((report.epoch, torch.equal(best["backbone.conv1.0.weight"], last["backbone.conv1.0.weight"])))
        if report.epoch == 4:
            break
    is_kept = [True, True, False, False] if select == "best" else [True] * 4
    assert [same for _, same in kept] == is_kept
    assert load_checkpoint(out / "last.pt")["best"] == {"value": 0.9, "epoch": 2}


def test_the_batch_size_reaches_the_loader(photos, tmp_path):
    """In the code behind the report it never did."""
    list(train(tiny(photos, "train.batch_size=5", "train.epochs=1"), tmp_path / "run"))
    assert Run(tmp_path / "run").metrics[0]["step"] == 7  # 36 photos in batches of 5, the last of 6


def test_odd_batches_and_a_last_batch_of_one_are_trained_on(photos, tmp_path):
    list(train(tiny(photos, "train.batch_size=7", "train.epochs=1", "mix.share=1"), tmp_path / "run"))
    assert Run(tmp_path / "run").metrics[0]["step"] == 5


def test_no_photo_is_dropped_and_none_is_alone_in_a_batch():
    for total, size, processes in ((36, 5, 1), (9, 4, 2), (1, 4, 1), (10, 10, 3), (11, 10, 1)):
        cuts = cut_updates(range(total), size, processes=processes)
        assert [number for cut in cuts for number in cut] == list(range(total))
        assert all(len(cut) >= 2 * processes for cut in cuts) or len(cuts) == 1


def test_mixing_can_be_switched_off_for_the_last_epochs(photos, tmp_path):
    list(train(tiny(photos, "mix.share=1", "mix.off_epochs=1"), tmp_path / "run"))
    assert [row["clean_fraction"] for row in Run(tmp_path / "run").metrics] == [0, 0, 1]


def test_frozen_stages_stay_as_they_are(photos, tmp_path):
    out = tmp_path / "run"
    weights = []
    for _ in train(tiny(photos, "model.freeze=3", "train.ema_decay=0"), out):
        weights.append(load_checkpoint(out / "last.pt")["model"])
    moved = lambda name: not torch.equal(weights[0][name], weights[1][name])  # noqa: E731
    assert moved("head.0.weight")
    assert moved("backbone.layer4.0.conv1.weight")
    assert moved("backbone.layer3.0.bn1.weight")
    assert not moved("backbone.layer2.0.conv1.weight")
    assert not moved("backbone.conv1.0.weight")
    assert not moved("backbone.layer2.0.bn1.running_mean")


def test_the_probe_alone_is_a_run(photos, tmp_path):
    reports = list(train(tiny(photos, "train.epochs=0", "probe.epochs=5"), tmp_path / "run"))
    run = Run(tmp_path / "run")
    assert [report.epoch for report in reports] == [0]
    assert run.summary["status"] == "finished"
    stored = run.predictions()
    assert run.summary["val"]["top1"] == (stored.probabilities.argmax(1) == stored.labels).mean()


def test_resolution_rises_on_its_way(photos, tmp_path):
    config = tiny(photos, "train.resolution_steps=[[0.0, 24], [0.5, 40]]", "eval.size=40")
    list(train(config, tmp_path / "run"))
    assert Run(tmp_path / "run").eval_spec().size == 40


def test_train_and_val_together_leave_nothing_to_select_on(photos, tmp_path):
    with pytest.raises(ConfigError, match="leaves nothing to select on"):
        tiny(photos, "data.train_on=train+val")
    list(train(tiny(photos, "data.train_on=train+val", "train.select=last", "train.epochs=1"), tmp_path / "run"))
    run = Run(tmp_path / "run")
    assert run.metrics[0]["step"] == 6
    assert run.metrics[0]["val"] == {}
    with pytest.raises(RunError, match="holds no predictions"):
        run.predictions()


def test_patience_waits_for_nothing_where_no_photos_validate(photos, tmp_path):
    settings = ("train.epochs=3", "train.patience_epochs=1", "data.train_on=train+val", "train.select=last")
    assert len(list(train(tiny(photos, *settings), tmp_path / "run"))) == 3


def test_copies_on_both_sides_of_the_split_and_photos_without_a_group_are_said(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    shutil.copy(root / "train" / "2" / "0.png", root / "val" / "2" / "copy.png")
    settings = tiny(root, "data.group_by=pattern", r"data.group_pattern=train/(\d+)/")
    notes = " ".join(prepare_dataset(settings.data, progress=Quiet()).notes)
    assert "1 photo lies in more than one split, such as" in notes
    assert "25 of 49 photos have no group by pattern, and are divided one by one" in notes


def test_more_processes_than_photos_of_a_batch_are_refused_and_fewer_gpus_than_asked_for(photos, tmp_path):
    index = prepare_dataset(tiny(photos).data, progress=Quiet()).index
    with pytest.raises(ConfigError, match=r"train.batch_size 8 is that of all processes together, and there are 9"):
        build.build_plan(tiny(photos), index, processes=9)
    with pytest.raises(ConfigError, match=r"train.devices = 1: "):
        build._make_fabric(accelerator="cuda", devices=1)


def test_patience_ends_a_run_that_gets_no_better(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("fieldmark.runs.session.metrics.summarize", lambda *_: {"top1": 0.5})
    list(train(tiny(photos, "train.epochs=20", "train.patience_epochs=2"), tmp_path / "run"))
    assert [row["is_best"] for row in Run(tmp_path / "run").metrics] == [True, False, False]
    assert Run(tmp_path / "run").summary["status"] == "finished"


def leave_after(config, out: Path, epochs: int) -> None:
    for report in train(config, out):
        if report.epoch == epochs:
            break


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_resumed_run_equals_an_unbroken_one(photos, tmp_path, epochs):
    config = tiny(photos, "probe.epochs=2")
    list(train(config, tmp_path / "unbroken"))
    leave_after(config, tmp_path / "broken", epochs)
    list(resume(tmp_path / "broken"))
    assert_same_result(tmp_path / "broken", tmp_path / "unbroken")


def test_a_run_with_a_parquet_split_table_is_resumed_and_read_as_one_with_csv(photos, tmp_path, monkeypatch):
    list(train(tiny(photos), tmp_path / "csv"))
    monkeypatch.setattr(photo_index, "MOST_CSV_ROWS", 10)
    leave_after(tiny(photos), tmp_path / "parquet", 1)
    list(resume(tmp_path / "parquet"))
    runs = [Run(tmp_path / name) for name in ("csv", "parquet")]
    assert [sorted(file.name for file in run.path.glob("split.*")) for run in runs] == [
        ["split.csv"],
        ["split.parquet"],
    ]
    assert runs[0].split == runs[1].split
    assert_same_result(*(run.path for run in runs))
    results = [evaluate(run) for run in runs]
    np.testing.assert_array_equal(results[0].predictions.probabilities, results[1].predictions.probabilities)
    assert write_report([runs[1]], tmp_path / "report.md")
    review = TestClient(
        open_review([runs[1]], tmp_path / "corrections.csv", max_distance=6), base_url="http://localhost"
    )
    assert review.get("/api/overview").json()["photos"] == 48


def test_processes_that_read_other_labels_do_not_train_together(photos, tmp_path):
    dataset = prepare_dataset(tiny(photos).data, progress=Quiet())
    digests: list[int] = []

    def gather(digest):
        digests.append(int(digest))
        return torch.tensor(digests)

    def exchange(dataset):
        session._require_same(SimpleNamespace(world_size=2, device="cpu", all_gather=gather), dataset)

    exchange(dataset)
    exchange(dataset)
    labels = [*dataset.index.photos.labels]
    changed = replace(dataset.index.photos, labels=Categories.of(["10", *labels[1:]]))
    with pytest.raises(DataError, match="see, label or divide the photos"):
        exchange(replace(dataset, index=replace(dataset.index, photos=changed)))


@pytest.mark.parametrize("saves", [1, 2])
def test_a_run_killed_right_after_a_save_equals_an_unbroken_one(photos, tmp_path, monkeypatch, saves):
    """The first save comes between the probe and the first update, where no epoch ends."""
    config = tiny(photos, "probe.epochs=2")
    list(train(config, tmp_path / "unbroken"))
    save, left = RunWriter.save, iter(range(saves))

    def save_and_die(writer, state):
        save(writer, state)
        if next(left) == saves - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunWriter, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        list(train(config, tmp_path / "broken"))
    monkeypatch.undo()
    list(resume(tmp_path / "broken"))
    assert_same_result(tmp_path / "broken", tmp_path / "unbroken")


def test_resume_needs_an_unfinished_run_with_the_same_photos(photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "photos")
    config = tiny(own, "train.epochs=2")
    with pytest.raises(RunError, match="is not a folder"):
        list(resume(tmp_path / "run"))
    leave_after(config, tmp_path / "run", 1)
    with pytest.raises(RunError, match=r"fieldmark train --resume"):
        next(train(config, tmp_path / "run"))
    Image.new("RGB", (90, 90)).save(own / "train/2/0.png")
    with pytest.raises(DataError, match="not those that"):
        list(resume(tmp_path / "run"))


def test_a_run_whose_photos_moved_resumes_from_where_they_are_and_from_no_others(photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "photos")
    leave_after(tiny(own, "train.epochs=2"), tmp_path / "run", 1)
    moved = own.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"which is gone: .*fieldmark train --resume .* --data FOLDER"):
        list(resume(tmp_path / "run"))
    others = shutil.copytree(moved, tmp_path / "others")
    Image.new("RGB", (90, 90)).save(others / "train/2/0.png")
    with pytest.raises(DataError, match="not those that"):
        list(resume(tmp_path / "run", data=others))
    list(resume(tmp_path / "run", data=moved))
    assert Run(tmp_path / "run").summary["status"] == "finished"
    assert Run(tmp_path / "run").split.root == moved


@pytest.mark.parametrize("name", ["best.safetensors", "last.pt", "metrics.jsonl"])
def test_a_full_disk_says_how_to_go_on_and_harms_nothing(photos, tmp_path, monkeypatch, name):
    config, out = tiny(photos, "train.select=last"), tmp_path / "run"
    replace, opened, calls = Path.replace, Path.open, []

    def refuse(path):
        if path.name.startswith(name):
            calls.append(path)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def full_replace(self, target):
        refuse(Path(target))
        return replace(self, target)

    def full_open(self, mode="r", *arguments, **named):
        if mode == "a":
            refuse(self)
        return opened(self, mode, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_replace)
        patch.setattr(Path, "open", full_open)
        with pytest.raises(ResourceError, match=f"No space left on device.*, then continue with.* --resume {out}"):
            list(train(config, out))
    list(resume(out))
    list(train(config, tmp_path / "unbroken"))
    assert_same_result(out, tmp_path / "unbroken")


def test_a_number_that_is_not_finite_names_the_photos_and_keeps_the_last_good_weights(photos, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"update \d+ is not finite.*train/.*Lower optim.lr") as caught:
        for _ in train(tiny(photos, "optim.lr=1e12", "optim.backbone_lr_scale=1"), out):
            pass
    assert str(out) in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(out / "last.pt")["model"].values())


def test_weights_ruined_by_the_last_update_are_never_evaluated_or_kept(photos, tmp_path):
    out = tmp_path / "run"
    settings = ("optim.lr=1e30", "optim.name=sgd", "train.epochs=1", "train.batch_size=64", "schedule.warmup_epochs=0")
    with pytest.raises(TrainingError, match=r"update 0 is not finite. Learning rate.*last good.*optim.lr"):
        list(train(tiny(photos, *settings), out))
    assert not (out / "best.safetensors").exists()
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(out / "last.pt")["model"].values())


def test_broken_photos_are_refused_or_listed_and_shift_no_label(photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "photos")
    broken = own / "train/10/3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"1 of 48 photos cannot be used:\n  'train/10/3.png' is truncated"):
        list(train(tiny(own), tmp_path / "refused"))
    list(train(tiny(own, "data.broken=skip", "train.epochs=1"), tmp_path / "run"))
    run = Run(tmp_path / "run")
    assert "train/10/3.png" in (run.path / "broken.csv").read_text()
    assert len(run.split.photos) == 47
    assert all(photo.path.split("/")[1] == photo.label for photo in run.split.photos)
    predictions = run.predictions()
    names = [run.classes[number] for number in predictions.labels]
    assert names == [path.split("/")[1] for path in predictions.paths]


def test_ctrl_c_finishes_the_update_saves_and_says_how_to_go_on(photos, tmp_path):
    config = tiny(photos, "train.epochs=30")
    out = tmp_path / "run"
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))

    class StartsTimer:
        def start(self, total: int, done: int) -> None:
            if total == 30 * 5:
                timer.start()

        def advance(self, n: int) -> None:
            time.sleep(0.01)

        def message(self, text: str) -> None: ...

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match=rf"SIGTERM.*fieldmark train --resume {out}"):
        list(train(config, out, progress=StartsTimer()))
    assert signal.getsignal(signal.SIGTERM) == handler
    assert Run(out).summary["status"] == "interrupted"
    list(resume(out))
    list(train(config, tmp_path / "unbroken"))
    assert_same_result(out, tmp_path / "unbroken")


SCRIPT = """
import sys
from fieldmark.config import load_config
from fieldmark.runs.train import resume, train
if __name__ == "__main__":
    out, is_resumed, overrides = sys.argv[1], sys.argv[2] == "resume", sys.argv[3:]
    for report in resume(out) if is_resumed else train(load_config(None, overrides), out):
        pass
"""


def run_script(tmp_path: Path, out: Path, *arguments: str, **options) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def is_finished(path):
    summary = path / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_points_a_run_ends_as_the_unbroken_one(photos, tmp_path):
    """SIGKILL at 12 random moments, from start-up to the last epoch, each answered by a resume."""
    overrides = [f"data.path={photos}", *TINY, "probe.epochs=2", "train.epochs=12", "train.save_minutes=0.005"]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    started = time.monotonic()
    assert run_script(tmp_path, unbroken, "train", *overrides).wait() == 0
    whole_seconds = time.monotonic() - started
    rng = np.random.default_rng()
    kills = 0
    while kills < 12:
        has_recipe = (broken / "recipe.toml").is_file()
        if is_finished(broken):  # the kill came between the last word and the end of the process
            assert_same_result(broken, unbroken)
            has_recipe = False
        if not has_recipe:
            shutil.rmtree(broken, ignore_errors=True)
        process = run_script(tmp_path, broken, *(["resume"] if has_recipe else ["train", *overrides]))
        # Start-up takes most of the time of so small a run: aim at all that comes after the imports.
        try:
            process.wait(timeout=whole_seconds * (0.35 + 0.45 * rng.random()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        assert_same_result(broken, unbroken)
        shutil.rmtree(broken)
    if (broken / "recipe.toml").is_file():
        summary = Run(broken).summary
        if summary["status"] != "finished":
            assert run_script(tmp_path, broken, "resume").wait() == 0
        assert_same_result(broken, unbroken)


def train_command(tmp_path: Path, out: Path) -> list[str]:
    """Training by a recipe of defaults: without one, a time budget would train, which is for one process."""
    recipe = tmp_path / "defaults.toml"
    recipe.write_text("")
    return [sys.executable, "-m", "fieldmark", "train", "--recipe", str(recipe), "--out", str(out)]


def test_a_batch_that_batchnorm_learns_nothing_from_is_refused_in_a_sentence(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"train.batch_size is 1: BatchNorm learns nothing from one photo.*Raise it"):
        list(train(tiny(photos, "train.batch_size=1"), tmp_path / "run"))


@pytest.mark.slow
def test_a_probe_of_two_processes_is_that_of_one(photos, tmp_path):
    """Also where one of them has no photo of its own."""
    overrides = [f"data.path={photos}", *TINY, "train.epochs=0", "probe.epochs=3", "train.precision=32-true"]
    assert run_script(tmp_path, tmp_path / "one", "train", *overrides).wait() == 0
    assert run_script(tmp_path, tmp_path / "two", "train", *overrides, "train.devices=2").wait() == 0
    one, two = Run(tmp_path / "one").metrics[0], Run(tmp_path / "two").metrics[0]
    for key in ("train_loss", "train_top1_clean"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)
    assert one["val"] == pytest.approx(two["val"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"), [((), "exists and is not empty"), (("model.weights=/gone/w.pth",), "/gone/w.pth")]
)
def test_what_is_wrong_is_told_once_by_two_processes(photos, tmp_path, settings, told):
    out = tmp_path / "run"
    out.mkdir()
    if not settings:
        (out / "note.txt").write_text("mine")
    pairs = [f"data.path={photos}", *TINY, "train.devices=2", *settings]
    command = [*train_command(tmp_path, out), *(f"--set={pair}" for pair in pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 1])
def test_a_signal_to_one_of_two_processes_stops_both_and_is_told_once(photos, tmp_path, batch_size):
    """Whether epochs are shorter than the updates between two questions, or longer."""
    out = tmp_path / "run"
    settings = (
        "train.devices=2",
        "train.epochs=5000",
        f"train.batch_size={2 * batch_size}",
        "model.freeze_batchnorm=true",
    )
    pairs = [f"data.path={photos}", *TINY, *settings]
    command = [*train_command(tmp_path, out), *(f"--set={pair}" for pair in pairs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Run(out).metrics if (out / "recipe.toml").is_file() else True:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.count("everything is saved") == 1
    assert "Traceback" not in told
    assert Run(out).summary["status"] == "interrupted"


@pytest.mark.slow
def test_the_command_line_tells_each_epoch_once_for_two_processes(photos, tmp_path):
    pairs = [f"data.path={photos}", *TINY, "train.devices=2", "train.epochs=2", "probe.epochs=2"]
    command = [*train_command(tmp_path, tmp_path / "run"), "--json"]
    done = subprocess.run(
        [*command, *(f"--set={pair}" for pair in pairs)], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout)["status"] == "finished"
    for line in ("probe ", "epoch   1", "epoch   2", "data: 48 photos"):
        assert sum(told.startswith(line) for told in done.stderr.splitlines()) == 1, done.stderr
    assert "deprecated" not in done.stderr


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_cut_updates(photos, tmp_path):
    """Without BatchNorm and mixing, whose statistics and partners are each process's own."""
    overrides = [
        f"data.path={photos}",
        *TINY,
        "model.name=test_convnext",
        "mix.share=0",
        "model.head=linear",
        "train.batch_size=7",
        "train.ema_decay=0",
        "train.precision=32-true",  # two halves of a batch round to bf16 otherwise than the whole
        "probe.epochs=2",
        "eval.batch_size=20",  # the last batch of 36 photos is short, and the 12 of validation are one process's
    ]
    assert run_script(tmp_path, tmp_path / "one", "train", *overrides).wait() == 0
    assert run_script(tmp_path, tmp_path / "two", "train", *overrides, "train.devices=2").wait() == 0
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert [row["step"] for row in one.metrics] == [row["step"] for row in two.metrics]
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert a["val"]["top1"] == b["val"]["top1"]
        assert a["train_top1_clean"] == b["train_top1_clean"]
        assert a["val"]["log_loss"] == pytest.approx(b["val"]["log_loss"], rel=1e-4)
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert one.predictions().paths == two.predictions().paths
    assert len(two.predictions().paths) == 12
    np.testing.assert_allclose(one.predictions().probabilities, two.predictions().probabilities, atol=1e-4)
    assert len((tmp_path / "two/metrics.jsonl").read_text().splitlines()) == 4
    json.loads((tmp_path / "two/summary.json").read_text())
