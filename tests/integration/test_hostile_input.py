"""Hostile records, over the three combinations of input format and output mode, on a real Kafka: `make fuzz` sends 10,000.

Each becomes a result or a dead letter with the right reason, by an oracle that shares nothing with the worker; the process
lives; and every result is that of its text alone, whatever stood beside it in its batch.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import orjson
import pytest

from tests.support.checkpoint import Oracle
from tests.support.payloads import PAYLOADS, RESULT, SKIPPED, TOMBSTONE, Verdict, records, verdict
from tests.support.process import Workers
from tests.support.scenario import Case, Story, TopicSizes, letter_place, play
from tests.support.topics import Kafka, Record

pytestmark = pytest.mark.kafka

SEED = 20_261_123
COMBINATIONS = (("json", "result"), ("json", "enrich"), ("text", "result"))
ROOMY = {"max_message_bytes": 4_000_000}  # so that each dead letter goes out untouched
ENRICHED = b',"sentiment":'


@pytest.mark.parametrize(("input_format", "output_mode"), COMBINATIONS)
def test_each_record_becomes_what_the_oracle_says(
    kafka: Kafka, workers: Workers, oracle: Oracle, input_format: str, output_mode: str
) -> None:
    hostile = records(SEED + len(input_format + output_mode), math.ceil(PAYLOADS / len(COMBINATIONS)))
    verdicts = {str(number): verdict(record, input_format, output_mode) for number, record in enumerate(hostile)}
    cases = {name: Case(hostile[int(name)], found.outcome) for name, found in verdicts.items()}
    settings = {"input_format": input_format, "output_mode": output_mode, "dead_letter_limit": 0}
    sizes = TopicSizes((4, 3, 2), ROOMY, ROOMY, ROOMY)
    story = play(kafka, workers, cases, settings=settings, sizes=sizes)

    assert story.exit_code == 0
    assert "Traceback" not in story.printed
    assert story.committed == story.ends
    assert_dead_letters(story)
    assert_results(story, verdicts, oracle, output_mode)
    nulls = Counter(case.outcome for case in cases.values())
    assert sum(record.value is None for record in story.output) == nulls[TOMBSTONE]
    assert story.metrics.get("records_skipped_total") == nulls[SKIPPED]
    assert story.metrics.get("records_consumed_total") == len(cases) == story.metrics.outcomes


def assert_dead_letters(story: Story) -> None:
    """One for each record that has to be one, with its reason, and all that the record had."""
    letters = {letter_place(letter): letter for letter in story.dead_letters}
    assert len(letters) == len(story.dead_letters) == story.reasons.total()
    for reason in story.reasons:
        for name in story.expected(reason):
            sent = story.sent[name]
            letter = letters[sent.place]
            assert dict(letter.headers)["error.reason"] == reason.encode(), (name, story.sent[name].value)
            assert (letter.key, letter.value) == (sent.key, sent.value), name
            assert tuple(letter.headers[: len(sent.headers)]) == tuple(sent.headers), name


def assert_results(story: Story, verdicts: dict[str, Verdict], oracle: Oracle, output_mode: str) -> None:
    """One for each event, with its id, and with the answer that its text gets alone."""
    results: dict[object, tuple[Record, dict[str, Any]]] = {}
    for record in story.output:
        if record.value is not None:
            fields = fields_of(record, output_mode)
            results[tuple(fields["source"].values())] = record, fields
    names = story.expected(RESULT)
    assert len(results) == len(names) == sum(record.value is not None for record in story.output)
    for name in names:
        sent, expected = story.sent[name], verdicts[name]
        record, fields = results[sent.place]
        id = "{}-{}-{}".format(*sent.place) if expected.id is None else expected.id
        assert (record.key, fields["id"]) == (sent.key, id), name
        found = list(fields["probabilities"].values())
        np.testing.assert_allclose(found, oracle.probabilities(expected.text), atol=2e-5, err_msg=name)
        assert fields["truncated"] is oracle.is_truncated(expected.text), name
        if output_mode == "enrich":
            assert_keeps_its_bytes(sent.value or b"", record.value or b"")


def assert_keeps_its_bytes(own: bytes, enriched: bytes) -> None:
    end = own.rindex(b"}")
    assert enriched.startswith(own[:end] + ENRICHED)
    assert enriched.endswith(own[end:])


def fields_of(record: Record, output_mode: str) -> dict[str, Any]:
    """The result's own fields; those that the event brought along may hold numbers of any size."""
    value = record.value or b""
    if output_mode == "enrich":
        value = value[value.rindex(ENRICHED) + len(ENRICHED) : value.rindex(b"}")]
    found: dict[str, Any] = orjson.loads(value)
    return found
