"""Parts of a prediction: the long form in Parquet, each with a key that says of what it is.

A part keeps the exact name of every photo, also one that is no valid text, which Parquet can only show escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fieldmark.errors import PredictionError
from fieldmark.files import whole_or_absent
from fieldmark.outputs.back_off import BackOff
from fieldmark.outputs.prediction_files import NUM_LONG_COLUMNS, long_schema, long_table
from fieldmark.outputs.predictor import Prediction

_KEY = b"fieldmark.part"
_EXACT = "path_bytes"
_ROWS_AT_ONCE = 1024


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies; sorted by name, parts are in order up to a hundred million."""
    return folder / f"part-{number:08d}.parquet"


def save_part(path: Path, predictions: Sequence[Prediction], *, classes: Sequence[str], key: str) -> None:
    """Write a part, whole or not at all.

    Args:
        path: The file.
        predictions: Its rows.
        classes: K names, in order of class number.
        key: What the rows depend on.

    Raises:
        ResourceError: It cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    has_groups = any(prediction.back_off for prediction in predictions)
    table = long_table(predictions, long_schema(classes, has_groups=has_groups))
    names = [prediction.path.encode("utf-8", "surrogateescape") for prediction in predictions]
    if any(name.decode("utf-8", "replace") != p.path for name, p in zip(names, predictions, strict=True)):
        table = table.append_column(_EXACT, pa.array(names, pa.binary()))
    keyed = table.replace_schema_metadata({_KEY: key.encode()})

    def write(part: Path) -> None:
        part.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(keyed, part)

    whole_or_absent(path, write)


def part_rows(path: Path, *, key: str) -> int | None:
    """Number of rows of a part, or None if there is no part of this key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return None
    return facts.num_rows if (facts.metadata or {}).get(_KEY) == key.encode() else None


def load_part(
    path: Path, *, classes: tuple[str, ...], threshold: float, back_off: BackOff | None
) -> Iterator[Prediction]:
    """The rows of a part, to the bit as they were predicted.

    Raises:
        PredictionError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                columns = {name: batch.column(name).to_pylist() for name in ("path", "problem")}
                names = columns["path"]
                if _EXACT in batch.schema.names:
                    names = [name.decode("utf-8", "surrogateescape") for name in batch.column(_EXACT).to_pylist()]
                rows = np.stack(
                    [batch.column(NUM_LONG_COLUMNS + k).to_numpy(zero_copy_only=False) for k in range(len(classes))],
                    axis=1,
                ).astype(np.float32)
                for name, row, problem in zip(names, rows, columns["problem"], strict=True):
                    yield Prediction(name, classes, row, problem, threshold, back_off)
    except (OSError, pa.ArrowException) as error:
        raise PredictionError(f"{path} cannot be read: {str(error).splitlines()[0]}. Remove it and go on") from None
