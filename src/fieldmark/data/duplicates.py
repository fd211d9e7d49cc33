"""The same photo twice: by its bytes, and by its perceptual hash among hundreds of thousands of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

NUM_BITS = 64
BAND_BITS = 16
NUM_BANDS = NUM_BITS // BAND_BITS
PAIRS_AT_ONCE = 4_000_000

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


def same_values(values: Sequence[str]) -> list[list[int]]:
    """Places of each value that occurs more than once, in order of first occurrence; "" does not count."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if value:
            places[value].append(place)
    return [found for found in places.values() if len(found) > 1]


def near_pairs(first: Hashes, second: Hashes, *, max_distance: int) -> tuple[Places, Places, Places]:
    """Every pair of one hash of `first` and one of `second` that differ in few bits. Exact, not approximate.

    Args:
        first: (N,) 64-bit hashes.
        second: (M,) 64-bit hashes.
        max_distance: Largest Hamming distance, 0 to 64. Up to 7 a search takes about a second for 50,000 x 50,000;
            above 11 it nears a comparison of everything with everything.

    Returns:
        (P,) places in `first`, (P,) places in `second`, (P,) distances; ordered by distance, then by place.

    Source:
        Norouzi, Punjani, Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing", arXiv:1307.2982,
        section 3: of four bands of 16 bits, at least one differs in no more than a quarter of the distance.
    """
    # Equal hashes are searched once: a thousand black photos would otherwise be a million pairs in every band.
    unique_first, inverse_first = np.unique(first, return_inverse=True)
    unique_second, inverse_second = np.unique(second, return_inverse=True)
    found = [
        np.stack([left, right])
        for band in range(NUM_BANDS)
        for left, right in _candidates(unique_first, unique_second, band, max_distance // NUM_BANDS)
        for left, right in [_keep_near(unique_first, unique_second, left, right, max_distance)]
    ]
    if not found:
        return _expand(np.empty((2, 0), dtype=np.int64), inverse_first, inverse_second, first, second)
    pairs = np.unique(np.concatenate(found, axis=1), axis=1)  # a pair is found in every band that is close
    return _expand(pairs, inverse_first, inverse_second, first, second)


def _candidates(first: Hashes, second: Hashes, band: int, radius: int) -> Iterator[tuple[Places, Places]]:
    """Pairs whose band differs in at most `radius` bits, a portion at a time."""
    shift = np.uint64(band * BAND_BITS)
    bands_first = ((first >> shift) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
    bands_second = ((second >> shift) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)
    order = np.argsort(bands_second, kind="stable")
    # starts[v] : starts[v + 1] are the places in `order` of the hashes whose band is v.
    starts = np.concatenate([[0], np.cumsum(np.bincount(bands_second, minlength=2**BAND_BITS))])
    for flipped in _masks(radius):
        wanted = bands_first ^ flipped
        counts = starts[wanted + 1] - starts[wanted]
        for chunk in _chunks(counts):
            repeats = counts[chunk]
            left = np.repeat(np.arange(len(first))[chunk], repeats)
            ends = np.cumsum(repeats)
            within = np.arange(len(left)) - np.repeat(ends - repeats, repeats)
            yield left, order[np.repeat(starts[wanted[chunk]], repeats) + within]


def _masks(radius: int) -> list[int]:
    """Every number of BAND_BITS bits with at most `radius` of them set."""
    sizes = range(min(radius, BAND_BITS) + 1)
    return [sum(1 << bit for bit in bits) for size in sizes for bits in combinations(range(BAND_BITS), size)]


def _chunks(counts: Places) -> Iterator[slice]:
    """Slices over `counts`, each of about PAIRS_AT_ONCE pairs, so that memory stays bounded."""
    portion = np.cumsum(counts) // PAIRS_AT_ONCE
    borders = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(counts)]
    for start, stop in pairwise(borders):
        if counts[start:stop].any():
            yield slice(start, stop)


def _keep_near(first: Hashes, second: Hashes, left: Places, right: Places, max_distance: int) -> tuple[Places, Places]:
    near = np.bitwise_count(first[left] ^ second[right]) <= max_distance
    return left[near], right[near]


def _expand(
    pairs: Places, inverse_first: Places, inverse_second: Places, first: Hashes, second: Hashes
) -> tuple[Places, Places, Places]:
    """Pairs of unique hashes back to pairs of all that have them."""
    members_first = np.split(np.argsort(inverse_first, kind="stable"), np.cumsum(np.bincount(inverse_first))[:-1])
    members_second = np.split(np.argsort(inverse_second, kind="stable"), np.cumsum(np.bincount(inverse_second))[:-1])
    lefts: list[Places] = [np.empty(0, dtype=np.int64)]
    rights: list[Places] = [np.empty(0, dtype=np.int64)]
    for one, other in pairs.T:
        ours, theirs = members_first[one], members_second[other]
        lefts.append(np.repeat(ours, len(theirs)))
        rights.append(np.tile(theirs, len(ours)))
    left, right = np.concatenate(lefts), np.concatenate(rights)
    distances = np.bitwise_count(first[left] ^ second[right]).astype(np.int64)
    order = np.lexsort((right, left, distances))
    return left[order], right[order], distances[order]
