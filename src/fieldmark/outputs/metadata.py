"""What an exported model must know besides its weights, as JSON beside it and, where the format allows, inside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.errors import ExportError

if TYPE_CHECKING:
    from fieldmark.outputs.back_off import BackOff
    from fieldmark.vision.augment import EvalSpec

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
        from fieldmark.vision.augment import EvalSpec

        return EvalSpec(**self.preprocessing)

    def groups(self) -> BackOff | None:
        """The groups to answer with where the class is not sure."""
        from fieldmark.outputs.back_off import BackOff

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
