"""The scene of a run: brokers behind proxies, a fleet of workers that are started again when they end, and a feed."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from tests.chaos.auditor import Audit, Given, Seen, audit
from tests.chaos.census import Census, census_of
from tests.chaos.cluster import Node, begin_all
from tests.chaos.events import NUMBER, RESULT, TOMBSTONE, kind_of, record_of, score_of
from tests.chaos.proxy import Proxy
from tests.chaos.questions import UNANSWERED, count, unread
from tests.support.broker import Broker, Extras, allowed_kinds, free_port, start_broker
from tests.support.process import Metrics, WorkerProcess
from tests.support.topics import Kafka, Topics, sending_config
from tests.support.waiting import wait_for
from worker.kafka.topics import WATCH_S

PARTITIONS: Final = 6
BROKERS: Final = 2  # where there is Java; the first is the controller, and coordinates the group
SLOTS: Final = 4  # workers at most; each has a listener of its own, behind a proxy of its own
WORKERS: Final = 3
SESSION_S: Final = 6.0
TICK_S: Final = 0.02
TRICKLE: Final = 50
MODEL: Final = "tests.chaos.model"
BACK_S: Final = 180.0  # to have done everything, once nothing disturbs any more
SCRAPE_EVERY: Final = 4  # looks at the fleet
UNCOMMITTED: Final = 6 * 512  # records that one worker may have published and not committed: its queues, full


class Feed(threading.Thread):
    """Publishes the events 0 to `events` - 1 at a steady rate; outlives whatever happens to the broker.

    It waits at `allowed`: so a slow machine meets the later acts under load too.
    """

    def __init__(self, bootstrap: str, topic: str, events: int, rate: float) -> None:
        super().__init__(daemon=True)
        config = {**sending_config(), "message.timeout.ms": 0, "enable.idempotence": True, "linger.ms": 5}
        quiet = {"bootstrap.servers": bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 500}
        self._config = {**quiet, **config, "error_cb": lambda _: None}
        self._producer = Producer(self._config)
        self._topic = topic
        self._events = events
        self._rate = rate
        self._stopping = threading.Event()
        self._refused: list[str] = []
        self.offered = 0
        self.allowed = events

    def run(self) -> None:
        owed, at = 0.0, time.monotonic()
        while self.offered < self._events and not self._stopping.wait(TICK_S):
            now = time.monotonic()
            owed, at = min(owed + (now - at) * self._rate, self._rate), now
            count = max(0, min(int(owed), min(self.allowed, self._events) - self.offered))
            for number in range(self.offered, self.offered + count):
                self._send(number)
            self.offered += count
            owed -= count
            self._producer.poll(0)

    def _send(self, number: int) -> None:
        record = record_of(number)
        headers: list[Any] = list(record.headers)
        self._producer.produce(self._topic, record.value, record.key, headers=headers, on_delivery=self._delivered)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._refused.append(str(error))

    def hold(self) -> None:
        """Nothing more until `allowed` is raised; returns when all that was offered is published."""
        self.allowed = 0
        wait_for(lambda: self._producer.flush(1) == 0, "the feed to be published", 60)
        # A topic that was created again has epochs from 0, so librdkafka takes its leaders for older than the one it knew.
        self._producer = Producer(self._config)

    def trickle(self) -> None:
        """Some events more are allowed, for an act that needs load."""
        self.allowed = min(self._events, self.allowed + TRICKLE)

    def finish(self) -> int:
        """Waits for the last event; how many have been published."""
        self.join()
        assert self._producer.flush(120) == 0, "the feed could not publish everything"
        assert not self._refused, f"the feed was refused: {self._refused[:3]}"
        return self.offered

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join()


@dataclass
class Way:
    """One worker's way to one broker: a listener of its own, and the proxies that lead to it.

    `entry` is in the worker's `bootstrap_servers`; `address` is where the broker sends its clients, and may move.
    """

    listener: str
    port: int
    entry: Proxy
    address: Proxy


@dataclass
class Slot:
    """One worker's place: its process comes and goes, the place and its ways to the brokers stay."""

    name: str
    ways: list[Way]
    fault: Path
    is_wanted: bool = False
    worker: WorkerProcess | None = None
    variables: dict[str, str] = field(default_factory=dict)
    may_fail: bool = False  # an act makes this worker end with 1
    is_leaving: bool = False
    begins_at: float = 0.0
    possible_duplicates: float = 0.0  # what its worker has counted by now

    @property
    def proxies(self) -> list[Proxy]:
        return [proxy for way in self.ways for proxy in (way.entry, way.address)]

    def network(self, **conditions: Any) -> None:
        """How all its ways are from now on, as of `Proxy.set`."""
        for proxy in self.proxies:
            proxy.set(**conditions)


