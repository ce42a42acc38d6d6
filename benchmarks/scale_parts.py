"""What benchmarks/scale.py measures: each part starts a broker, topics and workers of its own, and answers with figures.

The model costs nothing, unless a part says so: what is left is the plumbing. Readers are taken to read committed records
alone; waits are from the moment when the broker has an event to the moment when its result can be read.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.broker_log import (
    APPEND_TIME,
    OFFSETS_TOPIC,
    TopicLog,
    Wait,
    commit_times,
    percentiles,
    read_topic,
    waits,
)
from benchmarks.common import event
from benchmarks.load_generator import OpenLoop, publish
from tests.support.broker import Broker, start_broker
from tests.support.process import COSTLESS, Workers, WorkerProcess, workers_in
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

Figures = dict[str, float]

STEADY_RATE = 200
SESSION_MS = 6_000
BASELINE_S = 5.0
HOLD_S = 4.0
BACKLOG_EVENTS = 200_000
BACKLOG_TEXTS = 5_000
PASS_S = 0.05  # of the model, where it must be slower than the plumbing
UNEQUAL_EVENTS = 100_000
UNEQUAL_SHARE = 0.95
UNEQUAL_RATE = 100
UNPACKED_BYTES = 2_000_000  # of a partition's backlog
TEXT_BYTES = 2_000


@dataclass
class Scene:
    """A broker, topics with so many partitions, and the workers on them."""

    broker: Broker
    kafka: Kafka
    topics: Topics
    workers: Workers
    partitions: int
    delivery: str

    def start(self, name: str | None = None, *, pass_s: float = 0) -> WorkerProcess:
        """A new worker; `name` is its `group_instance_id`, `pass_s` what a pass of its model takes."""
        return self.workers.start(
            self.topics,
            {"PASS_SECONDS": str(pass_s)},
            delivery=self.delivery,
            group_instance_id=name,
            session_timeout_ms=SESSION_MS,
            cache_size=0,
        )

    def load(self, rate: float = STEADY_RATE, record: Callable[[int], Record] | None = None) -> OpenLoop:
        return OpenLoop(self.kafka.bootstrap, self.topics.input, rate, *([record] if record else []))

    def wait_until_done(self, seconds: float = 300) -> None:
        """Until the group has committed all that is in the input."""
        ends = {partition: end for partition, end in self.kafka.ends(self.topics.input).items() if end}
        wait_for(
            lambda: ends.items() <= self.kafka.committed(self.topics.group, self.topics.input).items(),
            "all results",
            seconds,
            every=0.5,
        )

    def wait_until_shared(self, workers: Sequence[WorkerProcess]) -> None:
        """Until each of these workers, and nobody else, has partitions."""

        def are_shared() -> bool:
            counts = [worker.metrics.get("assigned_partitions") for worker in workers]
            return all(counts) and sum(counts) == self.partitions

        wait_for(are_shared, f"{len(workers)} workers to share the partitions")

    def output(self) -> TopicLog:
        return read_topic(self.broker, self.topics.output, self.partitions)

    def waits(self) -> list[Wait]:
        return waits(read_topic(self.broker, self.topics.input, self.partitions), self.output())

    def commits(self) -> list[int]:
        partitions = len(self.kafka.partitions(OFFSETS_TOPIC))
        return sorted(commit_times(self.broker, partitions, exactly_once=self.delivery == "exactly-once"))


@contextmanager
def scene(partitions: int, delivery: str) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as folder, closing(start_broker(controllable=True)) as broker:
        kafka, topics = Kafka(broker.bootstrap), Topics.unique()
        for topic in (topics.input, topics.output):
            kafka.create(topic, partitions, **APPEND_TIME)
        kafka.create(topics.dead_letters)
        with workers_in(broker.bootstrap, Path("builtin"), Path(folder), COSTLESS) as workers:
            yield Scene(broker, kafka, topics, workers, partitions, delivery)


def now_ms() -> float:
    return time.time() * 1000


# One process.


def steady(partitions: int, delivery: str, seconds: float) -> Figures:
    """A steady load: waits and what the process holds after a warm-up of half the time."""
    with scene(partitions, delivery) as here:
        worker = here.start().wait_until_assigned(partitions)
        with here.load():
            time.sleep(seconds / 2)
            begin, cpu_s = now_ms(), cpu_seconds(worker.pid)
            time.sleep(seconds)
            end, cpu_s = now_ms(), cpu_seconds(worker.pid) - cpu_s
            held = process_figures(worker.pid, here.broker.bootstrap)
        here.wait_until_done()
        assert worker.terminate() == 0
        measured = [wait.ms for wait in here.waits() if begin <= wait.from_ms < end]
        commits = sum(begin <= moment < end for moment in here.commits())
        return {
            "events_per_s": round(len(measured) / seconds, 1),
            **percentiles(measured),
            **held,
            "commits_per_s": round(commits / seconds, 1),
            "control_records_per_result": control_share(here.output()),
            "cores": round(cpu_s / seconds, 2),
        }


def backlog(partitions: int, delivery: str, seconds: float) -> Figures:
    """A backlog: events/s from a tenth of the results to nine tenths of them."""
    texts = [f"{number} " + "событие, всё хорошо или не очень " * 4 for number in range(BACKLOG_TEXTS)]
    with scene(partitions, delivery) as here:
        records = (event(number, texts[number % BACKLOG_TEXTS]) for number in range(BACKLOG_EVENTS))
        publish(here.kafka.bootstrap, here.topics.input, records)
        worker = here.start()
        here.wait_until_done()
        peak_mb = round(memory_kb(worker.pid, "VmHWM") / 1e3)
        assert worker.terminate() == 0
        output = here.output()
        times = sorted(record.since_ms for record in output.readable)
        begin, end = times[len(times) // 10], times[len(times) * 9 // 10]
        commits = sum(begin <= moment < end for moment in here.commits())
        return {
            "events_per_s": round(0.8 * len(times) / (end - begin) * 1000),
            "peak_memory_mb": peak_mb,
            "commits_per_s": round(commits / (end - begin) * 1000, 1),
            "control_records_per_result": control_share(output),
        }


def memory(partitions: int, delivery: str, seconds: float) -> Figures:
    """What a backlog of compressed, large batches in every partition adds to the memory of a worker with a slow model."""
    value = event(0, "событие, всё хорошо или не очень " * (TEXT_BYTES // 60)).value
    sending = {"compression.type": "zstd", "linger.ms": 200, "batch.size": 900_000, "message.max.bytes": 1_000_000}
    with scene(partitions, delivery) as here:
        idle = here.start().wait_until_assigned(partitions)
        idle_mb = memory_kb(idle.pid, "VmRSS") / 1e3
        assert idle.terminate() == 0
        count = UNPACKED_BYTES // len(value or b"")
        records = (Record(value, partition=partition) for partition in range(partitions) for _ in range(count))
        publish(here.kafka.bootstrap, here.topics.input, records, **sending)
        worker = here.start(pass_s=0.5).wait_until_assigned(partitions)
        time.sleep(seconds)
        peak_mb = memory_kb(worker.pid, "VmHWM") / 1e3
        worker.kill()
    return {
        "idle_mb": round(idle_mb),
        "peak_mb": round(peak_mb),
        "mb_per_partition": round((peak_mb - idle_mb) / partitions, 2),
    }


def join(partitions: int, delivery: str, seconds: float) -> Figures:
    """A second member joins under a steady load."""
    with scene(partitions, delivery) as here:
        first = here.start().wait_until_assigned(partitions)
        with here.load():
            time.sleep(seconds / 2)
            begin = now_ms()
            time.sleep(BASELINE_S)
            second = here.start()
            wait_for(lambda: not is_stable(here), "a second member to join", every=0.02)
            joined = now_ms()
            wait_for(lambda: is_stable(here), "the group to share its partitions", every=0.02)
            stable = now_ms()
            here.wait_until_shared([first, second])
            time.sleep(HOLD_S)
        here.wait_until_done()
        assert [worker.terminate() for worker in (first, second)] == [0, 0]
        return {"join_to_stable_s": seconds_between(joined, stable), **interruption(here.waits(), begin, joined)}


def kill(partitions: int, delivery: str, seconds: float) -> Figures:
    """kill -9 of the only worker under a steady load; another starts at once. `own_start_s` is that of the first."""
    return restart_after_kill(partitions, delivery, seconds, None)


def kill_static(partitions: int, delivery: str, seconds: float) -> Figures:
    """The same with an instance id, which the other has too."""
    return restart_after_kill(partitions, delivery, seconds, "one")


def restart_after_kill(partitions: int, delivery: str, seconds: float, name: str | None) -> Figures:
    with scene(partitions, delivery) as here:
        started = now_ms()
        worker = here.start(name).wait_until_assigned(partitions)
        own_start_s = seconds_between(started, now_ms())
        with here.load():
            time.sleep(seconds / 2)
            begin = now_ms()
            time.sleep(BASELINE_S)
            killed = now_ms()
            worker.kill()
            worker = here.start(name).wait_until_assigned(partitions)
            time.sleep(HOLD_S)
        here.wait_until_done()
        assert worker.terminate() == 0
        found = here.waits()
        first = min(wait.to_ms for wait in found if wait.to_ms > killed + 300)  # what was on its way is not the other's
        return {
            "own_start_s": own_start_s,
            "first_result_s": seconds_between(killed, first),
            **interruption(found, begin, killed),
        }


# A group.


def unequal(partitions: int, delivery: str, seconds: float) -> Figures:
    """One partition has 95 % of a backlog, and the others a steady load: how long their events wait meanwhile.

    A pass of the model takes 50 ms, which is a micro-batch's turn.
    """

    def neighbour(number: int) -> Record:
        return Record(event(number, "текст").value, partition=1 + number % (partitions - 1))

    with scene(partitions, delivery) as here:
        large = int(UNEQUAL_EVENTS * UNEQUAL_SHARE)
        first = 10 * UNEQUAL_EVENTS  # the number of the backlog's first event
        backlog = (
            Record(event(first + number, f"текст {number}").value, partition=0 if number < large else 1 + number % (partitions - 1))
            for number in range(UNEQUAL_EVENTS)
        )  # fmt: skip
        publish(here.kafka.bootstrap, here.topics.input, backlog)
        begin = now_ms()
        worker = here.start(pass_s=PASS_S).wait_until_assigned(partitions)
        ready = now_ms()
        with here.load(UNEQUAL_RATE, neighbour):
            here.wait_until_done_of(0)
        here.wait_until_done()
        assert worker.terminate() == 0
        done = here.output().first()
        ends = {is_large: max(r.since_ms for r in done.values() if r.number >= first and (r.partition == 0) == is_large) for is_large in (True, False)}
        neighbours = [wait.ms for wait in here.waits() if wait.partition and ready <= wait.from_ms < ends[True]]
        return {}


# Evaluation.


def interruption(found: Sequence[Wait], begin: float, disturbed: float) -> Figures:
    """What a disturbance did: seconds until the last event that it delayed had its result, and the longest wait.

    An event counts as delayed if it waited longer than twice the longest wait between `begin` and the disturbance.
    """
    longest = max(wait.ms for wait in found if wait.from_ms >= begin and wait.to_ms < disturbed)
    after = [wait for wait in found if wait.to_ms >= disturbed]
    last = max((wait.to_ms for wait in after if wait.ms > 2 * longest), default=disturbed)
    return {
        "all_served_s": seconds_between(disturbed, last),
        "longest_wait_s": seconds_between(0, max(wait.ms for wait in after)),
        "longest_wait_before_s": seconds_between(0, longest),
    }


def is_stable(here: Scene) -> bool:
    described = here.kafka.of_the_group(lambda admin: admin.describe_consumer_groups([here.topics.group])[here.topics.group])
    return described.state.name == "STABLE"


def control_share(output: TopicLog) -> float:
    return round(output.control_records / output.records, 3)


def seconds_between(begin_ms: float, end_ms: float) -> float:
    return round((end_ms - begin_ms) / 1000, 2)


# A process, as Linux tells of it.


def process_figures(pid: int, bootstrap: str) -> Figures:
    files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {
        "memory_mb": round(memory_kb(pid, "VmRSS") / 1e3),
        "connections": len({name for name in files if name.startswith("socket:")} & connections_to(bootstrap)),
        "open_files": len(files),
    }


def connections_to(bootstrap: str) -> set[str]:
    """The names of all sockets of this machine that are connected to a broker."""
    port = f":{int(bootstrap.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[2].endswith(port) and row[3] == "01"}


def memory_kb(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
