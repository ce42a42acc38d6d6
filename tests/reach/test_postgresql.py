"""The recipe deploy/recipes/postgresql: results through a real Kafka Connect into a real PostgreSQL."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer

from tests.support.broker import Broker
from tests.support.component import available
from tests.support.connect import Connect
from tests.support.postgresql import DATABASE, USER, PostgreSQL
from tests.support.process import Workers
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.reach]

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "postgresql"
START = 1_795_000_000_000  # ms
TEXTS = ("ужасно, никому не советую", "прекрасно, очень понравилось", "завтра в девять", "отвратительный сервис")
Begin = Callable[[Topics], Connect]
Row = dict[str, Any]


@pytest.fixture
def model() -> Path:
    return Path("builtin")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = available(PostgreSQL, "PostgreSQL")
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def database(server: PostgreSQL) -> PostgreSQL:
    """With an empty table."""
    server.run("DROP TABLE IF EXISTS sentiment CASCADE")
    server.run((RECIPE / "schema.sql").read_text())
    return server


@pytest.fixture
def begin(broker: Broker, database: PostgreSQL, tmp_path: Path) -> Iterator[Begin]:
    """Starts Kafka Connect with the recipe on a test's topics."""
    started: list[Connect] = []

    def begin(topics: Topics) -> Connect:
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap,
            "DATABASE_URL": f"jdbc:postgresql://127.0.0.1:{database.port}/{DATABASE}",
            "DATABASE_USER": USER,
            "DATABASE_PASSWORD": "secret-of-the-database",
        }
        connect = available(lambda: Connect(RECIPE, topics.output, variables, tmp_path), "Kafka Connect")
        started.append(connect)
        return connect.wait_until_running()

    yield begin
    for connect in started:
        connect.close()
        print(connect.output[-4000:])