class Fleet:
    """Keeps a worker running in each wanted slot: whatever ends is started anew, as an orchestrator would.

    `surprises` are endings that no act asked for, and log lines that no operator should ever see.
    """

    def __init__(self, slots: list[Slot], topics: Topics, folder: Path, settings: dict[str, Any]) -> None:
        self.slots = slots
        self._topics = topics
        self._folder = folder
        self._settings = settings
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.surprises: list[str] = []
        self.exits: dict[str, int] = {}
        self.resident: list[tuple[float, int]] = []  # of the largest worker: when, and its bytes
        self.possible_duplicates = 0.0  # counted by workers that have ended
        self.sudden_ends = 0  # of workers that could commit nothing more

    def start(self, workers: int) -> None:
        for slot in self.slots[:workers]:
            slot.is_wanted = True
            self._begin(slot)
        self._watcher.start()

    def running(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.worker is not None and slot.worker.is_running]

    def begin_again(self, slot: Slot, after_s: float = 0.0) -> None:
        """The slot is wanted, and its worker is started in so many seconds if none runs."""
        with self._lock:
            slot.begins_at = time.monotonic() + after_s
            slot.is_wanted = True

    def kill(self, slot: Slot, after_s: float) -> None:
        with self._lock:
            slot.begins_at = time.monotonic() + after_s
            if slot.worker is not None:
                slot.worker.kill()
                self._ended(slot, "killed")

    def terminate(self, slot: Slot, *, forever: bool = False) -> int:
        """SIGTERM, and the exit code."""
        with self._lock:
            worker, slot.is_leaving = slot.worker, True
            slot.is_wanted = slot.is_wanted and not forever
        assert worker is not None
        code = worker.terminate(60)
        with self._lock:
            slot.is_leaving = False
            has_begun = bool(worker.output)  # before that, Python itself ends by the signal
            self._ended(slot, f"terminated: {code}", expected=code == 0 or (code == -signal.SIGTERM and not has_begun))
        return code

    def stop(self) -> None:
        """Ends every worker by SIGTERM."""
        for slot in self.running():
            self.terminate(slot, forever=True)

    def close(self) -> None:
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for slot in self.slots:
            if slot.worker is not None and slot.worker.is_running:
                slot.worker.kill()

    def _begin(self, slot: Slot) -> None:
        slot.worker = WorkerProcess(
            self._folder,
            MODEL,
            {"FAULT_FILE": str(slot.fault), **slot.variables},
            bootstrap_servers=",".join(f"127.0.0.1:{way.entry.port}" for way in slot.ways),
            input_topics=self._topics.input,
            output_topic=self._topics.output,
            dead_letter_topic=self._topics.dead_letters,
            group_id=self._topics.group,
            client_id=slot.name,
            **self._settings,
        )

    def _watch(self) -> None:
        looks = 0
        while not self._stopping.wait(0.25):
            with self._lock:
                for slot in self.slots:
                    self._look_after(slot)
            self._weigh()
            looks += 1
            if looks % SCRAPE_EVERY == 0:
                self.scrape()

    def scrape(self) -> None:
        """Notes what each worker counts, for one that ends suddenly cannot be asked any more."""
        for slot in self.slots:
            worker = slot.worker
            if worker is not None and not worker.is_paused:
                status, text = worker.get("/metrics")
                if status == 200 and slot.worker is worker:
                    slot.possible_duplicates = Metrics(text).get("duplicates_possible_total")

    def _look_after(self, slot: Slot) -> None:
        if slot.is_leaving:
            return
        if slot.worker is not None and not slot.worker.is_running:
            code = slot.worker.wait()
            self._ended(slot, f"ended: {code}", expected=slot.may_fail and code == 1)
        if slot.worker is None and slot.is_wanted and time.monotonic() >= slot.begins_at:
            self._begin(slot)

    def _ended(self, slot: Slot, how: str, expected: bool = True) -> None:
        worker, slot.worker = slot.worker, None
        self.exits[how] = self.exits.get(how, 0) + 1
        self.possible_duplicates += slot.possible_duplicates
        slot.possible_duplicates = 0.0
        self.sudden_ends += how != "terminated: 0"
        assert worker is not None
        if not expected:
            self.surprises.append(f"{slot.name} {how}: {worker.output[-1500:]}")
        for line in worker.lines("Traceback") + worker.lines("nobody foresaw"):
            self.surprises.append(f"{slot.name} printed: {line}")

    def _weigh(self) -> None:
        sizes = [resident_bytes(slot.worker.pid) for slot in self.running() if slot.worker]
        if sizes:
            self.resident.append((time.monotonic(), max(sizes)))


