"""What the audit reads of a topic."""

import pytest
from confluent_kafka import Producer

from tests.chaos.driver import read
from tests.support.topics import Kafka, Topics

pytestmark = pytest.mark.kafka


def test_the_audit_waits_until_a_transaction_of_a_killed_worker_is_aborted(kafka: Kafka, topics: Topics) -> None:
    config = {"bootstrap.servers": kafka.bootstrap, "transactional.id": topics.group, "transaction.timeout.ms": 1_000}
    producer = Producer(config)
    producer.init_transactions(60)
    producer.begin_transaction()
    producer.produce(topics.output, b"never committed", partition=0)
    producer.flush(60)
    other = Producer({"bootstrap.servers": kafka.bootstrap})
    other.produce(topics.output, b"behind it", partition=0)
    other.flush(60)
    assert [message.value() for message in read(kafka, topics.output)] == [b"behind it"]
    assert not kafka.has_open_transaction(topics.output)
