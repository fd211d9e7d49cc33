"""Predictions on disk: a table for people, a long form with every probability, a leaderboard's form, and parts.

Each writer takes an iterator and keeps one batch in memory, so a folder of any size can be predicted. A file is whole
or absent: it is written beside its place and moved there at the end.

Shape letters: K classes.
"""

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np

from fieldmark.data.folders import NONE, quote
from fieldmark.data.tables import read_table, write_rows
from fieldmark.errors import DataError, PredictionError, first_line
from fieldmark.files import fill_template, whole_or_absent
from fieldmark.inference.predictor import Prediction, Predictor

Form = Literal["short", "long", "leaderboard"]

LEADERBOARD_HEADER = ("image_name", "pred_label")
LONG_HEADER = ("path", "pred_label", "probability", "is_unknown", "problem")  # before the columns of the classes
GROUP_COLUMNS = ("level", "answer")  # after them, where the model was calibrated with a taxonomy
ENDINGS = (".csv", ".zip", ".json", ".parquet")
ROWS_PER_GROUP = 4096
_EXACT = "path_bytes"
_ROWS_AT_ONCE = 1024
_TOP = 3
MOST_FAILURES_SHOWN = 20
MOST_CLASSES_SHOWN = 5


def choose_form(path: Path, form: Form | None, *, has_sample: bool = False) -> Form:
    """The form of a file: JSON and Parquet are long; else what was asked for; else by the ending and the sample."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise PredictionError(f"{path}: predictions are written as {', '.join(ENDINGS)}; give one of these endings")
    if ending in (".json", ".parquet"):
        return "long"
    return form or ("leaderboard" if has_sample or ending == ".zip" else "short")


@dataclass
class PredictedPhotos:
    """Holds what was predicted, and how to show it."""

    out: Path | None  # the file that was written
    count: int = 0  # photos asked about
    failed: list[Prediction] = field(default_factory=list[Prediction])  # of photos that could not be read
    shown: Sequence[Prediction] = ()  # all predictions where no file was asked for, else none
    prior: Mapping[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """Of each class its share in `training` and that `assumed` here, where the answers were corrected for it."""

    def watch(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions, counted as they pass."""
        for prediction in predictions:
            self.count += 1
            if prediction.problem:
                self.failed.append(prediction)
            yield prediction

    def content(self) -> Any:
        """The shown predictions for machines, or what was written."""
        if self.out is None:
            return [json_row(prediction) for prediction in self.shown]
        failed = [{"path": prediction.path, "problem": prediction.problem} for prediction in self.failed]
        prior = {"prior": self.prior} if self.prior else {}
        return {"out": str(self.out), "rows": self.count, "failed": failed, **prior}

    def table(self) -> str:
        """What the terminal shows: without a file one line each, up to three classes for a single photo."""
        return fill_template("predictions.md", vars(self))

    def prior_message(self) -> str:
        """That the answers were corrected for other class shares than in training, and the largest changes."""
        changes = sorted(self.prior.items(), key=lambda row: -abs(row[1]["assumed"] - row[1]["training"]))
        return fill_template("prior.md", {"count": self.count, "changes": changes, "most": MOST_CLASSES_SHOWN})

    def failure_message(self) -> str:
        """Return which photos could not be read, and why."""
        return fill_template("failures.md", {"failed": self.failed, "count": self.count, "most": MOST_FAILURES_SHOWN})


def save_predictions(
    predictions: Iterable[Prediction],
    path: Path,
    *,
    classes: Sequence[str],
    form: Form | None = None,
    has_groups: bool = False,
) -> PredictedPhotos:
    """Write one row for each prediction, in the order given, in a form of docs/verbs/predict.md; see `choose_form`."""
    form, ending = choose_form(path, form), path.suffix.lower()
    done = PredictedPhotos(path)
    rows = done.watch(predictions)

    def write(part: Path) -> None:
        if ending == ".json":
            with part.open("w", encoding="utf-8") as file:
                file.write('{"classes": ' + json.dumps(list(classes)) + ', "predictions": [')
                for number, prediction in enumerate(rows):
                    file.write((",\n" if number else "\n") + json.dumps(json_row(prediction)))
                file.write("\n]}\n")
        elif ending == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetWriter(part, long_table([], classes, has_groups=has_groups).schema) as writer:
                while group := list(islice(rows, ROWS_PER_GROUP)):
                    writer.write_table(long_table(group, classes, has_groups=has_groups))
        else:
            _write_csv(part, _text_rows(rows, classes, form, has_groups=has_groups), zipped=ending == ".zip")

    whole_or_absent(path, write)
    return done


