"""The photos of a data set as columns: ten million take what their paths take, and none is an object until it is read.

Text is kept as bytes, in which names that are not UTF-8 are what the file system gave (PEP 383).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fieldmark.data.folders import Photo, natural_key

PARTS = ("train", "val", "test", "")
"""The splits, and "" for a photo whose split is not decided; a split's number is its index here."""
TRAIN, VAL, TEST, UNDECIDED = range(len(PARTS))
ROWS_AT_ONCE = 1 << 16

Item = TypeVar("Item")


@functools.cache
def arrow() -> tuple[Any, Any]:
    """Import pyarrow and its functions: a fifth of a second, for which a single prediction need not wait."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa, pc


class Rows(Sequence[Item]):
    """A sequence that equals any other of the same, and is indexed by a number, a slice, numbers or a mask."""

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True, eq=False)
class Texts(Rows[str]):
    """Many texts in one piece of memory; each becomes a `str` when it is asked for."""

    array: Any  # pyarrow's LargeBinaryArray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Texts as they are, or made of others."""
        if isinstance(texts, Texts):
            return texts
        return cls(_pack(map(to_bytes, texts)).combine_chunks())

    def find(self, others: Texts) -> NDArray[np.int64]:
        """(N,) the index among `others` of each, -1 for one that is not there."""
        if not len(self) or self.array.equals(others.array):  # what would be looked up in takes memory
            return np.arange(len(self))
        return np.asarray(arrow()[1].index_in(self.array, value_set=others.array).fill_null(-1)).astype(np.int64)

    def are_repeats(self) -> NDArray[np.bool_]:
        """(N,) whether each is the same as the one before."""
        return np.append(False, arrow()[1].equal(self.array[1:], self.array[:-1]))[: len(self)]

    def matching(self, pattern: str) -> NDArray[np.int64]:
        """The numbers of those in which a regular expression, of RE2, matches."""
        return np.flatnonzero(np.asarray(arrow()[1].match_substring_regex(self.array, pattern)))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return self.array[int(index)].as_py().decode("utf-8", "surrogateescape")
        return Texts(self.array.take(arrow()[0].array(np.arange(len(self))[index])))

    def __iter__(self) -> Iterator[str]:
        parts = (self.array[start : start + ROWS_AT_ONCE] for start in range(0, len(self), ROWS_AT_ONCE))
        return (content.decode("utf-8", "surrogateescape") for part in parts for content in part.to_pylist())


@dataclass(frozen=True, eq=False)
class Categories(Rows[str]):
    """Texts of which many are the same: each is the number of its word."""

    numbers: NDArray[np.integer[Any]]  # (N,) index in `words`; -1 for ""
    words: Sequence[str]  # different ones, of which some may not be used any more

    @classmethod
    def of(cls, texts: Iterable[str]) -> Categories:
        """The words in the order in which they first come."""
        numbers: dict[str, int] = {}
        found = np.fromiter((numbers.setdefault(text, len(numbers)) if text else -1 for text in texts), np.int32)
        return cls(found, Texts.of(numbers))

    def used(self) -> dict[int, str]:
        """The words that are there, by their numbers."""
        return {number: str(self.words[number]) for number in np.unique(self.numbers).tolist() if number >= 0}

    def find(self, others: Sequence[str]) -> NDArray[np.int64]:
        """(N,) the index among `others` of each; -1 for a "" that is not there, LookupError for another text."""
        place = {"": -1} | {word: index for index, word in enumerate(others)}
        places = np.full(len(self.words) + 1, place[""], np.int64)  # whose last is that of -1
        for number, word in self.used().items():
            places[number] = place[word]
        return places[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return self.words[int(self.numbers[index])] if self.numbers[index] >= 0 else ""
        return Categories(self.numbers[index], self.words)

    def __iter__(self) -> Iterator[str]:
        words = [*self.words, ""]
        return (words[number] for number in self.numbers)


@dataclass(frozen=True, eq=False)
class Photos(Rows[Photo]):
    """Photos in columns; each becomes a `Photo` when it is asked for."""

    paths: Texts
    labels: Categories  # "" where there is no label
    splits: NDArray[np.int8]  # (N,) numbers of PARTS
    groups: Categories

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> Photos:
        """Photos as they are, or in columns."""
        if isinstance(photos, Photos):
            return photos
        photos = [*photos]
        labels = Categories.of(photo.label or "" for photo in photos)
        splits = Categories.of(photo.split for photo in photos).find(PARTS).astype(np.int8)
        groups = Categories.of(photo.group for photo in photos)
        return cls(Texts.of(photo.path for photo in photos), labels, splits, groups)

    def append(self, others: Photos) -> Photos:
        """These, then others."""
        paths = Texts.of(chain(self.paths, others.paths))
        labels, groups = chain(self.labels, others.labels), chain(self.groups, others.groups)
        splits = np.concatenate([self.splits, others.splits])
        return Photos(paths, Categories.of(labels), splits, Categories.of(groups))

    def sort(self) -> Photos:
        """The same in natural order of path."""
        return self[natural_order(self.paths)]

    def is_labeled(self) -> NDArray[np.bool_]:
        """(N,) whether each has a label."""
        return self.labels.numbers >= 0

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return Photo(self.paths[index], self.labels[index] or None, PARTS[self.splits[index]], self.groups[index])
        return Photos(self.paths[index], self.labels[index], self.splits[index], self.groups[index])

    def __iter__(self) -> Iterator[Photo]:
        rows = zip(self.paths, self.labels, self.splits, self.groups, strict=True)
        return (Photo(path, label or None, PARTS[split], group) for path, label, split, group in rows)


def to_bytes(text: str) -> bytes:
    """UTF-8, in which lone surrogates are the bytes that they stand for, or at least some bytes that are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def natural_order(paths: Texts) -> NDArray[np.int64]:
    """(N,) the numbers of paths in the order of `natural_key`; equal paths in their own order."""
    (pa, pc), key = arrow(), natural_key()
    rows = pa.table({"key": _pack(key(path)[0] for path in paths), "path": paths.array})
    order = np.asarray(pc.sort_indices(rows, sort_keys=[("key", "ascending"), ("path", "ascending")]))
    del rows
    pa.default_memory_pool().release_unused()  # it would keep what the keys took
    return order.astype(np.int64)


def _pack(contents: Iterator[bytes]) -> Any:
    """A pyarrow ChunkedArray, made piece by piece."""
    pa, _ = arrow()
    parts = iter(lambda: [*islice(contents, ROWS_AT_ONCE)], [])
    return pa.chunked_array([pa.array(part, pa.large_binary()) for part in parts], pa.large_binary())
