"""Trackers get each epoch's row once, and one that is missing is told before anything is written."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fieldmark.config import load_config
from fieldmark.errors import MissingExtraError, ResourceError
from fieldmark.runs import writer
from fieldmark.runs.train import train

ROW = {"epoch": 2, "lr": 1e-3, "is_best": True, "train_top1_mixed": None, "val": {"top1": 0.5, "log_loss": 1.25}}
FLAT = {"epoch": 2.0, "lr": 1e-3, "val/top1": 0.5, "val/log_loss": 1.25}


class Recorder(ModuleType):
    """Stands for a package that is not installed, and keeps the calls."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return self

        if name.startswith("__"):
            raise AttributeError(name)
        return call


def test_a_row_becomes_numbers_by_name():
    tracker, given = writer.Trackers([], Path(), {}, warn=pytest.fail), []
    tracker._open["mine"] = (lambda values, epoch: given.append((values, epoch)), list)
    tracker.log(ROW, epoch=2)
    assert given == [(FLAT, 2)]


def test_tensorboard_files_hold_every_figure(tmp_path):
    tracker = writer.Trackers(["tensorboard"], tmp_path, {}, warn=pytest.fail)
    tracker.log(FLAT, epoch=2)
    tracker.log({"val/top1": 0.75}, epoch=3)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(FLAT)
    assert [(event.step, event.value) for event in read.Scalars("val/top1")] == [(2, 0.5), (3, 0.75)]


def test_weights_and_biases_is_given_settings_rows_and_the_end(tmp_path, monkeypatch):
    wandb = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = writer.Trackers(["wandb"], tmp_path / "mine", {"train": {"epochs": 3}}, warn=pytest.fail)
    tracker.log(FLAT, epoch=2)
    tracker.close()
    started = {
        "project": "fieldmark",
        "name": "mine",
        "dir": str(tmp_path / "mine"),
        "config": {"train": {"epochs": 3}},
    }
    assert wandb.calls == [("init", (), started), ("log", (FLAT,), {"step": 2}), ("finish", (), {})]


def test_mlflow_is_given_settings_rows_and_the_end(tmp_path, monkeypatch):
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tracker = writer.Trackers(["mlflow"], tmp_path / "mine", {"train": {"epochs": 3}}, warn=pytest.fail)
    tracker.log(FLAT, epoch=2)
    tracker.close()
    assert [name for name, _, _ in mlflow.calls] == [
        "set_experiment",
        "start_run",
        "log_dict",
        "log_metrics",
        "end_run",
    ]
    assert mlflow.calls[3][1:] == ((FLAT,), {"step": 2})


def test_a_tracker_that_does_not_start_is_an_error_and_closes_the_others(tmp_path, monkeypatch):
    def refused(**_):
        raise OSError("no key:\n log in")

    mlflow, wandb = Recorder("mlflow"), Recorder("wandb")
    wandb.init = refused
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ResourceError, match=r"wandb does not start: no key: log in\. .*leave it out of train.trackers"):
        writer.Trackers(["mlflow", "wandb"], tmp_path, {}, warn=pytest.fail)
    assert mlflow.calls[-1][0] == "end_run"


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise ConnectionError("server is gone")

    mlflow, wandb = Recorder("mlflow"), Recorder("wandb")
    mlflow.log_metrics = wandb.finish = gone
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    told = []
    tracker = writer.Trackers(["mlflow", "wandb"], tmp_path, {}, warn=told.append)
    for epoch in (1, 2):
        tracker.log(FLAT, epoch=epoch)
    tracker.close()
    assert [name for name, _, _ in wandb.calls] == ["init", "log", "log"]
    assert len(told) == 2
    assert told[0].startswith("warning: mlflow failed in epoch 1: server is gone. The training goes on without it")
    assert told[1] == "warning: wandb did not close: server is gone"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_tracker_is_told_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(writer, "find_spec", lambda package: None if package == name else SimpleNamespace())
    config = load_config(None, [f'train.trackers=["{name}"]', f"data.path={tmp_path}"])
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*fieldmark\[{name}\]"):
        list(train(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_no_package_is_asked_for_where_no_tracker_is(monkeypatch):
    monkeypatch.setattr(writer, "find_spec", None)
    writer.require_trackers([])
