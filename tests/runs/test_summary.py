"""What training tells: accuracies under their names, and a folder that nobody has taken."""

from __future__ import annotations

from dataclasses import replace

from fieldmark.config import load_config
from fieldmark.runs.folder import Run
from fieldmark.runs.train import format_epoch, format_result, free_folder, new_run_folder
from fieldmark.training.loop import EpochReport

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
