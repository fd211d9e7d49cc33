"""Laws of triage: suspects, surprises, confusions and look-alikes are found, in order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fieldmark.data.index import Photo, PhotoIndex
from fieldmark.errors import DataError
from fieldmark.inference.triage import (
    HeldOut,
    confused_pairs,
    join_held_out,
    label_suspects,
    near_duplicates,
)


def make_predictions(n=300, k=4, flips=12, seed=0):
    """Predictions of a good model; the first `flips` labels are wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    logits = rng.normal(0, 0.7, (n, k))
    logits[np.arange(n), truth] += 4
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = truth.copy()
    labels[:flips] = (labels[:flips] + 1) % k
    names = tuple("abcdefgh"[:k])
    return HeldOut(tuple(f"{i}.jpg" for i in range(n)), labels, probabilities.astype(np.float32), names)


def test_wrong_labels_are_suspected_and_few_right_ones():
    found = label_suspects(make_predictions())
    assert len(set(found) & set(range(12))) >= 11
    assert len(found) <= 16


def test_a_class_that_nobody_was_evaluated_on_does_not_upset_the_search():
    evaluated = make_predictions(k=3)
    wider = np.concatenate(
        [evaluated.probabilities[:, :1], evaluated.probabilities[:, :1] * 0, evaluated.probabilities[:, 1:]], 1
    )
    gapped = HeldOut(evaluated.paths, np.array([0, 2, 3])[evaluated.labels], wider, ("a", "none", "b", "c"))
    assert list(label_suspects(gapped)) == list(label_suspects(evaluated))
    single = HeldOut(("a.jpg",), np.array([0]), np.ones((1, 1), np.float32), ("a",))
    assert len(label_suspects(single)) == 0


def test_pairs_hold_every_mistake_once_whichever_way_it_went():
    probabilities = np.array([[0.1, 0.9, 0], [0.8, 0.2, 0], [0.6, 0.4, 0], [0, 0.1, 0.9], [0, 0.3, 0.7]], np.float32)
    evaluated = HeldOut(tuple("vwxyz"), np.array([0, 1, 1, 2, 1]), probabilities, ("a", "b", "c"))
    pairs = confused_pairs(evaluated)
    assert pairs == [(0, 1, [0, 1, 2]), (1, 2, [4])]


def test_folds_are_joined_and_doubles_and_strangers_refused():
    def run(paths, classes=("a", "b")):
        n = len(paths)
        stored = SimpleNamespace(paths=paths, labels=np.zeros(n, int), probabilities=np.full((n, 2), 0.5, np.float32))
        return SimpleNamespace(path=Path(paths[0]), classes=classes, predictions=lambda split: stored)

    assert join_held_out([run(("1", "2")), run(("3",))]).paths == ("1", "2", "3")
    with pytest.raises(DataError, match="1 photos are validated by more than one"):
        join_held_out([run(("1", "2")), run(("2",))])
    with pytest.raises(DataError, match="knows other classes"):
        join_held_out([run(("1",)), run(("2",), ("a", "c"))])


def test_the_same_photo_in_another_size_is_a_near_duplicate(tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((200, 160), Image.Resampling.BICUBIC)
    small.save(tmp_path / "a.jpg", quality=90)
    small.resize((150, 120)).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((200, 160)).save(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes(b"broken")
    index = PhotoIndex(tmp_path, tuple(Photo(f"{name}.jpg", None, "", "") for name in "abcd"), (), {})
    found = near_duplicates(index, max_distance=6)
    assert [pair[:2] for pair in found] == [(0, 1)]
