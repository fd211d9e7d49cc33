"""A trainer that learns nothing, in milliseconds, in the format of the real one. `behave.json` beside the cells says
which of them fail, crash, or wait for a file."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from fieldmark.config import dump_config, load_config
from fieldmark.errors import RunError, TrainingError


def train(config, out):
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} exists and is not empty")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.toml").write_text(dump_config(config), encoding="utf-8")
    yield from _learn(config, out)


def resume(out):
    yield from _learn(load_config(out / "recipe.toml"), out)


def _learn(config, out):
    behaviour = json.loads(_read(out.parent / "behave.json", "{}")).get(out.name, "")
    rows = _read(out / "metrics.jsonl", "").splitlines()
    _append(out.parent / "calls.txt", f"{out.name} {len(rows)}\n")
    _summary(out, "running")
    for epoch in range(len(rows) + 1, config.train.epochs + 1):
        _misbehave(behaviour, out, epoch)
        row = {"epoch": epoch, "step": epoch, "val": {"top1": value(config) * epoch / config.train.epochs}}
        _append(out / "metrics.jsonl", json.dumps(row) + "\n")
        yield SimpleNamespace(epoch=epoch)
    (out / "predictions").mkdir(exist_ok=True)
    (out / "predictions" / "val.parquet").write_bytes(b"")
    _summary(out, "finished")


def value(config):
    return 1 - abs(config.mix.share - 0.3)


def _misbehave(behaviour, out: Path, epoch):
    if epoch != 2:
        return
    if behaviour == "fail":
        raise TrainingError("the loss is not finite")
    if behaviour == "bug":
        raise ZeroDivisionError("division by zero")
    if behaviour == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "wait":
        (out.parent / "waiting").write_text(str(os.getpid()))
        while not (out.parent / "go").exists():
            time.sleep(0.02)


def _summary(out, status):
    (out / "summary.json").write_text(json.dumps({"status": status}))


def _read(path, default):
    return path.read_text(encoding="utf-8") if path.is_file() else default


def _append(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
