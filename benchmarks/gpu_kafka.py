"""The parts of benchmarks/gpu.py from Kafka to Kafka: backlogs, exactly once, latency, and the start.

All moments are the broker's own: topics are dated by LogAppendTime, and their log is read afterwards. The load is
librdkafka's, in processes of its own, and has ended before a backlog is measured.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.broker_log import (
    APPEND_TIME,
    batches,
    per_second,
    percentiles,
    read_topic,
    waits,
)
from benchmarks.gpu_load import LoadProcesses
from benchmarks.testbed import now_ms
from tests.support.broker import Broker, UnavailableError, start_broker
from tests.support.process import Metrics, WorkerProcess
from tests.support.topics import Kafka, Topics
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[1]
READY_S = 90
SETTLE_S = 1.0  # after all are ready, before time counts
SHARES = (0.1, 0.5, 0.8)
LOAD = 1.5  # times what a backlog is measured for
LATENCY_NUMBERS = 100_000_000  # between the numbers of two rates' events
IN_FORCE = ("device", "dtype", "backend", "max_batch_tokens", "max_batch_texts", "cuda_pass")


@dataclass
class Bench:
    """A running broker and what workers on it have in common. `backlog` has `events` events; `partitions` of each topic."""

    broker: Broker
    folder: Path
    texts: Path
    settings: Mapping[str, Any]
    partitions: int
    events: int
    seconds: float
    loads: int
    backlog: str = ""

    def __post_init__(self) -> None:
        self.kafka = Kafka(self.broker.bootstrap)

    def topics(self, input_topic: str = "") -> Topics:
        """New topics and a new group; an input that is there is read from its beginning."""
        names = Topics.unique()
        names = replace(names, input=input_topic or names.input)
        for name in {names.input, names.output} - {input_topic}:
            self.kafka.create(name, self.partitions, **APPEND_TIME)
        self.kafka.create(names.dead_letters)
        return names

    def publish(self, topic: str, count: int) -> None:
        load = LoadProcesses(self.loads, self.broker.bootstrap, topic, self.texts, 0, count=count)
        load.start()
        load.join()

    def fill(self) -> float:
        """Publishes the backlog that all cases read; events per second."""
        self.backlog = self.topics().input
        began = time.monotonic()
        self.publish(self.backlog, self.events)
        return self.events / (time.monotonic() - began)

    def results(self, topics: Topics) -> int:
        return sum(self.kafka.ends(topics.output).values())


@contextmanager
def benched(folder: Path, heap: str, **values: Any) -> Iterator[Bench]:
    """With a Kafka of its own, on this machine's Java or Docker. Raises UnavailableError."""
    with (
        patch("tests.support.broker.HEAP", heap),
        patch("tests.support.broker.fetch_jars", side_effect=UnavailableError("Kafka's jars are not in the cache")),
        closing(start_broker(controllable=True)) as broker,
    ):
        yield Bench(broker, folder, **values)


# Workers.


@dataclass
class Group:
    """Workers of one group, all of which have been started at once; `ready_s`: what each took from its start to ready."""

    workers: list[WorkerProcess]
    ready_s: list[float]

    def in_force(self) -> dict[str, Any]:
        """What the first says that it runs with, and which device memory each uses."""
        line = next(line for line in self.workers[0].logs if line["message"] == "ready")
        memory = [worker.metrics.get("inference_device_memory_bytes") for worker in self.workers]
        return {
            **{name: line[name] for name in IN_FORCE if name in line},
            "memory_mb": [round(each / 1e6) for each in memory],
        }


@contextmanager
def group_of(bench: Bench, topics: Topics, count: int, settings: Mapping[str, Any]) -> Iterator[Group]:
    """So many workers, once all of them are ready and share the partitions. Kills them in the end."""
    with ExitStack() as stack:
        began = time.monotonic()
        workers = [stack.enter_context(running(bench, topics, settings)) for _ in range(count)]
        ready_s: dict[int, float] = {}

        def are_ready() -> bool:
            for worker in workers:
                assert worker.is_running, worker.output[-3000:]
                if worker.pid not in ready_s and worker.status("/readyz") == 200:
                    ready_s[worker.pid] = round(time.monotonic() - began, 2)
            return len(ready_s) == count

        wait_for(are_ready, "all workers to be ready", READY_S, every=0.02)
        wait_for(lambda: are_sharing(workers, bench.partitions), "all workers to share the partitions", READY_S)
        yield Group(workers, list(ready_s.values()))


def are_sharing(workers: Sequence[WorkerProcess], partitions: int) -> bool:
    answers = [worker.get("/metrics") for worker in workers]
    counts = [Metrics(text).get("assigned_partitions") for status, text in answers if status == 200]
    return len(counts) == len(workers) and all(counts) and sum(counts) == partitions


@contextmanager
def running(bench: Bench, topics: Topics, settings: Mapping[str, Any]) -> Iterator[WorkerProcess]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    worker = WorkerProcess(
        bench.folder,
        variables={"PYTHONPATH": path},
        bootstrap_servers=bench.broker.bootstrap,
        input_topics=topics.input,
        output_topic=topics.output,
        dead_letter_topic=topics.dead_letters,
        group_id=topics.group,
        **{**bench.settings, **settings},
    )
    try:
        yield worker
    finally:
        if worker.is_running:
            worker.kill()


