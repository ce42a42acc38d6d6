"""A part of the cluster, or of the group, is away: what is at work goes on, and health names what is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import NewTopic

from tests.support.broker import Extras, JavaBroker, UnavailableError, free_port
from tests.support.process import COSTLESS, LONG_SESSION, WorkerProcess, Workers, workers_in
from tests.support.scenario import wait_until_committed
from tests.support.topics import Kafka, Record, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]

STAYS, GOES = 1, 2  # the brokers' numbers
OFFSETS = "__consumer_offsets"


@pytest.fixture
def worker_module() -> str:
    return COSTLESS


class Pair:
    """A cluster of two brokers. The first is the controller too and stays; the second may be stopped.

    Each is the coordinator of half of the groups; nothing is replicated.
    """

    def __init__(self) -> None:
        ports, controller = {number: free_port() for number in (STAYS, GOES)}, free_port()
        same = {
            "controller.quorum.voters": f"{STAYS}@localhost:{controller}",
            "offsets.topic.num.partitions": "2",
            "transaction.state.log.num.partitions": "1",
        }
        self.nodes: dict[int, JavaBroker] = {}
        cluster_id = Extras().cluster_id
        for number, port in ports.items():
            listener = f"PLAINTEXT://127.0.0.1:{port}"
            own = {
                "node.id": str(number),
                "process.roles": "broker,controller" if number == STAYS else "broker",
                "listeners": f"{listener},CONTROLLER://localhost:{controller}" if number == STAYS else listener,
                "advertised.listeners": listener,
            }
            self.nodes[number] = JavaBroker(Extras(properties=same | own, cluster_id=cluster_id))
            self.nodes[number].bootstrap = f"127.0.0.1:{port}"
        self.goes = self.nodes[GOES]

    def start(self) -> Kafka:
        for node in self.nodes.values():
            node.start()
        kafka = Kafka(self.nodes[STAYS].bootstrap)
        wait_for(lambda: len(kafka.admin.list_topics(timeout=30).brokers) == 2, "both brokers")
        self.create(kafka, OFFSETS, STAYS, GOES, compact=True)
        self.create(kafka, "__transaction_state", STAYS, compact=True)
        return kafka

    @staticmethod
    def create(kafka: Kafka, name: str, *leaders: int, compact: bool = False) -> None:
        """A topic with a partition for each of these brokers."""
        config = {"cleanup.policy": "compact"} if compact else {}
        topic = NewTopic(name, len(leaders), replica_assignment=[[leader] for leader in leaders], config=config)
        kafka.admin.create_topics([topic])[name].result(30)
        wait_for(lambda: name in kafka.names(), f"the brokers to know {name}")

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()


@pytest.fixture(scope="module")
def module_pair() -> Iterator[tuple[Pair, Kafka]]:
    try:
        pair = Pair()
    except UnavailableError as reason:
        pytest.skip(f"two brokers need Java: {reason}")
    try:
        yield pair, pair.start()
    finally:
        pair.close()


@pytest.fixture
def pair(module_pair: tuple[Pair, Kafka]) -> Iterator[Pair]:
    pair, _ = module_pair
    yield pair
    pair.goes.restore()


@pytest.fixture
def pair_kafka(module_pair: tuple[Pair, Kafka]) -> Kafka:
    return module_pair[1]


@pytest.fixture
def pair_workers(pair: Pair, tmp_path: Path, worker_module: str) -> Iterator[Workers]:
    with workers_in(pair.nodes[STAYS].bootstrap, Path("builtin"), tmp_path, worker_module, is_forked=True) as workers:
        yield workers


def group_of(broker: int, name: str) -> str:
    """A group's name whose coordinator this broker is: Java's hash of a string is odd as the sum of its characters is."""
    return name + str((sum(map(ord, name)) + broker - 1) % 2)


def to_partition(partition: int, numbers: range) -> list[Record]:
    return [Record(numbered(number).value, b"key", partition=partition) for number in numbers]


def topics_of(pair: Pair, kafka: Kafka, broker: int, *leaders: int) -> Topics:
    """Topics whose group's coordinator is this broker; of the input's partitions these are the leaders."""
    unique = Topics.unique()
    topics = Topics(unique.input, unique.output, unique.dead_letters, group_of(broker, unique.group))
    pair.create(kafka, topics.input, *leaders)
    for name in (topics.output, topics.dead_letters):
        pair.create(kafka, name, STAYS)
    return topics


def said(worker: WorkerProcess, part: str) -> list[str]:
    """What was logged of a part's troubles and of their ends."""
    return [line["message"] for line in worker.logs if line.get("part") == part]


