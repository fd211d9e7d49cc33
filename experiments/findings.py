"""The competition report's claims, each with the verdict that our runs support: `docs/findings.md` from run folders.

A claim is tested on pairs of variants that differ in nothing else than what the claim is about; where there are none,
it says so and nothing more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fieldmark.errors import FieldmarkError, ResourceError, RunError
from fieldmark.files import digest_file
from fieldmark.runs.folder import RunResults
from fieldmark.study.compare import Comparison, Pair, Variant, compare_runs, decide_together
from fieldmark.study.report import Table, markdown_table

Verdict = Literal[
    "supported", "partly supported", "contradicted", "inconsistent", "not distinguishable", "not tested here"
]
Order = Callable[[Any, Any], bool | None]


@dataclass(frozen=True)
class Claim:
    """One claim, and the pairs of variants that test it.

    Attributes:
        text: In the competition's words, or close to them.
        key: Dotted key in which alone the two variants differ.
        favors: For values (a, b) of the key: whether the claim has b ahead; None if it says nothing of them.
        measure: What is said to be higher: `accuracy` on validation photos (tested with paired intervals), or a figure
            of the runs' histories (tested by whether all runs of one variant lie above all of the other).
    """

    text: str
    key: str
    favors: Order
    measure: Literal["accuracy", "train_loss", "train_top1_clean", "train_top1_mixed", "speed"] = "accuracy"


@dataclass(frozen=True)
class Finding:
    """A claim's verdict, with the evidence in words."""

    claim: str
    verdict: Verdict
    evidence: tuple[str, ...]
    at_most: tuple[float, ...] = ()
    """Of each comparison of accuracies the upper end of the interval in the claim's favor, in points."""


def _more(first: Any, second: Any) -> bool:
    return second > first


def _toward(value: Any) -> Order:
    """The claim has this value ahead of every other."""
    return lambda first, second: True if second == value else False if first == value else None


def _between(low: Any, high: Any, *, high_wins: bool) -> Order:
    def order(first: Any, second: Any) -> bool | None:
        if (first, second) == (low, high):
            return high_wins
        return not high_wins if (first, second) == (high, low) else None

    return order


def _at_least(limit: float) -> Order:
    """The claim has values from `limit` on ahead of those below."""
    return lambda first, second: None if (first >= limit) == (second >= limit) else second >= limit


def _depth(first: Any, second: Any) -> bool | None:
    deep, flat = ("101" in str(second), "50" in str(first)), ("50" in str(second), "101" in str(first))
    return True if all(deep) else False if all(flat) else None


def _squeeze(first: Any, second: Any) -> bool | None:
    has = [str(name).startswith(("seres", "legacy_seres")) for name in (first, second)]
    return None if has[0] == has[1] else has[1]


CLAIMS = (
    Claim("Mixing at probability 0.3 or more gives the best validation accuracy", "mix.share", _at_least(0.6)),
    Claim("Mixing at probability 0.4 is best", "mix.share", _toward(0.8)),
    Claim("More mixing raises the training loss", "mix.share", _more, "train_loss"),
    Claim("More mixing lowers the training accuracy (on clean batches)", "mix.share",
          lambda a, b: b < a, "train_top1_clean"),
    Claim("More mixing lowers the training accuracy (λ-weighted, on mixed batches)", "mix.share",
          lambda a, b: b < a if a and b else None, "train_top1_mixed"),
    Claim("More mixing makes validation accuracy converge faster", "mix.share", _more, "speed"),
    Claim("101 layers are better than 50 (the competition report found they are not)", "model.name", _depth),
    Claim("Squeeze-and-excitation makes validation accuracy converge faster", "model.name", _squeeze, "speed"),
    Claim("A learning rate of 1e-4 is better than 1e-3", "optim.lr", _between(1e-3, 1e-4, high_wins=True)),
    Claim("A linear head is better than the competition's two layers", "model.head", _toward("linear")),
    Claim("A lower learning rate for the backbone than for the head is better", "optim.backbone_lr_scale",
          lambda a, b: b < a),
    Claim("The weights' own evaluation transform is better than squashing", "eval.transform", _toward("pretrained")),
    Claim("A larger training image is better", "augment.size", lambda a, b: b > a if a and b else None),
    Claim("CutMix is better than MixUp", "mix.cutmix_share", _between(0.0, 1.0, high_wins=True)),
    Claim("TrivialAugment is better than none", "augment.policy", _between("none", "trivial", high_wins=True)),
    Claim("Label smoothing helps", "train.label_smoothing", _more),
    Claim("A running average of the weights helps", "train.ema_decay", _more),
    Claim("Probing the head first helps (LP-FT)", "probe.epochs",
          lambda a, b: None if bool(a) == bool(b) else bool(b)),
)  # fmt: skip

