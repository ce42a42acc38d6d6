"""The worker with a probe on its event loop: `python -m benchmarks.probed run …`.

`PROBED` is the module that is run, if not `worker`: one with the same command line.

With `LAG_FILE` the probe asks to be called every 5 ms, and adds a line to that file at the end, in ms: how late it was at
worst, for 99 of 100 calls, and at worst by what its own thread computed at most (the rest is other threads and programs).
With `SWITCH_S` Python's switch interval is so many seconds. With `GARBAGE_S` garbage is looked for so often, however busy
the worker is.
"""

import asyncio
import os
import runpy
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial, partialmethod
from pathlib import Path

from worker.pipeline.stages import Pipeline
from worker.runtime import garbage_collection as garbage

PROBE_S = 0.005
JOINING_S = 1.0  # to connect and to join the group, which is no stage


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


def install() -> None:
    """As the variables say."""
    if "LAG_FILE" in os.environ:
        Pipeline.run = partialmethod(lambda pipeline, work: probed(work, pipeline), Pipeline.run)  # type: ignore[method-assign,assignment]
    if "SWITCH_S" in os.environ:
        sys.setswitchinterval(float(os.environ["SWITCH_S"]))
    if "GARBAGE_S" in os.environ:
        collect = partial(garbage.collect, lambda: True, every_s=float(os.environ["GARBAGE_S"]))
        garbage.collect = lambda is_quiet: collect()  # type: ignore[assignment,misc]


if __name__ == "__main__":
    install()
    runpy.run_module(os.environ.get("PROBED", "worker"), run_name="__main__")
