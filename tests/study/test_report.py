from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.errors import RunError
from fieldmark.runs.folder import Run
from fieldmark.study.charts import LAMBDA_DRAWS, Curves, curve_chart, list_curves, read_epochs, report_charts
from fieldmark.study.compare import compare_runs
from fieldmark.study.report import class_table, markdown_text, most_confused, pooled_confusion, write_report

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script><b>$x^2$ & {{ 7*7 }}",
    "plain | *starred* [link](javascript:alert(3))",
)


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.text += "" if self._inside else data


@pytest.fixture(scope="module")
def sweep(synthetic_run, tmp_path_factory):
    """Two settings with two seeds, whose photos are there."""
    folder = tmp_path_factory.mktemp("report")
    for n in range(100):
        label = ("auk", "bee-eater", "crane", "dipper")[n // 25]
        photo = folder / "photos" / "val" / label / f"{n:04d}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).integers(0, 255, (300, 400, 3), np.uint8)
        Image.fromarray(noise).save(photo, quality=95)
    for prob in (0.0, 0.4):
        for seed in (0, 1):
            synthetic_run(
                folder / "sweep" / f"{prob}-{seed}", seed=seed, overrides=[f"mix.share={prob}"],
                accuracy=0.6 + 0.6 * prob, epochs=8, root=folder / "photos",
            )  # fmt: skip
    return folder / "sweep"


@pytest.fixture(scope="module")
def page(sweep):
    runs = [Run(sweep / name) for name in ("0.0-0", "0.0-1")] + [sweep / "0.4-0", sweep / "0.4-1"]
    written = write_report(runs, sweep.parent / "report.html")
    return Page(written[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nasty_run(synthetic_run, tmp_path_factory):
    """One run with markup in every name, and whose photos are gone."""
    photos = [f"val/{n}\udcff<img src=x onerror=alert(4)>.jpg" for n in range(100)]
    folder = tmp_path_factory.mktemp("nasty") / "<i>run"
    return synthetic_run(folder, classes=NASTY, photos=photos, overrides=["mix.share=0.0"], accuracy=0.5)


@pytest.fixture(scope="module")
def nasty_text(nasty_run):
    written = write_report([nasty_run], nasty_run.parent / "r.html", title="<script>alert(5)</script>")
    return written[0].read_text(encoding="utf-8")


def test_the_page_asks_no_network_for_anything(page):
    loaded = [(tag, key) for tag, attrs in page.tags for key in ("src", "href", "srcset", "data", "action")
              if re.match(r"\s*(https?:)?//", attrs.get(key) or "") and tag != "a"]  # fmt: skip
    assert loaded == []
    assert not any(tag == "link" for tag, _ in page.tags)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_the_page_holds_every_figure_that_was_promised(page):
    charts = [attrs["id"].removeprefix("figure-") for tag, attrs in page.tags if tag == "figure"]
    assert charts == [
        "accuracy", "differences", "val-top1", "train_top1_clean", "train_top1_mixed", "val-log_loss", "train_loss",
        "lr", "cost-time", "lambda-mixup", "lambda-cutmix", "confusion",
    ]  # fmt: skip


def test_the_page_holds_verdicts_classes_and_recipe(page, sweep):
    verdict = compare_runs([sweep]).pairs[0].verdict
    assert "mix.share=0.4 is better than mix.share=0 by" in verdict
    assert verdict in page.text
    for text in (
        "Classes of mix.share=0.4",
        "bee-eater",
        "Where the variants differ",
        "optim.backbone_lr_scale",
        "2.14",
    ):
        assert text in page.text


def test_the_page_is_small_and_has_no_script(sweep, page):
    assert (sweep.parent / "report.html").stat().st_size < 500_000
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "plotly" not in sys.modules


def test_every_chart_is_a_drawing_with_text_and_tooltips(page):
    assert sum(tag == "svg" for tag, _ in page.tags) == 12
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tip in ("mix.share=0.4: 8", "epoch 8\nmix.share=0: ", "bee-eater → crane: "):
        assert tip in page.text


def test_confused_photos_are_shown_in_at_most_5_kilobytes(page):
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) >= 4
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert max(len(source) for source in pictures) < 5_000 * 4 / 3 + 100


def test_photos_that_are_gone_are_named_instead(nasty_text):
    assert "(file not found)" in Page(nasty_text).text
    assert not any(tag == "img" for tag, _ in Page(nasty_text).tags)


def test_a_file_name_that_is_not_utf8_is_written_legibly(nasty_text):
    assert "\\udcff" in nasty_text


def test_the_page_of_one_run_is_about_that_run(nasty_text):
    page = Page(nasty_text)
    assert "on 100 photos." in page.text
    for absent in ("Verdicts", "variant", "compare"):
        assert absent not in page.text
    charts = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert charts == ["figure-accuracy", "figure-loss", "figure-lr", "figure-confusion"]
    for fact in ("Backbone", "Epochs", "6; kept: the best (", "Parameters", "3.4 M"):
        assert fact in page.text


def test_of_a_budget_the_page_names_what_was_kept_and_not_what_its_settings_begin_with(make_run, tmp_path):
    run = make_run("a")
    summary = json.loads((run / "summary.json").read_text()) | {"kept": "the average of two heads"}
    (run / "summary.json").write_text(json.dumps(summary))
    write_report([run], tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "the average of two heads" in text
    assert "Backbone" not in text
    assert "kept: the" not in text


def test_a_probe_is_a_point_of_its_own_and_has_no_learning_rate(make_run):
    run = make_run("a")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    probe = rows[0] | {"epoch": 0, "is_probe": True, "lr": 9.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [probe, *rows]))
    charts = {chart.key: chart.figure.axes[0] for chart in report_charts(compare_runs([run]))}
    (rate,) = charts["lr"].lines
    assert list(rate.get_xdata()) == [1, 2, 3, 4, 5, 6]
    lines = {line.get_label(): list(line.get_xdata()) for line in charts["accuracy"].lines}
    assert lines["validation"] == lines["training"] == [1, 2, 3, 4, 5, 6]
    assert lines["probe (head alone), validation"] == [0]


def _accuracy_chart(line):
    return curve_chart(Curves("top1", "Accuracy", "", "top-1", True, {}), {"run": line})


def test_a_chart_of_one_epoch_shows_no_half_epochs_and_no_share_above_one():
    axes = _accuracy_chart({0: [1.0]}).figure.axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0]
    assert axes.get_ylim()[1] < 1.02


def test_ticks_of_shares_say_where_they_are():
    figure = _accuracy_chart({1: [0.50], 2: [0.53]}).figure
    figure.canvas.draw()
    axes = figure.axes[0]
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert float(label.get_text().strip("%")) == pytest.approx(100 * place)


def test_names_with_markup_do_no_harm_in_the_page(nasty_text):
    page = Page(nasty_text)
    assert not any(tag in ("script", "img") for tag, _ in page.tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert not any(tag in ("b", "i") for tag, _ in page.tags)
    assert not any(
        "javascript:" in str(value) for _, attrs in page.tags for key, value in attrs.items() if key != "alt"
    )
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "<script>alert" not in nasty_text


def test_markdown_comes_with_its_pictures_and_without_markup_of_names(nasty_run, tmp_path):
    written = write_report([nasty_run], tmp_path / "paper" / "report.md")
    text = written[0].read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert [Path(link).name for link in links] == [path.name for path in written[1:]]
    assert all((written[0].parent / link).read_bytes().startswith(b"\x89PNG") for link in links)
    assert "<script" not in text
    assert "<img" not in text
    assert r"plain \| \*starred\* \[link\](javascript:alert(3))" in text


def test_markdown_text_stays_in_its_line_and_cell():
    assert markdown_text("a\n\n# b|c `d`") == r"a \# b\|c \`d\`"


def test_a_line_is_the_mean_over_seeds_with_a_band(sweep):
    variant = compare_runs([sweep]).variants[1]
    axes = _accuracy_chart(read_epochs("val.top1", [run.metrics for run in variant.runs])).figure.axes[0]
    runs = [[row["val"]["top1"] for row in run.metrics] for run in variant.runs]
    assert axes.lines[0].get_ydata() == pytest.approx(np.mean(runs, axis=0))
    band = axes.collections[0].get_datalim(axes.transData).intervaly
    assert band == pytest.approx([np.min(runs), np.max(runs)])


def _lines(rows, number):
    curves = list_curves([rows])[number]
    axes = curve_chart(curves, {name: read_epochs(key, [rows]) for name, key in curves.lines.items()}).figure.axes[0]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_missing_figures_of_an_epoch_leave_a_gap_not_a_zero():
    rows = [
        {"epoch": 1, "lr": 1e-3, "train_loss": 2.0, "train_top1_clean": None, "train_top1_mixed": 0.3, "val": {}},
        {"epoch": 2, "lr": 1e-4, "train_top1_clean": 0.5, "train_top1_mixed": 0.4, "val": {"top1": 0.6}},
    ]
    assert _lines(rows, 0) == {
        "training, clean batches": [(2, 0.5)],
        "training, mixed batches": [(1, 0.3), (2, 0.4)],
        "validation": [(2, 0.6)],
    }


def test_the_probes_rate_is_not_drawn_among_the_schedules():
    rows = [
        {"epoch": 0, "lr": 3e-3, "is_probe": True, "val": {}},
        {"epoch": 1, "lr": 1e-4, "is_probe": False, "val": {}},
    ]
    assert _lines(rows, 2) == {"head": [(1, 1e-4)]}


def test_accuracy_under_mixing_has_no_line_where_nothing_was_mixed(sweep):
    mixed = next(chart for chart in report_charts(compare_runs([sweep])) if chart.key == "train_top1_mixed")
    assert [line.get_label() for line in mixed.figure.axes[0].lines] == ["mix.share=0.4"]
    assert "ceiling" in mixed.note


def test_lambda_is_drawn_from_the_draws_that_training_makes(sweep):
    charts = {chart.key: chart for chart in report_charts(compare_runs([sweep]))}
    for key in ("lambda-mixup", "lambda-cutmix"):
        bars = charts[key].figure.axes[0].patches
        assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)
        assert f"{LAMBDA_DRAWS:,} draws" in charts[key].note
    u_shaped = [bar.get_height() for bar in charts["lambda-mixup"].figure.axes[0].patches]
    assert min(u_shaped[0], u_shaped[-1]) > 2 * u_shaped[20]


def test_class_rows_are_counted_by_hand(make_run):
    variant = compare_runs([make_run("a", accuracy=0.7)]).variants[0]
    run = variant.runs[0]
    rows = {row[0]: row for row in class_table(variant).rows}
    for number, name in enumerate(run.classes):
        right = int(run.correct[run.labels == number].sum())
        assert rows[name][1:3] == ("25", f"{100 * right / 25:.0f} %")
    assert [int(row[2].split()[0]) for row in class_table(variant).rows] == sorted(
        int(row[2].split()[0]) for row in rows.values()
    )


def test_the_most_confused_pair_comes_first(make_run):
    variant = compare_runs([make_run("a", accuracy=0.5)]).variants[0]
    pairs = most_confused(variant, with_photos=False)
    confusion = pooled_confusion(variant)
    off = confusion - np.diag(np.diag(confusion))
    assert [pair["count"] for pair in pairs] == sorted(off[off > 0].tolist(), reverse=True)[:6]
    assert all(pair["true"] != pair["predicted"] for pair in pairs)


def test_a_broken_photo_is_named_and_not_shown(make_run, tmp_path):
    run = make_run("a", accuracy=0.5, root=tmp_path)
    for photo in Run(run).predictions("val").paths:
        (tmp_path / photo).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / photo).write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    shown = [
        photo for pair in most_confused(compare_runs([run]).variants[0], with_photos=True) for photo in pair["photos"]
    ]
    assert shown
    assert all(photo["source"] == "" for photo in shown)


def test_a_page_of_100_classes_and_photos_stays_under_half_a_megabyte(make_run, tmp_path):
    classes = [f"Species_{n:03d}_with_a_long_name" for n in range(100)]
    run = make_run("a", accuracy=0.5, classes=classes, per_class=3, epochs=40, root=tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for photo in Run(run).predictions("val").paths:
        (tmp_path / photo).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / photo, quality=90)
    (page,) = write_report([run], tmp_path / "report.html")
    assert page.stat().st_size < 500_000
    text = page.read_text(encoding="utf-8")
    assert all(f">{name}</text>" in text for name in classes)
    matrix = text[text.index('id="figure-confusion"') :]
    assert float(re.search(r"font-size: ([\d.]+)px", matrix).group(1)) >= 6


def test_other_endings_are_answered(make_run, tmp_path):
    with pytest.raises(RunError, match=r"a report is \.html or \.md; got 'report\.pdf'"):
        write_report([make_run("a")], tmp_path / "report.pdf")
