"""Tables of text: CSV and Parquet files in and out.

The one reader of training tables, corrections, taxonomies, samples and lists. Every value is text exactly as written:
"01" stays "01". Bytes that are not UTF-8 survive as lone surrogates (PEP 383) in paths and are refused elsewhere; what
is written is read back the same, newlines and quotes included.
"""

import csv
import io
import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fieldmark.data.columns import Texts
from fieldmark.data.storage import opened
from fieldmark.errors import DataError, did_you_mean, first_line
from fieldmark.files import whole_or_absent, write_whole

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Columns of text with their names."""

    name: str  # what messages call it
    values: Mapping[str, Sequence[str]]  # the text of each column, in the order of the file; one value for each row
    unusable: Mapping[str, str]  # columns that cannot be taken as text, and why; it matters if they are asked for
    lines: Sequence[int]  # the line of the file that each row begins on, from 1; of Parquet the row's number, from 1

    @property
    def num_rows(self) -> int:
        """Rows that hold anything."""
        return len(self.lines)

    def where(self, row: int) -> str:
        """Name a row for a message: the table and the line."""
        return f"{self.name}, line {self.lines[row]}"

    def column(self, name: str, *, option: str = "", is_text: bool = True) -> Sequence[str]:
        """Read the values of a column, one for each row.

        The DataError for a column that is not there names the option that would say which it is. Bytes that are not
        UTF-8 are refused in text; else they come as lone surrogates, as paths may.
        """
        if name in self.unusable:
            raise DataError(f"{self.name}: column {name!r} {self.unusable[name]}")
        if name not in self.values:
            names = [*self.values, *self.unusable]
            there = ", ".join(repr(column) for column in names)
            hint = did_you_mean(name, names) or "."
            way_out = f" Rename one, or say which it is: {option}" if option else ""
            raise DataError(f"{self.name} has no column {name!r}; it has {there}{hint}{way_out}")
        if is_text:
            for row, value in enumerate(self.values[name]):
                if not value.isascii() and (problem := encoding_problem(value)):
                    raise DataError(f"{self.where(row)}: {problem}. Save the table as UTF-8 (Excel: CSV UTF-8)")
        return self.values[name]

    def optional_column(self, name: str | None, *, is_text: bool = True) -> Sequence[str]:
        """Read a column as `column` does; empty text for each row where there is none or `name` is None."""
        if name is None or (name not in self.values and name not in self.unusable):
            return [""] * self.num_rows
        return self.column(name, is_text=is_text)


def encoding_problem(text: str) -> str:
    """Say that text holds bytes that are not UTF-8, and what they may be; "" for proper text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        data = text.encode("utf-8", "surrogateescape")
        try:
            return f"{data!r} is not UTF-8; as Windows-1252 it is {data.decode('cp1252')!r}"
        except UnicodeDecodeError:
            return f"{data!r} is not UTF-8"
    return ""


def read_table(location: Path | str, only: Collection[str | None] | None = None) -> Table:
    """Read a CSV (comma, semicolon or tab; UTF-8 or UTF-16) or Parquet file, here or behind a URL, as text.

    Of Parquet `only` some columns, if that is said. Raises DataError.
    """
    name = str(location)
    if not name.lower().endswith(TABLE_SUFFIXES):
        raise DataError(f"{name} is a file, but not a table ({', '.join(TABLE_SUFFIXES)}). Give a folder or a table")
    if name.lower().endswith(".parquet"):
        return _read_parquet(name, only)
    with opened(name) as file:
        return read_csv(name, file.read())


