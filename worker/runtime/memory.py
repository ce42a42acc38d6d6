"""Memory that is freed and memory that runs out, of the process and of a GPU."""

import ctypes
import platform
import sys
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3
ALLOCATION_FAILED: Final = (  # in messages of torch, of ONNX Runtime and of CUDA
    "allocate memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED",
)  # fmt: skip
LARGEST_BLOCK: Final = 1 << 25  # bytes; glibc before 2.35 takes no more


def keep_freed_blocks() -> None:
    """Has glibc keep freed blocks of up to 32 MiB for this process; does nothing with another allocator.

    Blocks given back to the system cost page faults when they are needed again: a tenth of a pass on a CPU. glibc's own
    thresholds adapt, and with them memory grows over hundreds of thousands of records.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK):  # without this one the other does harm
            libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BLOCK)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or ONNX Runtime raised this for want of memory."""
    is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_known or any(words in str(error) for words in ALLOCATION_FAILED)


def free_device_memory() -> None:
    """Has torch give unused GPU memory back. Does not import torch: where nobody has, there is nothing to free."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
