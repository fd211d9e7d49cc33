"""Predictions on disk: a table for people, a long form that holds every probability, and a leaderboard's form.

Each writer takes an iterator and keeps one batch in memory, so a folder of any size can be predicted. A file is whole
or absent: it is written beside its place and moved there at the end.

Shape letters: K classes.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

from fieldmark.data.tables import read_table
from fieldmark.errors import DataError, PredictionError
from fieldmark.files import whole_or_absent

if TYPE_CHECKING:
    from fieldmark.inference.predictor import Prediction

Form = Literal["short", "long", "leaderboard"]

LEADERBOARD_HEADER = ("image_name", "pred_label")
LONG_HEADER = ("path", "pred_label", "probability", "is_unknown", "problem")
"""Columns of the long form before those of the classes."""
GROUP_COLUMNS = ("level", "answer")
"""Columns after those of the classes, where the model was calibrated with a taxonomy."""
ENDINGS = (".csv", ".zip", ".json", ".parquet")
ROWS_PER_GROUP = 4096
_TOP = 3
MOST_FAILURES_SHOWN = 20
MOST_CLASSES_SHOWN = 5


def choose_form(path: Path, form: Form | None, *, has_sample: bool = False) -> Form:
    """The form of a file: JSON and Parquet are long; else what was asked for; else by the ending and the sample.

    Raises:
        PredictionError: The ending says no known format.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise PredictionError(f"{path}: predictions are written as {', '.join(ENDINGS)}; give one of these endings")
    if ending in (".json", ".parquet"):
        return "long"
    return form or ("leaderboard" if has_sample or ending == ".zip" else "short")


