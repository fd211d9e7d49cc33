"""Predictions on disk: the leaderboard's CSV and zip, and long forms that hold every probability.

Each writer takes an iterator and keeps one batch in memory, so a folder of any size can be predicted. A file is whole
or absent: it is written beside its place and moved there at the end.

Shape letters: K classes.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from fieldmark.errors import PredictionError
from fieldmark.files import whole_or_absent
from fieldmark.inference.predictor import Prediction

Form = Literal["leaderboard", "long"]

LEADERBOARD_HEADER = ("image_name", "pred_label")
ENDINGS = (".csv", ".zip", ".json", ".parquet")
ROWS_PER_GROUP = 4096
NUM_LONG_COLUMNS = 5
"""Columns of the long form before those of the classes."""
GROUP_COLUMNS = ("level", "answer")
"""Columns after those of the classes, where the model was calibrated with a taxonomy."""


def save_predictions(
    predictions: Iterable[Prediction], path: Path, *, classes: Sequence[str], form: Form, has_groups: bool = False
) -> list[Prediction]:
    """Write one row for each prediction, in the order given.

    Args:
        predictions: Consumed once.
        path: `.csv`, `.zip` (holding `prediction.csv`), `.json` or `.parquet`; folders on the way are made.
        classes: K names, in order of class number.
        form: `leaderboard` has `image_name,pred_label`, the name without its extension; `long` has the path, the
            label, its probability, whether that is too little to answer, the problem of an unreadable photo, and a
            column `p:<class>` for each class. JSON and Parquet are always long.
        has_groups: Also write `level` and `answer` in the long form: the finest name of a taxonomy that is sure.

    Returns:
        The predictions of photos that could not be read. Their rows have an empty label.

    Raises:
        PredictionError: The file's ending says no known format.
        ResourceError: The file cannot be written.
    """
    writers: dict[str, Callable[[Iterable[Prediction], Path, Sequence[str], Form, bool], None]] = {
        ".csv": _save_csv,
        ".zip": _save_zip,
        ".json": _save_json,
        ".parquet": _save_parquet,
    }
    check_ending(path)
    writer = writers[path.suffix.lower()]
    failed: list[Prediction] = []

    def watched() -> Iterator[Prediction]:
        for prediction in predictions:
            if prediction.problem:
                failed.append(prediction)
            yield prediction

    def write(part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        writer(watched(), part, classes, form, has_groups)

    whole_or_absent(path, write)
    return failed


def is_leaderboard(path: Path, form: Form) -> bool:
    """Whether a file of this name would have the leaderboard form."""
    return form == "leaderboard" and path.suffix.lower() in (".csv", ".zip")


def check_ending(path: Path) -> None:
    """Hold the name of a file against the formats that there are.

    Raises:
        PredictionError: Its ending says no known format.
    """
    if path.suffix.lower() not in ENDINGS:
        raise PredictionError(f"{path}: predictions are written as {', '.join(ENDINGS)}; give one of these endings")


class DistinctNames:
    """File names without folder and extension, one after another, each once."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def add(self, path: str) -> str:
        """The name of a path.

        Raises:
            PredictionError: A path before it had the same name.
        """
        name = PurePosixPath(path).stem
        if name in self._seen:
            raise PredictionError(
                f"{self._seen[name]} and {path} would both be {name!r} in the leaderboard form, which drops folder "
                "and extension. Rename one, or write the long form, which keeps the whole path"
            )
        self._seen[name] = path
        return name


