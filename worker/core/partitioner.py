"""Kafka's default partitioner, for many records at once: which output partition a record goes to. Pure."""

from collections.abc import Sequence
from itertools import compress
from typing import Final

import numpy as np
from numpy.typing import NDArray

SEED: Final = np.uint32(0x9747B28C)
FACTOR: Final = np.uint32(0x5BD1E995)
WORD: Final = 4
POSITIVE: Final = np.uint32(0x7FFFFFFF)
MAX_PADDED_BYTES: Final = 256  # keys are padded to the longest one; longer keys are hashed one by one

Hashes = NDArray[np.uint32]


def partitions_for(keys: Sequence[bytes | None], origins: Sequence[int], partitions: int) -> Hashes:
    """The output partitions of N records, shape (N,): murmur2 of the key modulo ``partitions``.

    Where the key is null, it is the record's input partition, of ``origins``, modulo ``partitions``.
    """
    hashes = murmur2([key or b"" for key in keys] if None in keys else keys) & POSITIVE  # type: ignore[arg-type]
    if None in keys:
        hashes = np.where([key is not None for key in keys], hashes, np.array(origins, np.uint32))
    return hashes % np.uint32(partitions)


def murmur2(keys: Sequence[bytes]) -> Hashes:
    """The hashes of N keys, unsigned, shape (N,), as Kafka's Java client computes them."""
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    if lengths.max(initial=0) <= MAX_PADDED_BYTES:
        return _hash_padded(keys, lengths)
    hashes = np.empty(len(keys), np.uint32)
    is_short = lengths <= MAX_PADDED_BYTES
    hashes[is_short] = _hash_padded(list(compress(keys, is_short)), lengths[is_short])
    for place in np.flatnonzero(~is_short).tolist():
        hashes[place] = _hash_padded([keys[place]], lengths[place : place + 1])[0]
    return hashes


def _hash_padded(keys: Sequence[bytes], lengths: NDArray[np.int64]) -> Hashes:
    """The same for keys of similar length: all are hashed at once, four bytes after four bytes."""
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