def save_predictions(
    predictions: Iterable[Prediction],
    path: Path,
    *,
    classes: Sequence[str],
    form: Form | None = None,
    has_groups: bool = False,
) -> list[Prediction]:
    """Write one row for each prediction, in the order given.

    Args:
        predictions: Consumed once.
        path: `.csv`, `.zip` (holding `prediction.csv`), `.json` or `.parquet`; folders on the way are made.
        classes: K names, in order of class index.
        form: `short` has the path, the label and its probability, the next two classes with theirs, whether the answer
            is too unsure to count, and the problem of an unreadable photo; `long` has a column `p:<class>` for each
            class instead of the next two; `leaderboard` has `image_name,pred_label`, the name without its extension.
            None is as `choose_form` says.
        has_groups: Also write `level` and `answer`: the finest name of a taxonomy that is sure.

    Returns:
        The predictions of photos that could not be read. Their rows have an empty label.

    Raises:
        PredictionError: The file's ending says no known format, or two rows would have one name in the leaderboard.
        ResourceError: The file cannot be written.
    """
    form = choose_form(path, form)
    failed: list[Prediction] = []

    def collect_failed() -> Iterator[Prediction]:
        for prediction in check_distinct(predictions) if form == "leaderboard" else predictions:
            if prediction.problem:
                failed.append(prediction)
            yield prediction

    def write(part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".json":
            _write_json(part, collect_failed(), classes)
        elif path.suffix.lower() == ".parquet":
            _write_parquet(part, collect_failed(), classes, has_groups=has_groups)
        else:
            rows = _text_rows(collect_failed(), classes, form, has_groups=has_groups)
            (_write_zip if path.suffix.lower() == ".zip" else _write_csv)(part, rows)

    whole_or_absent(path, write)
    return failed


@dataclass
class PredictedPhotos:
    """What was predicted, and how to show it.

    Attributes:
        out: The file that was written, or None.
        count: Photos asked about.
        failed: Predictions of photos that could not be read.
        shown: All predictions where no file was asked for, else none.
        prior: (class, share in training, share estimated here), where the answers were corrected for it.
    """

    out: Path | None
    count: int
    failed: list[Prediction]
    shown: Sequence[Prediction] = ()
    prior: Sequence[tuple[str, float, float]] = ()

    def rows(self) -> list[dict[str, Any]]:
        """The shown predictions as plain data."""
        return [json_row(prediction) for prediction in self.shown]

    def as_dict(self) -> dict[str, Any]:
        """What was written, for machines."""
        failed = [{"path": prediction.path, "problem": prediction.problem} for prediction in self.failed]
        prior = {"prior": _prior_dict(self.prior)} if self.prior else {}
        return {"out": str(self.out), "rows": self.count, "failed": failed, **prior}

    def table(self) -> str:
        """The shown predictions for people: one line each, up to three classes for a single photo."""
        if len(self.shown) == 1 and not self.shown[0].problem:
            [only] = self.shown
            lines = [f"{probability:7.2%}  {name}" for name, probability in only.top(3)]
            return "\n".join([*lines, *_describe_doubt(only)])
        return "\n".join(_format_line(prediction) for prediction in self.shown)

    def prior_message(self) -> str:
        """That the answers were corrected for other class shares than in training, and the largest changes."""
        largest = sorted(self.prior, key=lambda row: -abs(row[2] - row[1]))[:MOST_CLASSES_SHOWN]
        shares = ", ".join(f"{name} {before:.1%} to {now:.1%}" for name, before, now in largest)
        return (
            f"corrected for class shares estimated from these {self.count} photos (--prior estimate), from training to "
            f"here: {shares}{' ...' if len(self.prior) > len(largest) else ''}"
        )

    def failure_message(self) -> str:
        """Which photos could not be read, and why."""
        lines = [f"  {prediction.path!r} {prediction.problem}" for prediction in self.failed[:MOST_FAILURES_SHOWN]]
        left = len(self.failed) - len(lines)
        more = [f"  ... and {left} more"] if left else []
        head = f"error: {len(self.failed)} of {self.count} photos could not be read; their rows have no label:"
        return "\n".join([head, *lines, *more])


def _format_line(prediction: Prediction) -> str:
    if prediction.problem:
        return f"{prediction.path}\t(could not be read: {prediction.problem})"
    notes = [prediction.path, prediction.label, f"{prediction.probability:.4f}", *_describe_doubt(prediction)]
    return "\t".join(notes)


def _describe_doubt(prediction: Prediction) -> list[str]:
    """That the model is not sure enough of the class, and which group it is sure of; nothing where it is sure."""
    if prediction.problem or not prediction.is_unknown:
        return []
    answer = prediction.answer
    return [f"unknown, but {answer.level} {answer.name} {answer.probability:.4f}" if answer.level else "unknown"]


def _prior_dict(prior: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    return {name: {"training": before, "estimated": now} for name, before, now in prior}


def save_prior(path: Path, prior: Sequence[tuple[str, float, float]]) -> Path:
    """Write beside a prediction file that its answers were corrected, and for which class shares.

    Raises:
        ResourceError: It cannot be written.
    """
    beside = path.with_name(f"{path.name}.prior.json")
    text = json.dumps({"method": "expectation-maximization", "shares": _prior_dict(prior)}, indent=2) + "\n"
    whole_or_absent(beside, lambda part: part.write_text(text, encoding="utf-8"))
    return beside


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
                "and extension. Rename one, or write --form short or the long form, which keep the whole path"
            )
        self._seen[name] = path
        return name


def check_distinct(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
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
    """Compare the names that would be written with a sample submission.

    Args:
        names: As `leaderboard_names` gives them.
        sample: Table whose first column is the wanted ids, in the wanted order, under the header
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
        table = read_table(sample)
    except DataError as error:
        raise PredictionError(f"the sample submission {error}") from None
    if tuple(table.values) != LEADERBOARD_HEADER:
        raise PredictionError(
            f"the sample submission {sample} starts with {','.join(table.values)!r}; "
            f"expected {','.join(LEADERBOARD_HEADER)!r}"
        )
    names, seen = table.column(LEADERBOARD_HEADER[0]), set[str]()
    for name in names:
        if name in seen:
            raise PredictionError(f"the sample submission {sample} holds the id {name!r} twice")
        seen.add(name)
    return names


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        _write_rows(file, rows)


def _write_zip(path: Path, rows: Iterable[Sequence[str]]) -> None:
    # A fixed date: equal predictions give equal files.
    entry = zipfile.ZipInfo("prediction.csv", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open(entry, "w", force_zip64=True) as raw,
        io.TextIOWrapper(raw, newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        _write_rows(file, rows)


def _write_rows(file: IO[str], rows: Iterable[Sequence[str]]) -> None:
    plain = csv.writer(file, lineterminator="\n")
    # csv quotes only the line ending it writes itself; a lone carriage return in a name would split the row.
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        (quoted if any("\r" in field for field in row) else plain).writerow(row)


def _text_rows(
    predictions: Iterable[Prediction], classes: Sequence[str], form: Form, *, has_groups: bool
) -> Iterator[Sequence[str]]:
    if form == "leaderboard":
        yield LEADERBOARD_HEADER
        for prediction in predictions:
            yield PurePosixPath(prediction.path).stem, prediction.label
        return
    groups = GROUP_COLUMNS if has_groups else ()
    if form == "long":
        yield [*LONG_HEADER, *(f"p:{name}" for name in classes), *groups]
    else:
        others = [
            f"{column}_{place}" for place in range(2, _count_top(classes) + 1) for column in ("label", "probability")
        ]
        yield ["path", "label", "probability", *others, "is_unknown", "problem", *groups]
    for prediction in predictions:
        row = _long_row(prediction, len(classes)) if form == "long" else _short_row(prediction, _count_top(classes))
        yield [*row, *((prediction.answer.level, prediction.answer.name) if has_groups else ())]


def _count_top(classes: Sequence[str]) -> int:
    return min(_TOP, len(classes))


def _short_row(prediction: Prediction, count: int) -> list[str]:
    is_unknown = "true" if prediction.is_unknown else "false"
    if prediction.problem:
        return [prediction.path, *[""] * (2 * count), is_unknown, prediction.problem]
    top = [field for name, probability in prediction.top(count) for field in (name, f"{probability:.4f}")]
    return [prediction.path, *top, is_unknown, ""]


def _long_row(prediction: Prediction, num_classes: int) -> list[str]:
    head = [prediction.path, prediction.label]
    if prediction.problem:
        return [*head, "", "true", prediction.problem, *[""] * num_classes]
    # Nine digits bring back every float32.
    is_unknown = "true" if prediction.is_unknown else "false"
    return [*head, f"{prediction.probability:.9g}", is_unknown, "", *(f"{p:.9g}" for p in prediction.probabilities)]


def _write_json(path: Path, predictions: Iterable[Prediction], classes: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write('{"classes": ' + json.dumps(list(classes)) + ', "predictions": [')
        for number, prediction in enumerate(predictions):
            file.write(",\n" if number else "\n")
            file.write(json.dumps(json_row(prediction)))
        file.write("\n]}\n")


def json_row(prediction: Prediction) -> dict[str, Any]:
    """One prediction as plain data; the probabilities of an unreadable photo are None."""
    answer = prediction.answer
    groups = {"level": answer.level or None, "answer": answer.name or None} if prediction.fallback else {}
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


def _write_parquet(path: Path, predictions: Iterable[Prediction], classes: Sequence[str], *, has_groups: bool) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, long_table([], classes, has_groups=has_groups).schema) as writer:
        rows = iter(predictions)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(long_table(group, classes, has_groups=has_groups))


def long_table(group: Sequence[Prediction], classes: Sequence[str], *, has_groups: bool) -> Any:
    """Arrow table of the long form, of some predictions, with or without `GROUP_COLUMNS`."""
    import pyarrow as pa

    text, number = pa.string(), pa.float32()
    is_read = [not prediction.problem for prediction in group]
    columns: list[tuple[str, Any, list[Any]]] = [
        ("path", text, [_utf8(prediction.path) for prediction in group]),
        ("pred_label", text, [_utf8(prediction.label) or None for prediction in group]),
        ("probability", number, [p.probability if ok else None for p, ok in zip(group, is_read, strict=True)]),
        ("is_unknown", pa.bool_(), [prediction.is_unknown for prediction in group]),
        ("problem", text, [_utf8(prediction.problem) for prediction in group]),
    ]
    for k, name in enumerate(classes):
        values = [float(p.probabilities[k]) if ok else None for p, ok in zip(group, is_read, strict=True)]
        columns.append((f"p:{_utf8(name)}", number, values))
    if has_groups:
        answers = [prediction.answer for prediction in group]
        columns.append(("level", text, [answer.level or None for answer in answers]))
        columns.append(("answer", text, [answer.name or None for answer in answers]))
    arrays = [pa.array(values, kind) for _, kind, values in columns]
    return pa.Table.from_arrays(arrays, schema=pa.schema([(name, kind) for name, kind, _ in columns]))


def _utf8(name: str) -> str:
    """Parquet text is UTF-8; bytes of a file name that are not are shown as hexadecimal escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
