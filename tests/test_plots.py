"""Figures: they draw what they are given, show names literally, and leave pyplot alone."""

from __future__ import annotations

import io
import sys
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from fieldmark.data.decode import DecodeSpec
from fieldmark.errors import PhotoError
from fieldmark.plots import (
    Tip,
    confusion_figure,
    draw_lambda,
    figure_png,
    figure_svg,
    fill_grid,
    new_figure,
    plain_text,
    thumbnail,
)


def pixels(figure):
    return np.asarray(Image.open(io.BytesIO(figure_png(figure, dpi=50))).convert("RGB"))


@pytest.mark.parametrize("name", ["$\\frac{1}{2", "$x$", "a\nb", "鷹", "\x07", "x" * 300, ""])
def test_any_class_name_can_be_drawn(name):
    assert pixels(confusion_figure(np.eye(2, dtype=np.int64), [name, "other"])[0]).std() > 0


def test_a_dollar_name_is_shown_literally():
    text = new_figure(2, 2).text(0.5, 0.5, plain_text("$x$"))
    assert text._preprocess_math(text.get_text()) == ("$x$", False)


def test_the_confusion_matrix_has_true_classes_in_rows():
    confusion = np.array([[0, 3], [0, 1]])
    figure, tips = confusion_figure(confusion, ["a", "b"])
    axes = figure.axes[0]
    assert axes.get_ylabel() == "true class"
    colors = axes.images[0].get_array()
    assert np.array_equal(colors[..., 3], [[0, 1], [0, 1]])  # full color: the whole row is there
    assert np.array_equal(colors[0, 1, :3] * 255, [0xD5, 0x5E, 0x00])
    assert np.array_equal(colors[1, 1, :3] * 255, [0x00, 0x72, 0xB2])
    assert sorted((text.get_position(), text.get_text()) for text in axes.texts) == [((1, 0), "3"), ((1, 1), "1")]
    assert [tip.text for tip in tips] == ["a → b: 3 of 3", "b → b: 1 of 1"]


def test_a_matrix_of_very_many_classes_shows_those_with_the_most_mistakes():
    confusion = np.diag(np.full(500, 5))
    confusion[7, 400] = 2
    names = [
        label.get_text()
        for label in confusion_figure(confusion, [str(n) for n in range(500)])[0].axes[0].get_yticklabels()
    ]
    assert len(names) == 120
    assert {"7", "400"} <= set(names)


def test_a_picture_in_a_page_has_text_and_tooltips_and_no_markup_of_names():
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 10], [0, 10], label="x")
    axes.set_title(plain_text("<b>&"))
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    svg = figure_svg(figure, [Tip(axes, (0, 10), (0, 10), "<i>whole\udcff\nchart")], key="k")
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b>&" in texts
    (tip,) = root.iter("{http://www.w3.org/2000/svg}title")
    assert tip.text == "<i>whole�\nchart"
    box = root.findall(".//{http://www.w3.org/2000/svg}rect")[-1].attrib
    place = axes.get_position()
    assert float(box["width"]) == pytest.approx(place.width * 216, abs=0.1)
    assert float(box["y"]) == pytest.approx((1 - place.y1) * 144, abs=0.1)


def test_a_thumbnail_is_as_small_as_asked(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    decoding = DecodeSpec((255, 255, 255), 10**8)
    content = thumbnail(tmp_path / "noise.png", 140, decoding, max_bytes=5000)
    assert len(content) <= 5000
    assert Image.open(io.BytesIO(content)).size == (140, 105)
    with pytest.raises(PhotoError):
        thumbnail(tmp_path / "gone.png", 140, decoding)


def test_the_histogram_of_lambda_integrates_to_one_and_follows_the_beta():
    rng = np.random.default_rng(0)
    values = rng.beta(2.0, 2.0, size=20_000)
    axes = new_figure(4, 3).subplots()
    draw_lambda(axes, values, (2.0, 2.0), "MixUp")
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    assert sum(height for _, height in bars) / len(bars) == pytest.approx(1)
    inside, drawn = axes.lines[0].get_data()
    assert all(abs(np.interp(x, inside, drawn) - height) < 0.15 for x, height in bars)


def test_photos_are_drawn():
    figure = new_figure(6, 3)
    photos, captions = [np.zeros((4, 4, 3), np.uint8)] * 7, [f"$n{n}" for n in range(7)]
    fill_grid(figure.subplots(2, 6, squeeze=False), 6, photos, captions, ["green"] * 7)
    assert [axes.get_visible() for axes in figure.axes] == [True] * 7 + [False] * 5
    assert pixels(figure).std() > 0


def test_pyplot_is_not_touched():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
