"""Measures this machine: the token budget and threads that ``auto`` takes, and what ``bench`` recommends.

The commands that score and ``bench`` choose by the same functions. Those that measure block, for about as long as their
argument ``tuning_s`` says.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)

Forward = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
"""Padded ids (N, T) and lengths (N), or None where each text has T tokens → logits (N, labels). A call blocks."""

EXAMPLE_LENGTH: Final = 48  # tokens; the mean of reviews and of posts
EXAMPLE_TOKENS: Final = 1_024
CPU_BUDGETS: Final = (256, 512, 1_024, 2_048, 4_096, 8_192)
CUDA_BUDGETS: Final = (4_096, 8_192, 16_384, 32_768, 65_536)
TUNING_S: Final = 0.3
MEASURING_S: Final = 0.05  # of one pass that is repeated, at most
MIN_PASS_TOKENS: Final = 8  # the bounds hold whatever a noisy machine shows
MAX_PASS_TOKENS: Final = 128
MIN_GAIN: Final = 1.03  # a larger budget pads more and a thread costs others a core, so either has to bring this much
CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "150000 100000": microseconds of a period


class CpuTuning(NamedTuple):
    """What was chosen for a CPU. ``pass_tokens``: the tokens that are computed in the time that one more pass costs."""

    cpu_threads: int
    max_batch_tokens: int
    pass_tokens: int


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and by its container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # there is no quota
        pass
    return max(1, cores)


def fastest(took: Mapping[Name, Sequence[float]]) -> Name:
    """The fastest backend by the geometric mean of its times, in seconds, for one text and for a full batch.

    A light load has single texts and a backlog has full batches. The first of equally fast ones is taken.
    """
    return min(took, key=lambda name: math.prod(took[name]))


def smallest_at_full_speed(speeds: Mapping[int, float]) -> int:
    """The smallest number (of threads, of tokens) whose speed is the highest but for less than MIN_GAIN."""
    highest = max(speeds.values())
    return min(number for number, speed in speeds.items() if speed * MIN_GAIN >= highest)


def candidate_budgets(device: str, max_tokens: int) -> list[int]:
    """Token budgets to measure on ``cpu`` or ``cuda``; none is below ``max_tokens``, the model's longest text."""
    budgets = CUDA_BUDGETS if device == "cuda" else CPU_BUDGETS
    return [budget for budget in budgets if budget >= max_tokens] or [max_tokens]


def tune_cpu(
    forward: Forward,
    max_tokens: int,
    cpu_threads: int | Literal["auto"],
    max_batch_tokens: int | Literal["auto"],
    tuning_s: float,
) -> CpuTuning:
    """What is ``auto`` is measured, the rest stays as it is given. Takes ``tuning_s`` in all, or a single pass each."""
    began = time.monotonic()
    pass_tokens = tune_pass_tokens(forward, tuning_s / 4)
    if max_batch_tokens == "auto":
        max_batch_tokens = tune_budget(forward, "cpu", max_tokens, tuning_s / 2)
    if cpu_threads == "auto":
        cpu_threads = tune_threads(forward, began + tuning_s - time.monotonic())
    return CpuTuning(cpu_threads, max_batch_tokens, pass_tokens)


def tune_threads(forward: Forward, tuning_s: float = TUNING_S) -> int:
    """Measures how many passes at once, each on a CPU thread, score most texts; the smallest number at full speed."""
    ids = example(EXAMPLE_TOKENS)
    speeds: dict[int, float] = {}
    threads = available_cores()
    deadline = time.monotonic() + tuning_s
    while threads and (not speeds or time.monotonic() < deadline):
        speeds[threads] = threads / _concurrent_passes_s(forward, ids, threads)
        threads //= 2
    return smallest_at_full_speed(speeds)


def tune_budget(forward: Forward, device: str, max_tokens: int, tuning_s: float = TUNING_S) -> int:
    """Measures tokens a second by token budget; the smallest budget at full speed, at least ``max_tokens``.

    A budget whose two passes would last beyond ``tuning_s``, at the speed measured so far, is not measured any more.
    """
    speeds: dict[int, float] = {}
    deadline = time.monotonic() + tuning_s
    for budget in candidate_budgets(device, max_tokens):
        if speeds and time.monotonic() + 2 * budget / max(speeds.values()) > deadline:
            break
        ids = example(budget)
        speeds[budget] = ids.size / _pass_s(forward, ids)
    best = smallest_at_full_speed(speeds)
    log.info("measured the token budget", extra={"max_batch_tokens": best, "tokens_per_s": round(speeds[best])})
    return best


def tune_pass_tokens(forward: Forward, tuning_s: float = TUNING_S) -> int:
    """Measures what one more pass costs on a CPU, in the tokens that it could compute meanwhile: from 8 to 128."""
    short, full = 1, EXAMPLE_TOKENS // EXAMPLE_LENGTH
    took = {texts: _pass_s(forward, example(texts * EXAMPLE_LENGTH), tuning_s / 2) for texts in (short, full)}
    token_s = (took[full] - took[short]) / ((full - short) * EXAMPLE_LENGTH)
    if token_s <= 0:
        return MAX_PASS_TOKENS
    overhead = round(took[short] / token_s) - short * EXAMPLE_LENGTH
    return min(max(overhead, MIN_PASS_TOKENS), MAX_PASS_TOKENS)


def example(tokens: int) -> NDArray[np.int64]:
    """Token ids (N, 48) with about so many tokens."""
    return np.full((max(1, tokens // EXAMPLE_LENGTH), EXAMPLE_LENGTH), 1, np.int64)


def shortest_run_s(function: Callable[[], object], measuring_s: float = MEASURING_S) -> float:
    """Seconds of the shortest of 2 to 8 calls, the first left out: the least disturbed by a noisy machine."""
    runs: list[float] = []
    while len(runs) < 2 or (len(runs) < 8 and sum(runs) < measuring_s):
        started = time.perf_counter()
        function()
        runs.append(time.perf_counter() - started)
    return min(runs[1:])


def _pass_s(forward: Forward, ids: NDArray[np.int64], measuring_s: float = MEASURING_S) -> float:
    """Seconds for one pass."""
    return shortest_run_s(lambda: forward(ids, None), measuring_s)


def _concurrent_passes_s(forward: Forward, ids: NDArray[np.int64], threads: int) -> float:
    """Seconds until each of so many threads has computed one pass."""
    with ThreadPoolExecutor(threads) as pool:
        return shortest_run_s(lambda: list(pool.map(lambda _: forward(ids, None), range(threads))))
