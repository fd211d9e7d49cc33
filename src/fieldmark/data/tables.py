"""Tables of text: CSV and Parquet files in, CSV files out.

Every value is text exactly as written: "01" stays "01". Bytes that are not UTF-8 survive as lone surrogates (PEP 383),
and what is written is read back the same, newlines and quotes included.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldmark.errors import DataError, did_you_mean
from fieldmark.files import whole_or_absent

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns of text with their names."""

    name: str
    """What messages call it."""

    values: Mapping[str, list[str]]
    """The text of each column, in the order of the file; one value for each row."""

    unusable: Mapping[str, str]
    """Columns that cannot be taken as text, and why. It matters only to those who ask for them."""

    num_rows: int

    def column(self, name: str, *, setting: str = "") -> list[str]:
        """The values of a column, one for each row.

        Args:
            name: The column's.
            setting: Where a user may give another name, for the message.

        Raises:
            DataError: There is no such column, or it is not text; lists the columns there are.
        """
        if name in self.unusable:
            raise DataError(f"{self.name}: column {name!r} {self.unusable[name]}")
        if name not in self.values:
            names = [*self.values, *self.unusable]
            there = ", ".join(repr(column) for column in names)
            hint = did_you_mean(name, names) or "."
            way_out = f" Rename one, or say which it is: --set {setting}=NAME" if setting else ""
            raise DataError(f"{self.name} has no column {name!r}; it has {there}{hint}{way_out}")
        return self.values[name]

    def optional_column(self, name: str | None) -> list[str]:
        """As `column`, but empty text for each row where there is no such column or `name` is None."""
        if name is None or (name not in self.values and name not in self.unusable):
            return [""] * self.num_rows
        return self.column(name)


def read_table(path: Path) -> Table:
    """Read a CSV (comma, semicolon or tab; UTF-8, or UTF-16 with its mark) or Parquet file as text.

    Raises:
        DataError: Not a table, unreadable, no header, two columns of one name, or a row of another length than the
            header.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path} is a file, but not a table ({', '.join(TABLE_SUFFIXES)}). Give a folder or a table")
    try:
        return _read_parquet(path) if suffix == ".parquet" else read_csv(str(path), path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_csv(path: str, data: bytes) -> Table:
    """Read the content of a CSV file, as `read_table` does, wherever it lies.

    Args:
        path: What messages call it; `.tsv` at its end says what separates the values.
        data: Its content.

    Raises:
        DataError: As in `read_table`.
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
        header = _checked_header(path, next(reader, []))
        rows: list[tuple[str, ...]] = []
        for row in reader:
            if len(row) not in (0, len(header)):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} values, but the header names {len(header)} columns. "
                    "Put values that hold the separator in double quotes"
                )
            if row:
                rows.append(tuple(row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV table: {error}") from None
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    return Table(path, {name: list(column) for name, column in zip(header, columns, strict=True)}, {}, len(rows))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV file whole or not at all; `read_table` gives the same text back.

    Raises:
        ResourceError: The disk is full, or the folder not writable or not there.
    """
    # A bare carriage return is quoted by some versions of Python only, so quote everything where there is one.
    needs_quotes = any("\r" in value for row in rows for value in row)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if needs_quotes else csv.QUOTE_MINIMAL)
    writer.writerow(columns)
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8", errors="surrogateescape")
    whole_or_absent(path, lambda part: part.write_bytes(content))


def _checked_header(path: str, header: Sequence[str]) -> Sequence[str]:
    if not header:
        raise DataError(f"{path} is empty: its first line must name the columns")
    twice = [name for place, name in enumerate(header) if name in header[:place]]
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]!r}: rename one of them")
    return header


def _delimiter(path: str, text: str) -> str:
    if path.lower().endswith(".tsv"):
        return "\t"
    header = text.split("\n", 1)[0]
    return max(",;\t", key=header.count)


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # unlike read_table, makes no column of a folder named "year=2024"
            content = file.read()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} is not a Parquet table: {error}") from None
    values: dict[str, list[str]] = {}
    unusable: dict[str, str] = {}
    names = _checked_header(str(path), content.column_names)
    for name, column in zip(names, content.columns, strict=True):
        if pa.types.is_floating(column.type):
            unusable[name] = f"holds {column.type} numbers: is it 1 or 1.0? Store it as text or as integers"
        else:
            values[name] = [_text(value) for value in column.to_pylist()]
    return Table(str(path), values, unusable, content.num_rows)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return "" if value is None else str(value)
