"""Figures: they draw what they are given, show names literally, and leave pyplot alone."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from fieldmark.plots import (
    confusion_figure,
    draw_lambda,
    draw_rate,
    figure_png,
    new_figure,
    photo_grid,
    plain_text,
    training_figure,
)


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(figure_png(figure, dpi=50))).convert("RGB"))


@pytest.mark.parametrize("name", ["$\\frac{1}{2", "$x$", "a\nb", "鷹", "\x07", "x" * 300, ""])
def test_any_class_name_can_be_drawn(name):
    assert pixels(confusion_figure(np.eye(2, dtype=np.int64), [name, "other"])).std() > 0


def test_a_dollar_name_is_shown_literally():
    text = new_figure(2, 2).text(0.5, 0.5, plain_text("$x$"))
    assert text._preprocess_math(text.get_text()) == ("$x$", False)


def test_the_confusion_matrix_has_true_classes_in_rows():
    figure = confusion_figure(np.array([[0, 3], [0, 1]]), ["a", "b"])
    axes = figure.axes[0]
    assert axes.get_ylabel() == "true class"
    assert np.array_equal(axes.images[0].get_array(), [[0, 1], [0, 1]])
    assert sorted((text.get_position(), text.get_text()) for text in axes.texts) == [((1, 0), "3"), ((1, 1), "1")]


def test_missing_figures_of_an_epoch_leave_a_gap_not_a_zero():
    rows = [
        {"epoch": 1, "lr": 1e-3, "train_loss": 2.0, "train_top1_clean": None, "train_top1_mixed": 0.3, "val": {}},
        {"epoch": 2, "lr": 1e-4, "train_top1_clean": 0.5, "train_top1_mixed": 0.4, "val": {"top1": 0.6}},
    ]
    accuracy = training_figure(rows).axes[1]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in accuracy.lines}
    assert lines == {
        "training, clean batches": [(2, 0.5)],
        "training, mixed": [(1, 0.3), (2, 0.4)],
        "validation": [(2, 0.6)],
    }


def test_the_probes_rate_is_not_drawn_among_the_schedules():
    rows = [
        {"epoch": 0, "lr": 3e-3, "is_probe": True, "val": {}},
        {"epoch": 1, "lr": 1e-4, "is_probe": False, "val": {}},
    ]
    (line,) = training_figure(rows).axes[2].lines
    assert list(zip(*line.get_data(), strict=True)) == [(1, 1e-4)]


def test_the_lambda_density_integrates_to_one_and_follows_the_beta():
    rng = np.random.default_rng(0)
    values = rng.beta(2.0, 2.0, size=20_000)
    axes = new_figure(4, 3).subplots()
    draw_lambda(axes, values, (2.0, 2.0), "MixUp")
    grid, density = axes.lines[0].get_data()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.02)
    inside, drawn = axes.lines[1].get_data()
    assert np.abs(np.interp(inside, grid, density) - drawn).max() < 0.15


def test_constant_lambda_can_be_drawn():
    axes = new_figure(4, 3).subplots()
    draw_lambda(axes, np.ones(10), (1.0, 1.0), "CutMix")
    assert len(axes.lines) == 1


def test_rates_and_photos_are_drawn():
    figure = new_figure(4, 3)
    draw_rate(figure.subplots(), np.arange(3.0), {"head": np.array([1, 0.5, 0.0]), "backbone": np.zeros(3)}, "rate")
    assert pixels(figure).std() > 0
    grid = photo_grid([np.zeros((4, 4, 3), np.uint8)] * 7, [f"$n{n}" for n in range(7)], ["green"] * 7)
    assert [axes.get_visible() for axes in grid.axes] == [True] * 7 + [False] * 5
    assert pixels(grid).std() > 0


def test_pyplot_is_not_touched():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
