"""Some records, one worker, and everything that came of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import orjson

from tests.support.process import LONG_SESSION, Metrics, Workers
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

RESULT, TOMBSTONE, SKIPPED = "result", "tombstone", "skipped"
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Case:
    """A record and what the contract says becomes of it: one of the above, or a dead letter's reason."""

    record: Record
    outcome: str = RESULT
    codec: str = "none"


@dataclass(frozen=True)
class Story:
    """What went in, what came out, and what the worker said about it."""

    topics: Topics
    settings: Mapping[str, Any]
    cases: Mapping[str, Case]
    sent: Mapping[str, Record]
    output: list[Record]
    dead_letters: list[Record]
    metrics: Metrics
    printed: str
    exit_code: int
    committed: dict[int, int]
    ends: dict[int, int]

    def expected(self, outcome: str) -> list[str]:
        return [name for name, case in self.cases.items() if case.outcome == outcome]

    @property
    def reasons(self) -> Counter[str]:
        """How many dead letters of each reason there should be."""
        return Counter(case.outcome for case in self.cases.values() if case.outcome not in (RESULT, TOMBSTONE, SKIPPED))

    def result(self, name: str) -> Record:
        """The one result of a case."""
        return self._only(name, [record for record in self.output if result_place(record) == self.sent[name].place])

    def dead_letter(self, name: str) -> Record:
        return self._only(
            name, [record for record in self.dead_letters if letter_place(record) == self.sent[name].place]
        )

    @staticmethod
    def _only(name: str, found: list[Record]) -> Record:
        assert len(found) == 1, f"{name} came out {len(found)} times"
        return found[0]


def play(kafka: Kafka, workers: Workers, cases: Mapping[str, Case], *, settings: dict[str, Any], **topic: Any) -> Story:
    """Publishes the cases, lets one worker do them all, and ends it. `topic` as of `make_topics`."""
    topics = make_topics(kafka, **topic)
    sent = send_cases(kafka, topics.input, cases)
    worker = workers.start(topics, **LONG_SESSION | settings).wait_until_ready()
    ends = kafka.ends(topics.input)
    wait_until_committed(kafka, topics)
    no_lag = dict.fromkeys(map(str, ends), 0.0)
    wait_for(lambda: worker.metrics.by("partition", "consumer_lag_records") == no_lag, "a lag of 0")
    metrics = worker.metrics
    exit_code = worker.terminate()
    return Story(
        topics,
        settings,
        cases,
        sent,
        kafka.read(topics.output),
        kafka.read(topics.dead_letters),
        metrics,
        worker.output,
        exit_code,
        worked(kafka.committed(topics.group, topics.input)),
        worked(ends),
    )


@dataclass(frozen=True)
class TopicSizes:
    """How many partitions, and what configuration, the topics of a story have."""

    partitions: tuple[int, int, int] = (4, 3, 2)
    input: dict[str, object] = field(default_factory=dict)
    output: dict[str, object] = field(default_factory=dict)
    dead_letters: dict[str, object] = field(default_factory=dict)


def make_topics(kafka: Kafka, sizes: TopicSizes | None = None) -> Topics:
    sizes = sizes or TopicSizes()
    topics = Topics.unique()
    kafka.create(topics.input, sizes.partitions[0], **sizes.input)
    kafka.create(topics.output, sizes.partitions[1], **sizes.output)
    kafka.create(topics.dead_letters, sizes.partitions[2], **sizes.dead_letters)
    return topics


def send_cases(kafka: Kafka, topic: str, cases: Mapping[str, Case]) -> dict[str, Record]:
    sent = {}
    for codec, group in groupby(cases, lambda name: cases[name].codec):
        names = list(group)
        records = kafka.send(topic, [cases[name].record for name in names], codec)
        sent |= dict(zip(names, records, strict=True))
    return sent


def wait_until_committed(kafka: Kafka, topics: Topics, seconds: float = 150) -> None:
    """Waits until the group has done everything that is in the input topic now."""
    ends = worked(kafka.ends(topics.input))

    def left() -> str:
        committed = worked(kafka.committed(topics.group, topics.input))
        return "" if committed == ends else f"{committed} of {ends}"

    wait_for(lambda: not left(), "every record to be committed", seconds, describe=left)


def worked(offsets: dict[int, int]) -> dict[int, int]:
    """Offsets without those of empty partitions, which a group may commit or not."""
    return {partition: offset for partition, offset in offsets.items() if offset}


def source_of(record: Record) -> dict[str, Any]:
    """The `source` of a result, in either output mode."""
    fields = orjson.loads(record.value or b"")
    source: dict[str, Any] = fields.get("sentiment", fields)["source"]
    return source


def result_place(record: Record) -> Place | None:
    """The place of the input record that a record of the output topic is about; None for a tombstone."""
    if record.value is None:
        return None
    source = source_of(record)
    return source["topic"], source["partition"], source["offset"]


def letter_place(record: Record) -> Place:
    headers = dict(record.headers)
    topic, partition, offset = (headers[f"source.{name}"] or b"" for name in ("topic", "partition", "offset"))
    return topic.decode(), int(partition), int(offset)


def places(*records: list[Record]) -> Counter[Place | None]:
    """How often each input record came out as a result."""
    return Counter(result_place(record) for some in records for record in some)


def with_headers(record: Record, *headers: tuple[str, bytes | None]) -> Record:
    return replace(record, headers=headers)