def resident_bytes(pid: int) -> int:
    """Linux alone; 0 elsewhere, and for a process that has gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
    return 0


@dataclass
class Scene:
    """All that acts may lay hands on. `past` are the events of input topics that have been deleted since."""

    brokers: list[Broker]
    kafka: Kafka
    topics: Topics
    fleet: Fleet
    feed: Feed
    before: list[Census] = field(default_factory=list)
    past: list[Given] = field(default_factory=list)

    @property
    def proxies(self) -> list[Proxy]:
        return [proxy for slot in self.fleet.slots for proxy in slot.proxies]

    @property
    def nodes(self) -> list[Node]:
        """The brokers, where there are several."""
        return [broker for broker in self.brokers if isinstance(broker, Node)]

    def results(self) -> int:
        """How many offsets the output has given out, once the brokers answer."""
        found: list[int] = []

        def has_answered() -> bool:
            with contextlib.suppress(*UNANSWERED):
                found.append(count(self.kafka.bootstrap, self.topics.output))
            return bool(found)

        wait_for(has_answered, "the brokers to answer", 60, 0.5)
        return found[0]

    def calm(self) -> None:
        """Nothing is disturbed any more, and three workers run."""
        for broker in self.brokers:
            broker.restore()
        for slot in self.fleet.slots:
            slot.network()
            slot.fault.unlink(missing_ok=True)
            slot.variables.clear()
            slot.may_fail = False
        for slot in self.fleet.slots[:WORKERS]:
            self.fleet.begin_again(slot)
        for slot in self.fleet.slots[WORKERS:]:
            if slot.worker is not None:
                self.fleet.terminate(slot, forever=True)

    def finish(self) -> list[str]:
        """Waits until every event is fed and done, and ends the workers. What has grown since the start, a line each."""
        self.feed.finish()
        self.wait_until_done()
        leaks = self._leaks()
        self.fleet.scrape()
        self.fleet.stop()
        return leaks

    def wait_until_done(self) -> None:
        """Until all that is in the input is committed."""

        def left() -> int | None:
            with contextlib.suppress(*UNANSWERED):
                return unread(self.kafka.bootstrap, self.topics.group, self.topics.input)
            return None

        wait_for(lambda: left() == 0, "every event to be committed", BACK_S, 1, lambda: f"({left()} are left)")

    def census(self) -> list[Census]:
        """Of every worker that is ready: before that, it may not know the signal yet, and end by it."""
        workers = [slot.worker for slot in self.fleet.running()]
        return [census_of(worker) for worker in workers if worker and worker.status("/readyz") == 200]

    def note_what_is_held(self) -> None:
        """The census to compare with: once no worker has more clients than at the look before."""

        def is_settled() -> bool:
            before, self.before = self.before, self.census()
            return [census.clients for census in before] == [census.clients for census in self.before]

        wait_for(is_settled, "workers that have all their clients", every=WATCH_S + 1)

    def _leaks(self) -> list[str]:
        found: list[str] = []

        def is_as_before() -> object:
            now = self.census()
            found[:] = [words for census in now for words in census.beyond(self.before)]
            return now and not found

        with contextlib.suppress(AssertionError):  # what is still there is the answer
            wait_for(is_as_before, "as many clients, tasks and sockets as at the start", 60, 1)
        return found

    def audit(self) -> Audit:
        """Blocks; reads every topic once."""
        found = audited(self.kafka, self.topics, self.past)
        counted = self.fleet.possible_duplicates + sum(slot.possible_duplicates for slot in self.fleet.slots)
        found.explained = int(counted) + UNCOMMITTED * self.fleet.sudden_ends
        return found


@contextlib.contextmanager
def scene(folder: Path, *, events: int, rate: float, workers: int = WORKERS, **settings: Any) -> Iterator[Scene]:
    """Brokers of its own, with its topics, `workers` running and the feed not yet started."""
    brokers, slots = surroundings(folder)
    everyone = ",".join(broker.bootstrap for broker in brokers)
    kafka = Kafka(everyone)
    feed = fleet = None
    try:
        topics = topics_of_the_first(kafka, brokers)
        defaults = {"session_timeout_ms": int(SESSION_S * 1000), "inference_timeout_s": 6, "cpu_threads": 1}
        fleet = Fleet(slots, topics, folder, {**defaults, **settings})
        feed = Feed(everyone, topics.input, events, rate)
        kafka.create_all(topics, PARTITIONS)
        fleet.start(workers)
        for slot in slots[:workers]:
            if slot.worker:
                slot.worker.wait_until_assigned(PARTITIONS // workers)
        yield Scene(brokers, kafka, topics, fleet, feed)
    finally:
        if feed and fleet:
            feed.stop()
            fleet.close()
        for slot in slots:
            for proxy in slot.proxies:
                proxy.close()
        for broker in brokers:
            broker.close()


def surroundings(folder: Path) -> tuple[list[Broker], list[Slot]]:
    """Running brokers, and workers' places with a way to each: two where there is Java, else one of another kind."""
    is_java = "java" in allowed_kinds(controllable=True) and shutil.which("java") is not None
    ports = [[(free_port(), free_port()) for _ in range(SLOTS)] for _ in range(BROKERS if is_java else 1)]
    names = [f"WAY{number}" for number in range(SLOTS)]
    if is_java:
        cluster_id, controllers = Extras().cluster_id, {1: free_port()}
        brokers: list[Broker] = [
            Node(
                number,
                cluster_id,
                controllers,
                ways={name: (port, f"127.0.0.1:{address}") for name, (port, address) in zip(names, own, strict=True)},
            )
            for number, own in enumerate(ports, 1)
        ]
        begin_all(brokers)  # type: ignore[arg-type]
    else:
        extras = Extras(
            listeners={name: ("PLAINTEXT", port) for name, (port, _) in zip(names, ports[0], strict=True)},
            advertised={name: f"127.0.0.1:{address}" for name, (_, address) in zip(names, ports[0], strict=True)},
        )
        brokers = [start_broker(controllable=True, extras=extras)]
    slots = [
        Slot(
            f"worker-{number}",
            [way_to(broker, name, *own[number]) for broker, own in zip(brokers, ports, strict=True)],
            folder / f"fault-{number}",
        )
        for number, name in enumerate(names)
    ]
    return brokers, slots