def test_a_partition_without_a_leader_is_named_and_the_others_go_on(
    pair: Pair, pair_kafka: Kafka, pair_workers: Workers
) -> None:
    topics = topics_of(pair, pair_kafka, STAYS, STAYS, GOES)
    worker = pair_workers.start(topics, **LONG_SESSION).wait_until_assigned(2)
    for partition in (0, 1):
        pair_kafka.send(topics.input, to_partition(partition, range(10)))
    wait_for(lambda: worker.metrics.outcomes == 20, "the results")
    wait_for(lambda: set(worker.metrics.by("partition", "consumer_lag_records")) == {"0", "1"}, "a lag of both")

    pair.goes.stop()
    reason = f"partition {topics.input}-1 has no leader"
    wait_for(lambda: worker.get("/readyz") == (503, f"partitions: {reason}\n"), "the reason", 60)
    assert set(worker.metrics.by("partition", "consumer_lag_records")) == {"0"}
    assert set(worker.metrics.by("partition", "consumer_lag_seconds")) == {"0"}
    pair_kafka.send(topics.input, to_partition(0, range(10, 1_000)))
    wait_for(lambda: worker.metrics.outcomes == 1_010, "the other partition's results", 60)
    wait_for(lambda: worker.metrics.by("partition", "consumer_lag_records") == {"0": 0}, "its lag of 0", 60)
    holds_for(lambda: worker.get("/readyz") == (503, f"partitions: {reason}\n"), "the reason", 5)
    assert said(worker, "partitions").count(reason) == 1

    pair.goes.start()
    worker.wait_until_ready()
    pair_kafka.send(topics.input, to_partition(1, range(10)))
    wait_for(lambda: worker.metrics.outcomes == 1_020, "its results", 60)
    wait_for(lambda: worker.metrics.by("partition", "consumer_lag_records") == {"0": 0, "1": 0}, "both lags", 60)
    assert said(worker, "partitions")[-1].startswith("partitions: recovered after ")
    assert not worker.warnings("waiting for Kafka")
    assert worker.metrics.get("rebalances_total") == 1
    assert worker.terminate() == 0


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_coordinator_that_is_away_is_told_once_for_as_long_as_it_lasts(
    pair: Pair, pair_kafka: Kafka, pair_workers: Workers, delivery: str
) -> None:
    topics = topics_of(pair, pair_kafka, GOES, STAYS, STAYS)
    worker = pair_workers.start(topics, delivery=delivery, request_timeout_ms=5_000).wait_until_assigned(2)
    pair_kafka.send(topics.input, map(numbered, range(100)))
    wait_until_committed(pair_kafka, topics)
    told = len(said(worker, "coordinator"))  # a slow start may be told, too

    pair.goes.stop()
    pair_kafka.send(topics.input, map(numbered, range(100, 200)))  # so that there is something to commit
    wait_for(lambda: worker.get("/readyz")[1].startswith("coordinator: "), "the reason", 60)
    holds_for(lambda: worker.get("/readyz")[1].startswith("coordinator: "), "the reason", 8)
    assert worker.status("/livez") == 200
    assert len(said(worker, "coordinator")[told:]) == 1, "its beginning"

    pair.goes.start()
    worker.wait_until_ready()
    wait_until_committed(pair_kafka, topics)
    assert said(worker, "coordinator")[told + 1].startswith("coordinator: recovered after "), "its end"
    assert not worker.warnings("waiting for Kafka")
    assert worker.terminate() == 0
    results = pair_kafka.read(topics.output)
    assert len(results) == 200 if delivery == "exactly-once" else len(results) >= 200


def test_a_member_that_is_killed_and_comes_back_at_once(kafka: Kafka, topics: Topics, workers: Workers) -> None:
    """The group waits for the one that is gone, and says so; for no longer than the rebalance timeout.

    That is 0.4 of the request's timeout, 16 s, of which more than the first 5 s are told.
    """
    kafka.create_all(topics)
    settings = {"session_timeout_ms": 240_000, "request_timeout_ms": 40_000}
    stays, goes = (workers.start(topics, **settings) for _ in range(2))
    for worker in (stays, goes):
        worker.wait_until_assigned(2)
    told = len(said(stays, "group"))  # a slow start may be told, too
    goes.kill()
    back = workers.start(topics, **settings)
    wait_for(lambda: stays.get("/readyz")[1].startswith("group: rejoining"), "the rebalance to be told", 60)
    for worker in (stays, back):
        what = "its partitions, long before the session of the one that is gone ends"
        wait_for(lambda worker=worker: worker.metrics.get("assigned_partitions") == 2, what, 90)  # type: ignore[misc]
        worker.wait_until_ready()
    assert len(said(stays, "group")[told:]) == 2
    assert said(stays, "group")[-1].startswith("group: recovered after ")
    assert [worker.terminate() for worker in (stays, back)] == [0, 0]


def test_an_output_partition_without_a_leader_is_named_and_its_transaction_done_again(
    pair: Pair, pair_kafka: Kafka, pair_workers: Workers
) -> None:
    """It holds up all partitions of the process, which share one transaction; nothing is read or scored again."""
    unique = Topics.unique()
    topics = Topics(unique.input, unique.output, unique.dead_letters, group_of(STAYS, unique.group))
    pair.create(pair_kafka, topics.input, STAYS, STAYS)
    pair.create(pair_kafka, topics.output, STAYS, GOES)
    pair.create(pair_kafka, topics.dead_letters, STAYS)
    worker = pair_workers.start(topics, delivery="exactly-once", **LONG_SESSION).wait_until_assigned(2)
    pair_kafka.send(topics.input, map(numbered, range(100)))
    wait_until_committed(pair_kafka, topics)

    pair.goes.stop()
    pair_kafka.send(topics.input, map(numbered, range(100, 200)))
    reason = f"publish: publishing is stalled: nothing is acknowledged by {topics.output}-1\n"
    wait_for(lambda: worker.get("/readyz") == (503, reason), "the reason", 60)
    counted = worker.metrics.outcomes  # what was committed before a record of that partition came
    assert counted < 200
    holds_for(lambda: (worker.get("/readyz"), worker.metrics.outcomes) == ((503, reason), counted), "the reason", 5)
    assert worker.status("/livez") == 200

    pair.goes.start()
    worker.wait_until_ready()
    wait_until_committed(pair_kafka, topics)
    wait_for(lambda: worker.metrics.outcomes == 200, "every record to be counted")
    assert worker.metrics.get("batch_texts_sum") == 200, "scored once"
    assert worker.metrics.get("rebalances_total") == 1
    assert worker.terminate() == 0
    assert len(pair_kafka.read(topics.output)) == 200