def distinct(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """The same predictions, as long as no two have one name in the leaderboard form.

    Raises:
        PredictionError: Two have.
    """
    names = DistinctNames()
    for prediction in predictions:
        names.add(prediction.path)
        yield prediction


def leaderboard_names(paths: Iterable[str]) -> list[str]:
    """File names without folder and extension: the ids of the leaderboard form.

    >>> leaderboard_names(["test/10.jpg", "test/a.b.jpeg"])
    ['10', 'a.b']

    Raises:
        PredictionError: Two photos would have the same name.
    """
    names = DistinctNames()
    return [names.add(path) for path in paths]


def check_sample(names: Sequence[str], sample: Path) -> None:
    """Hold the names that would be written against a sample submission.

    Args:
        names: As `leaderboard_names` gives them.
        sample: CSV whose first column is the wanted ids, in the wanted order, under the header
            `image_name,pred_label`.

    Raises:
        PredictionError: Header, ids, count or order differ; the message shows the first difference.
    """
    wanted = _sample_names(sample)
    missing, extra = set(wanted) - set(names), set(names) - set(wanted)
    if missing or extra:
        parts = [f"{len(wanted)} ids are wanted, {len(names)} photos are there"]
        if missing:
            parts.append(f"without a photo: {_some(missing)}")
        if extra:
            parts.append(f"not in the sample: {_some(extra)}")
        raise PredictionError(f"the photos do not match {sample}: {'; '.join(parts)}")
    for row, (name, want) in enumerate(zip(names, wanted, strict=True), start=1):
        if name != want:
            raise PredictionError(
                f"the photos match {sample} in another order: row {row} should be {want!r} and is {name!r}. "
                "Give --sample-order to write the rows in the sample's order"
            )


def in_sample_order(paths: Sequence[str], sample: Path) -> list[str]:
    """The paths, ordered as the sample's ids; ids and paths are checked by `check_sample` afterwards."""
    places = {name: place for place, name in enumerate(_sample_names(sample))}
    return sorted(paths, key=lambda path: places.get(PurePosixPath(path).stem, len(places)))


def _sample_names(sample: Path) -> list[str]:
    try:
        with sample.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise PredictionError(f"the sample submission {sample} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise PredictionError(f"the sample submission {sample} is not a CSV file: {error}") from None
    if not rows or tuple(rows[0]) != LEADERBOARD_HEADER:
        header = ",".join(rows[0]) if rows else "nothing"
        raise PredictionError(
            f"the sample submission {sample} starts with {header!r}; expected {','.join(LEADERBOARD_HEADER)!r}"
        )
    names = [row[0] for row in rows[1:] if row]
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise PredictionError(f"the sample submission {sample} holds the id {twice!r} twice")
    return names


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _save_csv(
    predictions: Iterable[Prediction], path: Path, classes: Sequence[str], form: Form, has_groups: bool
) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        _write_rows(file, _rows(predictions, classes, form, has_groups))


def _save_zip(
    predictions: Iterable[Prediction], path: Path, classes: Sequence[str], form: Form, has_groups: bool
) -> None:
    # A fixed date: equal predictions give equal files.
    entry = zipfile.ZipInfo("prediction.csv", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as raw,
        io.TextIOWrapper(raw, newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        _write_rows(file, _rows(predictions, classes, form, has_groups))


def _write_rows(file: IO[str], rows: Iterable[Sequence[str]]) -> None:
    plain = csv.writer(file, lineterminator="\n")
    # csv quotes only the line ending it writes itself; a lone carriage return in a name would split the row.
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        (quoted if any("\r" in field for field in row) else plain).writerow(row)


def _rows(
    predictions: Iterable[Prediction], classes: Sequence[str], form: Form, has_groups: bool
) -> Iterator[Sequence[str]]:
    if form == "leaderboard":
        yield LEADERBOARD_HEADER
        for prediction in predictions:
            yield _leaderboard_row(prediction)
        return
    yield [*_long_header(classes), *(GROUP_COLUMNS if has_groups else ())]
    for prediction in predictions:
        groups = (prediction.answer.level, prediction.answer.name) if has_groups else ()
        yield [*_long_row(prediction, len(classes)), *groups]


def _leaderboard_row(prediction: Prediction) -> list[str]:
    return [PurePosixPath(prediction.path).stem, prediction.label]


def _long_header(classes: Sequence[str]) -> list[str]:
    return ["path", "pred_label", "probability", "is_unknown", "problem", *(f"p:{name}" for name in classes)]


def _long_row(prediction: Prediction, num_classes: int) -> list[str]:
    head = [prediction.path, prediction.label]
    if prediction.problem:
        return [*head, "", "true", prediction.problem, *[""] * num_classes]
    # Nine digits bring back every float32.
    is_unknown = "true" if prediction.is_unknown else "false"
    return [*head, f"{prediction.probability:.9g}", is_unknown, "", *(f"{p:.9g}" for p in prediction.probabilities)]


def _save_json(
    predictions: Iterable[Prediction], path: Path, classes: Sequence[str], form: Form, has_groups: bool
) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write('{"classes": ' + json.dumps(list(classes)) + ', "predictions": [')
        for number, prediction in enumerate(predictions):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(json_row(prediction)))
        file.write("\n]}\n")


def json_row(prediction: Prediction) -> dict[str, Any]:
    """One prediction as plain data; the probabilities of an unreadable photo are None."""
    answer = prediction.answer
    groups = {"level": answer.level or None, "answer": answer.name or None} if prediction.back_off else {}
    return {
        "path": prediction.path,
        "pred_label": prediction.label or None,
        "probability": None if prediction.problem else float(f"{prediction.probability:.9g}"),
        "problem": prediction.problem,
        "is_unknown": prediction.is_unknown,
        **groups,
        "probabilities": None
        if prediction.problem
        else {name: float(f"{p:.9g}") for name, p in zip(prediction.classes, prediction.probabilities, strict=True)},
    }


def _save_parquet(
    predictions: Iterable[Prediction], path: Path, classes: Sequence[str], form: Form, has_groups: bool
) -> None:
    import pyarrow.parquet as pq

    schema = long_schema(classes, has_groups=has_groups)
    with pq.ParquetWriter(path, schema) as writer:
        rows = iter(predictions)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(long_table(group, schema))


def long_schema(classes: Sequence[str], *, has_groups: bool) -> Any:
    """Arrow schema of the long form, with or without `GROUP_COLUMNS`."""
    import pyarrow as pa

    text, number = pa.string(), pa.float32()
    fields = [("path", text), ("pred_label", text), ("probability", number)]
    fields += [("is_unknown", pa.bool_()), ("problem", text)]
    groups = [(name, text) for name in (GROUP_COLUMNS if has_groups else ())]
    return pa.schema([*fields, *((f"p:{name}", number) for name in map(_utf8, classes)), *groups])


def long_table(group: Sequence[Prediction], schema: Any) -> Any:
    """Arrow table of the long form, of some predictions."""
    import pyarrow as pa

    has_groups = tuple(schema.names[-len(GROUP_COLUMNS) :]) == GROUP_COLUMNS
    num_classes = len(schema) - NUM_LONG_COLUMNS - (len(GROUP_COLUMNS) if has_groups else 0)
    columns: list[list[Any]] = [
        [_utf8(prediction.path) for prediction in group],
        [_utf8(prediction.label) if prediction.label else None for prediction in group],
        [None if prediction.problem else prediction.probability for prediction in group],
        [prediction.is_unknown for prediction in group],
        [_utf8(prediction.problem) for prediction in group],
        *(
            [None if prediction.problem else float(prediction.probabilities[k]) for prediction in group]
            for k in range(num_classes)
        ),
    ]
    if has_groups:
        answers = [prediction.answer for prediction in group]
        columns += [[answer.level or None for answer in answers], [answer.name or None for answer in answers]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _utf8(name: str) -> str:
    """Parquet text is UTF-8; bytes of a file name that are not are shown as hexadecimal escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
