"""The page that is made from the records."""

from __future__ import annotations

import tomllib

import pytest

from benchmarks import tables

RECORD = {
    "benchmark": "pipeline",
    "command": "python -m benchmarks.pipeline --quick",
    "versions": {"python": "3.11", "torch": "2.14"},
    "hardware": {"cores": 2, "processor": "a processor", "load_average_before": [3.0], "load_average": [4.0]},
    "rounds": {"race": 3},
    "measured": {"ours": 30.0, "theirs": 10.0},
    "units": {"ours": "photos per second", "theirs": "photos per second"},
    "spread": {"ours": [29.0, 31.0]},
    "formulas": {"ours / theirs": ["ours", "theirs"]},
    "ratios": {"ours / theirs": 3.0},
    "targets": {"ours / theirs": 2.5},
    "notes": ["one | note"],
    "profiles": {"ours": {"kernels.warp": 0.6, "everything else": 0.4}},
}


def test_the_page_tells_targets_medians_ranges_formulas_notes_and_profiles():
    text = tables.page([RECORD], {"pipeline": "A word on it."})
    assert "| pipeline | ours / theirs | 3 | 2.5 | met |" in text
    assert "| ours | 30 | 29 to 31 | photos per second |" in text
    assert "| ours / theirs | 3 | `ours` / `theirs` |" in text
    assert "- one | note" in text
    assert "*ours* goes: kernels.warp 60%, everything else 40%." in text
    assert "A word on it." in text
    assert "3.0 before, 4.0 after" in text


def test_a_target_that_is_not_met_is_called_missed():
    missed = RECORD | {"targets": {"ours / theirs": 3.01}}
    assert "| pipeline | ours / theirs | 3 | 3.01 | **missed** |" in tables.page([missed], {})


def test_nested_measurements_keep_both_names():
    assert tables.flatten({"speed": {"a": 1.0}, "b": 2.0}) == {"speed: a": 1.0, "b": 2.0}


def test_a_bar_in_a_cell_does_not_end_it():
    assert list(tables.table(["a"], [["x|y"]]))[-1] == r"| x\|y |"


def test_records_come_in_the_order_of_the_page_and_other_files_are_left_aside(tmp_path):
    for name in ("train", "pipeline", "zebra"):
        (tmp_path / f"{name}.json").write_text('{"measured": {}, "ratios": {}, "targets": {}}')
    (tmp_path / "costs.json").write_text('{"rows": []}')
    assert [record["benchmark"] for record in tables.load_records(tmp_path)] == ["pipeline", "train", "zebra"]


def test_committed_ratios_are_those_of_the_committed_measurements():
    records = tables.load_records(tables.RESULTS)
    assert records
    for record in records:
        for case, (numerator, denominator) in record.get("formulas", {}).items():
            expected = record["measured"][numerator] / record["measured"][denominator]
            assert record["ratios"][case] == pytest.approx(expected), (record["benchmark"], case)
        assert set(record["targets"]) <= set(record["ratios"])


def test_the_page_is_what_the_committed_records_make():
    comments, records = tables.RESULTS / "comments.toml", tables.load_records(tables.RESULTS)
    text = tables.page(records, tomllib.loads(comments.read_text(encoding="utf-8")))
    assert tables.PAGE.read_text(encoding="utf-8") == text, "run python -m benchmarks.tables"
    front = tables.README.read_text(encoding="utf-8")
    assert front.count(tables.BEGIN) == front.count(tables.END) == 1
    assert tables.readme(front, records) == front, "run python -m benchmarks.tables"
