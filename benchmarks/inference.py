"""ResNet-50 at 224 pixels on the CPU: eager torch beside fused, bf16, ONNX Runtime and OpenVINO, float and int8.

    python -m benchmarks.inference [--quick] [--json FILE]

Every case answers the same batch; the share of photos on which it gives eager float32's answer is measured beside the
time, so that no speed is bought silently. Photos and weights come from `shared` beside the repository where they are
there; else noise and random weights serve for the speed, and the result says so.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from benchmarks.record import (
    PHOTOS,
    Findings,
    Ratio,
    instruction_sets,
    interleave,
    load_average,
    parse_arguments,
    report,
)
from fieldmark.augment.reference import EvalSpec, eval_reference
from fieldmark.data.decode import DecodeSpec
from fieldmark.export.formats import quantize_onnx, quantize_openvino, write_onnx, write_openvino
from fieldmark.inference.exported import FILE, ExportedModel, ModelMetadata
from fieldmark.models.weights import fuse_batch_norm
from fieldmark.runs.environment import usable_cores

BATCH, SIZE = 16, 224
EAGER = "eager float32"
WEIGHTS = PHOTOS.parents[1] / "weights" / "resnet50_imagenet.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = {
    "transform": "weights",
    "size": SIZE,
    "crop_fraction": 0.875,
    "interpolation": "bilinear",
    "mean": MEAN,
    "std": STD,
}

Case = Callable[[], Any]


def load_model() -> tuple[torch.nn.Module, str]:
    """ResNet-50 as timm has it (v1.5), with ImageNet weights where they are."""
    model = timm.create_model("resnet50").eval()
    if not WEIGHTS.is_file():
        return model, "random weights: agreement of answers means nothing"
    from safetensors.torch import load_file

    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()}, strict=False)
    return model, "ImageNet weights"


def load_photos(count: int) -> tuple[np.ndarray, str]:
    """(N, 3, 224, 224) pictures, and what they are of."""
    files = sorted((PHOTOS / "val").rglob("*.jpg"))
    if not files:
        noise = np.random.default_rng(0).normal(0, 1, (count, 3, SIZE, SIZE)).astype(np.float32)
        return noise, "noise: agreement of answers means nothing"
    spec: Any = EvalSpec(**SPEC)
    chosen = [files[place] for place in np.linspace(0, len(files) - 1, count).round().astype(int)]
    pictures = [eval_reference(DecodeSpec((0, 0, 0), 10**8).read(file), spec).numpy() for file in chosen]
    return np.stack(pictures), f"{count} photos of birds100/val"


def metadata(kind: str, file: str, precision: str) -> str:
    """What `ExportedModel` asks for."""
    return ModelMetadata(
        kind=kind,
        precision=precision,
        file=file,
        architecture="resnet50",
        classes=tuple(map(str, range(1000))),
        preprocessing=EvalSpec(**SPEC),
        background=(0, 0, 0),
        temperature=1.0,
        threshold=0.0,
        parameters=0,
        license="",
        pretraining="",
        run="",
    ).to_json()


def exported_cases(model: torch.nn.Module, calibration: np.ndarray, threads: int, folder: Path) -> dict[str, Any]:
    """The runtimes, each with a model in a folder of its own."""
    onnx = folder / "model.onnx"
    write_onnx(model, onnx, size=SIZE, metadata="{}")
    makers: dict[str, tuple[str, Callable[[Path, str], None]]] = {
        "ONNX Runtime float32": ("onnx", lambda path, text: write_onnx(model, path, size=SIZE, metadata=text)),
        "ONNX Runtime int8": (
            "onnx", lambda path, text: quantize_onnx(onnx, path, calibration=calibration, metadata=text)
        ),
        "OpenVINO": ("openvino", lambda path, text: write_openvino(onnx, path, metadata=text)),
        "OpenVINO int8": (
            "openvino", lambda path, text: quantize_openvino(onnx, path, calibration=calibration, metadata=text)
        ),
    }  # fmt: skip
    cases: dict[str, Any] = {}
    for name, (kind, write) in makers.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        file = "model.onnx" if kind == "onnx" else "model.xml"
        text = metadata(kind, file, "float32")
        write(place / file, text)
        (place / FILE).write_text(text, encoding="utf-8")
        cases[name] = ExportedModel.load(place, threads=threads).logits
    return cases


def torch_cases(model: torch.nn.Module, has_bf16: bool) -> dict[str, Any]:
    """Eager torch in the forms that need no export."""
    last = fuse_batch_norm(model)[0].to(memory_format=torch.channels_last)

    def eager(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    def fused(images: np.ndarray, precision: Any = None) -> np.ndarray:
        inputs = torch.from_numpy(images).to(memory_format=torch.channels_last)
        mixed = torch.autocast("cpu", dtype=precision) if precision else contextlib.nullcontext()
        with torch.inference_mode(), mixed:
            return last(inputs).float().numpy()

    cases: dict[str, Any] = {EAGER: eager, "fused, channels last": fused}
    if has_bf16:
        cases["fused, channels last, bf16"] = lambda images: fused(images, torch.bfloat16)
    return cases


def measure(*, is_quick: bool, folder: Path) -> Findings:
    """Speeds, and on how many photos each case says what eager float32 says."""
    findings = Findings()
    found, cores = set(instruction_sets()), usable_cores()
    torch.set_num_threads(cores)
    has_bf16 = bool({"avx512_bf16", "amx_bf16"} & found)
    model, weights = load_model()
    photos, what = load_photos(32 if is_quick else 96)
    calibration, evaluated = photos[::2], photos[1::2]
    cases = torch_cases(model, has_bf16) | exported_cases(model, calibration, cores, folder)
    batch = np.ascontiguousarray(evaluated[:BATCH])

    def speed(case: Case) -> float:
        began = time.perf_counter()
        case(batch)
        return len(batch) / (time.perf_counter() - began)

    timers = {name: (lambda case=case: speed(case)) for name, case in cases.items()}
    rounds = interleave(timers, rounds=7 if is_quick else 21, limit_seconds=90 if is_quick else 600, warm_up=True)
    findings.add_rounds("inference", rounds, "photos per second of the clock")
    reference = cases[EAGER](evaluated).argmax(axis=1)
    for name, case in cases.items():
        findings.add(
            f"{name}: same answer", float((case(evaluated).argmax(axis=1) == reference).mean()), "share of photos"
        )
    floats = [name for name in cases if "int8" not in name and name != EAGER]
    int8 = [name for name in cases if "int8" in name]
    best = {"float": max(floats, key=rounds.medians.__getitem__), "int8": max(int8, key=rounds.medians.__getitem__)}
    findings.ratios = {
        "best without int8 / eager float32": Ratio(best["float"], EAGER, 3.5),
        "best int8 / eager float32": Ratio(best["int8"], EAGER, 6.0),
        **{
            f"{name} / eager float32": Ratio(name, EAGER)
            for name in cases
            if name not in best.values() and name != EAGER
        },
    }
    findings.notes = [
        f"ResNet-50 at {SIZE} pixels, batch {len(batch)}, {cores} threads; {weights}",
        f"pictures: {what}; every other one calibrates int8, the rest evaluate it",
        f"best without int8: {best['float']}; best int8: {best['int8']}",
    ]
    if not has_bf16:
        findings.notes.append("no bf16 instructions here: OpenVINO computes in float32, and torch's bf16 is left out")
    if not {"avx512_vnni", "avx_vnni", "amx_int8"} & found:
        findings.notes.append("no VNNI here: an int8 product takes three instructions where newer processors take one")
    return findings


def main() -> None:
    """Measure and report."""
    load_before = load_average()
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as scratch:
        findings = measure(is_quick=arguments.quick, folder=Path(scratch))
    report("inference", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=load_before)


if __name__ == "__main__":
    main()
