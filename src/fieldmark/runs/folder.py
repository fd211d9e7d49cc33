"""The run folder: one place that knows its files, and `Run`, which reads them.

A run folder is complete in itself: moved elsewhere, with the photos gone, it still predicts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.config import Config, load_config
from fieldmark.errors import RunError
from fieldmark.files import whole_or_absent

if TYPE_CHECKING:
    from fieldmark.augment.reference import EvalSpec
    from fieldmark.data.decode import DecodeSpec
    from fieldmark.data.index import PhotoIndex
    from fieldmark.models.classifier import Classifier


RECIPE = "recipe.toml"
SPLIT = "split.csv"
CLASSES = "classes.json"
MODEL = "model.json"
DATA = "data.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
BROKEN = "broken.csv"
LOG = "log.txt"
WEIGHTS = "best.safetensors"
STATE = "last.pt"
EPOCHS = "predictions/val_epochs.npz"
ENSEMBLE = "ensemble.json"
MEMBERS = "members"


@dataclass(frozen=True)
class PhotoPredictions:
    """Stored predictions of labelled photos, in natural order of path.

    Attributes:
        paths: N paths relative to the data root.
        labels: (N,) int64 class numbers.
        probabilities: (N, K) float32, rows sum to 1.
    """

    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


class Run:
    """A run folder, read-only.

    Args:
        path: The folder.

    Raises:
        RunError: There is no run in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"{self.path} is not a folder; a run is the folder that `fieldmark train --out` wrote")
        if not (self.path / RECIPE).is_file():
            raise RunError(f"{self.path} is not a run: it has no {RECIPE}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> Config:
        """The settings, every default filled in."""
        return load_config(self.path / RECIPE)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; a class's number is its place."""
        names = self._json(CLASSES, list)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise RunError(f"{self.path / CLASSES} should be a list of different class names; got {str(names)[:80]}")
        return tuple(names)

    @cached_property
    def split(self) -> PhotoIndex:
        """Every photo of the run with its label and split."""
        from fieldmark.data.index import load_split_table

        index = load_split_table(self._file(SPLIT), Path(self.data_info["root"]))
        # The classes of the model, in its order, whatever the photos in the table would say.
        return replace(index, classes=self.classes)

    @cached_property
    def model_info(self) -> dict[str, Any]:
        """Backbone, head, evaluation transform, parameters, licence and pre-training of the weights."""
        return _Record(self._json(MODEL, dict), self.path / MODEL)

    @cached_property
    def data_info(self) -> dict[str, Any]:
        """Root, fingerprint, counts and the classes' prior in training."""
        return _Record(self._json(DATA, dict), self.path / DATA)

    @property
    def is_ensemble(self) -> bool:
        """Whether several models answer together; then there is no single model to load."""
        return (self.path / ENSEMBLE).is_file()

    @cached_property
    def ensemble_info(self) -> dict[str, Any]:
        """Names, temperatures and parameters of an ensemble's members; see `experiment.ensemble`."""
        return _Record(self._json(ENSEMBLE, dict), self.path / ENSEMBLE)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware and command line."""
        return _Record(self._json(ENVIRONMENT, dict), self.path / ENVIRONMENT)

    @property
    def summary(self) -> dict[str, Any]:
        """Status, best epoch and its figures; `{"status": "running"}` while there is none."""
        if not (self.path / SUMMARY).is_file():
            return {"status": "running"}
        return _Record(self._json(SUMMARY, dict), self.path / SUMMARY)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One object per completed epoch, in order."""
        path = self.path / METRICS
        return read_json_lines(path) if path.is_file() else []

    @property
    def prior(self) -> NDArray[np.float64]:
        """(K,) share of each class among the training photos."""
        return np.asarray(self.data_info["prior"], np.float64)

    def predictions(self, split: str = "val") -> PhotoPredictions:
        """Stored predictions of the kept weights.

        Raises:
            RunError: None are stored for this split.
        """
        path = self.path / "predictions" / f"{split}.parquet"
        if not path.is_file():
            if split == "val" and self.config.data.train_on == "train+val":
                raise RunError(
                    f"{self.path} holds no predictions of 'val': it was trained on train+val, which leaves no "
                    "validation photos. Train one with data.train_on=train for this"
                )
            raise RunError(f"{self.path} holds no predictions of {split!r}: run `fieldmark evaluate` on it first")
        return read_predictions(path, self.classes)

    def eval_spec(self) -> EvalSpec:
        """How a photo becomes the picture that the model judges."""
        from fieldmark.augment.reference import EvalSpec

        self._refuse_ensemble()
        settings: dict[str, Any] = self.model_info["eval"]
        triples: dict[str, Any] = {name: tuple(settings[name]) for name in ("mean", "std")}
        return EvalSpec(**settings | triples)

    def decode_spec(self) -> DecodeSpec:
        """How files become the pixels that the model was trained on."""
        from fieldmark.data.decode import DecodeSpec

        return DecodeSpec(self.config.data.background, self.config.data.max_pixels)

    def load_model(self) -> Classifier:
        """The model with the kept weights, on the CPU, in evaluation mode."""
        from fieldmark.models.classifier import create_classifier
        from fieldmark.training.checkpoint import load_saved_weights

        self._refuse_ensemble()
        model = create_classifier(**self.model_info["create"])
        model.load_state_dict(load_saved_weights(self.path / WEIGHTS))
        return model.eval()

    def _refuse_ensemble(self) -> None:
        if self.is_ensemble:
            raise RunError(
                f"{self.path} is an ensemble, and this takes one model: use a run in {self.path / MEMBERS}, or make "
                "one model of the runs with `fieldmark combine --method soup`"
            )

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise RunError(f"{self.path} has no {name}: the run did not get that far, or the file was removed")
        return path

    def _json(self, name: str, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
        path = self._file(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, kind):
            expected = "an object" if kind is dict else "a list"
            raise RunError(f"{path} should hold {expected}; got {str(content)[:80]}")
        return content


class _Record(dict[str, Any]):
    """A JSON object of a run folder, which names its file where a key is missing."""

    def __init__(self, content: Any = (), path: Path = Path("a file of the run folder")) -> None:
        super().__init__(content)  # `dataclasses.asdict` copies a mapping by its pairs alone
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self._path} lacks {key!r}: it is damaged, or another version wrote it")


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=True) + "\n"
    whole_or_absent(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a torn last line, as a kill leaves it, is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_predictions(
    path: Path,
    *,
    paths: Sequence[str],
    labels: Sequence[int] | NDArray[np.int64],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> None:
    """Store predictions of labelled photos: `path`, `label` (a name), and one column of probabilities per class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    columns = {
        "path": pa.array([_encoded(name) for name in paths], pa.binary()),
        "label": pa.array([classes[number] for number in labels], pa.string()),
        **{f"p:{name}": pa.array(probabilities[:, number]) for number, name in enumerate(classes)},
    }
    table = pa.table(columns)
    whole_or_absent(path, lambda part: pq.write_table(table, part))


def read_predictions(path: Path, classes: Sequence[str]) -> PhotoPredictions:
    """Read what `write_predictions` wrote."""
    import pyarrow.parquet as pq

    # Not read_table: it would take a folder named like "x=y" for a partition.
    table = pq.ParquetFile(path).read()
    number_of = {name: number for number, name in enumerate(classes)}
    return PhotoPredictions(
        paths=tuple(_decoded(name) for name in table["path"].to_pylist()),
        labels=np.asarray([number_of[name] for name in table["label"].to_pylist()], np.int64),
        probabilities=np.stack([table[f"p:{name}"].to_numpy() for name in classes], axis=1).astype(np.float32),
    )


def _encoded(name: str) -> bytes:
    # File names need not be valid UTF-8; Parquet strings must be.
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class RunResults:
    """One run folder's results.

    Attributes:
        path: The folder.
        config: Its resolved recipe.
        classes: K class names in order of class number.
        photos: N paths of the judged photos, in order of path.
        labels: (N,) int64 class numbers.
        probabilities: (N, K) float32.
        epoch_predictions: (E, N) int64 class numbers after each epoch, where they were kept.
        prior: (K,) float64 share of each class in training.
        metrics: One object per epoch, as in metrics.jsonl.
        summary, model, data, environment: The JSON files of the same name.
    """

    path: Path
    config: Config
    classes: tuple[str, ...]
    photos: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    epoch_predictions: NDArray[np.int64] | None
    prior: NDArray[np.float64]
    metrics: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) most probable class; of equals, the first."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether each photo was right."""
        return self.predicted == self.labels


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """The finished run folders among `paths` and, where a path is a sweep or another folder of runs, right under it.

    Raises:
        RunError: A path is neither a run folder nor holds one, or a run that was named is not finished.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / SUMMARY).is_file():
            if run_status(path) != "finished":
                raise RunError(f"{path} is not finished (its status is {run_status(path)!r}): resume it first")
            inside = [path]
        else:
            inside = sorted(
                entry.parent for entry in path.glob(f"*/{SUMMARY}") if run_status(entry.parent) == "finished"
            )
        if not inside:
            what = "holds no finished run" if path.is_dir() else "does not exist"
            raise RunError(f"{path} {what}: give run folders (with a {SUMMARY}) or a folder of them, such as a sweep")
        found.extend(inside)
    return list(dict.fromkeys(found))


def run_status(path: Path) -> str:
    """The status in a run's summary; "missing" where there is none that can be read."""
    try:
        status = json.loads((path / SUMMARY).read_text(encoding="utf-8")).get("status", "missing")
    except (OSError, ValueError, AttributeError):
        return "missing"
    return str(status)


def load_results(path: str | Path, *, split: str) -> RunResults:
    """Read one run folder.

    Args:
        path: The folder.
        split: `val` or `test`: whose predictions to read.

    Raises:
        RunError: A file that is needed is missing or is not what it should be; the message names it.
    """
    run = Run(path)
    try:
        predictions = run.predictions(split)
        order = sorted(range(len(predictions.paths)), key=predictions.paths.__getitem__)
        return RunResults(
            path=run.path,
            config=run.config,
            classes=run.classes,
            photos=tuple(predictions.paths[number] for number in order),
            labels=predictions.labels[order],
            probabilities=predictions.probabilities[order],
            epoch_predictions=_load_epochs(run.path / EPOCHS, order) if split == "val" else None,
            prior=run.prior,
            metrics=tuple(run.metrics),
            summary=run.summary,
            model=run.model_info,
            data=run.data_info,
            environment=run.environment,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} cannot be read as a run folder: {error}") from error


def _load_epochs(path: Path, order: list[int]) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as content:
        predictions = content["predicted"]
    if predictions.ndim != 2 or predictions.shape[1] != len(order):
        raise ValueError(f"{path.name} holds predictions of shape {predictions.shape}, not of {len(order)} photos")
    return predictions[:, order].astype(np.int64)


def flatten(settings: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, of every setting; nested tables and dotted keys may be mixed, as in TOML."""
    table = settings.model_dump(mode="json") if isinstance(settings, Config) else settings
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def format_value(value: Any) -> str:
    """A setting's value in a few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return "none" if value is None else str(value)
