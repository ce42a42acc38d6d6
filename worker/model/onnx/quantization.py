"""Weights in int8, as ONNX Runtime's dynamic quantization makes them: symmetric, with a scale for each output."""

import platform
import sys
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

CPUINFO: Final = Path("/proc/cpuinfo")
DOT_PRODUCTS: Final = {"avx512_vnni", "avx_vnni", "asimddp"}  # Linux's names for instructions of x86 and ARM
FULL_RANGE: Final = 127
REDUCED_RANGE: Final = 64


def quantized(weight: NDArray[np.float32], *, has_reduced_range: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weight (out, in) → int8 (in, out), as a product takes it, and the scales (out) by which to multiply.

    ``has_reduced_range`` keeps the numbers to seven bits, for a CPU on which sums of products of bytes may overflow.
    """
    highest = REDUCED_RANGE if has_reduced_range else FULL_RANGE
    scales = np.abs(weight).max(axis=1) / np.float32(highest)
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    return np.rint(weight.T / scales).clip(-highest, highest).astype(np.int8), scales


@cache
def needs_reduced_range() -> bool:
    """Whether products of bytes may overflow on this CPU: without a dot product of bytes it adds two of them in 16 bits.

    Answers yes where that is not known, because numbers of seven bits are right everywhere.
    """
    if sys.platform == "darwin":
        return platform.machine() != "arm64"
    try:
        return not DOT_PRODUCTS & set(CPUINFO.read_text().split())
    except OSError:
        return True
