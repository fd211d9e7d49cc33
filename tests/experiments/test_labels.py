"""The table of what to label next: photos that judge take no part in a choice, and the rule chooses itself."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import labels


@pytest.fixture
def photos(monkeypatch):
    """Eight classes, of which four are seldom; two rounds of ten labels, two seeds."""
    for name, value in {"COUNT": 10, "ROUNDS": 2, "SEEDS": 2}.items():
        monkeypatch.setattr(labels, name, value)
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(8), [60, 60, 60, 60, 15, 15, 15, 15])
    features = (np.eye(8)[classes] + rng.normal(0, 0.25, (300, 8))).astype(np.float32)
    parts = np.split(rng.permutation(300), [200, 250])
    return labels.Photos("made", features, classes, *parts)


def test_rules_choose_other_photos_of_the_pool_alone_and_each_once(photos):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), 120)
    features = photos.features[photos.pool[:120]].astype(np.float64)
    for name, rule in labels.RULES.items():
        chosen = rule(probabilities, features, 20, rng)
        assert len(set(chosen.tolist())) == 20, name
        assert set(chosen) <= set(range(120)), name


def test_what_judges_takes_no_part_in_any_choice(photos):
    seen = []

    def watch(probabilities, features, count, rng):
        seen.append(features)
        return np.arange(count)

    right = labels.label_by(watch, photos, 16, seed=0)
    assert [part.shape for part in right] == [(3, 50), (3, 50)]
    judged = {row.tobytes() for row in photos.features[np.concatenate([photos.choosing, photos.judging])]}
    assert not judged & {row.tobytes() for features in seen for row in features}
    assert [len(features) for features in seen] == [184, 174, 164]


def test_a_row_is_what_was_measured_and_the_best_rule_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "RULES", {name: labels.RULES[name] for name in (labels.CHANCE, "BADGE")})
    found = labels.measure(photos, 16, tmp_path)
    assert found["BADGE"][1].shape == (2, 3, 50)
    worse, better = np.zeros((2, 3, 50), bool), np.ones((2, 3, 50), bool)
    worse[:, :, :20] = True
    rows = labels.summarize(photos, 16, {labels.CHANCE: (worse, worse), "BADGE": (better, better)})
    assert [row["gain"] for row in rows] == [0, pytest.approx(0.6)]
    assert rows[1]["low"] < 0.6 < rows[1]["high"]
    assert (rows[1]["labels"], rows[1]["top1"], rows[1]["reached"]) == ([16, 26, 36], [1, 1, 1], 16)
    page = labels.write_page(rows)
    assert "`fieldmark suggest` follows: BADGE.**" in page
    assert "| **BADGE** | 1.000 | 1.000 | 1.000 | 1.000 | +60.0 (" in page
    assert labels.measure(photos, 16, tmp_path)["BADGE"][0].tolist() == found["BADGE"][0].tolist()
