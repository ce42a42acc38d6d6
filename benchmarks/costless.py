"""The worker with a model that costs nothing: `python -m benchmarks.costless run …`. What is left is the plumbing.

With `PASS_SECONDS` a pass of the network takes so long, whatever is in it: a device whose cost two cores do not share.
With `PROFILE` the event loop is profiled into the file of that name. With `LAG_FILE` a probe on the event loop asks to be
called every 5 ms, and adds a line to that file: how late it was at worst, for 99 of 100 calls, and at worst by what its own
thread computed meanwhile (the rest is other programs'), in ms.
"""

import asyncio
import cProfile
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker import service
from worker.cli import main
from worker.pipeline import Pipeline
from worker.settings import RunSettings

PASS_SECONDS = float(os.environ.get("PASS_SECONDS", "0"))
PROBE_S = 0.005
JOINING_S = 1.0  # to connect and to join the group, which is no stage


class Tokens:
    def __init__(self, count: int) -> None:
        self.ids = [[1]] * count
        self.truncated = [False] * count


class CostlessModel:
    name = "costless@0"
    activation = "sigmoid"
    device = "cpu"
    dtype = "float32"
    max_batch_tokens = 1_000_000
    max_tokens = 512
    passes = 1
    widths = ()
    pass_tokens = 1

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return Tokens(len(texts))

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        if PASS_SECONDS:
            time.sleep(PASS_SECONDS)
        return np.zeros((len(ids), 3), dtype=np.float32)

    def memory_bytes(self) -> int:
        return 0


async def probe(late_ms: list[float], own_ms: list[float]) -> None:
    """Notes how late the event loop is, until cancelled."""
    await asyncio.sleep(JOINING_S)
    while True:
        due, computed = time.perf_counter() + PROBE_S, time.thread_time()
        await asyncio.sleep(PROBE_S)
        late_ms.append((time.perf_counter() - due) * 1000)
        own_ms.append(min(late_ms[-1], (time.thread_time() - computed) * 1000))


async def probed(run: Callable[[Pipeline], Awaitable[None]], pipeline: Pipeline) -> None:
    late_ms: list[float] = []
    own_ms: list[float] = []
    probing = asyncio.create_task(probe(late_ms, own_ms))
    try:
        await run(pipeline)
    finally:
        probing.cancel()
        if late_ms:
            note(sorted(late_ms), max(own_ms))


def note(late_ms: list[float], own_ms: float) -> None:
    with Path(os.environ["LAG_FILE"]).open("a") as file:
        file.write(f"{late_ms[-1]:.1f} {late_ms[len(late_ms) * 99 // 100]:.1f} {own_ms:.1f}\n")


if __name__ == "__main__":

    def load(_: RunSettings) -> Any:
        return CostlessModel()

    service._loaded = load
    if "PROFILE" in os.environ:
        run = service.run

        def profiled(settings: RunSettings) -> int:
            with cProfile.Profile() as profile:
                code = run(settings)
            profile.dump_stats(os.environ["PROFILE"])
            return code

        service.run = profiled
    if "LAG_FILE" in os.environ:
        Pipeline.run = partialmethod(lambda pipeline, work: probed(work, pipeline), Pipeline.run)  # type: ignore[method-assign,assignment]
    main()