def reviews(count: int, start: int = START) -> list[Record]:
    """Events of three keys and of none, ten seconds apart."""
    keys = (b"anna", "борис".encode(), b"carl", None)
    return [
        Record(
            value=orjson.dumps({"id": number, "text": f"{TEXTS[number % len(TEXTS)]} {number}"}),
            key=keys[number // 3 % len(keys)],
            headers=[("trace", b"\xff"), ("record_key", b"of somebody else")],
            timestamp=start + 10_000 * number,
        )
        for number in range(count)
    ]


def score(kafka: Kafka, workers: Workers, topics: Topics, records: Sequence[Record] = ()) -> None:
    """Sends these records, and lets one worker of the topics' group do all that is there."""
    kafka.send(topics.input, records)
    worker = workers.start(topics).wait_until_ready()
    wait_until_committed(kafka, topics)
    assert worker.terminate() == 0


def wait_until_written(kafka: Kafka, connect: Connect, topics: Topics) -> None:
    """The connector has committed every result of the output topic. (It commits no tombstone by itself.)"""
    ends = {record.partition: record.offset + 1 for record in kafka.read(topics.output) if record.value}
    wait_for(
        lambda: kafka.committed(connect.group, topics.output).items() >= ends.items(),
        "the connector to commit its last offsets",
        describe=lambda: f"{connect.states}, {kafka.committed(connect.group, topics.output)} of {ends}",
    )


def results(kafka: Kafka, topics: Topics) -> list[tuple[bytes | None, Row]]:
    """Keys and values of the output topic, tombstones left out."""
    return [(record.key, orjson.loads(record.value)) for record in kafka.read(topics.output) if record.value]


def row_of(key: bytes | None, result: Row) -> Row:
    """The columns that a result has in the table."""
    flat = {f"source_{name}": value for name, value in result.pop("source").items()}
    flat |= {f"probabilities_{name}": value for name, value in result.pop("probabilities").items()}
    times = {name: moment(result.pop(name)) for name in ("event_time", "processed_at")}
    minute = times["event_time"].replace(second=0, microsecond=0)
    return {**flat, **result, **times, "minute": minute, "record_key": None if key is None else key.decode()}


def rows(database: PostgreSQL) -> dict[int, Row]:
    """The table by source_offset."""
    found = database.rows("SELECT * FROM sentiment")
    for row in found:
        row |= {name: moment(row[name]) for name in ("event_time", "processed_at", "minute")}
    return {row["source_offset"]: row for row in found}


def moment(written: str) -> datetime:
    return datetime.fromisoformat(written)


def without_time_of_processing(found: dict[int, Row]) -> dict[int, Row]:
    return {offset: {**row, "processed_at": None} for offset, row in found.items()}


def test_each_result_is_a_row_and_a_repeat_finds_its_own(
    kafka: Kafka, workers: Workers, topics: Topics, database: PostgreSQL, begin: Begin
) -> None:
    kafka.create(topics.input)
    kafka.create(topics.output, 3)
    kafka.create(topics.dead_letters)
    others = [Record(value=None, key=b"anna"), Record(value=b"no JSON", key=b"anna")]
    publish_and_abort(kafka, topics.output)
    score(kafka, workers, topics, [*reviews(60), *others])
    connect = begin(topics)
    wait_until_written(kafka, connect, topics)
    published = results(kafka, topics)
    first = rows(database)
    assert len(published) == len(first) == 60
    for key, result in published:
        assert first[result["source"]["offset"]] == row_of(key, result)
    assert "secret-of-the-database" not in connect.output

    again = Topics(topics.input, topics.output, topics.dead_letters, f"{topics.group}.again")
    score(kafka, workers, again)
    wait_until_written(kafka, connect, topics)
    assert len(results(kafka, topics)) == 120
    second = rows(database)
    assert without_time_of_processing(second) == without_time_of_processing(first)
    assert all(second[offset]["processed_at"] > first[offset]["processed_at"] for offset in first)


def publish_and_abort(kafka: Kafka, topic: str) -> None:
    """A result that its transaction takes back."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "transactional.id": f"{topic}.aborted", "log_level": 0})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic, b'{"id": "aborted"}')
    producer.flush(30)
    producer.abort_transaction(30)


def test_the_view_has_the_numbers_of_the_results(
    kafka: Kafka, workers: Workers, topics: Topics, database: PostgreSQL, begin: Begin
) -> None:
    kafka.create_all(topics)
    score(kafka, workers, topics, reviews(100))
    wait_until_written(kafka, begin(topics), topics)
    groups: dict[tuple[datetime, str | None], list[Row]] = {}
    for key, result in results(kafka, topics):
        row = row_of(key, result)
        groups.setdefault((row["minute"], row["record_key"]), []).append(row)
    seen = database.rows("SELECT * FROM sentiment_by_minute")
    assert {row["label"] for rows in groups.values() for row in rows} == {"negative", "neutral", "positive"}
    assert {(moment(line["minute"]), line["key"]) for line in seen} == groups.keys()
    assert database.run("SELECT topic FROM sentiment_topics") == topics.input
    for line in seen:
        expected = groups[moment(line["minute"]), line["key"]]
        assert line["topic"] == topics.input
        assert line["results"] == len(expected)
        for label in ("negative", "neutral", "positive"):
            assert line[label] == sum(row["label"] == label for row in expected)
        assert line["mean_score"] == pytest.approx(sum(row["score"] for row in expected) / len(expected))


def test_after_an_outage_of_the_database_a_restart_of_the_task_goes_on_where_it_stood(
    kafka: Kafka, workers: Workers, topics: Topics, database: PostgreSQL, begin: Begin
) -> None:
    kafka.create_all(topics)
    score(kafka, workers, topics, reviews(20))
    connect = begin(topics)
    wait_until_written(kafka, connect, topics)
    database.stop()
    score(kafka, workers, topics, reviews(20, START + 3_600_000))
    connect.wait_until_failed()
    database.start()
    connect.restart()
    wait_until_written(kafka, connect, topics)
    assert database.run("SELECT count(*) FROM sentiment") == "40"


def test_a_result_that_the_database_refuses_stops_the_task_until_it_is_passed_over(
    kafka: Kafka, workers: Workers, topics: Topics, database: PostgreSQL, begin: Begin
) -> None:
    kafka.create_all(topics, 1)
    refused = Record(value=b'{"id": "a\\u0000b", "text": "ok"}')
    score(kafka, workers, topics, [*reviews(3), refused, *reviews(3)])
    connect = begin(topics)
    connect.wait_until_failed()
    connect.ask("PATCH", "/config", {"consumer.override.max.poll.records": "1"})
    wait_for(lambda: kafka.committed(connect.group, topics.output) == {0: 3}, "all before it to be written")
    connect.wait_until_failed()
    connect.ask("PUT", "/stop")
    wait_for(lambda: connect.ask("GET", "/status")["connector"]["state"] == "STOPPED", "the connector to stop")
    place = {"kafka_topic": topics.output, "kafka_partition": 0}
    assert connect.ask("GET", "/offsets") == {"offsets": [{"partition": place, "offset": {"kafka_offset": 3}}]}
    connect.ask("PATCH", "/offsets", {"offsets": [{"partition": place, "offset": {"kafka_offset": 4}}]})
    connect.ask("PATCH", "/config", {"consumer.override.max.poll.records": None})
    connect.ask("PUT", "/resume")
    wait_until_written(kafka, connect, topics)
    assert connect.states == ["RUNNING"]
    assert rows(database).keys() == {0, 1, 2, 4, 5, 6}
