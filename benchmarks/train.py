"""A training epoch end to end: ours beside timm's own script, a plain torchvision loop and fastai.

    python -m benchmarks.train [--quick] [--json FILE] [--timm-script PATH/TO/timm/train.py]

All train the same models from random weights on birds100, with the competition's augmentation list, batches of 32,
AdamW and no mixing; the time is that of the training part of an epoch after the first. Peers run as they come, and a
second time with channels_last, bf16 where the processor computes in it, and as many loader processes as serve this
machine best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.contest import Contender, ContenderError, Pace, Setup, start_all
from benchmarks.photos import birds_subset
from benchmarks.record import Findings, Ratio, add_timm_script, interleave, load_average, make_parser, report

CLOCK, PROCESSOR = "photos per second of the clock", "photos per second of processor time"


TARGETS = {"timm script, defaults": 2.3, "ours, model only": 0.97}
MORE_TARGETS = {
    "tf_efficientnet_lite0": {"timm script, defaults": 3.5, "timm script, best flags": 2.5},
    "resnet18": {"timm script, best flags": 1.15},
    "resnet50": {"timm script, best flags": 1.25},
}
"""What a ratio must be for each model, beside `TARGETS`."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    models: tuple[tuple[str, int, int], ...]
    """timm's name, side in pixels, photos of an epoch."""
    crowded: frozenset[str]
    """Models of which eight trainings at once do not fit into 24 GB: ours and timm's script alone train them."""
    rounds: int
    limit_seconds: float
    step_batch: int
    step_rounds: int


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores: one model at 96 pixels, on few photos."""
    if is_quick:
        return Plan(
            (("tf_efficientnet_lite0", 96, 192),), frozenset(), rounds=3, limit_seconds=60, step_batch=4, step_rounds=3
        )
    models = (("tf_efficientnet_lite0", 160, 1344), ("resnet18", 224, 640), ("resnet50", 224, 224))
    return Plan(models, frozenset({"resnet50"}), rounds=3, limit_seconds=3600, step_batch=16, step_rounds=5)


def contenders(model: str, size: int, data: Path, *, cores: int, timm_script: str, device: str) -> dict[str, Setup]:
    """Everybody, in both columns. Peers at their defaults take the loader processes that they take by themselves."""
    base = Setup("ours", str(data), model, size, batch_size=32, device=device, timm_script=timm_script)
    tuned_workers = max(cores - 1, 1)
    everybody = {
        "ours": base,
        "ours, model only": replace(base, kind="ours-model"),
        "torchvision loop, defaults": replace(base, kind="torchvision", workers=cores),
        "torchvision loop, best flags": replace(base, kind="torchvision", workers=tuned_workers, is_tuned=True),
        "fastai, defaults": replace(base, kind="fastai", workers=min(cores, 16)),
        "fastai, best flags": replace(base, kind="fastai", workers=tuned_workers, is_tuned=True),
    }
    if timm_script:
        everybody["timm script, defaults"] = replace(base, kind="timm")
        everybody["timm script, best flags"] = replace(base, kind="timm", workers=tuned_workers, is_tuned=True)
    return everybody


def measure(plan: Plan, folder: Path, *, timm_script: str, device: str, cores: int) -> Findings:
    """Every model in turn, then the step of ResNet-50."""
    findings = Findings()
    data = folder  # of the last model, for the update alone
    for model, size, photos in plan.models:
        data = folder / f"{model}-photos"
        findings.notes.append(f"{model}: {birds_subset(data, train=photos, val=4)}")
        setups = contenders(model, size, data, cores=cores, timm_script=timm_script, device=device)
        if model in plan.crowded:
            setups = {name: setup for name, setup in setups.items() if setup.kind.split("-")[0] in ("ours", "timm")}
            findings.notes.append(f"{model}: not by the torchvision loop and fastai, as all together take 30 GB")
        epochs(findings, f"{model} @{size}", setups, folder / model, plan.rounds, plan.limit_seconds)
        _add_ratios(findings, f"{model} @{size}")
    if plan.step_batch:
        _step(findings, plan, folder, data, device)
    add_notes(findings, device, timm_script=timm_script)
    return findings


def epochs(
    findings: Findings, title: str, setups: dict[str, Setup], folder: Path, rounds: int, limit_seconds: float
) -> None:
    """Interleaved epochs of contenders, by the clock and by processor time; those that die are noted and left out."""
    running, failed = start_all(setups, folder)
    findings.notes += [f"{title}: {name} could not run: {why}" for name, why in failed.items()]
    paces: dict[str, list[Pace]] = {name: [] for name in running}
    try:
        cases = {f"{title}: {name}": _timed(contender, paces[name]) for name, contender in running.items()}
        findings.add_rounds(title, interleave(cases, rounds=rounds, limit_seconds=limit_seconds), CLOCK)
    except ContenderError as error:
        findings.notes.append(f"{title}: a contender died between two epochs: {error}")
        return
    finally:
        for contender in running.values():
            contender.close()
    for name, seen in paces.items():
        middle = sorted(pace.by_processor for pace in seen)[len(seen) // 2]
        findings.add(f"{title}: {name}, by processor time", middle, PROCESSOR)
        if seen[-1].gigabytes:
            findings.add(f"{title}: {name}, memory", seen[-1].gigabytes, "GiB of the GPU")


def _timed(contender: Contender, paces: list[Pace]) -> Callable[[], float]:
    def epoch() -> float:
        paces.append(contender.epoch())
        return paces[-1].by_clock

    return epoch


def _add_ratios(findings: Findings, title: str) -> None:
    targets = TARGETS | MORE_TARGETS.get(title.split()[0], {})
    for end in ("", ", by processor time"):
        ours = f"{title}: ours{end}"
        if ours not in findings.measured:
            continue
        for name in list(findings.measured):
            if not name.startswith(f"{title}: ") or name == ours or name.endswith("processor time") != bool(end):
                continue
            peer = name.removeprefix(f"{title}: ").removesuffix(end)
            target = targets.get(peer) if not end else None
            label = "share of the model-only ceiling" if peer == "ours, model only" else f"ours / {peer}"
            findings.ratios[f"{title}: {label}{end}"] = Ratio(ours, name, target)


def _step(findings: Findings, plan: Plan, folder: Path, data: Path, device: str) -> None:
    """The update alone, on a batch in memory: ours, and torch as it comes in 32 bit."""
    title = "resnet50 @224, update alone"
    base = Setup("ours-model", str(data), "resnet50", 224, plan.step_batch, device=device, steps=1)
    setups = {"ours": base, "fp32 as it comes": replace(base, kind="torchvision-model")}
    epochs(findings, title, setups, folder / "step", plan.step_rounds, plan.limit_seconds)
    ours, default = f"{title}: ours", f"{title}: fp32 as it comes"
    if ours in findings.measured and default in findings.measured:
        findings.ratios[f"{title}: ours / fp32 as it comes"] = Ratio(ours, default, 2.3)


def add_notes(findings: Findings, device: str, *, timm_script: str) -> None:
    """Say what a reader must know of the machine and of timm's script."""
    from benchmarks.contender import has_bf16

    if not has_bf16(device):
        findings.notes.append(
            f"this {device} has no fast bf16, so ours trains in 32 bit, and 'best flags' are channels_last and loader "
            "processes; the targets for the update and against timm's defaults were set on a processor with bf16"
        )
    if not timm_script:
        findings.notes.append("timm's script was not measured: give its path with --timm-script")
        return
    findings.notes.append(
        "timm's flags have neither an affine stage nor a hue: the benchmark adds both to its transforms, so that all "
        "prepare the same; its augmentation list is otherwise its own"
    )


def main() -> None:
    """Measure and report."""
    from fieldmark.runs.environment import usable_cores

    parser = make_parser(__doc__ or "")
    add_timm_script(parser)
    arguments = parser.parse_args()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as folder:
        try:
            findings = measure(
                make_plan(is_quick=arguments.quick),
                Path(folder),
                timm_script=arguments.timm_script,
                device="cpu",
                cores=usable_cores(),
            )
        except FileNotFoundError as error:
            parser.exit(2, f"{error}\n")
    report("train", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=before)


if __name__ == "__main__":
    main()