NOT_IN_RUNS = (
    ("Validation accuracy 0.9067 and leaderboard 0.93 with SE-ResNeXt-101",
     "needs the competition's photos, and weights that are not to be had without a model hub"),
    ("Mixing at probability 0.4 is best on the leaderboard", "needs the labels of the competition's test photos"),
)  # fmt: skip

LEVEL = 0.95
"""Coverage of the intervals."""

MARGIN = 3.0
"""Points of accuracy of which the page says in how many comparisons such a gain is excluded."""

NOTHING = "No two runs differ in this alone."

INTRODUCTION = """\
Each claim of the competition report and of those who beat it, with the verdict that our runs support. A claim is tested
only by variants that differ in nothing else. Accuracy: paired 95 % intervals, and p-values corrected for the number of
comparisons that test the claim. Histories: whether all runs of one variant lie beyond all of the other. "Partly"
means that some pairs of variants support the claim and others cannot be told apart. "May still gain" is the upper end
of the intervals: what the claim could be worth at most, by these runs. Small models and few epochs stand in for large
ones where the sweep's name ends in "quick": what holds for them need not hold for a ResNet-50."""


def find_findings(comparisons: Sequence[Comparison]) -> list[Finding]:
    """Test every claim by every pair of variants that differ in its key alone.

    Args:
        comparisons: One for each group of runs on the same photos.
    """
    findings = [_find(claim, comparisons) for claim in CLAIMS]
    return findings + [Finding(text, "not tested here", (f"It {why}.",)) for text, why in NOT_IN_RUNS]