# Backlogs.


def backlog(bench: Bench, processes: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Events per second of so many workers on the backlog, from when all are ready, for some seconds."""
    topics = bench.topics(bench.backlog)
    with device_use(bench.folder) as use, group_of(bench, topics, processes, settings) as group:
        time.sleep(SETTLE_S)
        begin, deadline = now_ms(), time.monotonic() + bench.seconds
        use.begin()
        enough = 0.95 * bench.events
        while time.monotonic() < deadline and bench.results(topics) < enough:
            time.sleep(0.1)
        end = now_ms()
        figures = {
            "processes": processes,
            "settings": dict(settings),
            "in_force": group.in_force(),
            "ready_s": group.ready_s,
            "window_s": round((end - begin) / 1000, 2),
            "device": use.end(),
        }
    segments = [bench.broker.read_segment(topics.output, number) for number in range(bench.partitions)]
    return {**figures, "events_per_s": round(per_second(map(batches, segments), begin, end))}


def exactly_once(bench: Bench, events: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One worker on a backlog with exactly-once, to its end: the speed, and what readers find lost or twice."""
    topics = bench.topics()
    bench.publish(topics.input, events)
    with group_of(bench, topics, 1, {**settings, "delivery": "exactly-once"}):
        ends = {number: end for number, end in bench.kafka.ends(topics.input).items() if end}
        wait_for(
            lambda: ends.items() <= bench.kafka.committed(topics.group, topics.input).items(), "all results", every=0.5
        )
    log = read_topic(bench.broker, topics.output, bench.partitions)
    found = Counter(record.number for record in log.readable)
    return {
        "events": events,
        "events_per_s": round(log.per_second()),
        "lost": len(set(range(events)) - set(found)),
        "twice": sum(times > 1 for times in found.values()),
    }


# Latency.


def latency(bench: Bench, speed: float) -> dict[str, Any]:
    """Milliseconds from the broker having an event to its having the result, at shares of a speed, in events/s."""
    topics, seconds = bench.topics(), LOAD * bench.seconds
    spans: dict[float, tuple[float, float]] = {}
    with group_of(bench, topics, 1, {}):
        for place, share in enumerate(SHARES):
            first = place * LATENCY_NUMBERS
            rate = speed * share
            load = LoadProcesses(
                bench.loads, bench.broker.bootstrap, topics.input, bench.texts, first, rate=rate, seconds=seconds
            )
            begin = now_ms() + seconds / 4 * 1000
            load.start()
            load.join()
            spans[share] = (begin, now_ms())
            sent = sum(bench.kafka.ends(topics.input).values())
            wait_for(lambda sent=sent: bench.results(topics) >= sent, "all results of a load", 60)  # type: ignore[misc]
    found = waits(
        read_topic(bench.broker, topics.input, bench.partitions),
        read_topic(bench.broker, topics.output, bench.partitions).first(),
    )
    return {f"{share:.0%}": at_load([wait for wait in found if begin <= wait.from_ms < end], speed * share, end - begin)
            for share, (begin, end) in spans.items()}  # fmt: skip


def at_load(found: Sequence[Any], asked: float, span_ms: float) -> dict[str, float]:
    return {
        "asked_events_per_s": round(asked),
        "events_per_s": round(len(found) / span_ms * 1000),
        **percentiles([wait.ms for wait in found]),
    }


# The device, as its driver sees it.


class DeviceUse:
    """Samples of a GPU's use and memory, four a second, while a case runs; none where there is no `nvidia-smi`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._first = 0

    def begin(self) -> None:
        """Samples count from now on."""
        self._first = len(self._samples())

    def end(self) -> dict[str, float]:
        samples = self._samples()
        if len(samples) <= self._first:
            return {}
        uses, memory = zip(*samples[self._first :], strict=True)
        return {
            "use_mean_percent": round(sum(uses) / len(uses), 1),
            "use_most_percent": max(uses),
            "memory_mib": max(memory) - samples[0][1],  # of what runs since the first sample: the workers
        }

    def _samples(self) -> list[tuple[float, float]]:
        """The first device's lines; a line that is only half written is left out."""
        lines = self._file.read_text().rpartition("\n")[0].splitlines() if self._file.exists() else []
        cells = [line.split(",") for line in lines]
        return [(float(use), float(memory)) for index, use, memory in cells if index.strip() == "0"]


@contextmanager
def device_use(folder: Path) -> Iterator[DeviceUse]:
    file = folder / "device-use"
    columns = "--query-gpu=index,utilization.gpu,memory.used"
    command = ["nvidia-smi", columns, "--format=csv,noheader,nounits", "--loop-ms=250"]
    try:
        with file.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        file.unlink()
        yield DeviceUse(file)
        return
    try:
        yield DeviceUse(file)
    finally:
        process.kill()
        process.wait()
