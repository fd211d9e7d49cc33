"""What the server asks of a model, and a run or an export as such a model.

Letters: B batch, K classes, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fieldmark.experiment.folder import Run
    from fieldmark.outputs.attention import AttentionMaps
    from fieldmark.outputs.back_off import BackOff
    from fieldmark.outputs.predictor import Predictor
    from fieldmark.vision.augment import EvalSpec
    from fieldmark.vision.views import Views


@dataclass(frozen=True)
class Prepared:
    """A photo, ready for the model.

    Attributes:
        picture: (3, S, S) float32, normalised; several as `vision.views` lays them out.
        box: x, y, width, height of what the model sees, as shares of the upright photo.
    """

    picture: NDArray[np.float32]
    box: tuple[float, float, float, float]


class PhotoModel(Protocol):
    """What the server asks of a model."""

    @property
    def name(self) -> str:
        """What people call it; never a path."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in order of class number."""
        ...

    @property
    def threshold(self) -> float:
        """Least probability that is answered; 0 answers everything."""
        ...

    @property
    def back_off(self) -> BackOff | None:
        """Groups to answer with where the class is not sure."""
        ...

    @property
    def has_attention(self) -> bool:
        """Whether `attention` can be asked."""
        ...

    @property
    def num_examples(self) -> int:
        """How many photos the page may offer to try."""
        ...

    def example(self, number: int) -> bytes:
        """One of them, as JPEG."""
        ...

    def prepare(self, data: bytes, *, max_pixels: int) -> Prepared:
        """Decode one photo; raises PhotoError."""
        ...

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 3, S, S) -> (B, K), rows sum to 1."""
        ...

    def attention(self, picture: NDArray[np.float32], class_number: int) -> NDArray[np.float32]:
        """(h, w) in [0, 1]: where the model looked for a class."""
        ...


class ServedModel:
    """A run folder or an exported model behind the server."""

    def __init__(
        self, predictor: Predictor, *, name: str, maps: AttentionMaps | None, examples: Sequence[bytes]
    ) -> None:
        self._predictor = predictor
        self._maps = maps
        self._examples = list(examples)
        self.name = name
        self.classes = predictor.classes
        self.threshold = predictor.threshold
        self.back_off = predictor.back_off

    @classmethod
    def load(cls, path: Path) -> ServedModel:
        """Load a run (with attention maps, for convolutional models), an ensemble or an export (without).

        Raises:
            FieldmarkError: Neither is there, or it cannot be loaded.
        """
        from fieldmark.experiment.folder import Run
        from fieldmark.outputs.attention import AttentionMaps
        from fieldmark.outputs.metadata import FILE
        from fieldmark.outputs.predictor import Predictor

        predictor = Predictor.load(path)
        maps = None
        examples: list[bytes] = []
        if not (path / FILE).is_file():
            run = Run(path)
            maps = None if run.is_ensemble else AttentionMaps(run.load_model())
            examples = _examples(run, count=5)
        return cls(predictor, name=path.resolve().name, maps=maps, examples=examples)

    @property
    def num_examples(self) -> int:
        """How many photos the page may offer to try."""
        return len(self._examples)

    def example(self, number: int) -> bytes:
        """One of them, as JPEG."""
        return self._examples[number]

    @property
    def has_attention(self) -> bool:
        """Whether `attention` can be asked."""
        return self._maps is not None and self._maps.is_available

    def prepare(self, data: bytes, *, max_pixels: int) -> Prepared:
        """Decode one photo; raises PhotoError."""
        from fieldmark.data.decode import decode
        from fieldmark.vision.views import eval_picture

        photo = decode(data, background=self._predictor.background, max_pixels=max_pixels)
        spec = self._predictor.spec
        return Prepared(eval_picture(photo, spec).numpy(), seen_box(photo.shape[1], photo.shape[0], spec))

    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 3, S, S) -> (B, K), calibrated."""
        return self._predictor.probabilities(images)

    def attention(self, picture: NDArray[np.float32], class_number: int) -> NDArray[np.float32]:
        """(28, 28) in [0, 1]."""
        assert self._maps is not None
        maps: Any = self._maps(picture[None], [class_number])
        return maps[0]


def _examples(run: Run, *, count: int) -> list[bytes]:
    """Some validation photos of different classes, if they are still there."""
    from fieldmark.errors import FieldmarkError
    from fieldmark.serve.thumbnails import thumbnail

    examples: list[bytes] = []
    try:
        files = run.split.of("val").files()
        for place in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
            examples.append(thumbnail(files[place], 640))
    except FieldmarkError:
        pass  # a run without its photos serves all the same
    return examples


def seen_box(width: int, height: int, spec: EvalSpec | Views) -> tuple[float, float, float, float]:
    """The part of a photo that the evaluation transform (the widest of several) keeps: shares x, y, width, height."""
    from fieldmark.vision.views import Views

    if isinstance(spec, Views):
        return max((seen_box(width, height, one) for one in spec.specs), key=lambda box: box[2])
    if spec.transform == "squash":
        return (0.0, 0.0, 1.0, 1.0)
    side = min(width, height) * spec.crop_fraction
    return ((width - side) / 2 / width, (height - side) / 2 / height, side / width, side / height)
