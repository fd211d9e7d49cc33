"""The run folder: one place that knows its files, and `Run`, which reads them.

A run folder is complete in itself: moved elsewhere, with the photos gone, it still predicts.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, InstanceOf, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from fieldmark.config import Config, Pool, load_config
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import PhotoIndex, find_split_table, load_split_table
from fieldmark.errors import DataError, RunError
from fieldmark.files import Positive, Share, fill_template, read_values, whole_or_absent, write_whole

if TYPE_CHECKING:
    from fieldmark.augment.reference import EvalSpec
    from fieldmark.models.classifier import Classifier

RECIPE = "recipe.toml"
SPLIT = "split.csv"  # or the same in .parquet, which `find_split_table` finds
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
CALIBRATION = "calibration.json"

# What the JSON files hold, as far as anybody reads it. Names of files and classes need not be valid UTF-8, which
# pydantic asks of a `str`. A key that is missing is reported by whoever needs it: an ensemble lacks some.
_Name = InstanceOf[str]


class _Create(TypedDict, total=False):
    name: Required[str]
    num_classes: PositiveInt
    head: Literal["linear", "mlp"]
    head_hidden: PositiveInt
    head_dropout: Share
    feature_dropout: Share
    drop_path: Share
    stride_in_1x1: bool
    pool: Pool


class _Model(TypedDict, total=False):
    create: _Create
    eval: dict[str, Any]
    train_size: PositiveInt
    precision: Literal["32-true", "16-mixed", "bf16-mixed"]
    channels_last: bool
    parameters: NonNegativeInt
    weights: dict[str, Any]


class _Data(TypedDict, total=False):
    root: _Name
    fingerprint: str
    prior: list[Annotated[FiniteFloat, Field(ge=0)]]


class _Environment(TypedDict, total=False):
    versions: dict[str, str]
    hardware: dict[str, Any]
    command: list[_Name]


class _Summary(TypedDict, total=False):
    status: Literal["running", "finished", "interrupted"]
    seconds: float
    epochs: int
    best_epoch: int | None
    val: dict[str, Any]


class _Member(TypedDict):
    folder: _Name
    temperature: Positive


class _Ensemble(TypedDict, total=False):
    members: Annotated[list[_Member], Field(min_length=1)]


class _Epoch(TypedDict, total=False):
    epoch: Required[int]
    step: int
    lr: float
    train_loss: float | None
    train_top1_clean: float | None
    train_top1_mixed: float | None
    clean_fraction: float | None
    seconds: float
    images_per_second: float | None
    val: dict[str, float | None] | None
    is_best: bool
    is_probe: bool


@dataclass(frozen=True)
class PhotoPredictions:
    """Stored predictions of labeled photos, in natural order of path."""

    paths: tuple[str, ...]  # N, relative to the data root
    labels: NDArray[np.int64]  # (N,) class numbers
    probabilities: NDArray[np.float32]  # (N, K), rows sum to 1


class Run:
    """Reads a run folder. A file that is missing, damaged or not what it should be raises RunError.

    Args:
        path: The folder.

    Raises:
        RunError: There is no run in it.

    Examples:
        >>> run = fieldmark.Run("runs/mine")
        >>> run.classes, run.summary["status"]
        (('jay', 'robin', 'wren'), 'finished')
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"{self.path} is not a folder; a run is the folder that `fieldmark train --out` wrote")
        if not (self.path / RECIPE).is_file():
            raise RunError(f"{self.path} is not a run: it has no {RECIPE}")
        if not (self.path / RECIPE).stat().st_size:  # else all defaults, which no run ever meant
            raise RunError(f"{self.path} is not a run: its {RECIPE} is empty. Begin a new run")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        facts = [repr(str(self.path))]
        with suppress(RunError, LookupError, TypeError, ValueError):  # of a damaged run, what can be told
            facts.append(str(self.summary["status"]))
            facts.append(f"{len(self.classes)} classes")
            facts.append(f"validation {format_accuracy(self.summary['val'])}")
        return f"{type(self).__name__}({', '.join(facts)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the result with its interval, and the confusion matrix."""
        from fieldmark.plots import confusion_figure, figure_svg
        from fieldmark.training.metrics import confusion_matrix

        pictures: list[str] = []
        with suppress(RunError):  # what is not there is not shown
            found = self.predictions()
            predicted = found.probabilities.argmax(axis=1).astype(np.int64)
            confusion = confusion_matrix(predicted, found.labels, num_classes=len(self.classes))
            figure, tips = confusion_figure(confusion, self.classes)
            pictures.append(figure_svg(figure, tips, key=f"{self.path}-confusion"))
        return fill_template("run.html", {"text": repr(self), "pictures": pictures})

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
        """Class names; a class's number is its index."""
        names = tuple(_read_json(self._file(CLASSES), list[_Name]))
        if not names or len(set(names)) < len(names):
            raise RunError(f"{self.path / CLASSES} should be a list of different class names; got {str(names)[:80]}")
        return names

    @cached_property
    def split(self) -> PhotoIndex:
        """Every photo of the run with its label and split."""
        home = self._home
        index = load_split_table(home._file(find_split_table(home.path / SPLIT).name), self.data_info["root"])
        # The classes of the model, in its order, whatever the photos in the table would say.
        return replace(index, classes=self.classes)

    @cached_property
    def model_info(self) -> dict[str, Any]:
        """Backbone, head, evaluation transform, parameters, license and pre-training of the weights."""
        return _read_json(self._file(MODEL), _Model)

    @cached_property
    def data_info(self) -> dict[str, Any]:
        """Root, fingerprint, counts and the classes' prior in training."""
        return _read_json(self._home._file(DATA), _Data)

    @property
    def is_ensemble(self) -> bool:
        """Whether several models answer together; then there is no single model to load."""
        return (self.path / ENSEMBLE).is_file()

    @cached_property
    def ensemble_info(self) -> dict[str, Any]:
        """Folders, names and temperatures of an ensemble's members."""
        return _read_json(self._file(ENSEMBLE), _Ensemble)

    @property
    def members(self) -> list[Run]:
        """The runs of an ensemble, in its order; of any other run the run itself."""
        if not self.is_ensemble:
            return [self]
        return [Run(self.path / MEMBERS / row["folder"]) for row in self.ensemble_info["members"]]

    @property
    def _home(self) -> Run:
        """The run that says which photos these are: of a member of an ensemble the ensemble."""
        inside = self.path.resolve().parent
        is_member = inside.name == MEMBERS and (inside.parent / ENSEMBLE).is_file()
        return Run(inside.parent) if is_member else self

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware and command line."""
        return _read_json(self._file(ENVIRONMENT), _Environment)

    @property
    def summary(self) -> dict[str, Any]:
        """Status, best epoch and its metrics; `{"status": "running"}` while there is none."""
        if not (self.path / SUMMARY).is_file():
            return {"status": "running"}
        return _read_json(self.path / SUMMARY, _Summary)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One object per completed epoch, in order."""
        return read_metrics(self.path)

    def require_photos(self, index: PhotoIndex) -> None:
        """Raise DataError unless these are the very photos, labels and splits that the run began with."""
        if index.fingerprint() != self.data_info["fingerprint"]:
            raise DataError(
                f"the photos under {index.root} are not those that {self.path} began with (their fingerprint differs): "
                "bring them back, or begin a new run"
            )

    @cached_property
    def prior(self) -> NDArray[np.float64]:
        """(K,) share of each class among the training photos."""
        prior = np.asarray(self.data_info["prior"], np.float64)
        if len(prior) != len(self.classes):
            raise RunError(f"{self.path / DATA} has a prior of {len(prior)} classes, {CLASSES} {len(self.classes)}")
        return prior

    def predictions(self, split: str = "val") -> PhotoPredictions:
        """Give the stored predictions of the kept weights; a RunError where none are stored for this split."""
        path = self.path / "predictions" / f"{split}.parquet"
        if path.is_file():
            return _read_predictions(path, self.classes)
        if split == "val" and self.config.data.train_on == "train+val":
            raise RunError(
                f"{self.path} holds no predictions of 'val': it was trained on train+val, which leaves no "
                "validation photos. Train one with data.train_on=train for this"
            )
        raise RunError(f"{self.path} holds no predictions of {split!r}: run `fieldmark evaluate` on it first")

    def eval_spec(self) -> EvalSpec:
        """Say how a photo becomes the picture that the model is shown."""
        from fieldmark.augment.reference import EvalSpec

        self._refuse_ensemble()
        with _named(self.path / MODEL):
            return read_values(EvalSpec, self.model_info["eval"])

    def decode_spec(self) -> DecodeSpec:
        """Say how files become the pixels that the model was trained on."""
        from fieldmark.runs.dataset import decode_spec

        return decode_spec(self.config.data)

    def load_model(self) -> Classifier:
        """Load the model with the kept weights, on the CPU, in evaluation mode."""
        from fieldmark.models.classifier import create_classifier
        from fieldmark.training.checkpoint import load_saved_weights

        self._refuse_ensemble()
        create, weights = self.model_info["create"], load_saved_weights(self.path / WEIGHTS)
        with _named(self.path / MODEL):
            if create.get("num_classes") != len(self.classes):
                raise ValueError(f"creates {create.get('num_classes')} classes, {CLASSES} names {len(self.classes)}")
            model = create_classifier(**create)
            model.load_state_dict(weights)
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


