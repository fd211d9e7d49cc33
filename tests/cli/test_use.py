"""The verbs that use a trained model parse, call and print."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fieldmark.cli.app import app
from fieldmark.config import dump_config, load_config
from fieldmark.errors import RunError
from fieldmark.runs.folder import write_predictions


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    probabilities = np.full((90, 3), 0.1)
    probabilities[np.arange(90), np.where(rng.random(90) < 0.9, labels, (labels + 1) % 3)] = 0.8
    (tmp_path / "recipe.toml").write_text(dump_config(load_config()))
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    write_predictions(
        tmp_path / "predictions" / "val.parquet",
        paths=[f"{number}.jpg" for number in range(90)],
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        classes=["a", "b", "c"],
    )
    return tmp_path


def test_calibrate_writes_its_result_and_prints_it_as_json(run):
    answer = CliRunner().invoke(app, ["calibrate", str(run), "--coverage", "0.5", "--json"])
    assert answer.exit_code == 0, answer.output
    printed = json.loads(answer.stdout)
    assert printed == json.loads((run / "calibration.json").read_text())
    assert printed["coverage"] >= 0.5
    assert (run / "calibration.png").is_file()


def test_calibrate_takes_one_wish(run):
    answer = CliRunner().invoke(app, ["calibrate", str(run), "--coverage", "0.5", "--accuracy", "0.9"])
    assert answer.exit_code == 2
    assert "not both" in answer.output


@pytest.mark.parametrize("verb", ["calibrate", "export", "serve", "review"])
def test_a_folder_that_is_no_run_is_the_users_to_fix(tmp_path, verb):
    answer = CliRunner().invoke(app, [verb, str(tmp_path / "none")])
    assert isinstance(answer.exception, RunError)
