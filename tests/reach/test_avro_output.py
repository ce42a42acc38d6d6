"""Results in Avro: through the real worker, Kafka and a schema registry, and read by Confluent's own deserializer."""

import json
import urllib.error
import urllib.request
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from tests.chaos.proxy import Proxy
from tests.support.broker import free_port
from tests.support.process import COSTLESS, Workers, forked
from tests.support.scenario import letter_place, wait_until_committed
from tests.support.schema_registry import Registry
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import wait_for
from worker.core.schemas import result_avro_schema

pytestmark = [pytest.mark.kafka, pytest.mark.reach]

FIRST_VERSION = (Path(__file__).parents[1] / "fixtures" / "result-1.avsc").read_text(encoding="utf-8")
OTHER = {"type": "record", "name": "Other", "fields": [{"name": "other", "type": "string"}]}


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


def ask(registry: Registry, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and answer of the registry."""
    request = urllib.request.Request(
        registry.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def register(registry: Registry, subject: str, schema: object) -> int:
    """The status of the answer: 200, or why not."""
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return ask(registry, "POST", f"/subjects/{subject}/versions", {"schema": text})[0]


def avro(registry: Registry, **more: object) -> dict[str, object]:
    return {"output_format": "avro", "schema_registry_url": registry.url, **more}


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_results_are_read_by_a_peer_and_the_rest_is_as_ever(
    delivery: str, kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 4)
    headers = (("trace", b"1"), ("content-type", b"application/json"))
    others = [
        Record(None, b"tombstone", headers),
        Record(b"{", b"broken", headers),
        Record('{"text": "без имени"}'.encode(), None, headers, 1_795_428_000_000),
    ]
    sent = kafka.send(topics.input, [*map(numbered, range(2_000)), *others])
    worker = workers.start(topics, **avro(schema_registry, delivery=delivery)).wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.metrics.outcomes == len(sent)
    assert worker.terminate() == 0

    client = SchemaRegistryClient({"url": schema_registry.url})
    latest = client.get_latest_version(f"{topics.output}-value")
    assert json.loads(latest.schema.schema_str or "") == result_avro_schema()
    deserialize = AvroDeserializer(client)
    context = SerializationContext(topics.output, MessageField.VALUE)
    by_place = {record.place: record for record in sent}
    output = kafka.read(topics.output)
    results = [record for record in output if record.value is not None]
    seen: Counter[Any] = Counter()
    for record in results:
        fields: Any = deserialize(record.value, context)
        place = tuple(fields["source"].values())
        seen[place] += 1
        origin = by_place[place]  # type: ignore[index]
        own = orjson.loads(origin.value or b"")
        assert fields["id"] == own.get("id", "-".join(map(str, place)))
        assert (fields["label"], fields["score"], fields["truncated"]) == ("negative", 0.0, False)
        assert fields["probabilities"] == {"negative": 0.5, "neutral": 0.5, "positive": 0.5}
        assert (fields["labels"], fields["windows"]) == (None, None)
        assert fields["event_time"] == datetime.fromtimestamp(origin.timestamp / 1000, UTC)
        assert fields["processed_at"] > datetime(2026, 1, 1, tzinfo=UTC)
        assert (record.key, record.timestamp) == (origin.key, origin.timestamp)
        kept = [header for header in origin.headers if header[0] != "content-type"]
        assert list(record.headers) == [*kept, ("content-type", b"application/avro")]
    assert seen == Counter(record.place for record in sent if record.value not in (None, b"{"))
    (tombstone,) = (record for record in output if record.value is None)
    assert (tombstone.key, tuple(tombstone.headers)) == (b"tombstone", headers)
    (letter,) = kafka.read(topics.dead_letters)
    assert (letter.key, letter.value, tuple(letter.headers[:2])) == (b"broken", b"{", headers)
    assert letter_place(letter) == sent[-2].place


def test_a_schema_that_someone_else_registers_has_to_be_there(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 1)
    sent = kafka.send(topics.input, [numbered(0)])
    settings = avro(schema_registry)
    looks_only = {"WORKER_SCHEMA_AUTO_REGISTER": "false"}
    subject = f"{topics.output}-value"
    worker = workers.start(topics, looks_only, **settings)
    assert worker.wait() == 2
    (sentence,) = worker.warnings("not registered under", subject, "sentiment-worker schema result --format avro")
    assert "\n" not in sentence
    assert ask(schema_registry, "GET", f"/subjects/{subject}/versions")[0] == 404, "it has registered nothing"

    assert register(schema_registry, subject, forked("schema", "result", "--format", "avro").stdout) == 200
    worker = workers.start(topics, looks_only, **settings).wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert ask(schema_registry, "GET", f"/subjects/{subject}/versions") == (200, [1])
    assert kafka.count(topics.output) == len(sent)


def test_a_subject_with_another_schema_ends_the_start(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 1)
    subject = f"{topics.output}-value"
    assert register(schema_registry, subject, OTHER) == 200
    assert ask(schema_registry, "PUT", f"/config/{subject}", {"compatibility": "BACKWARD"})[0] == 200
    worker = workers.start(topics, **avro(schema_registry))
    assert worker.wait() == 2
    (sentence,) = worker.warnings("does not fit the subject", subject, "409")
    assert "\n" not in sentence
    assert ask(schema_registry, "GET", f"/subjects/{subject}/versions") == (200, [1])


def test_a_registry_that_is_away_at_the_start_is_waited_for(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 1)
    kafka.send(topics.input, [numbered(0)])
    port = free_port()
    target = schema_registry.url.removeprefix("http://")
    address, _, path = target.partition("/")
    worker = workers.start(topics, output_format="avro", schema_registry_url=f"http://127.0.0.1:{port}/{path}")
    wait_for(lambda: "registry: " in worker.get("/readyz")[1], "a reason to be told", describe=lambda: worker.output)
    assert worker.status("/livez") == 200
    assert len(worker.warnings("does not answer", "waiting for it")) == 1, "told once"
    assert kafka.count(topics.output) == 0
    proxy = Proxy(port, address)
    try:
        worker.wait_until_ready()
        wait_until_committed(kafka, topics)
    finally:
        proxy.close()
    assert worker.terminate() == 0, "it needs the registry no more"
    assert kafka.count(topics.output) == 1


@pytest.mark.parametrize("rule", ["BACKWARD", "BACKWARD_TRANSITIVE"])
def test_the_schema_stays_compatible(rule: str, schema_registry: Registry) -> None:
    """After the first version the registry takes today's schema, then one with a field more, but none without a default."""
    subject = f"{uuid.uuid4().hex[:8]}-value"
    assert register(schema_registry, subject, FIRST_VERSION) == 200
    assert ask(schema_registry, "PUT", f"/config/{subject}", {"compatibility": rule})[0] == 200
    now = result_avro_schema()
    assert register(schema_registry, subject, now) == 200
    field = {"name": "later", "type": ["null", "string"], "default": None}
    assert register(schema_registry, subject, {**now, "fields": [*now["fields"], field]}) == 200
    required = {"name": "required", "type": "string"}
    assert register(schema_registry, subject, {**now, "fields": [*now["fields"], field, required]}) == 409
