"""Avro as input: the whole worker, a real Kafka and a real schema registry, which may know nothing, be away or refuse."""

import io
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import fastavro
import orjson
import pytest

from tests.chaos.proxy import Proxy
from tests.support.avro import number, record, review, string
from tests.support.broker import free_port
from tests.support.component import available
from tests.support.process import COSTLESS, WorkerProcess, Workers, forked
from tests.support.scenario import letter_place, places, result_place, wait_until_committed
from tests.support.schema_registry import Registry, running_registry
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for
from worker.core.framing import FRAME_BYTES, frame
from worker.core.schemas import result_avro_schema

pytestmark = [pytest.mark.kafka, pytest.mark.reach]

FIRST = record("Review", id="long", text=["null", "string"], stars="int")
LANGUAGE = {**record("Language", code="string"), "namespace": "com.example"}
SECOND = record("Review", text=["null", "string"], id="long", stars="int", language=LANGUAGE)
ENDS_S = 15.0  # the revocation of a worker whose session and request timeouts are as here


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


@pytest.fixture
def proxy(schema_registry: Registry) -> Iterator[Proxy]:
    with closing(Proxy(free_port(), f"127.0.0.1:{schema_registry.port}")) as proxy:
        yield proxy


def second(id: int, text: str) -> bytes:
    """A value with the schema SECOND."""
    return b"\x02" + string(text) + number(id) + number(5) + string("ru")


def avro(registry: Registry, port: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "input_format": "avro",
        "schema_registry_url": f"http://127.0.0.1:{port or registry.port}{registry.path}",
        "dead_letter_limit": 0,
        **more,
    }


def reasons(letters: list[Record]) -> Counter[str]:
    return Counter((dict(letter.headers)["error.reason"] or b"").decode() for letter in letters)


def ids(results: list[Record]) -> Counter[str]:
    return Counter(orjson.loads(result.value or b"")["id"] for result in results)


def wait_for_its_wait(worker: WorkerProcess) -> None:
    """Until the worker says that it waits for the registry."""
    ready = partial(worker.get, "/readyz")
    wait_for(lambda: ready()[1].startswith("registry: "), "the reason to be told", describe=ready)


def test_two_versions_of_a_schema_bytes_that_fit_none_and_a_replay(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 3)
    subject = f"{topics.input}-value"
    one, two = (schema_registry.register(subject, schema) for schema in (FIRST, SECOND))
    salt = {"type": "fixed", "name": f"t{topics.input.replace('.', '_')}", "size": 1}  # a schema that no other test has
    later = record("Later", body="string", text="string", id="string", salt=salt)
    unknown = max(one, two) + 1
    values = [
        frame(one) + review(id, f"текст {id}") if id % 2 else frame(two) + second(id, f"текст {id}")
        for id in range(400)
    ]
    rng = random.Random(0)
    bad = {
        "unknown_schema": [frame(unknown) + string("b") + string("да") + string("later") + b"s"] * 3,
        "invalid_avro": [b"", b'{"text": "OK"}', frame(one) + rng.randbytes(50), (frame(two) + second(1, "да"))[:-1]],
        "text_not_string": [frame(one) + review(9, None)],
    }
    all_values = [*values, *(value for some in bad.values() for value in some)]
    records = [Record(value, b"k%d" % (at % 7)) for at, value in enumerate(all_values)]
    random.Random(1).shuffle(records)
    sent = {each.place: each for each in kafka.send(topics.input, records)}
    worker = workers.start(topics, **avro(schema_registry))
    wait_until_committed(kafka, topics, 120)
    assert worker.get("/readyz")[0] == 200
    assert worker.terminate() == 0

    results, letters = kafka.read(topics.output), kafka.read(topics.dead_letters)
    assert ids(results) == Counter(map(str, range(400)))
    assert reasons(letters) == {reason: len(some) for reason, some in bad.items()}
    for letter in letters:
        assert (letter.key, letter.value) == (sent[letter_place(letter)].key, sent[letter_place(letter)].value)

    known = schema_registry.register(f"{topics.input}-later", later)
    assert known == unknown, "the registry counts its ids up"
    flags = ["--dead-letter-topic", topics.dead_letters, "--group-id", topics.group, "--input-format", "avro"]
    replayed = forked("replay", "--bootstrap-servers", kafka.bootstrap, *flags, "--reason", "unknown_schema")
    assert replayed.returncode == 0, replayed.stderr
    workers.start(topics, **avro(schema_registry)).wait_until_ready()
    wait_until_committed(kafka, topics)
    assert ids(kafka.read(topics.output)) == Counter([*map(str, range(400)), *["later"] * 3])
    assert len(kafka.read(topics.dead_letters)) == len(letters)


