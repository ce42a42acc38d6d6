"""What a worker holds: Kafka clients, tasks, sockets. A run ends with no more of them than it began with."""

import asyncio
import gc
import os
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
from aiokafka.client import AIOKafkaClient

from tests.support.process import WorkerProcess
from tests.support.waiting import wait_for

ASK: Final = signal.SIGUSR1
SPARE_SOCKETS: Final = 2  # connections are made when they are needed, and not all have been at the start
SPARE_TASKS: Final = 4  # what is under way at the moment


@dataclass(frozen=True)
class Census:
    """`clients` counts closed ones, too: what still refers to one of them would keep a batch of records just as well."""

    clients: int
    tasks: dict[str, int]
    sockets: int

    def beyond(self, before: Iterable["Census"]) -> list[str]:
        """What there is more of than in any worker at the start, a line each."""
        before = list(before)
        found = []
        if self.clients > max(census.clients for census in before):
            found.append(f"{self.clients} Kafka clients")
        tasks = max(sum(census.tasks.values()) for census in before)
        if sum(self.tasks.values()) > tasks + SPARE_TASKS:
            found.append(f"{sum(self.tasks.values())} tasks where there were {tasks}: {self.tasks}")
        sockets = max(census.sockets for census in before)
        if self.sockets > sockets + SPARE_SOCKETS:
            found.append(f"{self.sockets} sockets where there were {sockets}")
        return found


def answer_with_census(folder: Path) -> None:
    """From now on this process writes its census into the folder whenever it gets the signal ASK."""

    def write(*_: object) -> None:
        target = census_file(folder, os.getpid())
        target.with_suffix(".part").write_bytes(orjson.dumps(taken()))
        target.with_suffix(".part").rename(target)

    signal.signal(ASK, write)


def taken() -> Census:
    gc.collect()
    held = gc.get_objects()
    tasks = [thing for thing in held if isinstance(thing, asyncio.Task) and not thing.done()]
    names = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)
    descriptors = (str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return Census(
        clients=sum(isinstance(thing, AIOKafkaClient) for thing in held),
        tasks=dict(names),
        sockets=sum(name.startswith("socket:") for name in descriptors),
    )


def census_of(worker: WorkerProcess) -> Census:
    """Asks a worker of `tests.chaos.model`; blocks until it has answered."""
    file = census_file(worker.folder, worker.pid)
    file.unlink(missing_ok=True)
    worker.ask(ASK)
    wait_for(lambda: file.exists() or not worker.is_running, "a worker's census", 60)
    return Census(**orjson.loads(file.read_bytes()))


def census_file(folder: Path, pid: int) -> Path:
    return folder / f"census-{pid}.json"
