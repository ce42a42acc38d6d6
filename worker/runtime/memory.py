"""What becomes of memory that is freed."""

import ctypes
import platform
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3
LARGEST_BLOCK: Final = 1 << 25  # glibc before 2.35 takes no more


def keep_blocks() -> None:
    """Has glibc keep, for this whole process, blocks up to 32 MiB that are freed; does nothing with another allocator.

    Given back to the system, they would be paid for by page faults when they are needed again: a tenth of a pass on a CPU.
    And its own thresholds, which move, let memory grow over hundreds of thousands of records.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK):  # without this one the other does harm
            libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BLOCK)
