"""Laws of the taxonomy: sums over the tree, and answers at the level that is sure."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.errors import DataError
from fieldmark.inference.taxonomy import Answer, Taxonomy, find_answers, load_taxonomy, taxonomy_scores
from fieldmark.runs.folder import PhotoPredictions

LEVELS = ("class", "genus", "family")
ROWS = [["tit", "Parus", "Paridae"], ["blue tit", "Cyanistes", "Paridae"], ["gull", "Larus", "Laridae"]]
TREE = Taxonomy(LEVELS, ROWS)


def test_the_probability_of_a_group_is_the_sum_of_its_classes():
    sums = TREE.at_level(np.array([[0.4, 0.35, 0.25]]), 2)
    assert dict(zip(TREE.nodes[2], sums[0], strict=True)) == {"Paridae": pytest.approx(0.75), "Laridae": 0.25}


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_probabilities_sum_to_one_at_every_level_and_the_best_never_falls_upwards(weights):
    probabilities = np.array([weights]) / sum(weights)
    best = [TREE.at_level(probabilities, level).max() for level in range(3)]
    assert all(TREE.at_level(probabilities, level).sum() == pytest.approx(1) for level in range(3))
    assert best[0] <= best[1] + 1e-12 <= best[2] + 2e-12


def test_the_answer_is_the_finest_level_that_is_sure():
    probabilities = np.array([[0.9, 0.05, 0.05], [0.45, 0.4, 0.15], [0.3, 0.2, 0.5]])
    answers = find_answers(probabilities, TREE, thresholds=[0.8, 0.8, 0.8])
    assert answers[0] == Answer("class", "tit", pytest.approx(0.9))
    assert answers[1] == Answer("family", "Paridae", pytest.approx(0.85))
    assert answers[2] == Answer("", "", pytest.approx(0.5))


def test_accuracy_rises_with_the_level(tmp_path):
    (tmp_path / "t.csv").write_text("class,genus,family\n" + "".join(",".join(row) + "\n" for row in ROWS))
    probabilities = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.8, 0.1, 0.1]])
    stored = PhotoPredictions(("a", "b", "c"), np.array([0, 1, 2]), probabilities)
    run = SimpleNamespace(predictions=lambda split: stored, classes=[row[0] for row in ROWS])
    found = taxonomy_scores(run, tmp_path / "t.csv")
    assert found["class"] == pytest.approx(1 / 3)
    assert found["genus"] == pytest.approx(1 / 3)
    assert found["family"] == pytest.approx(2 / 3)


def test_a_table_is_read_by_name_whatever_its_order(tmp_path):
    path = tmp_path / "taxonomy.csv"
    path.write_text("\ufeffclass,genus,family\ngull,Larus,Laridae\nother,X,Y\ntit,Parus,Paridae\n", encoding="utf-8")
    tree = load_taxonomy(path, ["tit", "gull"])
    assert tree.levels == LEVELS
    assert tree.nodes[2] == ("Paridae", "Laridae")


@pytest.mark.parametrize(
    "content",
    [
        "class;genus\ntit;Parus\ngull;Larus\n".encode("utf-8-sig"),
        "class\tgenus\ntit\tParus\ngull\tLarus\n".encode("utf-16"),
        b"class,genus\r\ntit,Parus\r\n\r\ngull,Larus\r\n",
    ],
)
def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path, content):
    (tmp_path / "taxonomy.csv").write_bytes(content)
    assert load_taxonomy(tmp_path / "taxonomy.csv", ["tit", "gull"]).nodes == (("tit", "gull"), ("Parus", "Larus"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: its first line must name the columns"),
        ("class\ntit\ngull\n", "needs a header such as class,genus,family"),
        ("class,genus\ntit,Parus\n", "lacks 1 of 2 classes: gull. Add a row"),
        ("class,genus\ntit,Parus\ngull\n", "line 3: 1 values, but the header names 2 columns"),
        ("class,genus\ntit,Parus\ngull, \n", "line 3: expected 2 filled cells"),
        ("class,genus\ntit,Parus\ntit,Larus\n", "line 3: the class 'tit' has a row already"),
        ("class,genus,family\ntit,P,A\ngull,P,B\n", "the genus 'P' is in more than one family .*not a tree"),
    ],
)
def test_a_bad_table_says_where(tmp_path, text, message):
    path = tmp_path / "taxonomy.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_taxonomy(path, ["tit", "gull"])


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_taxonomy(tmp_path / "none.csv", ["tit"])
