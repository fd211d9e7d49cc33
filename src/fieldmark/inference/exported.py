"""An exported model, loaded: the same question and answer for every form.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fieldmark.augment.reference import EvalSpec
from fieldmark.errors import DataError, ExportError, MissingExtraError, first_line, needs_extra
from fieldmark.files import Positive, Share, digest_file, read_values
from fieldmark.inference.taxonomy import Fallback

Compute = Callable[[NDArray[np.float32]], NDArray[np.float32]]

FILE = "fieldmark.json"
KEY = "fieldmark"
FORMAT = 1

Channel = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True)
class ModelMetadata:
    """Everything between a photo and a named probability."""

    kind: str  # "onnx", "openvino", "torch", "timm" or "web"
    precision: str  # "float32", "float16" (weights only) or "int8"
    file: str  # of the model, in the same folder
    architecture: str  # timm name of the backbone
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    preprocessing: EvalSpec  # how an upright RGB photo becomes (B, 3, S, S)
    background: tuple[Channel, Channel, Channel]  # RGB under transparent pixels
    temperature: Positive  # divides the logits before the softmax
    threshold: Share  # least probability that is answered; below it the answer is "unknown"
    parameters: int
    license: str  # of the weights that training started from
    pretraining: str  # what those weights were trained on
    run: str  # name of the run folder
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])  # agreement of logits, accuracy of int8
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])  # of the run, on photos it was not trained on
    back_off: Fallback | None = None  # groups to answer with where the class is not sure
    # Exports of earlier versions have the defaults of the settings.
    max_pixels: Annotated[int, Field(gt=0)] = 178_956_970
    batch_size: Annotated[int, Field(gt=0, lt=2**31)] = 64
    digests: dict[str, str] = field(default_factory=dict[str, str])  # SHA-256 of each file beside fieldmark.json

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=True)

    @classmethod
    def load(cls, folder: Path) -> ModelMetadata:
        """Read what `to_json` wrote into an exported model's folder; every value is checked, by its key."""
        where = folder / FILE
        if not where.is_file():
            raise ExportError(f"{folder} is not an exported model: it has no {FILE}; make one with fieldmark export")
        try:
            content = json.loads(where.read_text(encoding="utf-8"))
        except OSError as error:
            raise ExportError(f"{where} cannot be read: {error}") from None
        except ValueError as error:
            raise ExportError(f"{where} is not JSON: {error}; export the run again") from None
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != FORMAT:
            raise ExportError(f"{where} has format {found!r}, this version reads {FORMAT}: export the run again")
        try:
            metadata = read_values(cls, content)
            if metadata.back_off and len(metadata.back_off.rows) != len(metadata.classes):
                raise DataError("is not of the model's classes")
        except ValueError as error:
            raise ExportError(f"{where} {error}. Export the run again") from None
        except DataError as error:
            raise ExportError(f"{where}, key 'back_off': {error}. Export the run again") from None
        twice = [name for number, name in enumerate(metadata.classes) if name in metadata.classes[:number]]
        if twice:
            raise ExportError(f"{where}, key 'classes': {twice[0]!r} is there twice. Export the run again")
        return metadata


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """A model that `fieldmark export` wrote, of any form. Calls from several threads are safe."""

    metadata: ModelMetadata
    compute: Compute

    @classmethod
    def load(cls, folder: str | Path, *, threads: int) -> ExportedModel:
        """Load an export folder for calls of so many `threads`; 0 leaves it to the runtime.

        OpenVINO computes in 32 bit, in which the export was proven. The others compute in what the file holds.
        """
        folder = Path(folder)
        metadata = ModelMetadata.load(folder)
        path = folder / metadata.file
        if Path(metadata.file).name != metadata.file or not path.is_file():
            raise ExportError(f"{folder} has no {metadata.file}: the export is not complete, make it again")
        for name, digest in metadata.digests.items():
            # A flipped bit in a weight changes answers, and no runtime would notice.
            if not (file := folder / name).is_file() or digest_file(file) != digest:
                raise ExportError(f"{file} is not the file that was exported: it is damaged. Export the run again")
        loaders: dict[str, Callable[[], Compute]] = {
            **dict.fromkeys(("onnx", "web"), lambda: _load_onnx(path, threads)),
            "openvino": lambda: _load_openvino(path, threads),
            "torch": lambda: _load_torch(path),
            "timm": lambda: compute_with(
                import_module("timm").create_model(f"local-dir:{folder}", pretrained=True).eval()
            ),
        }
        if metadata.kind not in loaders:
            raise ExportError(f"{folder} holds the unknown form {metadata.kind!r}; known are {', '.join(loaders)}")
        size = metadata.preprocessing.size
        try:
            compute = loaders[metadata.kind]()
            outputs = compute(np.zeros((1, 3, size, size), np.float32)).shape[1:]
        except (MissingExtraError, ExportError):
            raise
        except Exception as error:  # each runtime has its own errors for a broken file
            raise ExportError(f"{path} cannot be loaded: {first_line(error)}") from error
        if outputs != (len(metadata.classes),):
            raise ExportError(
                f"{path} gives outputs of shape {outputs}, but {folder / FILE} names {len(metadata.classes)} classes: "
                "they belong to different models. Export the run again"
            )
        return cls(metadata, compute)

    def logits(self, images: NDArray[np.float32], *, flips: bool = False) -> NDArray[np.float32]:
        """(B, K) logits of normalized (B, 3, S, S); with `flips` their mean with those of the mirror images."""
        output = self.compute(np.ascontiguousarray(images, np.float32))
        return np.asarray((output + self.logits(images[..., ::-1])) / 2, np.float32) if flips else output


