"""Time to accuracy: how long ours takes to name as many test photos rightly as timm's own script after ten epochs.

    python -m benchmarks.reach --timm-script PATH/TO/timm/train.py [--quick] [--json FILE]

Both start from the weights of EfficientNet-Lite0, on birds100; time is that of all commands from the start to a
prediction file. timm's script has its best flags and decays its rate over these ten epochs. Ours is `fieldmark train
--minutes` with Lite0 alone and `fieldmark predict`; of the budgets tried it is the first that reaches the accuracy.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.budget import FailedError, Measuring, list_contenders
from benchmarks.labeled import QUICK_CLASSES, DataError, DataSet, open_data, score
from benchmarks.record import PHOTOS, Findings, Ratio, load_average, make_parser, report

PEER, OURS = "timm train.py, ten epochs", "ours, Lite0 alone"
EPOCHS, SIZE = 10, 160
BUDGETS = (1.0, 2.0, 3.0, 5.0, 10.0)


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


def measure(measuring: Measuring, data: DataSet, *, epochs: int) -> Findings:
    """timm's script first, then budgets of ours until one is as accurate."""
    findings = Findings(notes=[data.note])
    task = list_contenders()["timm train.py @224"]
    assert task is not None
    peer = replace(task, size=SIZE, epochs=epochs)

    def run_ours(minutes: float) -> tuple[float, Path]:
        parts, place, _ = measuring.run_ours(data, minutes, 0, is_alone=True)
        return sum(parts), place

    *times, wanted = timed(lambda: measuring.run_peer(peer, data), data)
    _note(findings, PEER, *times, wanted)
    for minutes in BUDGETS:
        *times, reached = timed(partial(run_ours, minutes), data)
        if reached >= wanted:
            _note(findings, OURS, *times, reached)
            findings.notes.append(f"ours has a budget of {minutes:g} minutes, the first of {BUDGETS} that reaches it")
            findings.ratios["time to accuracy, timm's script / ours"] = Ratio(PEER, OURS, 6)
            findings.ratios["time to accuracy, timm's script / ours, by processor time"] = Ratio(
                f"{PEER}, by processor time", f"{OURS}, by processor time", 6
            )
            return findings
        findings.notes.append(f"ours within {minutes:g} minutes named {reached:.3f} rightly: not enough")
    return findings


def _note(findings: Findings, name: str, seconds: float, spent: float, accuracy: float) -> None:
    findings.add(name, seconds, "seconds of the clock")
    findings.add(f"{name}, by processor time", spent, "seconds of processor time")
    findings.add(f"{name}: accuracy", accuracy, "share of test photos")


def main() -> None:
    """Measure and report."""
    from fieldmark.runs.environment import usable_cores

    parser = make_parser(__doc__ or "")
    parser.add_argument("--timm-script", required=True, metavar="FILE", help="train.py of pytorch-image-models")
    arguments = parser.parse_args()
    if not Path(arguments.timm_script).is_file():
        parser.error(f"--timm-script {arguments.timm_script}: no such file")
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as temporary:
        folder, script = Path(temporary), str(Path(arguments.timm_script).resolve())
        try:
            data = open_data("birds100", PHOTOS.parent, folder / "birds100", classes=QUICK_CLASSES * arguments.quick)
            measuring = Measuring(folder, {data.name: data}, timm_script=script, device="cpu", cores=usable_cores())
            findings = measure(measuring, data, epochs=2 if arguments.quick else EPOCHS)
        except (DataError, FailedError) as error:
            parser.exit(2, f"{error}\n")
    report("reach", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
