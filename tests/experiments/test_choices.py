"""What is said of one change on several data sets."""

from __future__ import annotations

import pytest
from experiments.choices import find_open, find_spread, group_gains, widen, write_page
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


def make_row(data, change="none", *, fold=0, top1=(0.01, -0.01, 0.03), log_loss=(0.2, 0.1, 0.3)):
    row = {"data": data, "fold": fold, "cell": change, "change": change, "photos": 90, "top1": 0.8, "minutes": 2.0}
    gains = {"top1_gain": None, "log_loss_gain": None}
    return row | (gains if change == "none" else {"top1_gain": [*top1], "log_loss_gain": [*log_loss]})


def test_the_page_has_a_row_for_each_change_and_says_what_was_not_run():
    page = write_page([make_row("birds"), make_row("birds", "mix.share=0"), make_row("signs")])
    assert "| mix.share=0 | +1.0 (-1.0 to +3.0) | not run | +1.0 (-1.0 to +3.0) | not distinguishable of 1 |" in page
    assert (
        "| mix.share=0 | +0.200 (+0.100 to +0.300) | not run | +0.200 (+0.100 to +0.300) | helps on all of 1 |" in page
    )
    assert "| signs | 90 | 0.800 | 2.0 |" in page


def test_folds_that_agree_make_a_change_surer_and_folds_that_do_not_widen_every_interval():
    agreeing = [make_row("birds", "a", fold=fold) for fold in range(3)]
    gains = group_gains(agreeing, "top1")
    assert find_spread(gains) == 1
    assert widen(gains["a"]["birds"], 1) == pytest.approx([0.01, 0.01 - 0.02 / 3**0.5, 0.01 + 0.02 / 3**0.5])

    # Two values 0.04 apart, of which each has a standard error of 0.02 / 1.96: the difference is 2.77 of its own.
    apart = [make_row("birds", "a", fold=fold, top1=(at, at - 0.02, at + 0.02)) for fold, at in enumerate((0.0, 0.04))]
    spread = find_spread(group_gains(apart, "top1"))
    assert spread == pytest.approx(0.04 / (2**0.5 * 0.02 / 1.96))
    page = write_page([make_row("birds"), *apart, make_row("birds", "b")])
    assert "Intervals are 2.77 times as wide" in page
    assert "| a (2 folds) | +2.0 (-1.9 to +5.9) |" in page
    assert "| b | +1.0 (-4.5 to +6.5) |" in page


def test_what_the_first_fold_leaves_open_is_tried_again():
    rows = [make_row("birds"), make_row("birds", "open"), make_row("birds", "sure", top1=(0.03, 0.01, 0.05))]
    later = make_row("birds", "sure", fold=1, top1=(0.0, -0.02, 0.02))
    assert find_open([*rows, later]) == {"open"}
