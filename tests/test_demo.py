"""The demo: all photos of the package in a table, and the same path as training."""

from __future__ import annotations

import csv
import re
from importlib import resources

import pytest

from fieldmark.demo import run_demo, write_table
from fieldmark.errors import ConfigError, MissingExtraError
from fieldmark.progress import Quiet


def test_the_table_holds_every_photo_and_defective_is_above_one_half(tmp_path):
    assert write_table(tmp_path / "photos.csv") == (2624, 821)
    with (tmp_path / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    probability = {}
    for line in (resources.files("elpv_dataset") / "data" / "labels.csv").read_text().splitlines():
        name, value, _ = line.split()
        probability[name.rpartition("/")[2]] = float(value)
    for row in rows:
        expected = "defective" if probability[row["path"].rpartition("/")[2]] > 0.5 else "functional"
        assert row["label"] == expected


def test_a_missing_package_says_which_extra_brings_it(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(resources, "files", absent)
    with pytest.raises(MissingExtraError, match=r"elpv-dataset is not installed.*fieldmark\[demo\]"):
        write_table(tmp_path / "photos.csv")


def test_several_processes_are_refused_before_they_write_over_each_other(tmp_path):
    with pytest.raises(ConfigError, match="the demo trains in one process"):
        run_demo(tmp_path / "demo", minutes=0.8, overrides=["train.devices=2"], progress=Quiet())


@pytest.mark.slow
def test_the_demo_ends_with_accuracy_interval_picture_and_the_next_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ["augment.size=64", "eval.size=64", "train.threads=1", "loader.workers=0"]
    told = run_demo(tmp_path / "demo", minutes=0.8, overrides=small, progress=Quiet())
    assert re.search(r"0\.\d{4}  \(95 % interval 0\.\d{4} to 0\.\d{4}\)", told)
    assert "656 photos" in told
    assert "Deitsch et al. 2019" in told
    assert "fieldmark train PHOTOS --minutes 10" in told
    for name in ("predictions.png", "evaluation/confusion.png", "run/summary.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 100
