"""Time to accuracy: how long ours takes to name as many test photos rightly as timm's own script after some epochs.

    python -m benchmarks.reach --timm-script PATH/TO/timm/train.py [--quick] [--json FILE]

Both start from the same weights, on birds100: EfficientNet-Lite0's, and a ResNet-50's where they are at hand. Time is
that of all commands from the start to a prediction file. timm's script has its best flags and decays its rate over
these epochs. Ours is `fieldmark train --minutes` with this network alone and `fieldmark predict`; of the budgets tried
it is the first that reaches the accuracy.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.budget import ALONE, FailedError, Measuring, list_contenders
from benchmarks.inference import WEIGHTS
from benchmarks.labeled import QUICK_CLASSES, DataError, DataSet, open_data, score
from benchmarks.record import PHOTOS, Findings, Ratio, add_timm_script, load_average, make_parser, report
from benchmarks.rivals import Task

BUDGETS = (1.0, 2.0, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Case:
    """A network that both train: what timm's script does with it, our settings for it, and the ratio that is wanted."""

    name: str
    peer: Task
    settings: tuple[str, ...]
    target: float


def list_cases(*, is_quick: bool) -> list[Case]:
    """What is compared; the quick plan is two epochs of Lite0."""
    task = list_contenders()["timm train.py @224"]
    assert task is not None
    cases = [Case("Lite0 @160", replace(task, size=160, epochs=2 if is_quick else 10), ALONE, 6)]
    if WEIGHTS.is_file() and not is_quick:
        peer = replace(task, model="resnet50", weights=str(WEIGHTS), stride_in_1x1=True, epochs=3)
        settings = ("model.name=resnet50", f"model.weights={WEIGHTS}", "model.stride_in_1x1=true")
        cases.append(Case("ResNet-50 @224", peer, settings, 2))
    return cases


def timed(work: Callable[[], tuple[float, Path]], data: DataSet) -> tuple[float, float, float]:
    """Run a contender, which gives its seconds and its folder.

    Returns:
        Seconds by the clock and of processor time, and the share of test photos that it names rightly.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, place = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, spent, score(data, place / "prediction.csv") / len(data.truth)


def measure(measuring: Measuring, data: DataSet, cases: Sequence[Case]) -> Findings:
    """For each network timm's script first, then budgets of ours until one is as accurate."""
    findings = Findings(notes=[data.note])
    for case in cases:
        _compare(findings, measuring, data, case)
    return findings


def _compare(findings: Findings, measuring: Measuring, data: DataSet, case: Case) -> None:
    def run_ours(minutes: float) -> tuple[float, Path]:
        parts, place, _ = measuring.run_ours(data, minutes, 0, settings=case.settings)
        return sum(parts), place

    peer, ours = f"{case.name}: timm train.py, {case.peer.epochs} epochs", f"{case.name}: ours"
    *times, wanted = timed(lambda: measuring.run_peer(case.peer, data), data)
    _note(findings, peer, *times, wanted)
    for minutes in BUDGETS:
        *times, reached = timed(partial(run_ours, minutes), data)
        if reached >= wanted:
            _note(findings, ours, *times, reached)
            findings.notes.append(f"{ours} has a budget of {minutes:g} minutes, the first of {BUDGETS} that reaches it")
            ratio = f"{case.name}: time to accuracy, timm's script / ours"
            findings.ratios[ratio] = Ratio(peer, ours, case.target)
            ends = (f"{peer}, by processor time", f"{ours}, by processor time")
            findings.ratios[f"{ratio}, by processor time"] = Ratio(*ends, case.target)
            return
        findings.notes.append(f"{ours} within {minutes:g} minutes named {reached:.3f} rightly: not enough")


def _note(findings: Findings, name: str, seconds: float, spent: float, accuracy: float) -> None:
    findings.add(name, seconds, "seconds of the clock")
    findings.add(f"{name}, by processor time", spent, "seconds of processor time")
    findings.add(f"{name}: accuracy", accuracy, "share of test photos")


def main() -> None:
    """Measure and report."""
    from fieldmark.runs.environment import usable_cores

    parser = make_parser(__doc__ or "")
    add_timm_script(parser, is_required=True)
    arguments = parser.parse_args()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as temporary:
        folder, script = Path(temporary), str(Path(arguments.timm_script).resolve())
        try:
            data = open_data("birds100", PHOTOS.parent, folder / "birds100", classes=QUICK_CLASSES * arguments.quick)
            measuring = Measuring(folder, {data.name: data}, timm_script=script, device="cpu", cores=usable_cores())
            findings = measure(measuring, data, list_cases(is_quick=arguments.quick))
        except (DataError, FailedError) as error:
            parser.exit(2, f"{error}\n")
    report("reach", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
