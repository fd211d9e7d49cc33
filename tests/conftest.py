"""Fixtures for all tests: run folders of invented numbers, in the format of docs/architecture.md."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import dump_config, load_config
from fieldmark.runs.folder import write_predictions

MakeRun = Callable[..., Path]

SKIPS = {
    "no shared data": "photographs and weights that may stand beside the repository are not there",
    "no browser": "Debian's chromium is not installed",
    "no node": "no node to run the page's scripts by themselves",
    "no GPU": "no CUDA device",
    "slow": "needs what only `make bench` installs",
    "not on this system": "the law is about another operating system",
}
"""The only reasons for which a test may be skipped; any other fails the run."""

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Real photographs and weights that may stand beside the repository. Only the fixture `shared` looks there."""


def pytest_addoption(parser):
    parser.addoption("--malformed-uploads", type=int, default=6000, help="how many the slow test of the server sends")
    parser.addoption("--families", type=int, default=6, help="how many of timm's families the slow test trains")


def write_photos(
    folder: Path, names: Sequence[str], *, count: int = 10, step: float = 60, noise: float = 40, width: int = 48
) -> None:
    """Write `count` photos of each class, noise around a gray that is `step` brighter from class to class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for place in range(count):
            pixels = rng.normal(60 + step * number, noise, (40, width, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")


@pytest.fixture(scope="session", name="write_photos")
def _write_photos() -> Callable[..., None]:
    return write_photos


def make_synthetic_run(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
    accuracy: float = 0.8,
    classes: Sequence[str] = ("auk", "bee-eater", "crane", "dipper"),
    per_class: int = 25,
    photos: Sequence[str] | None = None,
    epochs: int = 6,
    status: str = "finished",
    keep_epochs: bool = True,
    root: Path | None = None,
    parameters: int = 3_400_000,
) -> Path:
    """Write a run folder whose figures agree with each other; photos differ in difficulty alike for all runs."""
    config = load_config(None, [f"train.seed={seed}", f"train.epochs={epochs}", *overrides])
    (path / "predictions").mkdir(parents=True)
    labels = np.repeat(np.arange(len(classes)), per_class)
    names = list(photos or (f"val/{classes[c]}/{n:04d}.jpg" for n, c in enumerate(labels)))
    difficulty = np.random.default_rng(7).random(len(labels))
    rng = np.random.default_rng([seed, *"".join(overrides).encode()])
    predicted = []
    for epoch in range(epochs):
        reached = accuracy * (1 - 0.6 * np.exp(-1.2 * epoch))
        right = difficulty + rng.normal(0, 0.08, len(labels)) < reached
        wrong = (labels + 1 + (rng.random(len(labels)) < 0.2)) % len(classes)
        predicted.append(np.where(right, labels, wrong))
    top1 = [float((row == labels).mean()) for row in predicted]
    best = int(np.argmax(top1)) if config.train.select == "best" else epochs - 1
    probabilities = np.full((len(labels), len(classes)), 0.3 / (len(classes) - 1), np.float32)
    probabilities[np.arange(len(labels)), predicted[best]] = 0.7
    write_predictions(
        path / "predictions" / "val.parquet", paths=names, labels=labels, probabilities=probabilities, classes=classes
    )
    if keep_epochs:
        np.savez_compressed(path / "predictions" / "val_epochs.npz", predicted=np.stack(predicted), labels=labels)
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for epoch in range(epochs):
            file.write(json.dumps(_epoch(config, epoch, epochs, top1, best)) + "\n")
    (path / "recipe.toml").write_text(dump_config(config), encoding="utf-8")
    with (path / "split.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        writer.writerows([name, classes[label], "val", ""] for name, label in zip(names, labels, strict=True))
    _write(path / "classes.json", list(classes))
    _write(path / "model.json", {"name": config.model.name, "parameters": parameters, "license": "Apache-2.0"})
    prior = np.arange(1, len(classes) + 1)
    _write(path / "data.json", {"root": str(root or path / "no-photos"), "prior": list(prior / prior.sum())})
    _write(path / "environment.json", {"versions": {"torch": "2.14"}, "hardware": {"cores": 2}, "command": ["train"]})
    summary = {"status": status, "best_epoch": best + 1, "seconds": 10.0 * epochs, "val": {"top1": top1[best]}}
    _write(path / "summary.json", summary)
    return path


def _epoch(config, epoch, epochs, top1, best):
    return {
        "epoch": epoch + 1,
        "step": 10 * (epoch + 1),
        "lr": config.optim.lr * 0.5 * (1 + float(np.cos(np.pi * epoch / epochs))),
        "train_loss": 2.0 * float(np.exp(-0.4 * epoch)) + config.mix.share,
        "train_top1_clean": min(1.0, top1[epoch] + 0.1),
        "train_top1_mixed": max(0.0, top1[epoch] - 0.2) if config.mix.share else None,
        "clean_fraction": 1 - config.mix.share,
        "val": {"top1": top1[epoch], "top5": 1.0, "log_loss": 1 - top1[epoch], "macro_recall": top1[epoch]},
        "seconds": 10.0,
        "images_per_second": 50.0,
        "is_best": epoch == best,
        "is_probe": False,
    }


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and weights beside the repository; without it, the test is skipped."""
    if not (SHARED / "data/birds100").is_dir():
        pytest.skip("no shared data")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory):
    """Give tests a user's cache of their own: what the program remembers between runs is neither read nor changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_trials(request, monkeypatch):
    """Leave out the trial of each model in a process of its own, some seconds each, but where it is tested."""
    if "trial" not in request.node.name:
        monkeypatch.setattr("fieldmark.runs.build.choose_computation", lambda model, wanted, **_: (wanted, ""))


@pytest.fixture
def make_run(tmp_path) -> MakeRun:
    """Make a run folder under `tmp_path` by name; keywords as for `make_synthetic_run`."""

    def make(name: str, **options) -> Path:
        return make_synthetic_run(tmp_path / name, **options)

    make.folder = lambda name: tmp_path / name
    return make


@pytest.fixture(scope="session")
def synthetic_run() -> MakeRun:
    """`make_synthetic_run` itself, for fixtures that live longer than a test."""
    return make_synthetic_run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests were skipped and why, and name those whose reason is not on the list."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason} ({SKIPS.get(reason, 'not on the list of reasons')})")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test was skipped for a reason that is not on the list."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if session.exitstatus == pytest.ExitCode.OK and any(_reason(report) not in SKIPS for report in skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
