"""Outcomes as the pipeline hands them on."""

import json
import time

from aiokafka import ConsumerRecord

from worker.core.encoder import Encoder
from worker.core.events import Event, Failure, Outgoing
from worker.core.sentiment import Sentiment
from worker.kafka.delivery import Outcome
from worker.kafka.producer_records import ProducerRecord

GOOD = Sentiment("positive", 0.75, (0.1, 0.2, 0.85))
BAD = Failure("decode", "invalid_json", "the value is not JSON at character 0")


def outcome(number: int, *, value: bytes | None = None, failure: Failure | None = None) -> Outcome:
    """A result, or a dead letter for a failure, of a record a second old."""
    value = value or json.dumps({"id": f"e{number}", "text": f"текст {number}"}).encode()
    sent_at = round(1000 * time.time()) - 1_000
    record = ConsumerRecord("texts", 3, number, sent_at, 0, None, value, None, 0, len(value), [])
    if failure:
        return Outcome(record, None, failure)
    (result,) = Encoder().encode([record], [Event(f"e{number}", "")], [GOOD], [False], "model@0", "now")
    assert isinstance(result, Outgoing)
    return Outcome(record, ProducerRecord("sentiment", result, 3), None, GOOD)
