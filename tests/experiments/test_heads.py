"""The table of what pooling earns says of each network what its heads did out of fold."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from experiments import heads
from fieldmark.budget.candidates import find_backbones
from fieldmark.config import load_config


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("plain", "striped")):
        for place in range(12):
            path = tmp_path / "photos" / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(place).integers(0, 120, (40, 40, 3))
            pixels[:: 2 + 6 * number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def test_each_network_has_a_row_with_both_poolings_and_the_gain_is_their_difference(photos, tmp_path, monkeypatch):
    def find_tiny(config):
        tiny = load_config(None, [f'data.path="{photos.as_posix()}"', "model.name=test_resnet", "model.weights=random",
                                  f"model.pool={config.model.pool}"])  # fmt: skip
        return find_backbones(tiny)

    monkeypatch.setattr(heads, "find_backbones", find_tiny)
    (row,) = heads.compare(photos, tmp_path / "features", [])
    assert (row["data"], row["photos"]) == ("photos", 24)
    assert row["gain"] == pytest.approx(row["top1_covariance"] - row["top1_average"])
    assert row["low"] <= row["gain"] <= row["high"]
    assert heads.compare(photos, tmp_path / "features", ["resnet50"]) == []
    page = heads.write_page([row])
    assert page.count("| photos | 24 | test_resnet") == 1


def test_a_gain_is_what_covariance_pooling_has_more(tmp_path, monkeypatch):
    labels = np.zeros(4, np.int64)
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    answers = {"average": [right, wrong, wrong, wrong], "covariance": [right, right, right, wrong]}

    def answer(data, pool, folder, names):
        return {"network": np.asarray(answers[pool], np.float32)}, labels

    monkeypatch.setattr(heads, "out_of_fold", answer)
    (row,) = heads.compare(tmp_path / "photos", tmp_path, [])
    assert (row["top1_average"], row["top1_covariance"], row["gain"]) == (0.25, 0.75, 0.5)
    assert "| 0.250 | 0.750 | +50.0 (" in heads.write_page([row])