class RunResults(Run):
    """A run folder with its predictions of one split, `val` or `test`, in order of path."""

    def __init__(self, path: str | Path, *, split: str) -> None:
        super().__init__(path)
        stored = self.predictions(split)
        order = sorted(range(len(stored.paths)), key=stored.paths.__getitem__)
        self.photos = tuple(stored.paths[number] for number in order)
        self.labels = stored.labels[order]  # (N,) class numbers
        self.probabilities = stored.probabilities[order]  # (N, K)
        self.epoch_predictions: NDArray[np.int64] | None = None  # (E, N) class numbers, where they were kept
        epochs = self.path / EPOCHS
        if split == "val" and epochs.is_file():
            predicted = read_epochs(epochs)
            if predicted.shape[1] != len(order):
                raise RunError(f"{epochs} holds predictions of shape {predicted.shape}, not of {len(order)} photos")
            self.epoch_predictions = predicted[:, order].astype(np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(N,) most probable class; of equals, the first."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether each photo was right."""
        return self.predicted == self.labels


class _Record(dict[str, Any]):
    """A JSON object of a run folder, which names its file where a key is missing."""

    def __init__(self, content: Any = (), path: Path = Path("a file of the run folder")) -> None:
        super().__init__(content)  # `dataclasses.asdict` copies a mapping by its pairs alone
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self._path} lacks {key!r}: it is damaged, or another version wrote it")