def test_while_the_registry_is_away_it_waits_loses_nothing_and_keeps_its_deadlines(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry, proxy: Proxy
) -> None:
    kafka.create_all(topics, 4)
    one = schema_registry.register(f"{topics.input}-value", FIRST)

    def send(first: int, schema_id: int, write: Any) -> None:
        made = [
            Record(frame(schema_id) + write(id, f"текст {id}"), b"k%d" % (id % 20)) for id in range(first, first + 500)
        ]
        kafka.send(topics.input, made)

    settings = avro(schema_registry, proxy.port, drain_timeout_s=600, request_timeout_ms=10_000)
    first = workers.start(topics, **settings).wait_until_assigned(4)
    send(0, one, review)
    wait_until_committed(kafka, topics)
    proxy.set(refuses=True)
    two = schema_registry.register(f"{topics.input}-value", SECOND)
    send(500, two, second)
    send(1000, one, review)
    wait_for_its_wait(first)
    assert first.status("/livez") == 200

    proxy.set(swallows=True)
    proxy.reset()
    begun = time.monotonic()
    other = workers.start(topics, **settings)  # waits for the registry before it joins
    assert other.status("/readyz") != 200
    third = workers.start(topics, **{**settings, **avro(schema_registry)}).wait_until_assigned(2)
    assert time.monotonic() - begun < ENDS_S + 30, "a revocation does not wait for the registry"
    assert not first.lines("revoked before everything under way was published")
    assert third.terminate() == 0
    first.wait_for_status("/readyz", 503)
    wait_for_its_wait(first)
    assert first.terminate() == 1, "what it had taken is left to others"
    assert first.lines("could not be committed, and will be read again")

    proxy.set()
    other.wait_until_assigned(4)
    wait_until_committed(kafka, topics)
    assert other.terminate() == 0
    results = kafka.read(topics.output)
    assert ids(results) == Counter(map(str, range(1500)))
    assert places(results) == Counter(each.place for each in kafka.read(topics.input))
    assert not kafka.read(topics.dead_letters)
    for key in {result.key for result in results}:
        of_key = [result_place(result) or ("", 0, 0) for result in results if result.key == key]
        assert of_key == sorted(of_key), "order is kept"


def test_exactly_once_in_and_out_of_avro_whatever_happens_to_registry_and_workers(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry, proxy: Proxy
) -> None:
    """Workers that wait for the registry, or are past it, are killed, joined and left; every record is accounted for."""
    kafka.create_all(topics, 4)
    known = schema_registry.register(f"{topics.input}-value", FIRST)
    sent: list[Record] = []

    def send(schema_id: int, write: Any, count: int = 3_000) -> None:
        """Of a hundred records one fits no schema, and every second one needs the schema that is new."""
        made = []
        for id in range(len(sent), len(sent) + count):
            value = frame(schema_id) + write(id, f"текст {id}") if id % 2 else frame(known) + review(id, f"текст {id}")
            made.append(Record(value[:-1] if id % 100 == 7 else value, b"k%d" % (id % 20)))
        sent.extend(kafka.send(topics.input, made))

    def grown(worker: WorkerProcess) -> None:
        before = worker.metrics.outcomes
        wait_for(
            lambda: worker.metrics.outcomes > before + 200, "more outcomes", describe=lambda: worker.get("/readyz")
        )

    settings = avro(
        schema_registry, proxy.port, output_format="avro", delivery="exactly-once", max_batch_texts=64, cache_size=0
    )
    slow = {"PASS_SECONDS": "0.03"}
    worker = workers.start(topics, slow, **settings).wait_until_assigned(4)
    for turn in range(4):
        send(known, review)
        grown(worker)
        proxy.set(refuses=turn % 2 == 0, swallows=turn % 2 == 1)
        proxy.reset()
        newer = record("Review", **{f"field{turn}": "string"}, text=["null", "string"], id="long")
        new = schema_registry.register(f"{topics.input}-value", newer)
        send(new, lambda id, text: string("новое") + b"\x02" + string(text) + number(id))
        wait_for_its_wait(worker)
        other = workers.start(topics, slow, **{**settings, **avro(schema_registry)}).wait_until_assigned(2)
        grown(other)
        if turn < 2:
            worker.kill()
            other.wait_until_assigned(4)
            proxy.set()
            worker = workers.start(topics, slow, **settings).wait_until_assigned(2)
            assert other.terminate() == 0
            worker.wait_until_assigned(4)
        else:
            other.kill()
            proxy.set()
            worker.wait_until_assigned(4)
    wait_until_committed(kafka, topics, 240)
    assert worker.terminate() == 0

    results, letters = kafka.read(topics.output), kafka.read(topics.dead_letters)
    written = [
        fastavro.schemaless_reader(io.BytesIO((r.value or b"")[FRAME_BYTES:]), result_avro_schema(), None)
        for r in results
    ]
    came = [tuple(fields["source"].values()) for fields in written]  # type: ignore[index, call-overload]
    bad = {each.place for id, each in enumerate(sent) if id % 100 == 7}
    assert Counter(came) == Counter(each.place for each in sent if each.place not in bad)
    assert Counter(map(letter_place, letters)) == Counter(bad)
    assert set(reasons(letters)) == {"invalid_avro"}
    for key in {result.key for result in results}:
        of_key = [place for place, result in zip(came, results, strict=True) if result.key == key]
        assert of_key == sorted(of_key), "order is kept"


