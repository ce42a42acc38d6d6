"""Which output partition a record goes to: Kafka's default partitioner, for many records at once. Pure; numpy alone."""

from collections.abc import Sequence
from itertools import compress
from typing import Final

import numpy as np
from numpy.typing import NDArray

SEED: Final = np.uint32(0x9747B28C)
FACTOR: Final = np.uint32(0x5BD1E995)
WORD: Final = 4
POSITIVE: Final = np.uint32(0x7FFFFFFF)
LONGEST_TOGETHER: Final = 256  # bytes: keys are padded to the longest of those that are hashed together

Hashes = NDArray[np.uint32]


def partitions_for(keys: Sequence[bytes | None], origins: Sequence[int], partitions: int) -> Hashes:
    """The output partitions of N records, shape (N,), each below ``partitions``.

    By murmur2 of the key; where that is null, the input partition modulo the output's partitions.
    """
    hashes = murmur2([key or b"" for key in keys] if None in keys else keys) & POSITIVE  # type: ignore[arg-type]
    if None in keys:
        hashes = np.where([key is not None for key in keys], hashes, np.array(origins, np.uint32))
    return hashes % np.uint32(partitions)


def murmur2(keys: Sequence[bytes]) -> Hashes:
    """The hash of each, as Kafka's Java client has it, unsigned."""
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    if len(keys) and lengths.max() <= LONGEST_TOGETHER:
        return _together(keys, lengths)
    hashes = np.empty(len(keys), np.uint32)
    is_short = lengths <= LONGEST_TOGETHER
    hashes[is_short] = _together(list(compress(keys, is_short)), lengths[is_short])
    for place in np.flatnonzero(~is_short).tolist():
        hashes[place] = _together([keys[place]], lengths[place : place + 1])[0]
    return hashes


def _together(keys: Sequence[bytes], lengths: NDArray[np.int64]) -> Hashes:
    """A column of words after the other, for all keys that reach so far."""
    if not len(keys):
        return np.empty(0, np.uint32)
    columns = int(lengths.max()) // WORD + 1
    words = np.array(keys, f"S{columns * WORD}").view("<u4").reshape(-1, columns)  # padded with zeros
    whole = lengths // WORD
    mixed = words * FACTOR
    mixed ^= mixed >> np.uint32(24)
    mixed *= FACTOR
    hashes = SEED ^ lengths.astype(np.uint32)
    for column in range(int(whole.max())):
        hashes = np.where(column < whole, hashes * FACTOR ^ mixed[:, column], hashes)
    rest = words[np.arange(len(keys)), whole]
    hashes = np.where(lengths % WORD, (hashes ^ rest) * FACTOR, hashes)
    hashes ^= hashes >> np.uint32(13)
    hashes *= FACTOR
    return hashes ^ hashes >> np.uint32(15)
