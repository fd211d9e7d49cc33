"""A torch model as ONNX, in float32 or int8; the only module besides `exported` that knows ONNX.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import ExportError, MissingExtraError
from fieldmark.outputs.metadata import KEY

if TYPE_CHECKING:
    from torch import nn

INPUT, OUTPUT = "images", "logits"
OPSET = 18  # the oldest that torch's exporter writes without conversion; runtimes since 2023 read it


def write_onnx(model: nn.Module, path: Path, *, size: int, metadata: str) -> None:
    """Write `model` as one ONNX file.

    Args:
        model: (B, 3, S, S) float32 -> (B, K) logits, in eval mode, on the CPU.
        path: File to write; weights are inside.
        size: S.
        metadata: Stored under the key "fieldmark" of the file's metadata.

    Raises:
        ExportError: The model cannot be exported.
        MissingExtraError: onnx is not installed.
    """
    import torch

    try:
        import onnx

        importlib.import_module("onnxscript")  # torch needs it and would say so less clearly
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export") from None
    example = torch.zeros(2, 3, size, size)
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # torch's exporter raises many kinds; each means the same to the user
        raise ExportError(f"the model cannot be written as ONNX: {_first_line(error)}") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {KEY: metadata})
    onnx.save_model(proto, path)


def quantize_onnx(source: Path, path: Path, *, calibration: NDArray[np.float32], metadata: str) -> None:
    """Write an int8 copy of an ONNX file: static ranges, weights per channel.

    Args:
        source: ONNX in float32.
        path: File to write.
        calibration: (N, 3, S, S) normalised photos that set the ranges of the activations.
        metadata: Stored in the file, as by `write_onnx`.

    Raises:
        MissingExtraError: onnxruntime is not installed.

    Source:
        Jacob et al., arXiv:1712.05877; QDQ form of ONNX Runtime. Weights use 7 bits: without VNNI, products of
        uint8 and int8 are summed in pairs in 16 bits and would saturate (ONNX Runtime, "Quantize ONNX models", on
        reduce_range).
    """
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime", "export") from None
    reader: Any = _Reader(calibration)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # quantization advises through the root logger on what is done here already
    try:
        with tempfile.TemporaryDirectory() as folder:
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
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {KEY: metadata})
    onnx.save_model(proto, path)


class _Reader:
    """Calibration photos in small batches, as ONNX Runtime asks for them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(
            images[start : start + 8] for start in range(0, len(images), 8)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
