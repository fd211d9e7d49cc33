"""What training tells: accuracies under their names, and a folder that nobody has taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.runs.folder import Run
from fieldmark.runs.train import format_epoch, format_result, free_folder, new_run_folder, train
from fieldmark.training.loop import EpochReport
from fieldmark.training.metrics import compare_with_probe

REPORT = EpochReport(3, 30, True, 1e-4, 1.25, 0.9, 0.6, 0.2, 100, 12.4, {"top1": 0.8, "log_loss": 0.5})


def test_clean_and_mixed_accuracy_are_told_apart_and_only_where_there_are_any():
    assert format_epoch(REPORT) == (
        "epoch   3  loss 1.2500  train 0.9000  train, mixed 0.6000  val top-1 0.8000  val loss 0.5000  lr 1.0e-04  12 s"
    )
    assert "train 0" not in format_epoch(replace(REPORT, train_top1_clean=None))
    assert "mixed" not in format_epoch(replace(REPORT, train_top1_mixed=None))
    assert "val" not in format_epoch(replace(REPORT, metrics={}))
    assert format_epoch(replace(REPORT, epoch=0, step=0)).startswith("probe ")


def test_no_two_runs_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("laptop", ['data.path="/data/birds.v2"'])
    first = new_run_folder(config, "laptop")
    assert first.as_posix() == "runs/birds-laptop"
    first.mkdir(parents=True)
    assert new_run_folder(config, "laptop").name == "birds-laptop-2"
    (tmp_path / "runs" / "birds-laptop-2").mkdir()
    assert free_folder(first).name == "birds-laptop-3"


def test_weights_chosen_by_validation_are_told_to_be_biased(make_run):
    path = make_run("a run")
    summary = {"select": "best", "metric": "top1", "best_epoch": 3, "val": {"top1": 0.8, "top1_interval": [0.7, 0.9]}}
    told = format_result(type("Told", (Run,), {"summary": summary})(path))
    assert "top-1 0.8000, 95 % interval 0.7000 to 0.9000  (weights of epoch 3, the best by top1: biased upward" in told
    assert f"fieldmark evaluate '{path}'" in told  # the folder has a space in its name


@pytest.mark.parametrize("select", ["best", "last"])
def test_a_probe_that_beats_its_fine_tuning_is_told_and_kept_where_select_allows(make_run, tmp_path, select):
    rows = [
        {"epoch": epoch, "is_probe": not epoch, "val": {"top1": top1, "log_loss": 1 - top1}}
        for epoch, top1 in enumerate((0.76, 0.63, 0.7))
    ]
    found = compare_with_probe(rows, metric="top1", select=select)
    assert found == {"value": 0.76, "best_fine_tuned": 0.7, "is_kept": select == "best"}
    assert compare_with_probe(rows, metric="log_loss", select=select)["value"] == pytest.approx(0.24)
    assert compare_with_probe(rows[1:], metric="top1", select=select) is None
    rows[2]["val"]["top1"] = 0.76
    assert compare_with_probe(rows, metric="top1", select=select) is None
    summary = {"select": select, "metric": "top1", "best_epoch": 0, "probe": found}
    told = format_result(type("Told", (Run,), {"summary": summary})(make_run("run")))
    assert "fine-tuning did not help: top1 0.7600 after the probe, at best 0.7000 in the epochs after it" in told
    kept = "The probe's weights are kept" if select == "best" else "train.select=best keeps the probe's"
    assert kept in told


def test_a_real_run_whose_probe_wins_keeps_the_probes_weights(tmp_path):
    """Fine-tuned at a rate of nothing but harm: SGD with 3."""
    for number, name in enumerate(("a", "b")):
        for photo in range(10):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, photo]).integers(0, 100, (40, 40, 3)).astype(np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{photo}.png")
    settings = [
        *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=2"),
        *("train.batch_size=8", "train.threads=1", "loader.workers=0", "schedule.warmup_epochs=0", "cache.mode=off"),
        *("probe.epochs=200", "train.ema_decay=0", "optim.name=sgd", "optim.lr=3", "optim.backbone_lr_scale=1"),
        *("train.precision=32-true", "data.val_fraction=0.4", f"data.path={tmp_path / 'photos'}"),
    ]
    kept = []
    for report in train(load_config(None, settings), tmp_path / "run"):
        if report.epoch == 0:
            kept.append((tmp_path / "run" / "best.safetensors").read_bytes())
    run = Run(tmp_path / "run")
    assert run.summary["probe"]["value"] > run.summary["probe"]["best_fine_tuned"]
    assert run.summary["best_epoch"] == 0
    assert kept == [(run.path / "best.safetensors").read_bytes()]
    assert run.summary["val"]["top1"] == run.summary["probe"]["value"]
    assert "fine-tuning did not help" in format_result(run)