def test_credentials_decide_at_the_start(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    kafka.create_all(topics, 1)
    password = "geheim-0123456789"
    with ExitStack() as stack:
        registry = available(lambda: stack.enter_context(running_registry({"alice": password})), "schema registry")
        settings = avro(registry, schema_registry_user="alice")
        wrong = workers.start(topics, {"WORKER_SCHEMA_REGISTRY_PASSWORD": password + "x"}, **settings)
        assert wrong.wait() == 2
        assert len(wrong.lines("refuses the credentials")) == 1
        right = workers.start(topics, {"WORKER_SCHEMA_REGISTRY_PASSWORD": password}, **settings).wait_until_ready()
        assert right.terminate() == 0
        flags = ["--schema-registry-url", registry.url, "--schema-registry-user", "alice"]
        flags += ["--bootstrap-servers", kafka.bootstrap]
        for given, verdict in ((password, "ok"), (password + "x", "fail")):
            checked = forked("check", *flags, "--model", "builtin", WORKER_SCHEMA_REGISTRY_PASSWORD=given)
            assert [line for line in checked.stdout.splitlines() if line.startswith(f"{verdict:<5} registry")]
            assert password not in checked.stdout + checked.stderr
        assert password not in wrong.output + right.output


def test_a_schema_that_refers_to_another_is_read(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 1)
    author = f"Author{topics.input.partition('.')[0]}"
    schema_registry.register(f"{topics.input}-author", record(author, name="string"))
    refers = [{"name": author, "subject": f"{topics.input}-author", "version": 1}]
    outer = record("Outer", author=author, texts={"type": "map", "values": "string"}, id="string")
    id = schema_registry.register(f"{topics.input}-value", outer, references=refers)
    value = string("Иван") + number(1) + string("ru") + string("да") + b"\0" + string("a-1")
    kafka.send(topics.input, [Record(frame(id) + value)])
    formats = {"input_format": f"{topics.input}=avro", "text_field": f"{topics.input}=texts.ru"}
    worker = workers.start(topics, **avro(schema_registry) | formats)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    (result,) = kafka.read(topics.output)
    assert ids([result]) == {"a-1": 1}


def test_json_in_the_framing_is_read_where_a_registry_is_configured(
    kafka: Kafka, topics: Topics, workers: Workers, schema_registry: Registry
) -> None:
    kafka.create_all(topics, 1)
    schema = {"type": "object", "properties": {"id": {"type": "integer"}, "text": {"type": "string"}}}
    id = schema_registry.register(f"{topics.input}-value", schema, "JSON")
    values = [(frame(id) if at % 2 else b"") + orjson.dumps({"id": at, "text": "да"}) for at in range(100)]
    kafka.send(topics.input, [Record(value) for value in values])
    worker = workers.start(topics, schema_registry_url=schema_registry.url)
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0
    assert ids(kafka.read(topics.output)) == Counter(map(str, range(100)))
