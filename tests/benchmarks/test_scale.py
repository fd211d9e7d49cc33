"""The cost of many photos, from the records alone."""

from __future__ import annotations

import pytest

from benchmarks import scale

CLOCK, PROCESSOR = "photos per second of the clock", "photos per second of processor time"


def record(unit, **more):
    measured = more.pop("measured")
    machine = {"cores": 4, "processor": "a processor", "gpus": more.pop("gpus", [])}
    return {"measured": measured, "units": dict.fromkeys(measured, unit), "hardware": machine, "command": "it", **more}


PIPELINE = record(PROCESSOR, measured={"small: scaled decode": 500.0, "small: ours, no cache": 250.0})
INFERENCE = record(CLOCK, measured={"OpenVINO int8": 2000.0}, is_quick=True)
GPU = record(CLOCK, measured={"resnet50: ours": 3600.0, "resnet50: ours, model only": 4000.0}, gpus=["a GPU"])
STORAGE = {"measured": {"500×375 JPEG": 112_000.0}}
LISTS = record(PROCESSOR, measured={"1,000 rows: index": 0.1})
ALL = {"pipeline": PIPELINE, "inference": INFERENCE, "gpu": GPU, "storage": STORAGE, "lists": LISTS}


def test_speeds_by_the_clock_are_shared_by_the_cores_and_those_of_the_processor_are_not():
    assert scale.per_core(ALL, scale.READ[0]) == 500
    step = next(step for step in scale.COMPUTE if step.entry == "OpenVINO int8")
    assert scale.per_core(ALL, step) == 500
    assert scale.hours(500, 1_800_000) == 1


def test_the_tables_tell_core_hours_gpu_hours_and_bytes():
    text = scale.tables(ALL)
    assert "| read, 500×375 JPEG | 500.0 | 0.56 | 56 |" in text
    assert "| ResNet-50 at 224, OpenVINO int8 | 250.0 | 111 | 4.6 | 50% |" in text  # read and computed
    assert "| resnet50 | 3,600.0 | 0.077 | 7.7 |" in text
    assert "| 500×375 JPEG | 112 KB | 112 GB | 11.2 TB |" in text
    assert "inference.json (quick plan): 4 cores of a processor, by `it`" in text
    assert "gpu.json: 4 cores of a processor, a GPU, by `it`" in text
    assert "- Not in inference.json: OpenVINO\n" in text
    assert "Not measured yet" not in text


@pytest.mark.parametrize("name", scale.SOURCES)
def test_a_record_that_is_missing_is_named_with_the_command_that_makes_it(name):
    text = scale.tables({other: content for other, content in ALL.items() if other != name})
    command = "scale --weigh" if name == "storage" else f"{name} --json benchmarks/results/{name}.json"
    assert f"- Not measured yet: {name}.json (`python -m benchmarks.{command}`)" in text
    assert text.count("Not measured yet") == 1


def test_the_committed_page_is_what_the_committed_records_make():
    page = scale.PAGE.read_text(encoding="utf-8")
    made = scale.tables(scale.load_records(scale.RESULTS))
    assert made in page, "run python -m benchmarks.scale"
    assert scale.with_tables(page, made) == page