def write_findings(
    paths: Sequence[str | Path], path: str | Path, *, command: str, only_tested: bool = False
) -> list[Finding]:
    """Write the findings of run folders as Markdown.

    Args:
        paths: Run folders, sweeps, or folders of them; each path is compared within itself.
        path: The Markdown file.
        command: What the reader types to make it again; it is shown.
        only_tested: Leave out the claims that these runs say nothing of.

    Raises:
        RunError: A path holds no finished run, or runs that cannot be compared.
        ResourceError: The file cannot be written.
    """
    if not paths:
        raise RunError("no runs to find anything in: give run folders, or folders of them")
    comparisons = [compare_runs([one], level=LEVEL) for one in paths]
    groups = [[run for variant in comparison.variants for run in variant.runs] for comparison in comparisons]
    findings = find_findings(comparisons)
    if only_tested:
        findings = [finding for finding in findings if finding.verdict != "not tested here"]
    try:
        Path(path).write_text(render_findings(findings, groups, command=command), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from None
    return findings


def render_findings(findings: Sequence[Finding], groups: Sequence[Sequence[RunResults]], *, command: str) -> str:
    """The page as Markdown."""
    rows = [(finding.claim, finding.verdict, describe_most(finding.at_most)) for finding in findings]
    evidence = [
        "\n".join([f"{finding.claim}: {finding.verdict}.\n", *(f"- {line}" for line in finding.evidence or (NOTHING,))])
        for finding in findings
    ]
    behind = [
        (group[0].path.resolve().parent.name, str(len(group)), str(len(group[0].photos)),
         ", ".join(sorted({str(run.model_info.get("create", {}).get("name", run.config.model.name)) for run in group})),
         ", ".join(digest_file(run.path / "predictions" / "val.parquet")[:8] for run in group))
        for group in groups
    ]  # fmt: skip
    heading = ("Sweep", "Runs", "Photos", "Models", "SHA-256 of each run's predictions")
    return (
        "\n\n".join(
            [
                "# Findings",
                INTRODUCTION,
                f"Made by `{command}`.",
                markdown_table(Table(("Claim", "Verdict", "May still gain, in points"), tuple(rows), frozenset())),
                "## Evidence",
                *evidence,
                "## Runs behind it",
                markdown_table(Table(heading, tuple(behind), frozenset({1, 2}))),
            ]
        )
        + "\n"
    )


def describe_most(at_most: Sequence[float]) -> str:
    """What a claim about accuracy could be worth at most, by its comparisons; "" where there is none."""
    if not at_most:
        return ""
    if max(at_most) <= 0:
        return "nothing"
    excluded = sum(bound < MARGIN for bound in at_most)
    if len(at_most) == 1:
        return f"{at_most[0]:.1f}"
    spread = f"{max(at_most):.1f}" if min(at_most) <= 0 else f"{min(at_most):.1f} to {max(at_most):.1f}"
    return f"{spread}; {MARGIN:g} are excluded in {excluded} of {len(at_most)} comparisons"


def _find(claim: Claim, comparisons: Sequence[Comparison]) -> Finding:
    asked_pairs = [
        (comparison, pair, favors_second)
        for comparison in comparisons
        for pair in comparison.pairs
        if (favors_second := _favors_second(claim, *_variants_of(comparison, pair))) is not None
    ]
    # One claim is one question: what else a sweep compares does not make its answer less sure.
    pairs = decide_together(
        [(pair.first, pair.second, pair.difference) for _, pair, _ in asked_pairs], metric="top1", level=LEVEL
    )
    tested = [
        found
        for (comparison, asked, favors_second), pair in zip(asked_pairs, pairs, strict=True)
        if (found := _score_pair(claim, _variants_of(comparison, asked), pair, favors_second=favors_second))
    ]
    verdict = _together({verdict for verdict, _ in tested})
    at_most = [
        100 * (pair.difference.interval.high if favors_second else -pair.difference.interval.low)
        for _, pair, favors_second in asked_pairs
        if claim.measure == "accuracy"
    ]
    return Finding(claim.text, verdict, tuple(evidence for _, evidence in tested), tuple(at_most))


def _together(verdicts: set[Verdict]) -> Verdict:
    """One verdict of several pairs': "best" must hold against each."""
    if not verdicts:
        return "not tested here"
    if len(verdicts) == 1:
        return next(iter(verdicts))
    if {"supported", "contradicted"} <= verdicts:
        return "inconsistent"
    return "partly supported" if "supported" in verdicts else "contradicted"


def _variants_of(comparison: Comparison, pair: Pair) -> tuple[Variant, Variant]:
    by_name = {variant.name: variant for variant in comparison.variants}
    return by_name[pair.first], by_name[pair.second]


def _favors_second(claim: Claim, first: Variant, second: Variant) -> bool | None:
    """Whether the claim has the second variant ahead; None if it says nothing of the two."""
    if [key for key in first.changes if first.changes[key] != second.changes[key]] != [claim.key]:
        return None
    return claim.favors(first.changes[claim.key], second.changes[claim.key])


def _score_pair(
    claim: Claim, variants: tuple[Variant, Variant], pair: Pair, *, favors_second: bool
) -> tuple[Verdict, str] | None:
    first, second = variants
    if claim.measure == "accuracy":
        if not pair.is_distinguishable:
            return "not distinguishable", pair.verdict
        agrees = (pair.difference.interval.estimate > 0) == favors_second
        return "supported" if agrees else "contradicted", pair.verdict
    return _score_histories(claim, first, second, favors_second=favors_second)


def _score_histories(
    claim: Claim, first: Variant, second: Variant, *, favors_second: bool
) -> tuple[Verdict, str] | None:
    values = [[value for run in variant.runs if (value := _history(run, claim.measure)) is not None]
              for variant in (first, second)]  # fmt: skip
    if not all(values):
        return None
    low, high = values if favors_second else values[::-1]
    unit = "epochs to reach it" if claim.measure == "speed" else claim.measure.replace("_", " ")
    if claim.measure == "speed":
        # Fewer epochs are faster: the favored variant's numbers are to be the smaller ones.
        low, high = high, low
    shown = [f"{variant.name}: {', '.join(f'{value:.3g}' for value in found)}"
             for variant, found in zip((first, second), values, strict=True)]  # fmt: skip
    evidence = f"{unit} at the end: {'; '.join(shown)}." if claim.measure != "speed" else f"{unit}: {'; '.join(shown)}."
    if min(map(len, values)) < 2:
        return "not distinguishable", evidence + " One run each is too few to tell it from chance."
    if max(low) < min(high):
        return "supported", evidence
    return ("contradicted" if max(high) < min(low) else "not distinguishable"), evidence


def _history(run: RunResults, measure: str) -> float | None:
    rows: list[Mapping[str, Any]] = [row for row in run.metrics if not row.get("is_probe")]
    if measure == "speed":
        return epochs_to_reach(rows, share=0.9)
    value = rows[-1].get(measure) if rows else None
    return float(value) if value is not None else None


def epochs_to_reach(rows: Sequence[Mapping[str, Any]], *, share: float) -> float | None:
    """Epochs until validation accuracy first is at `share` of its own maximum, interpolated; None without a history."""
    values = [float(row["val"]["top1"]) for row in rows if row.get("val")]
    if len(values) < 3 or max(values) <= 0:
        return None
    goal = share * max(values)
    place = int(np.argmax(np.array(values) >= goal))
    if place == 0:
        return 1.0
    before, after = values[place - 1], values[place]
    return place + (goal - before) / (after - before)


def main() -> None:
    """Write the page from the folders named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.findings", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Run folders, sweeps, or folders of them.")
    parser.add_argument("--out", type=Path, default=Path("findings.md"), help="Markdown to write.")
    parser.add_argument("--only-tested", action="store_true", help="Leave out claims that these runs do not test.")
    arguments = parser.parse_args()
    command = " ".join(["python -m experiments.findings", *map(str, arguments.runs), "--out", str(arguments.out)])
    command += " --only-tested" * arguments.only_tested
    try:
        findings = write_findings(arguments.runs, arguments.out, command=command, only_tested=arguments.only_tested)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    for finding in findings:
        print(f"{finding.verdict}: {finding.claim}")
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
