"""Measures this machine: the token budget and threads that ``auto`` takes, and what ``bench`` recommends.

The commands that score and ``bench`` choose by the same functions. Those that measure block for some hundred
milliseconds, or for as long as their argument ``tuning_s`` says.
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

from worker.model.torch.bert import Forward, shortest_run_s

log = logging.getLogger(__name__)
Name = TypeVar("Name", bound=Hashable)

EXAMPLE_LENGTH: Final = 48  # tokens; the mean of reviews and of posts
EXAMPLE_TOKENS: Final = 1_024
CPU_BUDGETS: Final = (256, 512, 1_024, 2_048, 4_096, 8_192)
CUDA_BUDGETS: Final = (4_096, 8_192, 16_384, 32_768, 65_536)
TUNING_S: Final = 0.3
MIN_PASS_TOKENS: Final = 8  # the bounds hold whatever a noisy machine shows
MAX_PASS_TOKENS: Final = 128
MIN_GAIN: Final = 1.03  # a larger budget pads more and a thread costs others a core, so either has to bring this much
CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "150000 100000": microseconds of a period


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and by its container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # there is no quota
        pass
    return max(1, cores)


def cpu_has(*names: str) -> bool:
    """Whether this CPU has one of these capabilities, by torch's names; False where this version of torch has no list."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in names)


def use_single_torch_thread() -> None:
    """Has torch compute on one thread per pass, for the calling thread and those that begin later, until it is set anew.

    Several passes at once, on a thread each, waste less than several threads in one pass.
    """
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Has torch compute on the calling thread alone inside, and on as many as before after it. Takes a microsecond."""
    before = torch.get_num_threads()
    use_single_torch_thread()
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


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


def tune_threads(forward: Forward, tuning_s: float = TUNING_S) -> int:
    """Measures how many passes at once, each on a CPU thread, score most texts; the smallest number at full speed."""
    ids = _example(EXAMPLE_TOKENS, torch.device("cpu"))
    speeds: dict[int, float] = {}
    threads = available_cores()
    deadline = time.monotonic() + tuning_s
    while threads and (not speeds or time.monotonic() < deadline):
        speeds[threads] = threads / _concurrent_passes_s(forward, ids, threads)
        threads //= 2
    return smallest_at_full_speed(speeds)


def tune_budget(forward: Forward, device: torch.device, max_tokens: int, tuning_s: float = TUNING_S) -> int:
    """Measures tokens a second by token budget; the smallest budget at full speed, at least ``max_tokens``."""
    speeds: dict[int, float] = {}
    deadline = time.monotonic() + tuning_s
    for budget in candidate_budgets(device.type, max_tokens):
        if speeds and time.monotonic() > deadline:
            break
        ids = _example(budget, device)
        speeds[budget] = ids.numel() / _pass_s(forward, ids)
    best = smallest_at_full_speed(speeds)
    log.info("measured the token budget", extra={"max_batch_tokens": best, "tokens_per_s": round(speeds[best])})
    return best


def tune_pass_tokens(forward: Forward) -> int:
    """Measures what one more pass costs on a CPU, in the tokens that it could compute meanwhile: from 8 to 128."""
    short, full = 1, EXAMPLE_TOKENS // EXAMPLE_LENGTH
    took = {texts: _pass_s(forward, torch.full((texts, EXAMPLE_LENGTH), 1)) for texts in (short, full)}
    token_s = (took[full] - took[short]) / ((full - short) * EXAMPLE_LENGTH)
    if token_s <= 0:
        return MAX_PASS_TOKENS
    overhead = round(took[short] / token_s) - short * EXAMPLE_LENGTH
    return min(max(overhead, MIN_PASS_TOKENS), MAX_PASS_TOKENS)


def _example(tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids (N, 48) with about so many tokens."""
    return torch.full((max(1, tokens // EXAMPLE_LENGTH), EXAMPLE_LENGTH), 1, device=device)


def _pass_s(forward: Forward, ids: torch.Tensor) -> float:
    """Seconds for one pass, its logits copied to the host."""
    with torch.inference_mode():
        return shortest_run_s(lambda: forward(ids, None).cpu())


def _concurrent_passes_s(forward: Forward, ids: torch.Tensor, threads: int) -> float:
    """Seconds until each of so many threads has computed one pass."""

    def one_pass(_: int) -> None:
        with single_torch_thread(), torch.inference_mode():
            forward(ids, None)

    with ThreadPoolExecutor(threads) as pool:
        return shortest_run_s(lambda: list(pool.map(one_pass, range(threads))))
