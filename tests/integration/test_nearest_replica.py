"""With `client_rack` records come from the replica in that rack, and none is lost or scored twice when it fails."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ElectionType, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import NewTopic, PartitionMetadata

from tests.chaos.cluster import Node, begin_all
from tests.chaos.conftest import IS_LONG
from tests.chaos.proxy import Proxy
from tests.support.broker import Extras, UnavailableError, free_port
from tests.support.process import COSTLESS, LONG_SESSION, WorkerProcess, Workers, forked, workers_in
from tests.support.reassignment import reassign
from tests.support.scenario import places, wait_until_committed
from tests.support.topics import Kafka, Load, Record, Topics, numbered
from tests.support.waiting import holds_for, wait_for

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(600)]

long_form = pytest.mark.skipif(not IS_LONG, reason="a slow case, which is run by make chaos")

RACKS = {1: "a", 2: "a", 3: "b"}
NEAR = 3  # the only broker in rack b; it leads no partition
FAR_AND_NEAR = [[1, 2, NEAR], [2, 1, NEAR]]
FAR = [[1, 2], [2, 1]]
SELECTOR = "org.apache.kafka.common.replica.RackAwareReplicaSelector"
ENOUGH = 20_000  # bytes; of two hundred records, and far more than all that is not records


class Racks:
    """Three brokers in two racks. Workers reach each of them through a proxy, which counts what the broker sends."""

    def __init__(self) -> None:
        controllers = {number: free_port() for number in RACKS}
        cluster_id = Extras().cluster_id
        self.nodes: dict[int, Node] = {}
        self.proxies: dict[int, Proxy] = {}
        for number, rack in RACKS.items():
            port, entrance = free_port(), free_port()
            self.nodes[number] = Node(
                number,
                cluster_id,
                controllers,
                replicas=len(RACKS),
                ways={"WORKER": (port, f"127.0.0.1:{entrance}")},
                properties={"broker.rack": rack, "replica.selector.class": SELECTOR},
            )
            self.proxies[number] = Proxy(entrance, f"127.0.0.1:{port}")
        self.bootstrap = ",".join(node.bootstrap for node in self.nodes.values())

    @property
    def entrances(self) -> str:
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies.values())

    @property
    def near(self) -> Node:
        return self.nodes[NEAR]

    def start(self) -> Kafka:
        begin_all(self.nodes.values())
        kafka = Kafka(self.bootstrap)
        wait_for(lambda: len(kafka.admin.list_topics(timeout=30).brokers) == len(RACKS), "all brokers")
        # The group's offsets are elsewhere too, so that its coordinator stays when the near broker goes.
        create(kafka, "__consumer_offsets", FAR * 2, **{"cleanup.policy": "compact"})
        return kafka

    def bytes_from(self, *numbers: int) -> int:
        return sum(self.proxies[number].bytes_back for number in numbers)

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        for node in self.nodes.values():
            node.close()


def create(kafka: Kafka, name: str, replicas: list[list[int]], **config: str) -> None:
    topic = NewTopic(name, len(replicas), replica_assignment=replicas, config=config)
    kafka.admin.create_topics([topic])[name].result(30)
    wait_for(lambda: name in kafka.names(), f"the brokers to know {name}")


@pytest.fixture(scope="module")
def started_racks() -> Iterator[tuple[Racks, Kafka]]:
    with ExitStack() as stack:
        try:
            racks = Racks()
        except UnavailableError as reason:
            pytest.skip(f"three brokers need Java: {reason}")
        stack.callback(racks.close)
        yield racks, racks.start()


@pytest.fixture
def racks(started_racks: tuple[Racks, Kafka]) -> Iterator[Racks]:
    racks, _ = started_racks
    yield racks
    racks.near.restore()


@pytest.fixture
def near_topics(started_racks: tuple[Racks, Kafka]) -> Topics:
    """The near broker has a replica of the input alone."""
    kafka, topics = started_racks[1], Topics.unique()
    create(kafka, topics.input, FAR_AND_NEAR)
    for name in (topics.output, topics.dead_letters):
        create(kafka, name, FAR)
    return topics


@pytest.fixture
def kafka(started_racks: tuple[Racks, Kafka]) -> Kafka:
    return started_racks[1]


@pytest.fixture
def rack_workers(racks: Racks, tmp_path: Path) -> Iterator[Workers]:
    with workers_in(racks.entrances, Path("builtin"), tmp_path, COSTLESS, is_forked=True) as workers:
        yield workers


@pytest.fixture
def load(kafka: Kafka, near_topics: Topics) -> Iterator[Load]:
    load = Load(kafka, near_topics.input, 200)
    yield load
    load.end()


def padded(number: int) -> Record:
    return Record(f'{{"id": "{number}", "text": "всё хорошо", "more": "{"x" * 1_000}"}}'.encode(), f"{number}".encode())


def is_scored(worker: WorkerProcess, records: float) -> bool:
    return worker.metrics.outcomes >= records


def partitions_of(kafka: Kafka, topic: str) -> list[PartitionMetadata]:
    return list(kafka.admin.list_topics(topic, timeout=30).topics[topic].partitions.values())


def wait_until_near(kafka: Kafka, topics: Topics) -> None:
    """Until the near broker is in sync for all partitions, so that leaders may name it."""
    wait_for(lambda: all(NEAR in each.isrs for each in partitions_of(kafka, topics.input)), "the near broker in sync")


def move(kafka: Kafka, topics: Topics, replicas: list[list[int]]) -> None:
    reassign(kafka.bootstrap, topics.input, replicas)

    def is_done() -> bool:
        found = partitions_of(kafka, topics.input)
        return all(
            set(each.replicas) == set(each.isrs) == set(wanted) for each, wanted in zip(found, replicas, strict=True)
        )

    wait_for(is_done, "the replicas to be moved")


@pytest.mark.parametrize("client_rack", ["b", "a", "elsewhere", None])
def test_records_come_from_the_replica_in_the_rack(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers, client_rack: str | None
) -> None:
    wait_until_near(kafka, near_topics)
    kafka.send(near_topics.input, map(padded, range(1_000)))
    before = {number: racks.bytes_from(number) for number in RACKS}
    worker = rack_workers.start(near_topics, client_rack=client_rack).wait_until_assigned(2)
    wait_until_committed(kafka, near_topics)
    sent = {number: racks.bytes_from(number) - before[number] for number in RACKS}
    print(f"client_rack {client_rack}: bytes from each broker: {sent}")
    assert worker.terminate() == 0
    if client_rack == "b":
        assert sent[NEAR] > 900_000
        assert sent[1] + sent[2] < 100_000
        assert worker.lines("the leaders name a nearer replica to fetch from")
    else:
        assert sent[NEAR] < 100_000
        assert sent[1] + sent[2] > 900_000


@pytest.mark.parametrize(
    ("client_rack", "said"),
    [
        ("b", "ok    rack         records are read from replicas in b, where there are any\n"),
        (
            "elsewhere",
            "warn  rack         no broker has broker.rack elsewhere (they have: a, b): records are read from",
        ),
    ],
)
def test_check_tells_whether_there_are_replicas_in_the_rack(
    racks: Racks, near_topics: Topics, client_rack: str, said: str
) -> None:
    names = {
        "bootstrap_servers": racks.bootstrap,
        "input_topics": near_topics.input,
        "output_topic": near_topics.output,
        "dead_letter_topic": near_topics.dead_letters,
        "group_id": near_topics.group,
        "model": "builtin",
        "http_port": 0,
        "client_rack": client_rack,
    }
    done = forked("check", *(word for name, value in names.items() for word in (f"--{name.replace('_', '-')}", value)))
    assert said in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


def exactly_once(kafka: Kafka, topics: Topics, records: list[Record]) -> bool:
    found = places(kafka.read(topics.output))
    return set(found) == {record.place for record in records} and set(found.values()) == {1}


def grows(racks: Racks, *numbers: int) -> Any:
    """A condition: these brokers have sent as much as some hundred records are."""
    before = racks.bytes_from(*numbers)
    return lambda: racks.bytes_from(*numbers) - before > ENOUGH


def scores(worker: WorkerProcess, records: int) -> Any:
    """A condition: it has scored so many more."""
    wanted = worker.metrics.outcomes + records
    return lambda: is_scored(worker, wanted)


@pytest.mark.parametrize("delivery", [pytest.param("at-least-once", marks=long_form), "exactly-once"])
def test_the_replica_is_killed_mid_stream_and_comes_back(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers, load: Load, delivery: str
) -> None:
    wait_until_near(kafka, near_topics)
    settings = {"client_rack": "b", "delivery": delivery, **LONG_SESSION}
    worker = rack_workers.start(near_topics, **settings).wait_until_assigned(2)
    load.start()
    wait_for(grows(racks, NEAR), "records from the near broker")
    far = racks.bytes_from(1, 2)
    wait_for(grows(racks, NEAR), "more of them")

    racks.near.kill()
    wait_for(scores(worker, 1_000), "the leaders to send them")
    assert racks.bytes_from(1, 2) > far

    racks.near.start()
    wait_until_near(kafka, near_topics)
    wait_for(grows(racks, NEAR), "records from the near broker again")
    records = load.stop()
    wait_until_committed(kafka, near_topics)
    assert worker.metrics.get("offset_resets_total") == 0
    assert worker.metrics.get("rebalances_total") == 1
    assert worker.terminate() == 0
    assert exactly_once(kafka, near_topics, records)


def test_the_replica_moves_away_comes_back_and_becomes_the_leader(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers, load: Load
) -> None:
    wait_until_near(kafka, near_topics)
    worker = rack_workers.start(near_topics, client_rack="b", **LONG_SESSION).wait_until_assigned(2)
    load.start()
    wait_for(grows(racks, NEAR), "records from the near broker")

    move(kafka, near_topics, FAR)
    wait_for(grows(racks, 1, 2), "records from the leaders")

    move(kafka, near_topics, FAR_AND_NEAR)
    wait_for(grows(racks, NEAR), "records from the near broker again")

    move(kafka, near_topics, [[NEAR, 1, 2], [NEAR, 2, 1]])
    moved = [TopicPartition(near_topics.input, number) for number in (0, 1)]
    kafka.admin.elect_leaders(ElectionType.PREFERRED, moved).result(30)
    wait_for(lambda: {each.leader for each in partitions_of(kafka, near_topics.input)} == {NEAR}, "it to lead")
    wait_for(grows(racks, NEAR), "records from the near broker as the leader")

    records = load.stop()
    wait_until_committed(kafka, near_topics)
    assert worker.metrics.get("offset_resets_total") == 0
    assert worker.metrics.get("rebalances_total") == 1
    assert worker.terminate() == 0
    assert exactly_once(kafka, near_topics, records)


@long_form
def test_a_replica_that_hangs_is_left(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers, load: Load
) -> None:
    """Long before the request to it times out, which would take a minute."""
    wait_until_near(kafka, near_topics)
    worker = rack_workers.start(near_topics, client_rack="b", request_timeout_ms=60_000).wait_until_assigned(2)
    load.start()
    wait_for(grows(racks, NEAR), "records from the near broker")
    racks.near.pause()
    wait_for(scores(worker, 1_000), "the leaders to send them", 45)
    racks.near.resume()
    records = load.stop()
    wait_until_committed(kafka, near_topics)
    assert worker.metrics.get("rebalances_total") == 1
    assert worker.terminate() == 0
    assert exactly_once(kafka, near_topics, records)


@long_form
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_replica_and_worker_are_killed_again_and_again(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers, load: Load, delivery: str
) -> None:
    """In turn, each as soon as records come from the replica, which is also stopped for a while."""
    wait_until_near(kafka, near_topics)
    settings = {"client_rack": "b", "delivery": delivery, "session_timeout_ms": 10_000}
    worker = rack_workers.start(near_topics, **settings)
    load.start()
    for act in ("replica", "worker", "pause") * 3:
        wait_for(grows(racks, NEAR), "records from the near broker", 90)
        assert worker.metrics.get("offset_resets_total") == 0
        if act == "worker":
            worker.kill()
            worker = rack_workers.start(near_topics, **settings)
            continue
        if act == "pause":
            racks.near.pause()
        else:
            racks.near.kill()
        wait_for(scores(worker, 500), "the leaders to send them", 90)
        if act == "pause":
            racks.near.resume()
        else:
            racks.near.start()
    records = load.stop()
    wait_until_committed(kafka, near_topics)
    assert worker.metrics.get("offset_resets_total") == 0
    assert worker.terminate() == 0
    found = places(kafka.read(near_topics.output))
    assert set(found) == {record.place for record in records}
    if delivery == "exactly-once":
        assert set(found.values()) == {1}


def test_a_replica_sends_records_up_to_its_last_stable_offset(
    racks: Racks, kafka: Kafka, near_topics: Topics, rack_workers: Workers
) -> None:
    wait_until_near(kafka, near_topics)
    worker = rack_workers.start(near_topics, client_rack="b", **LONG_SESSION).wait_until_assigned(2)
    config = {"bootstrap.servers": racks.bootstrap, "transactional.id": near_topics.group, "log_level": 0}
    producer = Producer(config)
    wait_for(lambda: is_initialised(producer), "the coordinator of transactions")

    def send(numbers: range) -> None:
        for number in numbers:
            producer.produce(near_topics.input, padded(number).value, partition=0)
        assert producer.flush(60) == 0

    producer.begin_transaction()
    send(range(300))
    producer.commit_transaction()
    wait_for(lambda: is_scored(worker, 300), "what is committed")
    near = racks.bytes_from(NEAR)
    producer.begin_transaction()
    send(range(300, 600))
    plain = kafka.send(near_topics.input, [Record(numbered(number).value, partition=0) for number in range(9)])
    holds_for(lambda: worker.metrics.outcomes == 300, "nothing behind the open transaction is read", 5)
    producer.abort_transaction()
    wait_for(lambda: is_scored(worker, 309), "what is behind it")
    producer.begin_transaction()
    send(range(600, 900))
    producer.commit_transaction()
    wait_for(lambda: is_scored(worker, 609), "the last transaction")
    wait_until_committed_behind_markers(worker, near_topics, kafka)
    assert worker.terminate() == 0
    assert racks.bytes_from(NEAR) - near > 600_000, "it sends what is aborted, too"
    found = places(kafka.read(near_topics.output))
    assert len(found) == 609
    assert set(found.values()) == {1}
    assert {record.place for record in plain} < set(found)


def is_initialised(producer: Producer) -> bool:
    with suppress(KafkaException):
        producer.init_transactions(30)
        return True
    return False


def wait_until_committed_behind_markers(worker: WorkerProcess, topics: Topics, kafka: Kafka) -> None:
    wait_until_committed(kafka, topics)
    wait_for(lambda: worker.metrics.get("consumer_lag_records") == 0, "no lag")