_WRONG_CONTENT = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
                  zipfile.BadZipFile, zlib.error)  # fmt: skip


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Turn whatever reading a file of the wrong content raises into one sentence that names the file."""
    try:
        yield
    except _WRONG_CONTENT as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
        if isinstance(error, OSError):
            raise RunError(f"{path} cannot be read: {reason}") from error
        reason = f"lacks {reason}" if isinstance(error, LookupError) else reason
        raise RunError(f"{path} {reason}: it is damaged, or another version wrote it") from error


def _read_json(path: Path, kind: Any) -> Any:
    """The content of a JSON file as it is, once it is found to be of this kind."""
    with _named(path):
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
        read_values(kind, content)
    return _Record(content, path) if isinstance(content, dict) else content


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=True) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the epochs that a run folder reports, if any; a torn last line, as a kill leaves it, is left out."""
    path = run / METRICS
    if not path.is_file():
        return []
    with _named(path):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
        read_values(list[_Epoch], rows)
    return rows


def write_predictions(
    path: Path,
    *,
    paths: Sequence[str],
    labels: Sequence[int] | NDArray[np.int64],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> None:
    """Store predictions of labeled photos: `path`, `label` (a name), and one column of probabilities per class."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        # File names need not be valid UTF-8; Parquet strings must be.
        "path": pa.array([name.encode("utf-8", "surrogateescape") for name in paths], pa.binary()),
        "label": pa.array([classes[number] for number in labels], pa.string()),
        **{f"p:{name}": pa.array(probabilities[:, number]) for number, name in enumerate(classes)},
    }
    table = pa.table(columns)
    whole_or_absent(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


def _read_predictions(path: Path, classes: Sequence[str]) -> PhotoPredictions:
    import pyarrow.parquet as pq

    number_of = {name: number for number, name in enumerate(classes)}
    with _named(path):
        # Not read_table: it would take a folder named like "x=y" for a partition.
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        columns = [np.asarray(table[f"p:{name}"].to_numpy(), np.float32) for name in classes]
        return PhotoPredictions(
            paths=tuple(name.decode("utf-8", "surrogateescape") for name in table["path"].to_pylist()),
            labels=np.asarray([number_of[name] for name in table["label"].to_pylist()], np.int64),
            probabilities=np.stack(columns, axis=1),
        )


def read_epochs(path: Path) -> NDArray[np.integer[Any]]:
    """(E, N) predicted classes after each epoch, from val_epochs.npz."""
    # Opened here: numpy leaves a file open that is no archive.
    with _named(path), path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        predicted = content["predicted"]
        if predicted.ndim != 2 or predicted.dtype.kind not in "iu":
            raise ValueError(f"has predicted of shape {predicted.shape} and type {predicted.dtype}, not whole numbers")
        return predicted


def forget_answers(path: Path) -> None:
    """Remove what a run folder says of weights that are about to be replaced; validation is predicted anew."""
    (path / CALIBRATION).unlink(missing_ok=True)
    for file in (path / "predictions").glob("*.parquet"):
        if file.stem != "val":
            file.unlink()


def find_runs(paths: Iterable[Run | str | Path]) -> list[Path]:
    """Find the finished runs among `paths` and, where a path is a sweep or another folder of runs, right under it.

    A path that is neither a run folder nor holds one, or that names a run that is not finished, is a RunError; a `Run`
    is taken as it is, also while it trains.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if isinstance(given, Run):
            inside = [path]
        elif (path / SUMMARY).is_file():
            if run_status(path) != "finished":
                raise RunError(f"{path} is not finished (its status is {run_status(path)!r}): resume it first")
            inside = [path]
        else:
            inside = sorted(entry.parent for entry in path.glob(f"*/{SUMMARY}"))
            inside = [entry for entry in inside if run_status(entry) == "finished"]
        if not inside:
            what = "holds no finished run" if path.is_dir() else "does not exist"
            raise RunError(f"{path} {what}: give run folders (with a {SUMMARY}) or a folder of them, such as a sweep")
        found.extend(inside)
    return list(dict.fromkeys(found))


def run_status(path: Path) -> str:
    """Read the status from a run's summary; "missing" where there is none that can be read."""
    try:
        return str(_read_json(path / SUMMARY, _Summary)["status"])
    except RunError:
        return "missing"


def flatten(settings: Config | Mapping[str, Any], prefix: str = "", *, separator: str = ".") -> dict[str, Any]:
    """Dotted key to value, of every setting; nested tables and dotted keys may be mixed, as in TOML."""
    table = settings.model_dump(mode="json") if isinstance(settings, Config) else settings
    flat: dict[str, Any] = {}
    for key, value in table.items():
        is_table = isinstance(value, dict)
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}{separator}", separator=separator) if is_table else {name: value}
    return flat


def format_accuracy(metrics: Mapping[str, Any]) -> str:
    """Top-1 accuracy with its interval."""
    low, high = metrics["top1_interval"]
    return f"top-1 {metrics['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}"


def format_value(value: Any) -> str:
    """A setting's value in a few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return "none" if value is None else str(value)
