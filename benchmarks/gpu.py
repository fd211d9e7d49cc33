"""A training epoch on a GPU, end to end: ours, its ceiling, and timm's script.

    python -m benchmarks.gpu [--quick] [--json FILE] [--timm-script PATH/TO/timm/train.py]

As `benchmarks.train`, with the device changed: random weights, birds100, the competition's augmentation list, AdamW, no
mixing. All contenders wait on the GPU together, and one trains at a time. Without a GPU it says so and ends.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.contest import Setup
from benchmarks.photos import birds_subset
from benchmarks.record import Findings, Ratio, add_timm_script, load_average, make_parser, report
from benchmarks.train import add_notes, contenders, epochs

NO_GPU = "this machine has no CUDA GPU: nothing was measured"
TARGETS = {"ours, model only": 0.97, "timm script, best flags": 1.0}
SIZE = 224


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    cases: tuple[tuple[str, int], ...]
    """Alias of a backbone, photos of an update."""
    train_photos: int
    rounds: int
    limit_seconds: float


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan: one backbone; the whole one: small and large, and two sizes of an update."""
    if is_quick:
        return Plan((("resnet50", 32),), 1344, rounds=3, limit_seconds=60)
    return Plan((("resnet50", 32), ("resnet50", 64), ("resnext50", 32), ("seresnext101", 32)), 2699, 5, 100)


def list_setups(case: tuple[str, int], data: Path, *, timm_script: str, cores: int) -> dict[str, Setup]:
    """Who trains a case; in the first, also timm's script at its defaults and ours without determinism."""
    from fieldmark.models.catalog import ALIASES

    alias, photos = case
    everybody = contenders(ALIASES[alias], SIZE, data, cores=cores, timm_script=timm_script, device="cuda")
    chosen = {who: setup for who, setup in everybody.items() if setup.kind in ("ours", "ours-model", "timm")}
    chosen["ours, model only, passes not recorded"] = replace(everybody["ours, model only"], more="train.compile=off")
    if case == ("resnet50", 32):
        chosen["ours, not deterministic"] = replace(everybody["ours"], more="train.deterministic=false")
    else:
        chosen.pop("timm script, defaults", None)
    title = f"{alias}, {photos} photos"
    return {f"{title}: {who}": replace(setup, batch_size=photos) for who, setup in chosen.items()}


def measure(plan: Plan, folder: Path, *, timm_script: str, cores: int) -> Findings:
    """All cases in each round."""
    findings = Findings()
    data = folder / "data"
    findings.notes.append(birds_subset(data, train=plan.train_photos, val=4))
    setups: dict[str, Setup] = {}
    for case in plan.cases:
        setups |= list_setups(case, data, timm_script=timm_script, cores=cores)
    title = f"@{SIZE}"
    epochs(findings, title, setups, folder / "runs", plan.rounds, plan.limit_seconds)
    add_notes(findings, "cuda", timm_script=timm_script)
    for name in setups:
        case, _, peer = name.partition(": ")
        ours, theirs = f"{title}: {case}: ours", f"{title}: {name}"
        if peer != "ours" and {ours, theirs} <= findings.measured.keys():
            findings.ratios[f"{case}: ours / {peer}"] = Ratio(ours, theirs, TARGETS.get(peer))
    return findings


def main() -> None:
    """Measure and report, if there is a GPU."""
    parser = make_parser(__doc__ or "")
    add_timm_script(parser)
    arguments = parser.parse_args()
    import torch

    from fieldmark.runs.environment import usable_cores

    if not torch.cuda.is_available():
        print(NO_GPU)
        return
    before, plan, cores = load_average(), make_plan(is_quick=arguments.quick), usable_cores()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as folder:
        findings = measure(plan, Path(folder), timm_script=arguments.timm_script, cores=cores)
    report("gpu", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
