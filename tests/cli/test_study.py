"""The evidence verbs: parse, call, print; what they call has tests of its own."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
from typer.testing import CliRunner

from fieldmark.cli import train
from fieldmark.cli.app import app
from fieldmark.config import Metric
from fieldmark.errors import RunError


@pytest.fixture
def runs(make_run, tmp_path):
    """Two variants that differ in accuracy, on the same photos."""
    plain = make_run(tmp_path / "plain", overrides=["mix.share=0"], accuracy=0.5)
    mixed = make_run(tmp_path / "mixed", overrides=["mix.share=0.4"], accuracy=0.95)
    return [str(plain), str(mixed)]


def test_the_metrics_of_the_command_line_are_those_of_the_config():
    assert get_args(get_args(train.Metric)[0]) == get_args(Metric)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_compare_prints_variants_with_intervals_and_a_verdict(runs):
    result = invoke("compare", *runs)
    assert result.exit_code == 0
    assert "mix.share=0.4" in result.stdout
    assert "is better than" in result.stdout
    content = json.loads(invoke("compare", *runs, "--json").stdout)
    assert len(content["pairs"]) == 1
    assert content["pairs"][0]["is_distinguishable"]


def test_compare_against_a_baseline_prints_what_each_change_did_as_a_table(runs):
    plain, mixed = runs
    result = invoke("compare", mixed, plain, "--against", plain, "--markdown")
    assert result.exit_code == 0
    head, _, base, change = result.stdout.strip().splitlines()
    assert head.startswith("| Change | Score | Effect | 95 % interval |")
    assert base.startswith("| plain (baseline) | ")
    assert re.match(r"\| mix\.share=0\.4 \| \d\d\.\d % \| \+\d\d\.\d \| \+.* to \+.* \| &lt; 0\.001 \| yes \|", change)


def test_a_report_with_another_ending_is_refused(runs, tmp_path):
    result = invoke("report", *runs, "--out", str(tmp_path / "report.pdf"))
    assert isinstance(result.exception, RunError)


def test_a_sweep_without_such_a_grid_names_those_there_are(tmp_path):
    result = invoke("sweep", "resnet50-mixin", "--out", str(tmp_path / "out"))
    assert "resnet50-mixing" in str(result.exception)


def test_sweep_takes_ray_without_an_address_as_predict_and_serve_do(tmp_path):
    result = invoke("sweep", "no-such-grid", "--out", str(tmp_path / "out"), "--ray")
    assert "no-such-grid" in str(result.exception)
