"""A torch model as ONNX, OpenVINO, torch or timm, in float or int8; the only module besides `exported` that knows them.

Letters: B batch, K classes, S side in pixels. A model is (B, 3, S, S) float32 -> (B, K) logits, in eval mode, on the
CPU. Text given as `metadata` is stored inside the file.
"""

import importlib
import io
import logging
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fieldmark.errors import ExportError, first_line, needs_extra
from fieldmark.inference.exported import FILE, KEY, ModelMetadata, import_openvino

INPUT, OUTPUT = "images", "logits"
OPSET = 18  # the oldest that torch's exporter writes without conversion; runtimes since 2023 read it


def write_onnx(model: nn.Module, path: Path, *, size: int, metadata: str) -> None:
    """Write `model` as one ONNX file with the weights inside; `size` is S."""
    with needs_extra("onnx", "export"):
        import onnx
    with needs_extra("onnxscript", "export"):
        importlib.import_module("onnxscript")  # torch needs it and would say so less clearly
    with _one_error("as ONNX"), _plain_attention(model):
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto: Any = program.model_proto  # made anew each time
    onnx.helper.set_model_props(proto, {KEY: metadata})
    onnx.save_model(proto, path)


def halve_onnx(source: Path, path: Path, *, metadata: str) -> None:
    """Write a copy of an ONNX file with weights in 16 bits, which runtimes widen once when they load it."""
    with needs_extra("onnx", "export"):
        import onnx
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 64 and np.abs(values).max() < np.finfo(np.float16).max:
            name, tensor.name = tensor.name, f"{tensor.name}.half"
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))
            widened = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, widened)
    onnx.helper.set_model_props(model, {KEY: metadata})
    onnx.save_model(model, path)


def quantize_onnx(source: Path, path: Path, *, calibration: NDArray[np.float32], metadata: str) -> None:
    """Write an int8 copy of an ONNX file: weights per channel, ranges of activations by (N, 3, S, S) normalized photos.

    Source:
        Jacob et al., arXiv:1712.05877; QDQ form of ONNX Runtime. Weights use 7 bits: without VNNI, products of
        uint8 and int8 are summed in pairs in 16 bits and would saturate (ONNX Runtime, "Quantize ONNX models", on
        reduce_range).
    """
    with needs_extra("onnx", "export"):
        import onnx
    with needs_extra("onnxruntime", "export"):
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    batches = ({INPUT: calibration[start : start + 8]} for start in range(0, len(calibration), 8))
    reader: Any = SimpleNamespace(get_next=partial(next, batches, None))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # quantization advises through the root logger on what is done here already
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            prepared = Path(folder) / "prepared.onnx"
            shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
    finally:
        root.setLevel(level)
    quantized = onnx.load(path)
    onnx.helper.set_model_props(quantized, {KEY: metadata})
    onnx.save_model(quantized, path)


@contextmanager
def _plain_attention(model: nn.Module) -> Generator[None]:
    """Let timm's attention compute by plain products: torch cannot write its fused one with a bias as ONNX (BEiT)."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            vars(module)["fused_attn"] = False
        yield
    finally:
        for module in fused:
            vars(module)["fused_attn"] = True


@contextmanager
def _one_error(way: str) -> Generator[None]:
    """Torch's exporters raise many kinds of errors; each means the same to the user."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first is the reason, the others say which step it was
            cause = cause.__cause__
        raise ExportError(f"the model cannot be written {way}: {first_line(cause)}") from error


def write_openvino(source: Path, path: Path, *, metadata: str) -> None:
    """Write an ONNX file as IR with float16 weights, the .xml file `path` and a .bin file beside it."""
    ov = import_openvino()
    model = ov.convert_model(source)
    model.set_rt_info(metadata, [KEY])
    ov.save_model(model, path, compress_to_fp16=True)


def quantize_openvino(source: Path, path: Path, *, calibration: NDArray[np.float32], metadata: str) -> None:
    """Write an ONNX file as int8 IR, ranges of activations by (N, 3, S, S) normalized photos.

    Source:
        NNCF's post-training quantization with bias correction; "mixed" is symmetric weights, asymmetric activations.
    """
    ov = import_openvino()
    with needs_extra("nncf", "export"):
        import nncf
    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset, preset = nncf.Dataset([image[None] for image in calibration]), nncf.QuantizationPreset.MIXED
    quantized = nncf.quantize(ov.convert_model(source), dataset, preset=preset, subset_size=len(calibration))
    quantized.set_rt_info(metadata, [KEY])
    ov.save_model(quantized, path, compress_to_fp16=False)


def write_torch(model: nn.Module, path: Path, *, size: int, metadata: str) -> None:
    """Write `model` as a torch.export program (.pt2): it runs without Fieldmark and without timm; `size` is S."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=65536)},)
    with _one_error("by torch.export"):
        program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine
    # By way of memory: on a full disk torch's own writer would abort the process.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FILE: metadata})
    path.write_bytes(buffer.getbuffer())


def write_timm(model: nn.Module, folder: Path, metadata: ModelMetadata) -> None:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    import timm
    from timm.models import save_for_hf

    parts: Any = model
    if not isinstance(parts.head, nn.Linear):
        raise ExportError(
            "the timm form holds a linear head only, and this run has another: export --to onnx or torch, or train "
            'with model.head = "linear"'
        )
    architecture, spec = metadata.architecture.split(".")[0], metadata.preprocessing
    whole: Any = timm.create_model(architecture, num_classes=len(metadata.classes))
    strides = [
        [module.stride for module in one.modules() if isinstance(module, nn.Conv2d)] for one in (parts.backbone, whole)
    ]
    if parts.pool is not None or strides[0] != strides[1]:
        raise ExportError(
            "the timm form cannot say that strides were moved (model.stride_in_1x1) or features pooled otherwise "
            "(model.pool): export --to onnx or torch, or train with model.pool=average"
        )
    known: dict[str, Any] = whole.pretrained_cfg
    head = {f"{known['classifier']}.{name}": value for name, value in parts.head.state_dict().items()}
    with _one_error("for timm"):
        whole.load_state_dict({**parts.backbone.state_dict(), **head})
    is_cropped = spec.transform == "weights"
    for key in ("test_input_size", "test_crop_pct"):
        known.pop(key, None)
    known |= {
        "input_size": (3, spec.size, spec.size),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_fraction if is_cropped else 1.0,
        "crop_mode": "center" if is_cropped else "squash",
        "mean": spec.mean,
        "std": spec.std,
    }
    save_for_hf(whole, str(folder), {"label_names": list(metadata.classes)}, safe_serialization=True)