def leaderboard_names(paths: Iterable[str]) -> Iterator[str]:
    """File names without folder and extension: the ids of the leaderboard form, each of which must be one photo's.

    >>> list(leaderboard_names(["test/10.jpg", "test/a.b.jpeg"]))
    ['10', 'a.b']
    """
    seen: dict[str, str] = {}
    for path in paths:
        name = _submitted_name(path)
        if name in seen:
            raise PredictionError(
                f"{seen[name]} and {path} would both be {name!r} in the leaderboard form, which drops folder "
                "and extension. Rename one, or write --form short or the long form, which keep the whole path"
            )
        seen[name] = path
        yield name


def _submitted_name(path: str) -> str:
    """The stem, also of a path that a list from Windows has."""
    return PurePosixPath(path.replace("\\", "/")).stem


def check_sample(names: Sequence[str], sample: Path) -> None:
    """Compare names, as `leaderboard_names` gives them, with a sample submission: its header, its ids, their order."""
    wanted = _sample_names(sample)
    missing, extra = set(wanted) - set(names), set(names) - set(wanted)
    if missing or extra:
        parts = [f"{len(wanted)} ids are wanted, {len(names)} photos are there"]
        if missing:
            parts.append(f"without a photo: {quote(sorted(missing))}")
        if extra:
            parts.append(f"not in the sample: {quote(sorted(extra))}")
        raise PredictionError(f"the photos do not match {sample}: {'; '.join(parts)}")
    for row, (name, want) in enumerate(zip(names, wanted, strict=True), start=1):
        if name != want:
            raise PredictionError(
                f"the photos match {sample} in another order: row {row} should be {want!r} and is {name!r}. "
                "Give --sample-order to write the rows in the sample's order"
            )


def in_sample_order(paths: Sequence[str], sample: Path) -> list[str]:
    """The paths, ordered as the sample's ids; ids and paths are checked by `check_sample` afterwards."""
    order = {name: number for number, name in enumerate(_sample_names(sample))}
    return sorted(paths, key=lambda path: order.get(_submitted_name(path), len(order)))


def _sample_names(sample: Path) -> Sequence[str]:
    try:
        table = read_table(sample)
    except DataError as error:
        raise PredictionError(f"the sample submission {error}") from None
    if tuple(table.values) != LEADERBOARD_HEADER:
        raise PredictionError(
            f"the sample submission {sample} starts with {','.join(table.values)!r}; "
            f"expected {','.join(LEADERBOARD_HEADER)!r}"
        )
    names = table.column(LEADERBOARD_HEADER[0])
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise PredictionError(f"the sample submission {sample} holds the id {twice!r} twice")
    return names