def way_to(broker: Broker, listener: str, port: int, address: int) -> Way:
    target = f"{broker.bootstrap.rpartition(':')[0]}:{port}"
    return Way(listener, port, Proxy(free_port(), target), Proxy(address, target))


def topics_of_the_first(kafka: Kafka, brokers: list[Broker]) -> Topics:
    """Topics and a group that the first broker coordinates, so that an act knows whom to stop."""
    while True:
        topics = Topics.unique()
        if len(brokers) == 1 or kafka.coordinator(topics.group) == 1:
            return topics


def wait_for_results(kafka: Kafka, topics: Topics, more: int, seconds: float = 180) -> None:
    """So many more than there are once the brokers can say."""
    first: list[int] = []

    def has_come() -> bool:
        try:
            results = kafka.count(topics.output)
        except (KafkaException, TimeoutError):  # a leader is being found
            return False
        first.append(results)
        return results >= first[0] + more

    wait_for(has_come, f"{more} results more", seconds)


# What came of it.


def audited(kafka: Kafka, topics: Topics, past: Iterable[Given] = ()) -> Audit:
    """Accounts for every event in these topics, and in `past`. Blocks; reads each once, with read_committed."""
    given = chain(past, (as_given(message) for message in read(kafka, topics.input)))
    output = (as_seen(message) for message in read(kafka, topics.output))
    letters = (as_letter(message) for message in read(kafka, topics.dead_letters))
    return audit(given, output, letters)


def read(kafka: Kafka, topic: str, wait_s: float = 120) -> Iterator[Message]:
    """Every committed record, partition after partition; AssertionError where one cannot be read to its end.

    A transaction that a killed worker left open is waited for: the broker aborts it, and what is behind it can be read.
    """
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": "auditor", "isolation.level": "read_committed"}
    consumer = Consumer({**config, "enable.auto.commit": False, "enable.partition.eof": True, "log_level": 0})
    try:
        # This consumer itself would be told the offset of the oldest open transaction.
        for partition, end in kafka.ends(topic).items():
            consumer.assign([TopicPartition(topic, partition, 0)])
            deadline, ended = time.monotonic() + wait_s, 0
            while ended < end:
                assert time.monotonic() < deadline, f"{topic}-{partition} cannot be read beyond {ended} of {end}"
                for message in consumer.consume(5_000, timeout=0.5):
                    if message.error() is None:
                        yield message
                    elif message.error().code() == KafkaError._PARTITION_EOF:
                        ended = message.offset()
                    else:
                        raise AssertionError(f"{topic} cannot be read: {message.error()}")
    finally:
        consumer.close()


def number_of(message: Message) -> int:
    number = dict(message.headers() or ()).get(NUMBER)
    return -1 if number is None else int(number)


def as_given(message: Message) -> Given:
    number = number_of(message)
    kind = kind_of(number)
    score = score_of(number) if kind == RESULT else 0.0
    return Given(number, message.partition(), message.offset(), message.key(), kind, score)


def as_seen(message: Message) -> Seen:
    value = message.value()
    if value is None:
        return Seen(number_of(message), None, None, message.key(), TOMBSTONE)
    result = orjson.loads(value)
    source = result["source"]
    return Seen(number_of(message), source["partition"], source["offset"], message.key(), RESULT, result["score"])


def as_letter(message: Message) -> Seen:
    headers = {name: value.decode() for name, value in message.headers() or () if value is not None}
    place = int(headers["source.partition"]), int(headers["source.offset"])
    return Seen(int(headers[NUMBER]), *place, message.key(), headers["error.reason"])
