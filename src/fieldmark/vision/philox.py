"""Random numbers that are a pure function of (seed, epoch, photo number): a counter-based generator, vectorised.

Shape letters: B photos of a batch, N draws of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fieldmark.errors import DataError

NOISE_SIZE = 1 << 20
"""Length of the noise bank."""

CROP, FLIP, AFFINE, COLOR, POLICY, ERASE, MIX = range(7)
"""Streams: each part draws from its own, so switching one off leaves the others' numbers alone."""


def uniforms(seed: int, epoch: int, numbers: ArrayLike, *, stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers that are a pure function of their arguments.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        numbers: (B,) photo numbers (or steps), each 0 to 2**32 - 1.
        stream: Which part draws; numbers of two streams are independent.
        count: Draws per number.

    Returns:
        (B, count) in [0, 1), multiples of 2**-32.

    Raises:
        DataError: A seed, epoch or number outside its range.
    """
    return uniform_streams(seed, epoch, numbers, {stream: count})[stream]


def uniform_streams(
    seed: int, epoch: int, numbers: ArrayLike, counts: Mapping[int, int]
) -> dict[int, NDArray[np.float64]]:
    """`uniforms` of several streams in one go, which saves most of the time of small batches.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        numbers: (B,) photo numbers (or steps), each 0 to 2**32 - 1.
        counts: Draws per number, by stream.

    Returns:
        By stream, (B, count) in [0, 1).

    Raises:
        DataError: A seed, epoch or number outside its range.
    """
    array = np.asarray(numbers, dtype=np.int64).reshape(-1)
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 32 and np.all((array >= 0) & (array < 1 << 32))):
        raise DataError(
            "random numbers need a seed of 0 to 2**64 - 1 and epochs and photo numbers of 0 to 2**32 - 1; "
            f"got seed {seed}, epoch {epoch}, numbers {array.min(initial=0)} to {array.max(initial=0)}"
        )
    blocks = {stream: -(-count // 4) for stream, count in counts.items()}
    counter = np.empty((len(array), sum(blocks.values()), 4), dtype=np.uint64)
    counter[..., 0] = np.concatenate([np.arange(0), *map(np.arange, blocks.values())])
    counter[..., 1] = array.astype(np.uint64)[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = np.repeat(np.array(list(blocks), dtype=np.uint64), list(blocks.values()))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(len(array), -1).astype(np.float64) * 2.0**-32
    starts = 4 * np.cumsum([0, *blocks.values()])
    return {stream: words[:, start : start + counts[stream]] for stream, start in zip(blocks, starts, strict=False)}


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox-4x32-10, a counter-based generator: ten rounds of multiply and exchange.

    Written here because NumPy's own Philox (4x64) is a sequential stream: it can't be evaluated at many counters at
    once.

    Args:
        counter: (..., 4) 32-bit words, held in 64 bits.
        key: Two 32-bit words.

    Returns:
        (..., 4) 32-bit words, held in 64 bits.

    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, sec. 3.3 and table 2.
    """
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    # Words 0 and 2 are multiplied, words 3 and 1 are mixed in: two arrays of pairs halve the calls.
    factors = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for number in range(10):
        keys = [(key[1] + number * 0xBB67AE85) & 0xFFFFFFFF, (key[0] + number * 0x9E3779B9) & 0xFFFFFFFF]
        product = even * factors
        mixed = (product >> half) ^ odd[..., ::-1] ^ np.array(keys, dtype=np.uint64)
        even, odd = mixed[..., ::-1], (product & mask)[..., ::-1]
    return np.stack([even, odd], axis=-1).reshape(counter.shape)


@cache
def noise_bank() -> NDArray[np.float32]:
    """(2**20,) float32 numbers of N(0, 1), the same on every machine; read-only.

    RandomErasing's noise is read from it by every executor, because drawing 3 S² normal numbers per photo costs more
    than the rest of the augmentation.
    """
    bank = np.random.Generator(np.random.Philox(0)).standard_normal(NOISE_SIZE, dtype=np.float32)
    bank.setflags(write=False)
    return bank
