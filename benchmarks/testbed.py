"""Topics on a running broker and workers on them, for benchmarks that measure waits by the broker's clock."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.broker_log import APPEND_TIME, OFFSETS_TOPIC, TopicLog, Wait, commit_times, read_topic, waits
from benchmarks.load_generator import OpenLoop, numbered, publish
from tests.support.broker import Broker
from tests.support.process import COSTLESS, Metrics, WorkerProcess, Workers, workers_in
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for


@dataclass
class Testbed:
    """New topics with so many partitions, and the workers on them; `settings` are those of every worker."""

    broker: Broker
    kafka: Kafka
    topics: Topics
    workers: Workers
    partitions: int
    settings: Mapping[str, Any]

    def start(self, variables: Mapping[str, str] | None = None, **settings: object) -> WorkerProcess:
        """A new worker."""
        return self.workers.start(self.topics, variables, **{**self.settings, **settings})

    def publish(self, records: Iterable[Record], **config: Any) -> None:
        """Publishes a backlog; returns when the broker has all of it."""
        publish(self.kafka.bootstrap, self.topics.input, records, **config)

    def load(self, rate: float, record: Callable[[int], Record] = numbered) -> OpenLoop:
        """Publishes events as long as its `with` block runs."""
        return OpenLoop(self.kafka.bootstrap, self.topics.input, rate, record)

    def waits_under_load(
        self, rate: float, seconds: float, record: Callable[[int], Record] = numbered
    ) -> tuple[list[int], float]:
        """The waits of a load's events, ms, and results/s, without its first quarter. Returns after the last result."""
        begin, end = now_ms() + seconds / 4 * 1000, now_ms() + seconds * 1000
        with self.load(rate, record):
            time.sleep(seconds)
        self.wait_until_done()
        found = self.waits()
        done = sum(begin <= wait.to_ms < end for wait in found)
        return [wait.ms for wait in found if wait.from_ms >= begin], done / (end - begin) * 1000

    def wait_until_done(self, partitions: Sequence[int] | None = None, seconds: float = 300) -> None:
        """Until the group has committed all that is in the input now, or in these partitions of it."""
        ends = self.kafka.ends(self.topics.input)
        wanted = {number: ends[number] for number in partitions or ends if ends[number]}

        def is_done() -> bool:
            return wanted.items() <= self.kafka.committed(self.topics.group, self.topics.input).items()

        wait_for(is_done, "all results", seconds, every=0.5)

    def wait_until_shared(self, workers: Sequence[WorkerProcess]) -> None:
        """Until each of these workers, and nobody else, has partitions."""

        def are_shared() -> bool:
            answers = [worker.get("/metrics") for worker in workers]
            counts = [Metrics(text).get("assigned_partitions") for status, text in answers if status == 200]
            return len(counts) == len(workers) and all(counts) and sum(counts) == self.partitions

        wait_for(are_shared, f"{len(workers)} workers to share the partitions")

    def group(self) -> tuple[str, int]:
        """The state of the group, such as STABLE, and its number of members."""
        group = self.topics.group
        described = self.kafka.of_the_group(lambda admin: admin.describe_consumer_groups([group])[group])
        return described.state.name, len(described.members)

    def input(self) -> TopicLog:
        return read_topic(self.broker, self.topics.input, self.partitions)

    def output(self) -> TopicLog:
        """Waits until no transaction is open: what is behind one that a killed worker left can be read only then."""
        topic = self.topics.output
        wait_for(lambda: not self.kafka.has_open_transaction(topic), "the open transactions to end", every=0.5)
        return read_topic(self.broker, self.topics.output, self.partitions)

    def waits(self) -> list[Wait]:
        return waits(self.input(), self.output().first())

    def commits(self, *, exactly_once: bool) -> list[int]:
        """When offsets were committed, by any group."""
        return sorted(commit_times(self.broker, len(self.kafka.partitions(OFFSETS_TOPIC)), exactly_once=exactly_once))


@contextmanager
def new_testbed(
    broker: Broker, partitions: int, checkpoint: Path = Path("builtin"), module: str = COSTLESS, **settings: object
) -> Iterator[Testbed]:
    """Makes the topics. Ends the workers that still run."""
    kafka, topics = Kafka(broker.bootstrap), Topics.unique()
    for topic in (topics.input, topics.output):
        kafka.create(topic, partitions, **APPEND_TIME)
    kafka.create(topics.dead_letters)
    with (
        tempfile.TemporaryDirectory() as folder,
        workers_in(broker.bootstrap, checkpoint, Path(folder), module) as workers,
    ):
        yield Testbed(broker, kafka, topics, workers, partitions, {"cache_size": 0, **settings})


def now_ms() -> float:
    """Milliseconds since 1970: the broker's clock too, for it runs on this machine."""
    return time.time() * 1000
