"""What becomes of memory that is freed: by glibc's allocator, and nothing elsewhere. The latest call holds, process-wide."""

import ctypes
import platform
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3
LARGEST_BLOCK: Final = 1 << 30
LARGE_BLOCK: Final = 1 << 16  # what is fetched and published is larger, records and results are smaller


def return_large_blocks() -> None:
    """Large blocks go back to the system at once: else records that outlive a fetch keep its megabyte, whole or in parts."""
    _set(M_MMAP_THRESHOLD, LARGE_BLOCK)


def keep_all_blocks() -> None:
    """Nothing goes back: the next pass on a CPU would pay for its tensors by page faults, a tenth of its time."""
    _set(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    _set(M_TRIM_THRESHOLD, LARGEST_BLOCK)


def _set(parameter: int, value: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(parameter, value)
