"""Photos that show none of the classes: a class `_none` whose photos are answered with "unknown"."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import fieldmark
from fieldmark.budget.run import train_within
from fieldmark.cli.app import app
from fieldmark.config import load_config
from fieldmark.files import read_values
from fieldmark.inference.calibration import Calibration, apply_temperature, calibrate, describe_calibration
from fieldmark.inference.predictor import Prediction
from fieldmark.inference.taxonomy import Fallback, load_taxonomy
from fieldmark.inference.writers import save_predictions

CLASSES = ("_none", "jay", "robin", "wren")
TINY = ["model.name=test_resnet", "model.weights=random", "eval.size=32", "augment.size=32", "cache.mode=off",
        "loader.workers=0", "train.threads=1", "train.device=cpu"]  # fmt: skip


def answer(*shares: float, threshold: float = 0.0, fallback: Fallback | None = None) -> Prediction:
    return Prediction("a.jpg", CLASSES, np.asarray(shares, np.float32), "", threshold, fallback)


def test_a_photo_of_none_is_unknown_and_its_label_is_still_a_class():
    found = answer(0.6, 0.1, 0.3, 0.0)
    assert (found.is_unknown, found.label, found.answer.level) == (True, "robin", "")
    assert found.probability == pytest.approx(0.3)
    assert [name for name, _ in found.top(4)] == ["robin", "jay", "wren"]
    sure = answer(0.3, 0.1, 0.6, 0.0, threshold=0.5)
    assert (sure.is_unknown, sure.label, sure.answer.name) == (False, "robin", "robin")
    assert answer(0.3, 0.1, 0.6, 0.0, threshold=0.7).is_unknown


def test_a_group_is_no_answer_to_a_photo_of_none(tmp_path):
    table = tmp_path / "taxonomy.csv"
    table.write_text("class,family\njay,crow\nrobin,thrush\nwren,wren\n")
    tree = load_taxonomy(table, CLASSES)
    assert tree.nodes == (CLASSES, ("_none", "crow", "thrush", "wren"))
    fallback = Fallback(tree.levels, tree.rows, (0.9, 0.2), ())
    assert answer(0.3, 0.35, 0.3, 0.05, fallback=fallback).answer.name == "crow"
    assert answer(0.5, 0.3, 0.1, 0.1, fallback=fallback).answer.level == ""


def make_logits(seed: int = 0, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    return rng.normal(0, 1.5, (count, 4)) + 3 * np.eye(4)[labels], labels


def test_calibration_says_how_well_none_is_told_apart_and_keeps_95_percent_of_the_others():
    logits, labels = make_logits()
    found = calibrate(logits, labels, "coverage", 0.95, confidence_level=0, folds=5, seed=0, classes=CLASSES)
    none = found.none
    assert none is not None
    assert none.photos == (labels == 0).sum()
    assert found.coverage >= 0.95 - (apply_temperature(logits, 1).argmax(1)[labels > 0] == 0).mean()
    confidence = apply_temperature(logits, found.temperature)[:, 1:].max(1)  # of one temperature: near the cross-fitted
    assert none.auroc.estimate == pytest.approx(roc_auc_score(labels > 0, confidence), abs=0.01)
    assert none.auroc.low < none.auroc.estimate < none.auroc.high
    passed = (confidence[labels == 0] >= np.quantile(confidence[labels > 0], 0.05)).mean()
    assert none.fpr95.estimate == pytest.approx(passed, abs=0.05)
    assert none.answered <= none.fpr95.estimate + 0.05
    assert read_values(Calibration, json.loads(json.dumps(asdict(found)))) == found
    assert f"_none             {none.photos} photos" in describe_calibration(found)


def test_an_answer_to_a_photo_of_none_counts_as_wrong():
    logits, labels = make_logits()
    strict, lax = (
        calibrate(logits, labels, "accuracy", 0.97, confidence_level=0, folds=5, seed=0, classes=classes)
        for classes in (CLASSES, ("a", "b", "c", "d"))
    )
    kept = apply_temperature(logits, strict.temperature)
    shown = kept[:, 1:].max(1) >= np.maximum(strict.threshold, kept[:, 0])
    right = kept[:, 1:].argmax(1) + 1 == labels
    assert right[shown].mean() == pytest.approx(0.97, abs=0.01)
    assert lax.none is None


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_photos) -> Path:
    root = tmp_path_factory.mktemp("none")
    write_photos(root / "photos", ("_none", "jay", "wren"), step=80, noise=20, count=20)
    config = load_config(None, [f'data.path="{(root / "photos").as_posix()}"', *TINY])
    ticks = iter(0.05 * tick for tick in range(10**6))
    train_within(config, root / "run", minutes=0.05, clock=lambda: next(ticks))
    return root / "run"


def test_answers_of_none_are_unknown(run):
    assert fieldmark.Run(run).classes == ("_none", "jay", "wren")
    found = CliRunner().invoke(app, ["calibrate", str(run), "--json"])
    assert found.exit_code == 0
    assert json.loads(found.stdout)["none"]["photos"] == 3
    predictor = fieldmark.Predictor.load(run)
    for one in predictor.predict(run.parent / "photos"):
        assert one.label in ("jay", "wren")
        says_none = one.probabilities[0] > one.probabilities[1:].max()
        assert one.is_unknown == (says_none or one.probability < predictor.threshold)


def test_each_row_of_the_short_form_is_as_wide_as_its_header(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    rows = [
        *fieldmark.Predictor.load(run).predict(
            [*sorted((run.parent / "photos").rglob("*.*"))[:2], tmp_path / "broken.jpg"]
        )
    ]
    save_predictions(rows, tmp_path / "p.csv", classes=("_none", "jay", "wren"), form="short")
    header, *lines = (tmp_path / "p.csv").read_text().splitlines()
    assert header == "path,label,probability,label_2,probability_2,is_unknown,problem"
    assert [line.count(",") for line in lines] == 3 * [header.count(",")]


def test_an_export_says_unknown_as_its_run_does(run, tmp_path):
    CliRunner().invoke(app, ["calibrate", str(run)])
    fieldmark.export_run(
        fieldmark.Run(run), tmp_path / "export", to="onnx", is_int8=False, max_accuracy_loss=0.01, max_photos=9
    )
    own, exported = (
        fieldmark.Predictor.load(model).predict(run.parent / "photos") for model in (run, tmp_path / "export")
    )
    assert [one.is_unknown for one in own] == [one.is_unknown for one in exported]
