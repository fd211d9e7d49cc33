"""An exported model, loaded: the same question and answer for every form.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from fieldmark.errors import ExportError, MissingExtraError

if TYPE_CHECKING:
    from fieldmark.augment.reference import EvalSpec
    from fieldmark.inference.taxonomy import BackOff


Compute = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class ExportedModel:
    """A model that `fieldmark export` wrote, of any form. Calls from several threads are safe.

    Attributes:
        metadata: What came with it.
    """

    def __init__(self, metadata: ModelMetadata, compute: Compute) -> None:
        self.metadata = metadata
        self._compute = compute

    @classmethod
    def load(cls, folder: str | Path, *, threads: int, precision: str) -> ExportedModel:
        """Load an export folder.

        Args:
            folder: With fieldmark.json and the model file.
            threads: Threads of one call; 0 leaves it to the runtime.
            precision: What OpenVINO computes in: "f32", or "auto" for bf16 where the processor has it. The others
                compute in what the file holds.

        Raises:
            ExportError: No export, or its model file is missing or cannot be read.
            MissingExtraError: The runtime of this form is not installed.
        """
        folder = Path(folder)
        metadata = ModelMetadata.load(folder)
        path = folder / metadata.file
        if not path.is_file():
            raise ExportError(f"{folder} has no {metadata.file}: the export is not complete, make it again")
        loaders: dict[str, Callable[[], Compute]] = {
            "onnx": lambda: _onnx(path, threads),
            "openvino": lambda: _openvino(path, threads, precision),
            "torch": lambda: _torch(path),
            "timm": lambda: _timm(folder),
        }
        if metadata.kind not in loaders:
            raise ExportError(f"{folder} holds the unknown form {metadata.kind!r}; known are {', '.join(loaders)}")
        try:
            compute = loaders[metadata.kind]()
        except MissingExtraError:
            raise
        except Exception as error:  # each runtime has its own errors for a broken file
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{path} cannot be loaded: {line}") from error
        return cls(metadata, compute)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a class's number is its place."""
        return self.metadata.classes

    @property
    def temperature(self) -> float:
        """Divides the logits before the softmax."""
        return self.metadata.temperature

    @property
    def threshold(self) -> float:
        """Least probability that is answered; 0 answers everything."""
        return self.metadata.threshold

    def eval_spec(self) -> EvalSpec:
        """How a photo becomes an input."""
        return self.metadata.eval_spec()

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, K) logits of normalised images (B, 3, S, S)."""
        return self._compute(np.ascontiguousarray(images, np.float32))

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, K) calibrated probabilities of normalised images (B, 3, S, S)."""
        return np.asarray(softmax(self.logits(images) / self.temperature, axis=1), np.float32)


def _onnx(path: Path, threads: int) -> Compute:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "export") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0], np.float32)


def _openvino(path: Path, threads: int, precision: str) -> Compute:
    import threading

    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino") from None
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    if precision == "f32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled: Any = openvino.Core().compile_model(path, "CPU", settings)
    local = threading.local()

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        # An infer request belongs to one thread at a time; the compiled model may be shared.
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return np.array(local.request.infer([images])[0], np.float32)

    return compute


def _torch(path: Path) -> Compute:
    import torch

    return _torch_compute(torch.export.load(path).module())


def _timm(folder: Path) -> Compute:
    import timm

    return _torch_compute(timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def _torch_compute(model: Any) -> Compute:
    import torch

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return compute


FILE = "fieldmark.json"
KEY = "fieldmark"
FORMAT = 1


@dataclass(frozen=True)
class ModelMetadata:
    """Everything between a photo and a named probability.

    Attributes:
        kind: "onnx", "openvino", "torch" or "timm".
        precision: "float32", "float16" (weights only) or "int8".
        file: Name of the model file in the same folder.
        architecture: timm name of the backbone.
        classes: Class names; a class's number is its place.
        preprocessing: Fields of `vision.augment.EvalSpec`: how an upright RGB photo becomes the input (B, 3, S, S).
        background: RGB under transparent pixels, 0 to 255.
        temperature: Divides the logits before the softmax.
        threshold: Least probability that is answered; below it the answer is "unknown". 0 answers everything.
        parameters: Number of weights.
        licence: Licence of the weights that training started from.
        pretraining: What those weights were trained on.
        run: Name of the run folder.
        evidence: What was measured when it was exported: agreement of logits, accuracy of int8.
        metrics: Figures of the run on photos that it was not trained on.
        back_off: `outputs.back_off.BackOff` as plain values: groups to answer with where the class is not sure.
    """

    kind: str
    precision: str
    file: str
    architecture: str
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    background: tuple[int, int, int]
    temperature: float
    threshold: float
    parameters: int
    licence: str
    pretraining: str
    run: str
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    back_off: dict[str, Any] | None = None

    def eval_spec(self) -> EvalSpec:
        """The evaluation picture, for `vision.augment.eval_reference`."""
        from fieldmark.augment.reference import EvalSpec

        return EvalSpec(**self.preprocessing)

    def groups(self) -> BackOff | None:
        """The groups to answer with where the class is not sure."""
        from fieldmark.inference.taxonomy import BackOff

        return BackOff.from_dict(self.back_off) if self.back_off else None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelMetadata:
        """Read back what `to_json` wrote.

        Args:
            text: JSON.
            where: The file, for messages.

        Raises:
            ExportError: Not JSON, another format, or fields are missing.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ExportError(f"{where} is not JSON: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ExportError(f"{where} has format {found!r}, this version reads {FORMAT}: export the run again")
        missing = sorted(set(cls.__dataclass_fields__) - set(content) - {"back_off"})
        if missing:
            raise ExportError(f"{where} lacks {', '.join(missing)}: export the run again")
        known: dict[str, Any] = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        # JSON has lists where the values were tuples.
        for name in ("classes", "background"):
            known[name] = tuple(known[name])
        for name in ("mean", "std"):
            known["preprocessing"][name] = tuple(known["preprocessing"][name])
        return cls(**known)

    @classmethod
    def load(cls, folder: Path) -> ModelMetadata:
        """Read the metadata of an exported model's folder.

        Raises:
            ExportError: There is none, or it cannot be read.
        """
        path = folder / FILE
        if not path.is_file():
            raise ExportError(f"{folder} is not an exported model: it has no {FILE}; make one with fieldmark export")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))