def _load_onnx(path: Path, threads: int) -> Compute:
    with needs_extra("onnxruntime", "export"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0], np.float32)


def _load_openvino(path: Path, threads: int) -> Compute:
    openvino = import_openvino()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled: Any = openvino.Core().compile_model(path, "CPU", settings)
    # An infer request belongs to one thread at a time; the compiled model may be shared.
    return lambda images: np.array(compiled.create_infer_request().infer([images])[0], np.float32)


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which would otherwise send usage statistics to an analytics host."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # to Python: not installed
    with needs_extra("openvino", "export"):
        import openvino
    return openvino


def _load_torch(path: Path) -> Compute:
    from torch.export.pt2_archive._package import load_pt2

    _require_harmless_program(path)
    # Not torch.export.load: what this cannot read, that unpickles as an older format.
    return compute_with(load_pt2(path).exported_programs["model"].module())


def compute_with(model: Any) -> Compute:
    """Logits by a torch model on the CPU."""

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return compute


# All that an archive of one program without pickled or compiled objects holds.
_MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|extra/[\w.]+|archive_\w+|byteorder|\.data/\w+"
)
_OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file|save|load|warn|_print)\w+\.\w+|torch\.sym_\w+|math\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_autocast"  # of a graph in the same file
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
_SIZES = re.compile(
    r"((Mul|Add|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilToInt|Integer|Eq|Ne|Lt|Le|Gt|Ge)\(|Symbol\('[a-z]+\d+'"
    r"|(positive|nonnegative|integer)=True|true|false|-?\d+|[(), ])*"
)
# Without quotes, brackets and equals signs no string becomes code, whatever torch makes of it.
_WORDS = re.compile(r"[\w.+\- ]*")
_STRINGS = {
    "target": _OPERATORS,
    "expr_str": _SIZES,
    "type": re.compile(r"(builtins\.)?[a-z]+"),
    "entry": re.compile(r"(?!as_custom_obj$|as_operator$)[\w.+\- ]*"),
}


def _require_harmless_program(path: Path) -> None:
    """Refuse a .pt2 that could run code: torch unpickles some of its members, evaluates its sizes, calls by name."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(str(path)) as archive:
        names: list[str] = archive.get_file_names()
        problem = next((f"the member {name!r}" for name in names if not _MEMBERS.fullmatch(name)), "")
        for name in names:
            if name.endswith(".json") and not name.startswith("extra/"):
                problem = problem or _find_code(json.loads(archive.read_bytes(name)))
        try:
            torch.load(io.BytesIO(archive.read_bytes("data/sample_inputs/model.pt")), weights_only=True)
        except pickle.UnpicklingError:
            problem = problem or "pickled objects"
    if problem:
        raise ExportError(
            f"{path} is refused, since opening it could run code: it holds {problem}, which `fieldmark export` never "
            "writes. Make the export again from its run"
        )


def _find_code(content: Any) -> str:
    """Return what in a JSON file of the archive could become code, or ""."""
    for key, value in _leaves(content, ""):
        if isinstance(value, str) and not _STRINGS.get(key, _WORDS).fullmatch(value):
            return f"{value[:60]!r} as {key or 'a name'}"
        if key == "use_pickle" and value:
            return "pickled tensors"
    return ""


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Strings and numbers with the names that they stand under, and those names."""
    if isinstance(value, dict):
        for name, part in cast("dict[str, Any]", value).items():
            yield ("entry" if part is not None else ""), name
            if name != "metadata":  # for people: where each operator came from
                yield from _leaves(part, name)
    elif isinstance(value, list):
        for part in cast("list[Any]", value):
            yield from _leaves(part, key)
    elif isinstance(value, str) and key in {"in_spec", "out_spec", "context"}:
        yield from _leaves(json.loads(value), "")
    else:
        yield key, value
