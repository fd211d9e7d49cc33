"""What each benchmark would do, without doing it."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
from benchmarks.contender import timm_flags
from benchmarks.contest import Setup
from benchmarks.record import Findings

from benchmarks import gpu, lists, memory, pipeline, reach, rivals, shards, startup, train

PLANS = {
    "pipeline": lambda is_quick: pipeline.make_plan(is_quick=is_quick, cores=16),
    "train": lambda is_quick: train.make_plan(is_quick=is_quick),
    "memory": lambda is_quick: memory.make_plan(is_quick=is_quick),
    "shards": lambda is_quick: shards.make_plan(is_quick=is_quick),
    "lists": lambda is_quick: lists.make_plan(is_quick=is_quick),
    "startup": lambda is_quick: startup.make_plan(is_quick=is_quick),
    "gpu": lambda is_quick: gpu.make_plan(is_quick=is_quick),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_quick_plan_is_smaller_and_its_rounds_end_in_time(name):
    quick, whole = (PLANS[name](is_quick) for is_quick in (True, False))
    for field in dataclasses.fields(quick):
        small, large = getattr(quick, field.name), getattr(whole, field.name)
        assert (len(small) <= len(large)) if isinstance(small, tuple) else small <= large, field.name
    assert quick.limit_seconds <= 90 < whole.limit_seconds


@pytest.mark.parametrize("name", [*PLANS, "inference", "serving", "tables", "budget", "reach"])
def test_help_says_what_it_measures(name, capsys, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    shown = capsys.readouterr().out
    assert (module.__doc__ or "?").splitlines()[0] in shown
    assert "--quick" in shown or name == "tables"


def test_more_workers_than_cores_are_never_measured():
    assert pipeline.make_plan(is_quick=True, cores=1).max_workers == 1
    assert pipeline.make_plan(is_quick=False, cores=4).max_workers == 4


def test_time_to_accuracy_is_that_of_one_network_with_the_same_weights_on_both_sides(tmp_path):
    (tmp_path / "train").mkdir()
    (quick,) = reach.list_cases(is_quick=True)
    assert (quick.peer.model, quick.peer.epochs) == ("tf_efficientnet_lite0", 2)
    for case in reach.list_cases(is_quick=False):
        assert f"model.name={case.peer.model}" in case.settings
        flags = rivals.timm_flags(dataclasses.replace(case.peer, folder=str(tmp_path)))
        assert flags[flags.index("--model") + 1] == case.peer.model
        weights = case.peer.weights or "package:efficientnet-lite0"  # which a peer without a file of its own takes
        assert f"model.weights={weights}" in case.settings
        assert ("model.stride_in_1x1=true" in case.settings) == case.peer.stride_in_1x1


def test_peers_run_as_they_come_and_with_their_best_flags(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    everybody = train.contenders("resnet18", 96, tmp_path, cores=2, timm_script="train.py", device="cpu")
    assert {name.partition(",")[0] for name in everybody} == {"ours", "torchvision loop", "fastai", "timm script"}
    assert {setup.is_tuned for name, setup in everybody.items() if name.endswith("best flags")} == {True}
    assert {setup.is_tuned for name, setup in everybody.items() if name.endswith("defaults")} == {False}
    plain = timm_flags(everybody["timm script, defaults"], tmp_path)
    assert "--channels-last" not in plain
    assert "--workers" not in plain
    tuned = timm_flags(everybody["timm script, best flags"], tmp_path)
    assert tuned[-3:] == ["--channels-last", "--workers", "1"] or "bfloat16" in tuned


def test_without_its_script_timm_is_left_out(tmp_path):
    everybody = train.contenders("resnet18", 96, tmp_path, cores=2, timm_script="", device="cpu")
    assert not [name for name in everybody if "timm" in name]


def test_a_script_that_is_not_there_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train", "--timm-script", str(tmp_path / "train.py")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "train.py: no such file" in capsys.readouterr().err


def test_ours_is_divided_by_each_peer_and_by_its_ceiling_alike_in_kind():
    findings = Findings()
    for name, value in (("ours", 8.0), ("ours, model only", 10.0), ("timm script, defaults", 4.0)):
        findings.add(f"m: {name}", value, train.CLOCK)
        findings.add(f"m: {name}, by processor time", value / 2, train.PROCESSOR)
    train._add_ratios(findings, "m")
    units = findings.units
    assert all(units[ratio.numerator] == units[ratio.denominator] for ratio in findings.ratios.values())
    assert {case: ratio.target for case, ratio in findings.ratios.items() if ratio.target} == {
        "m: share of the model-only ceiling": 0.97,
        "m: ours / timm script, defaults": 2.3,
    }
    assert len(findings.ratios) == 4


def test_without_a_gpu_the_gpu_benchmark_says_so_and_writes_nothing(capsys, monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    assert capsys.readouterr().out.strip() == gpu.NO_GPU
    assert not list(tmp_path.iterdir())


def test_the_first_update_ends_the_process_and_an_inspected_photo_does_not(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(startup.os, "_exit", ended.append)
    progress = startup.FirstUpdate()
    progress.start(200, 0)
    progress.advance(1)
    assert not ended
    progress.start(startup.ENDLESS * 6, 0)
    progress.advance(1)
    assert ended == [0]


def test_setup_travels_as_json():
    import json

    setup = Setup("ours", "data", "resnet18", 96, 32)
    assert Setup(**json.loads(json.dumps(dataclasses.asdict(setup)))) == setup
