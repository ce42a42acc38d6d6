"""CloudEvents from a peer, through the real worker on a real Kafka, and back to the peer."""

from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from tests.support.process import COSTLESS, Workers
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for

pytestmark = pytest.mark.kafka
TRACE = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def sent_as(message: KafkaMessage) -> Record:
    key = message.key.encode() if isinstance(message.key, str) else message.key
    return Record(message.value, key, (*message.headers.items(), TRACE))


def test_events_of_both_modes_and_plain_records_beside_each_other(
    kafka: Kafka, topics: Topics, workers: Workers
) -> None:
    kafka.create_all(topics, 1)
    event = CloudEvent(
        attributes={
            "id": "7",
            "source": "/shop",
            "type": "review",
            "datacontenttype": "application/json",
            "partitionkey": "k",
        },
        data={"text": "Хорошо"},
    )
    batch = Record(b"[]", headers=(("content-type", b"application/cloudevents-batch+json"),))
    written = [sent_as(to_binary_event(event)), sent_as(to_structured_event(event)), numbered(0), batch]
    sent = kafka.send(topics.input, written)
    worker = workers.start(topics, output_format="cloudevents").wait_until_ready()
    wait_for(lambda: worker.metrics.outcomes == 4, "four outcomes")
    assert worker.terminate() == 0
    (letter,) = kafka.read(topics.dead_letters)
    assert dict(letter.headers)["error.reason"] == b"invalid_cloudevent"
    results = kafka.read(topics.output)
    assert len(results) == 3
    for record, origin, id in zip(results, sent, ["7", "7", "0"], strict=False):
        headers = {name: value for name, value in record.headers if value is not None}
        assert len(headers) == len(record.headers), "a header is there twice"
        read = from_kafka_event(KafkaMessage(headers, record.key, record.value or b""))
        data: Any = read.get_data()
        assert (data["id"], read.get_subject(), read.get_type()) == (id, id, "sentiment-worker.result")
        assert read.get_id() == f"{topics.input}-{origin.partition}-{origin.offset}"
        assert headers.get("traceparent") == (TRACE[1] if origin.headers else None)