def read_csv(path: str, data: bytes) -> Table:
    """Read the content of a CSV file, as `read_table` does, wherever it comes from; `path` is its name in messages.

    A first line `sep=;`, as Excel writes it, names the separator. Rows without a value are skipped.
    """
    text = _decode_text(path, data)
    given = re.match(r'"?sep=(.)"?\r?\n', text)
    text = text[given.end() :] if given else text
    header = text.split("\n", 1)[0]
    delimiter = given[1] if given else "\t" if path.lower().endswith(".tsv") else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 2 if given else 1
    line = first
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        names = _check_header(path, next(reader, []))
        line = reader.line_num + first
        for row in reader:
            if len(row) not in (0, len(names)):
                raise DataError(
                    f"{path}, line {line}: {len(row)} values, but the header names {len(names)} columns. "
                    "Put values that hold the separator in double quotes"
                )
            if row and (len(row) == 1 or any(map(str.strip, row))):
                rows.append(row)
                lines.append(line)
            line = reader.line_num + first
    except csv.Error as error:
        is_open = "unexpected end of data" in str(error)
        problem = "a double quote is opened and never closed" if is_open else str(error)
        raise DataError(f"{path} is not a CSV table: line {line}: {problem}") from None
    return Table(path, {name: [row[column] for row in rows] for column, name in enumerate(names)}, {}, lines)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file whole or not at all; `read_table` gives the same text back."""
    text = io.StringIO(newline="")
    write_rows(text, [columns, *rows])
    write_whole(path, text.getvalue())


def write_table(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write columns of text as CSV or, by the name, Parquet, where what is not UTF-8 is bytes; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        return write_csv(path, [*columns], zip(*columns.values(), strict=True))
    arrays = {name: Texts.of(texts).array for name, texts in columns.items()}
    for name, array in arrays.items():
        with suppress(pa.ArrowInvalid):
            arrays[name] = array.cast(pa.large_string())
    return whole_or_absent(path, lambda part: pq.write_table(pa.table(arrays), part, write_page_checksum=True))


def write_rows(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of CSV to a file that is open with `newline=""`."""
    # Only some versions of Python quote a bare carriage return, which would split the row.
    plain, quoted = (csv.writer(file, lineterminator="\n", quoting=kind) for kind in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for row in rows:
        (quoted if any("\r" in str(value) for value in row) else plain).writerow(row)


def _check_header(path: str, header: Sequence[str]) -> Sequence[str]:
    if not header:
        raise DataError(f"{path} is empty: its first line must name the columns")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise DataError(f"{path} has two columns named {twice[0]!r}: rename one of them")
    return header


def _decode_text(path: str, data: bytes) -> str:
    """UTF-16 with its mark or plainly so, else UTF-8, of which what is none survives as lone surrogates."""
    has_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not has_mark and b"\0" not in data[:2]:
        return data.decode("utf-8-sig", errors="surrogateescape")
    encoding = "utf-16" if has_mark else "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a CSV table: it begins as UTF-16; {error.reason}. Save it as UTF-8") from None


@contextmanager
def open_parquet(location: str, name: str) -> Generator[Any]:
    """A Parquet file of this machine or behind a URL for reading; a DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(location) as file:
        try:
            table = pq.ParquetFile(file)  # unlike pq.read_table, makes no column of a folder named "year=2024"
        except (pa.ArrowException, ValueError) as error:
            raise DataError(f"{name} is not a Parquet table: {first_line(error)}") from None
        yield table


def _read_parquet(path: str, only: Collection[str | None] | None) -> Table:
    import pyarrow as pa

    values: dict[str, Texts] = {}
    unusable: dict[str, str] = {}
    with open_parquet(path, path) as file:
        _check_header(path, file.schema_arrow.names)
        for field in file.schema_arrow:
            if pa.types.is_floating(field.type):
                unusable[field.name] = f"holds {field.type} numbers: is it 1 or 1.0? Store it as text or as integers"
            elif only is None or field.name in only:
                values[field.name] = _as_texts(file.read([field.name]).column(0))
            else:
                unusable[field.name] = "was not asked for"
            pa.default_memory_pool().release_unused()  # it would keep what unpacking took
        return Table(path, values, unusable, range(1, file.metadata.num_rows + 1))


def _as_texts(column: Any) -> Texts:
    """The text of a Parquet column: of what is text or whole numbers at once, of all else value by value."""
    import pyarrow as pa

    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    try:
        return Texts(column.cast(pa.large_binary()).fill_null(b"").combine_chunks())
    except pa.ArrowNotImplementedError:
        return Texts.of(map(cell_text, column.to_pylist()))


def cell_text(value: Any) -> str:
    """Text of a Parquet cell; bytes that are not UTF-8 come as lone surrogates."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return "" if value is None else str(value)
