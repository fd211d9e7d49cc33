"""A training epoch on a GPU, end to end, for the competition's seven backbones: ours, its ceiling, and timm's script.

    python -m benchmarks.gpu [--quick] [--json FILE] [--timm-script PATH/TO/timm/train.py]

As `benchmarks.train`, with the device changed; without a GPU it says so and ends.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.photos import birds_subset
from benchmarks.record import Findings, Ratio, load_average, make_parser, report
from benchmarks.train import contenders, epochs

NO_GPU = "this machine has no CUDA GPU: nothing was measured"
ESTIMATES = {
    "resnet50": "3.5-3.9k",
    "resnext50": "3.0-3.2k",
    "resnet101": "2.2-2.4k",
    "resnext101": "1.8-1.9k",
}
"""Photos per second of the model alone that were expected of one H100, before any was measured."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    backbones: tuple[str, ...]
    size: int
    train_photos: int
    rounds: int
    limit_seconds: float


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan: two backbones; the whole one: all seven of the competition's."""
    from fieldmark.models.catalog import ALIASES

    if is_quick:
        return Plan(("resnet50", "seresnext50"), 224, 2048, rounds=2, limit_seconds=60)
    return Plan(tuple(ALIASES), 224, 2699, rounds=5, limit_seconds=300)


def measure(plan: Plan, folder: Path, *, timm_script: str, device: str, cores: int) -> Findings:
    """Every backbone in turn; the peers beside ResNet-50 alone."""
    from fieldmark.models.catalog import ALIASES

    findings = Findings()
    data = folder / "data"
    findings.notes.append(birds_subset(data, train=plan.train_photos, val=4))
    findings.notes += [
        f"expected of an H100 with {name}: {range_} photos per second" for name, range_ in ESTIMATES.items()
    ]
    for name in plan.backbones:
        timm_name = ALIASES[name]
        everybody = contenders(timm_name, plan.size, data, cores=cores, timm_script=timm_script, device=device)
        setups = {who: setup for who, setup in everybody.items() if name == "resnet50" or who.startswith("ours")}
        epochs(findings, name, setups, folder / name, plan.rounds, plan.limit_seconds)
        targets = {"ours, model only": 0.97, "timm script, defaults": 1.7}
        for peer in setups:
            case = f"{name}: {peer}"
            if peer == "ours" or case not in findings.measured or f"{name}: ours" not in findings.measured:
                continue
            findings.ratios[f"{name}: ours / {peer}"] = Ratio(f"{name}: ours", case, targets.get(peer))
    return findings


def main() -> None:
    """Measure and report, if there is a GPU."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--timm-script", default="", metavar="FILE", help="train.py of pytorch-image-models")
    arguments = parser.parse_args()
    import torch

    from fieldmark.runs.environment import usable_cores

    if not torch.cuda.is_available():
        print(NO_GPU)
        return
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as folder:
        findings = measure(
            make_plan(is_quick=arguments.quick),
            Path(folder),
            timm_script=arguments.timm_script,
            device="cuda",
            cores=usable_cores(),
        )
    report("gpu", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
