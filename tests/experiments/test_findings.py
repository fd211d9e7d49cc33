from __future__ import annotations

import json

import pytest
from experiments.findings import CLAIMS, NOT_IN_RUNS, describe_most, epochs_to_reach, main, write_findings

from fieldmark.errors import RunError
from fieldmark.files import digest_file

ACCURACY = "Mixing at probability 0.3 or more gives the best validation accuracy"
LOSS = "More mixing raises the training loss"
LINEAR = "A linear head is better than the competition's two layers"


@pytest.fixture
def find(make_run, tmp_path):
    """Verdicts by claim, of runs described as (overrides, seed, accuracy)."""

    def made(*runs):
        for number, (overrides, seed, accuracy) in enumerate(runs):
            make_run(f"sweep/{number}", overrides=overrides, seed=seed, accuracy=accuracy)
        findings = write_findings([tmp_path / "sweep"], tmp_path / "findings.md", command="make findings")
        return {finding.claim: finding for finding in findings}

    return made


def _mixing(low, high):
    return [([f"mix.share={prob}"], seed, accuracy) for prob, accuracy in ((0.0, low), (0.8, high)) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.5, 0.9, "supported"), (0.9, 0.5, "contradicted"), (0.8, 0.8, "not distinguishable")],
)
def test_a_claim_about_accuracy_follows_the_paired_verdict(find, low, high, verdict):
    finding = find(*_mixing(low, high))[ACCURACY]
    assert finding.verdict == verdict
    assert "mix.share=0.8" in finding.evidence[0]
    assert len(finding.at_most) == 1
    assert (finding.at_most[0] > 0) == (verdict != "contradicted")


def test_what_a_claim_may_still_be_worth_is_said_with_the_comparisons_that_exclude_a_margin():
    assert describe_most([]) == ""
    assert describe_most([-0.5]) == "nothing"
    assert describe_most([1.25]) == "1.2"
    assert describe_most([-1.0, 2.9, 14.5]) == "14.5; 3 are excluded in 2 of 3 comparisons"
    assert describe_most([1.0, 2.0]) == "1.0 to 2.0; 3 are excluded in 2 of 2 comparisons"


def test_a_claim_about_histories_asks_that_all_runs_lie_beyond_all_others(find):
    finding = find(*_mixing(0.7, 0.7))[LOSS]
    assert finding.verdict == "supported"
    assert finding.evidence == ("train loss at the end: mix.share=0: 0.271, 0.271; mix.share=0.8: 1.07, 1.07.",)


def test_best_must_hold_against_each_other_value(find):
    runs = [*_mixing(0.5, 0.9), (["mix.share=0.4"], 0, 0.9), (["mix.share=0.4"], 1, 0.9)]
    found = find(*runs)["Mixing at probability 0.4 is best"]
    assert found.verdict == "partly supported"
    assert len(found.evidence) == 2


def test_what_else_a_sweep_compares_makes_no_claim_less_sure(find):
    others = [([f"train.batch_size={size}"], 0, 0.7) for size in (8, 16, 24)]
    finding = find((['model.head="linear"'], 0, 0.7), (['model.head="mlp"'], 0, 0.7), *others)[LINEAR]
    assert finding.verdict == "not distinguishable"
    assert "comparisons" not in finding.evidence[0]


def test_a_history_is_not_tested_by_one_run_each(find):
    runs = [(["mix.share=0.0"], 0, 0.9), (["mix.share=0.8"], 0, 0.9)]
    found = find(*runs)["More mixing makes validation accuracy converge faster"]
    assert found.verdict == "not distinguishable"
    assert found.evidence[0].endswith("One run each is too few to tell it from chance.")


def test_settings_that_differ_in_more_than_the_claim_prove_nothing(find):
    runs = [(["mix.share=0.0", "optim.lr=1e-3"], 0, 0.5), (["mix.share=0.8", "optim.lr=1e-4"], 0, 0.9)]
    verdicts = {finding.verdict for finding in find(*runs).values()}
    assert verdicts == {"not tested here"}


def test_the_order_of_the_runs_does_not_turn_a_claim_around(find):
    head = [(['model.head="linear"'], 0, 0.9), (['model.head="mlp"'], 0, 0.5)]
    assert find(*head)[LINEAR].verdict == "supported"


def test_the_page_has_every_claim_and_says_how_it_was_made(find, tmp_path):
    find(*_mixing(0.5, 0.9))
    text = (tmp_path / "findings.md").read_text()
    assert text.count("\n| ") == len(CLAIMS) + len(NOT_IN_RUNS) + 5
    assert "Made by `make findings`." in text
    assert "No two runs differ in this alone." in text
    assert "model hub" in text


def test_convergence_is_counted_to_nine_tenths_of_the_best():
    rows = [{"val": {"top1": value}} for value in (0.2, 0.5, 0.8, 0.8, 0.8)]
    assert epochs_to_reach(rows, share=0.9) == pytest.approx(2 + (0.72 - 0.5) / 0.3)
    assert epochs_to_reach(rows[:2], share=0.9) is None


def test_no_runs_find_nothing(tmp_path):
    with pytest.raises(RunError, match="no runs to find anything in"):
        write_findings([], tmp_path / "findings.md", command="")


def test_claims_are_about_settings_that_exist():
    from fieldmark.config import load_config
    from fieldmark.runs.folder import flatten

    known = flatten(load_config())
    assert [claim.key for claim in CLAIMS if claim.key not in known] == []
    json.dumps([claim.text for claim in CLAIMS])


def test_the_command_gives_every_claim_a_verdict(make_run, tmp_path, monkeypatch, capsys):
    for name, prob, accuracy in (("plain", 0.0, 0.5), ("mixed", 0.8, 0.95)):
        make_run(name, overrides=[f"mix.share={prob}"], accuracy=accuracy)
    page = tmp_path / "findings.md"
    monkeypatch.setattr("sys.argv", ["findings", str(tmp_path / "plain"), str(tmp_path / "mixed"), "--out", str(page)])
    main()
    assert len(capsys.readouterr().out.splitlines()) == len(CLAIMS) + len(NOT_IN_RUNS)
    assert "not tested here" in page.read_text()
    assert "python -m experiments.findings" in page.read_text()


def test_the_page_says_by_what_predictions_its_runs_are_known(find, tmp_path):
    find(*_mixing(0.5, 0.9))
    page = (tmp_path / "findings.md").read_text()
    for number in range(4):
        assert digest_file(tmp_path / "sweep" / str(number) / "predictions" / "val.parquet")[:8] in page
