"""Traces: through the worker by headers, and of the worker itself, at a collector in this process."""

from dataclasses import replace

import pytest

from tests.support.broker import free_port
from tests.support.collector import Collector, Span, running_collector
from tests.support.process import COSTLESS, LONG_SESSION, Workers
from tests.support.scenario import places
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for
from worker.telemetry.tracing import LINKS

pytestmark = pytest.mark.kafka
ONCE = {"cache_size": 0, **LONG_SESSION}


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def traced(number: int) -> Record:
    """Every record belongs to a trace of its own."""
    headers = (("traceparent", f"00-{number + 1:032x}-{number + 1:016x}-01".encode()), ("tracestate", b"vendor=1"))
    return replace(numbered(number), headers=headers)


def variables(collector: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def messages(spans: list[Span]) -> int:
    """How many messages the spans are of."""
    return sum(int(span.attributes["messaging.batch.message_count"]) for span in spans)


def test_a_trace_goes_through_whether_spans_are_sent_or_not(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """To results, to dead letters and to nulls."""
    kafka.create_all(topics, 1)
    context = traced(0).headers
    sent = kafka.send(topics.input, [traced(0), Record(b"{", headers=context), Record(None, b"k", context)])
    worker = workers.start(topics, **ONCE).wait_until_ready()
    wait_for(lambda: worker.metrics.outcomes == len(sent), "the outcomes")
    assert worker.terminate() == 0
    published = kafka.read(topics.output) + kafka.read(topics.dead_letters)
    assert [record.headers[:2] for record in published] == [context] * 3


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_spans_are_of_micro_batches_and_link_to_their_events(
    kafka: Kafka, topics: Topics, workers: Workers, delivery: str
) -> None:
    kafka.create_all(topics, 1)
    count = 300
    records = [traced(number) for number in range(count)]
    records[5] = replace(records[5], value=b"{")
    records[6] = replace(records[6], headers=())
    sent = kafka.send(topics.input, records)
    with running_collector() as collector:
        worker = workers.start(
            topics,
            variables(collector),
            tracing="otel",
            delivery=delivery,
            max_batch_texts=200,
            client_id="me",
            **ONCE,
        ).wait_until_ready()
        wait_for(lambda: worker.metrics.outcomes == count, "the outcomes")
        # At its end it sends the last ones within two seconds or not at all; those of a poll come before those of sending.
        wait_for(lambda: messages(collector.named(f"process {topics.input}")) == count, "the spans", 60)
        wait_for(
            lambda: messages([span for span in collector.spans if span.name.startswith("send ")]) == count, "all", 60
        )
        assert worker.terminate() == 0
    common = {"messaging.system": "kafka", "messaging.client.id": "me"}
    polls, processes = collector.named(f"poll {topics.input}"), collector.named(f"process {topics.input}")
    sends, letters = collector.named(f"send {topics.output}"), collector.named(f"send {topics.dead_letters}")
    assert len(collector.spans) == len(polls + processes + sends + letters)
    assert {span.service for span in collector.spans} == {"sentiment-worker"}
    assert all(span.attributes.items() >= common.items() and span.began <= span.ended for span in collector.spans)

    assert messages(polls) == messages(processes) == count
    assert (messages(sends), messages(letters)) == (count - 1, 1)
    assert sum(span.attributes["sentiment_worker.dead_letters"] for span in processes) == 1
    for spans, kind, name, operation in (
        (polls, "CLIENT", "poll", "receive"),
        (processes, "CONSUMER", "process", "process"),
        (sends + letters, "CLIENT", "send", "send"),
    ):
        for span in spans:
            attributes = span.attributes
            assert (span.kind, attributes["messaging.operation.name"]) == (kind, name)
            assert attributes["messaging.operation.type"] == operation
            if name != "send":
                assert attributes["messaging.consumer.group.name"] == topics.group
                assert attributes["messaging.destination.name"] == topics.input
                assert attributes["messaging.destination.partition.id"] == "0"
    received = {span.id: span for span in polls}
    assert {span.parent for span in processes} == set(received), "each poll has its process"
    for span in processes:
        poll = received[span.parent]
        assert (span.trace_id, span.links) == (poll.trace_id, poll.links)
        assert poll.ended <= span.began
    for span in collector.spans:
        linked = min(LINKS, span.attributes["messaging.batch.message_count"])
        assert linked - 1 <= len(span.links) <= linked
        for trace_id, id, attributes in span.links:
            number = int(trace_id, 16) - 1
            assert (int(id, 16) - 1, attributes["messaging.kafka.offset"]) == (number, sent[number].offset)
            assert attributes["messaging.destination.name"] == topics.input
    assert [int(trace_id, 16) for trace_id, _, _ in letters[0].links] == [6]
    assert kafka.read(topics.output)[0].headers[:2] == records[0].headers, "events keep the context that they have"


@pytest.mark.parametrize("trouble", ["gone", "slow"])
def test_no_record_waits_for_a_collector(kafka: Kafka, topics: Topics, workers: Workers, trouble: str) -> None:
    kafka.create_all(topics, 2)
    sent = kafka.send(topics.input, map(traced, range(8_000)))
    with running_collector(is_slow=trouble == "slow") as collector:
        if trouble == "gone":
            collector.url = f"http://127.0.0.1:{free_port()}"
        patient = (
            {"OTEL_EXPORTER_OTLP_TIMEOUT": "600"} if trouble == "slow" else {}
        )  # it waits for an answer to the end
        worker = workers.start(topics, variables(collector) | patient, tracing="otel", max_batch_texts=50, **ONCE)
        worker.wait_until_ready()
        wait_for(lambda: worker.metrics.outcomes == len(sent), "every record")
        assert worker.status("/livez") == 200
        if trouble == "slow":
            wait_for(lambda: collector.requests, "the collector to be asked")
        else:
            wait_for(lambda: worker.warnings("the collector does not take spans"), "the line that says so")
        assert worker.terminate() == 0
    assert places(kafka.read(topics.output)) == dict.fromkeys((record.place for record in sent), 1)
    assert not worker.lines("Traceback")
    if trouble == "gone":
        assert len(worker.warnings("the collector does not take spans")) == 1, "said once"
    else:
        assert worker.warnings("the last spans could not be sent in time")
