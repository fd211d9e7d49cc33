"""What is said of one change on several data sets."""

from __future__ import annotations

import pytest
from experiments.choices import write_page
from experiments.pages import judge, mean_gain


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([[0.02, 0.01, 0.03], [0.03, 0.01, 0.05]], "helps on all"),
        ([[-0.02, -0.03, -0.01], [-0.03, -0.05, -0.01]], "hurts on all"),
        ([[0.02, 0.01, 0.03], [-0.03, -0.05, -0.01]], "helps on 1, hurts on 1"),
        ([[0.03, 0.01, 0.05], [0.02, -0.01, 0.05]], "helps in the mean, for sure on 1"),
        ([[0.03, 0.01, 0.05], [-0.02, -0.05, 0.01]], "helps on 1"),
        ([[0.01, -0.01, 0.03], [-0.01, -0.03, 0.01]], "not distinguishable"),
    ],
)
def test_the_verdict_goes_by_the_intervals(gains, words):
    assert judge(gains, mean_gain(gains)) == words


def test_the_mean_of_several_data_sets_is_surer_than_each():
    estimate, low, high = mean_gain([[0.02, 0.0, 0.04], [0.04, 0.02, 0.06]])
    assert estimate == pytest.approx(0.03)
    assert 0.01 < low < 0.02 < 0.04 < high < 0.05


def test_the_page_has_a_row_for_each_change_and_says_what_was_not_run():
    rows = [
        {"data": "birds", "change": "none", "photos": 90, "top1": 0.8, "minutes": 2.0, "top1_gain": None,
         "log_loss_gain": None},
        {"data": "birds", "change": "mix.share=0", "top1_gain": [0.01, -0.01, 0.03], "log_loss_gain": [0.2, 0.1, 0.3]},
        {"data": "signs", "change": "none", "photos": 70, "top1": 0.9, "minutes": 1.0, "top1_gain": None,
         "log_loss_gain": None},
    ]  # fmt: skip
    page = write_page(rows)
    assert "| mix.share=0 | +1.0 (-1.0 to +3.0) | not run | +1.0 (-1.0 to +3.0) | not distinguishable of 1 |" in page
    assert (
        "| mix.share=0 | +0.200 (+0.100 to +0.300) | not run | +0.200 (+0.100 to +0.300) | helps on all of 1 |" in page
    )
    assert "| signs | 70 | 0.900 | 1.0 |" in page
