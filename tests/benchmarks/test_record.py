"""The form that benchmarks share."""

from __future__ import annotations

import json

import pytest
from benchmarks.record import Findings, Ratio, Rounds
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import record as form


@pytest.fixture
def findings() -> Findings:
    found = Findings(notes=["made of nothing"])
    found.add_rounds(
        "race", Rounds({"ours": 30.0, "theirs": 10.0}, {"ours": (29.0, 31.0)}, rounds=3), "photos per second"
    )
    found.ratios = {"ours / theirs": Ratio("ours", "theirs", 2.5), "theirs / ours": Ratio("theirs", "ours", 2.5)}
    found.ratios["told"] = Ratio("ours", "ours")
    return found


def test_every_ratio_can_be_recomputed_from_the_record_alone(findings):
    record = form.make_record("race", findings, is_quick=True, load_before=[1.0])
    assert record["ratios"] == {"ours / theirs": 3.0, "theirs / ours": pytest.approx(1 / 3), "told": 1.0}
    for case, (numerator, denominator) in record["formulas"].items():
        assert record["ratios"][case] == record["measured"][numerator] / record["measured"][denominator]


def test_a_record_names_its_command_versions_hardware_rounds_and_units(findings):
    record = form.make_record("race", findings, is_quick=True, load_before=[1.0])
    assert record["command"] == "python -m benchmarks.race --quick"
    assert record["versions"]["torch"]
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["load_average_before"] == [1.0]
    assert record["rounds"] == {"race": 3}
    assert record["units"] == dict.fromkeys(record["measured"], "photos per second")
    assert record["targets"] == {"ours / theirs": 2.5, "theirs / ours": 2.5}


def test_a_ratio_of_something_that_was_not_measured_is_an_error(findings):
    findings.ratios["ghost"] = Ratio("ours", "nobody")
    with pytest.raises(KeyError, match="nobody"):
        form.make_record("race", findings, is_quick=False, load_before=[])


def test_the_file_holds_the_record_and_the_terminal_the_verdicts(findings, tmp_path, capsys):
    file = tmp_path / "deep" / "race.json"
    form.report("race", findings, is_quick=False, json_file=file, load_before=[])
    assert json.loads(file.read_text()) == json.loads(
        json.dumps(form.make_record("race", findings, is_quick=False, load_before=[]))
    ) | {"hardware": json.loads(file.read_text())["hardware"]}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "target" in line] == ["met", "MISSED"]
    assert "note: made of nothing" in lines


@given(names=st.permutations("abcd"), rounds=st.integers(1, 6))
def test_every_case_is_measured_once_in_each_round_and_the_order_rotates(names, rounds):
    calls: list[str] = []

    def case(name):
        return lambda: calls.append(name) or float(len(calls))

    result = form.interleave({name: case(name) for name in names}, rounds=rounds, limit_seconds=60)
    turns = [calls[start : start + len(names)] for start in range(0, len(calls), len(names))]
    assert result.rounds == rounds == len(turns)
    for number, turn in enumerate(turns):
        place = number % len(names)
        assert turn == names[place:] + names[:place]


def test_the_median_over_rounds_counts_and_the_warm_up_does_not():
    values = iter([1000.0, 3.0, 1.0, 2.0])
    result = form.interleave({"a": lambda: next(values)}, rounds=3, limit_seconds=60, warm_up=True)
    assert result == Rounds({"a": 2.0}, {"a": (1.0, 3.0)}, rounds=3)


def test_no_round_begins_after_the_limit_but_the_least_number_always_runs():
    assert form.interleave({"a": lambda: 1.0}, rounds=5, limit_seconds=0).rounds == 1
    assert form.interleave({"a": lambda: 1.0}, rounds=5, limit_seconds=0, least=3).rounds == 3


def test_interleaved_gives_seconds_of_the_clock():
    seconds = form.interleaved({"nothing": lambda: None, "something": lambda: sum(range(200_000))}, rounds=3)
    assert 0 <= seconds["nothing"] < seconds["something"] < 10


def test_a_profile_names_the_busiest_place_and_sums_to_one():
    shares = form.profile_shares(lambda: sorted(range(300_000), key=lambda value: -value))
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert next(iter(shares)) in {"test_record.<lambda>", "<built-in method builtins.sorted>"}


def test_every_benchmark_takes_quick_and_json():
    arguments = form.make_parser("what it is").parse_args(["--quick", "--json", "a.json"])
    assert arguments.quick
    assert str(arguments.json) == "a.json"
