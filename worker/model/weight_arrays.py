"""Reads a file's numbers into numpy arrays: which types there are, and how they become float32. Needs no torch."""

import math
from collections.abc import Sequence
from io import BufferedReader
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DTYPES: Final = {  # safetensors' names of the types; bfloat16, which numpy does not know, by its bits
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?",
}  # fmt: skip
ITEM_BYTES: Final = {name: np.dtype(code).itemsize for name, code in DTYPES.items()}


class UnusableFile(Exception):
    """A file of weights cannot be used; the message goes on after the file's name."""


class Damaged(UnusableFile):
    """The file breaks the rules of its format."""

    def __init__(self, why: str) -> None:
        super().__init__(f"is damaged ({why}); if it was cut short, copy or download it again")


class OnlyForTorch(UnusableFile):
    """The file is whole, and only torch reads it."""


def read_array(file: BufferedReader, offset: int, shape: Sequence[int], dtype: str) -> Array:
    """The numbers at a byte of the file, in memory of their own: floating point as float32, others as they are.

    ``dtype`` is a key of ``DTYPES``. Blocks. Raises Damaged if the file ends too early.
    """
    array = np.empty(math.prod(shape), DTYPES[dtype])
    file.seek(offset)
    if file.readinto(array.view(np.uint8).data) != array.nbytes:
        raise Damaged("it became shorter while it was read")
    return _as_float32(array, dtype).reshape(shape)


def _as_float32(array: Array, dtype: str) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if not dtype.startswith("F"):
        return array
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, as torch has it
        return array.astype(np.float32, copy=False)
