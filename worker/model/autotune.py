"""Backend, CPU threads and token budget by what was measured: what `auto` takes and what `bench` recommends.

Both choose by the functions here, of which `bench` measures longer. Blocks for some hundred milliseconds, or as told.
"""

import logging
import math
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from worker.model.bert import Forward, seconds

log = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)

EXAMPLE_LENGTH: Final = 48  # tokens; the mean of reviews and of posts
EXAMPLE_TOKENS: Final = 1_024
CPU_BUDGETS: Final = (256, 512, 1_024, 2_048, 4_096, 8_192)
CUDA_BUDGETS: Final = (4_096, 8_192, 16_384, 32_768, 65_536)
PATIENCE_S: Final = 0.3
LEAST_PASS_TOKENS: Final = 8  # whatever a noisy machine shows
MOST_PASS_TOKENS: Final = 128
WORTH: Final = 1.03  # a larger budget pads more and a thread costs others a core, so either has to bring this much
CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "150000 100000": microseconds of a period


def available_cores() -> int:
    """Cores that this process may use: by its affinity, and by its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no quota
        pass
    return max(1, cores)


def cpu_has(*names: str) -> bool:
    """Whether this CPU has one of these capabilities, by torch's names; False where this torch does not tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in names)


def use_one_thread() -> None:
    """For the calling thread and those that begin later, for good: what a process that is the worker's own wants.

    Passes run side by side, which wastes less than several threads in each.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on the calling thread alone; after, on as many as before. Takes a microsecond."""
    before = torch.get_num_threads()
    use_one_thread()
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


def fastest(took: Mapping[Name, Sequence[float]]) -> Name:
    """Of backends and their seconds for one text and for a full batch, the fastest by the mean of both ratios.

    A light load has the former and a backlog the latter. Of equals the first.
    """
    return min(took, key=lambda name: math.prod(took[name]))


def candidate_budgets(device: str, longest: int) -> list[int]:
    """Token budgets to measure for a kind of device; none is below ``longest``, the model's maximum."""
    budgets = CUDA_BUDGETS if device == "cuda" else CPU_BUDGETS
    return [budget for budget in budgets if budget >= longest] or [longest]


def tune_threads(forward: Forward, patience_s: float = PATIENCE_S) -> int:
    """The fewest threads that together score about as fast as any number up to the cores, a pass on each."""
    ids = _example(EXAMPLE_TOKENS, torch.device("cpu"))
    speeds: dict[int, float] = {}
    threads = available_cores()
    deadline = time.monotonic() + patience_s
    while threads and (not speeds or time.monotonic() < deadline):
        speeds[threads] = threads / _took_side_by_side(forward, ids, threads)
        threads //= 2
    return least_that_is_as_fast(speeds)


def tune_budget(forward: Forward, device: torch.device, longest: int, patience_s: float = PATIENCE_S) -> int:
    """The smallest token budget with about the most tokens a second; at least ``longest``, the model's maximum."""
    speeds: dict[int, float] = {}
    deadline = time.monotonic() + patience_s
    for budget in candidate_budgets(device.type, longest):
        if speeds and time.monotonic() > deadline:
            break
        ids = _example(budget, device)
        speeds[budget] = ids.numel() / _took(forward, ids)
    best = least_that_is_as_fast(speeds)
    log.info("measured the token budget", extra={"max_batch_tokens": best, "tokens_per_s": round(speeds[best])})
    return best


def least_that_is_as_fast(speeds: Mapping[int, float]) -> int:
    """Of numbers and the speed with each, the smallest whose speed is within WORTH of the highest."""
    fastest = max(speeds.values())
    return min(number for number, speed in speeds.items() if speed * WORTH >= fastest)


def tune_pass_tokens(forward: Forward) -> int:
    """The tokens that a CPU computes in the time that one more pass costs, from 8 to 128, by a short pass and a full one."""
    short, full = 1, EXAMPLE_TOKENS // EXAMPLE_LENGTH
    took = {texts: _took(forward, torch.full((texts, EXAMPLE_LENGTH), 1)) for texts in (short, full)}
    token_s = (took[full] - took[short]) / ((full - short) * EXAMPLE_LENGTH)
    if token_s <= 0:
        return MOST_PASS_TOKENS
    overhead = round(took[short] / token_s) - short * EXAMPLE_LENGTH
    return min(max(overhead, LEAST_PASS_TOKENS), MOST_PASS_TOKENS)


def _example(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.full((max(1, tokens // EXAMPLE_LENGTH), EXAMPLE_LENGTH), 1, device=device)


def _took(forward: Forward, ids: torch.Tensor) -> float:
    def finished() -> torch.Tensor:
        return forward(ids, None).cpu()

    with torch.inference_mode():
        return seconds(finished)


def _took_side_by_side(forward: Forward, ids: torch.Tensor, threads: int) -> float:
    """Seconds for one pass on each of so many threads."""

    def one_pass(_: int) -> None:
        with one_thread(), torch.inference_mode():
            forward(ids, None)

    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(one_pass, range(threads))))