def _write_csv(path: Path, rows: Iterable[Sequence[str]], *, zipped: bool) -> None:
    with ExitStack() as stack:
        if zipped:
            # A fixed date: equal predictions give equal files.
            entry = zipfile.ZipInfo("prediction.csv", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive = stack.enter_context(zipfile.ZipFile(path, "w"))
            raw = stack.enter_context(archive.open(entry, "w", force_zip64=True))
        else:
            raw: IO[bytes] = stack.enter_context(path.open("wb"))
        text = io.TextIOWrapper(raw, newline="", encoding="utf-8", errors="surrogateescape")
        write_rows(stack.enter_context(text), rows)


def _text_rows(
    predictions: Iterable[Prediction], classes: Sequence[str], form: Form, *, has_groups: bool
) -> Iterator[Sequence[str]]:
    if form == "leaderboard":
        yield LEADERBOARD_HEADER
        named, labeled = tee(predictions)
        yield from zip(leaderboard_names(one.path for one in named), (one.label for one in labeled), strict=True)
    elif form == "long":
        yield _long_columns(classes, has_groups=has_groups)
        yield from (list(map(_as_text, _long_values(one, has_groups=has_groups))) for one in predictions)
    else:
        count = min(_TOP, len(classes) - (NONE in classes))
        ranks = ["", *(f"_{rank}" for rank in range(2, count + 1))]
        top = [f"{column}{rank}" for rank in ranks for column in ("label", "probability")]
        yield ["path", *top, "is_unknown", "problem", *(GROUP_COLUMNS if has_groups else ())]
        for one in predictions:
            top = [text for name, share in one.top(count) for text in (name, f"{share:.4f}")] or [""] * (2 * count)
            groups = one.answer[:2] if has_groups else ()
            yield [one.path, *top, _as_text(one.is_unknown), one.problem, *groups]


def _as_text(value: str | float | bool | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.9g}"  # nine digits bring back every float32
    return "" if value is None else str(value)


def _long_columns(classes: Sequence[str], *, has_groups: bool) -> list[str]:
    return [*LONG_HEADER, *(f"p:{name}" for name in classes), *(GROUP_COLUMNS if has_groups else ())]


def _long_values(prediction: Prediction, *, has_groups: bool) -> list[str | float | bool | None]:
    """The values of `_long_columns`; None where there is none."""
    is_read, label = not prediction.problem, prediction.label or None
    probabilities = prediction.probabilities.tolist() if is_read else [None] * len(prediction.classes)
    groups = [name or None for name in prediction.answer[:2]] if has_groups else []
    head = [prediction.path, label, prediction.probability if is_read else None, prediction.is_unknown]
    return [*head, prediction.problem, *probabilities, *groups]


def json_row(prediction: Prediction) -> dict[str, Any]:
    """One prediction as plain data; the probabilities of an unreadable photo are None."""
    level, answer, _ = prediction.answer
    shares = zip(prediction.classes, prediction.probabilities.tolist(), strict=True)
    known = None if prediction.problem else {name: float(f"{share:.9g}") for name, share in shares}
    return {
        "path": prediction.path,
        "pred_label": prediction.label or None,
        "probability": known and known[prediction.label],
        "problem": prediction.problem,
        "is_unknown": prediction.is_unknown,
        **({"level": level or None, "answer": answer or None} if prediction.fallback else {}),
        "probabilities": known,
    }


def long_table(group: Sequence[Prediction], classes: Sequence[str], *, has_groups: bool) -> Any:
    """Arrow table of the long form, of some predictions, with or without `GROUP_COLUMNS`."""
    import pyarrow as pa

    text, number = pa.string(), pa.float32()
    kinds = [text, text, number, pa.bool_(), text, *[number] * len(classes), *([text, text] if has_groups else [])]
    names = [_utf8(name) for name in _long_columns(classes, has_groups=has_groups)]
    rows = [map(_utf8, _long_values(prediction, has_groups=has_groups)) for prediction in group]
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return pa.Table.from_arrays(arrays, names=names)


def _utf8(value: Any) -> Any:
    """Parquet text is UTF-8; bytes of a file name that are not are shown as hexadecimal escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return value


def save_part(path: Path, predictions: Sequence[Prediction], *, classes: Sequence[str]) -> None:
    """Write a part, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    has_groups = any(prediction.fallback for prediction in predictions)
    table = long_table(predictions, classes, has_groups=has_groups)
    names = [prediction.path.encode("utf-8", "surrogateescape") for prediction in predictions]
    if any(name.decode("utf-8", "replace") != p.path for name, p in zip(names, predictions, strict=True)):
        table = table.append_column(_EXACT, pa.array(names, pa.binary()))
    whole_or_absent(path, lambda part: pq.write_table(table, part, write_page_checksum=True))


def load_part(path: Path, predictor: Predictor) -> Iterator[Prediction]:
    """The rows of a part, to the bit as they were predicted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                names, problems = batch.column("path").to_pylist(), batch.column("problem").to_pylist()
                if _EXACT in batch.schema.names:
                    names = [name.decode("utf-8", "surrogateescape") for name in batch.column(_EXACT).to_pylist()]
                columns = range(len(LONG_HEADER), len(LONG_HEADER) + len(predictor.classes))
                rows = np.stack([batch.column(k).to_numpy(zero_copy_only=False) for k in columns], axis=1)
                for name, row, problem in zip(names, rows.astype(np.float32), problems, strict=True):
                    yield Prediction(name, predictor.classes, row, problem, predictor.threshold, predictor.fallback)
    except FileNotFoundError:
        raise PredictionError(
            f"{path} is not there though it was made: let all machines share the folder of --out, and call again"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise PredictionError(f"{path} cannot be read: {first_line(error)}. Remove it and go on") from None
