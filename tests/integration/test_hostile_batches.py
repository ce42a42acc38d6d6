"""Batches of some kB that would fill the memory or hold up the event loop: a worker outlives them, or names their place."""

import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cramjam
import pytest

from tests.support.batches import GZIP, ZSTD, batch, record, send
from tests.support.process import COSTLESS, WorkerProcess, Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Topics, numbered
from tests.support.waiting import wait_for
from worker.kafka.decompression import HEADERS, PARTS

pytestmark = pytest.mark.kafka

MB = 1_000_000
PARTITIONS = 16
ALONE_MB = 350  # more than a worker takes that reads nothing
BUDGET_MB = 135


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def peak_mb(worker: WorkerProcess) -> float:
    """The most memory that this process has had at a time; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1_000 for line in lines if line.startswith("VmHWM")), 0.0)


def cpu_s(worker: WorkerProcess) -> float:
    """The CPU time of this process; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched(worker: WorkerProcess) -> Iterator[list[float]]:
    """How many seconds the worker computed during each look at /livez, until the worker or the block ends.

    They are of its CPU time, which does not depend on what else the machine has to do.
    """
    waits: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05) and worker.is_running:
            began = cpu_s(worker)
            worker.status("/livez")
            waits.append(cpu_s(worker) - began)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield waits
    finally:
        ended.set()
        thread.join()


def assert_names_the_place(worker: WorkerProcess, topics: Topics, partition: int) -> None:
    assert worker.wait(60) == 1
    last_words = str(worker.logs[-1]["message"])
    assert f"{topics.input}-{partition} at offset 0" in last_words
    assert "cannot be read" in last_words


async def test_batches_that_are_large_unpacked_come_one_after_the_other(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    """All of them at a time would be 1.6 GB."""
    kafka.create_all(topics, PARTITIONS)
    count = 1_000
    values = b"".join(record(offset, b'{"text":"%s"}' % (b"good " * 20_000)) for offset in range(count))
    bomb = batch(bytes(cramjam.zstd.compress(values)), ZSTD, count)
    assert len(bomb) < 100_000 < 100 * MB < len(values)
    await send(kafka.bootstrap, topics.input, dict.fromkeys(range(PARTITIONS), bomb), count)
    worker = workers.start(topics, max_batch_texts=16, max_unpacked_bytes=128 * 2**20)
    worker.wait_until_ready()
    with watched(worker) as waits:
        wait_until_committed(kafka, topics, 240)
    assert peak_mb(worker) < ALONE_MB + BUDGET_MB
    assert max(waits) < 2
    assert worker.metrics.outcomes == PARTITIONS * count
    assert worker.terminate() == 0


async def test_a_batch_of_many_members_holds_nothing_up(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """Members beyond the bound are not unpacked; what is within it is read."""
    kafka.create_all(topics, 2)
    members = PARTS - 100
    long = record(0, b'{"text":"%s"}' % (b"good " * (24 * MB)))
    size = -(-len(long) // members)
    within = b"".join(gzip.compress(long[begin : begin + size], 1) for begin in range(0, len(long), size))
    beyond = within + gzip.compress(b"") * 200
    await send(kafka.bootstrap, topics.input, {0: batch(within, GZIP, 1)}, 1)
    worker = workers.start(topics)
    worker.wait_until_ready()
    with watched(worker) as waits:
        wait_until_committed(kafka, topics)
        await send(kafka.bootstrap, topics.input, {1: batch(beyond, GZIP, 1)}, 1)
        assert_names_the_place(worker, topics, 1)
    assert max(waits) < 2


@pytest.mark.parametrize("headers", [HEADERS + 1, 15 * MB])
async def test_a_record_of_more_headers_than_memory_ends_the_worker_with_its_address(
    kafka: Kafka, topics: Topics, workers: Workers, headers: int
) -> None:
    kafka.create_all(topics, 2)
    fitting = record(0, b'{"text":"good"}', b"\0\1" * HEADERS, HEADERS)
    hostile = record(0, b'{"text":"good"}', b"\0\1" * headers, headers)
    packed = {number: bytes(cramjam.zstd.compress(value)) for number, value in enumerate((fitting, hostile))}
    await send(kafka.bootstrap, topics.input, {0: batch(packed[0], ZSTD, 1)}, 1)
    worker = workers.start(topics)
    worker.wait_until_ready()
    wait_until_committed(kafka, topics)
    kafka.send(topics.input, [numbered(1)])
    await send(kafka.bootstrap, topics.input, {1: batch(packed[1], ZSTD, 1)}, 1)
    peaks: list[float] = []

    def ended() -> bool:
        peaks.append(peak_mb(worker))
        return not worker.is_running

    wait_for(ended, "the worker to end", 60, every=0.02)
    assert max(peaks) < ALONE_MB + 200
    assert_names_the_place(worker, topics, 1)
