"""The demo: an embedded broker, the unchanged worker, real reviews sent at a steady pace, a live view, and a reckoning.

Broker and worker are processes of their own. What happened is counted twice: by the worker (its /metrics) and by the
demo, which reads the output and dead-letter topics with another Kafka client than the worker's. The demo succeeds where
both counts agree and nothing is missing.
"""

import contextlib
import csv
import http.client
import importlib.resources
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol, Self

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker.events import ID_HEADER
from worker.sentiment import LABELS

try:
    import confluent_kafka as kafka

    from worker import embedded
except ImportError:  # the extra `demo` is not installed: run() says so
    kafka = None  # type: ignore[assignment]

GROUP = "sentiment-worker-demo"
METRIC_PREFIX = "sentiment_worker_"

READY_S = 120
SETTLE_S = 20
DRAIN_S = 30
MOST_IN_FLIGHT = 2_000  # the mock keeps the last 5 MB of a partition, read or not
TICK_S = 0.02
FRAME_S = 0.2
LINE_S = 2.0
RECENT = 12
COLOURS: Mapping[str, str] = {"negative": "red", "neutral": "yellow", "positive": "green"}


class Options(Protocol):
    """What ``run`` is told; the settings of the command ``demo`` fit."""

    @property
    def events(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def plain(self) -> bool: ...
    @property
    def keep_running(self) -> bool: ...


class DemoError(Exception):
    """The demo cannot go on; the message is one sentence for the person who watches."""


# What is sent


class Review(NamedTuple):
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Message:
    """A record to send. ``fate`` is what should become of it: result, tombstone, skipped, or a dead letter's reason."""

    id: str
    key: bytes | None
    value: bytes | None
    fate: str
    review: Review | None = None


BROKEN: Sequence[tuple[str, bytes | None]] = (
    ("invalid_json", '{"id": "broken", "text": "Отличное качест'.encode()),
    ("missing_text", '{"id": "broken", "review": "Текст есть, но не там"}'.encode()),
    ("empty_text", b'{"id": "broken", "text": " \\n\\t "}'),
    ("tombstone", None),
    ("invalid_utf8", '{"id": "broken", "text": "Платье в кодировке прошлого века"}'.encode("cp1251")),
    ("text_not_string", b'{"id": "broken", "text": 5}'),
    ("skipped", None),
    ("not_an_object", '["Массив", "вместо", "объекта"]'.encode()),
    ("invalid_json", "Просто строка, не JSON".encode()),
    ("too_large", json.dumps({"id": "broken", "text": "ну " * 50_000}, ensure_ascii=False).encode()),
    ("missing_text", b"{}"),
    ("tombstone", None),
)
"""Records that no worker can score: what becomes of each, and its value."""


def reviews() -> list[Review]:
    """The reviews that ship with the package, which its model was never trained on. Reads a file."""
    path = importlib.resources.files("worker.builtin") / "demo.csv"
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    return [Review(row["text"], row["label"]) for row in rows]


def lap(of: Sequence[Review], events: int, number: int = 0) -> list[Message]:
    """``events`` reviews as JSON events with the broken records spread among them. No two laps share an id."""
    messages = [_review_message(of[n % len(of)], n) for n in range(number * events, (number + 1) * events)]
    for place, (fate, value) in reversed(list(enumerate(BROKEN))):
        messages.insert((place + 1) * events // (len(BROKEN) + 1), _broken_message(fate, value, number, place))
    return messages


def endless(of: Sequence[Review], events: int) -> Iterator[Message]:
    """Lap after lap."""
    number = 0
    while True:
        yield from lap(of, events, number)
        number += 1


def _review_message(review: Review, number: int) -> Message:
    id = f"review-{number + 1}"
    product = f"product-{number % 40 + 1}"
    value = json.dumps({"id": id, "product": product, "text": review.text}, ensure_ascii=False).encode()
    return Message(id, product.encode(), value, "result", review)


def _broken_message(fate: str, value: bytes | None, number: int, place: int) -> Message:
    id = f"broken-{number * len(BROKEN) + place + 1}"
    return Message(id, None if fate == "skipped" else id.encode(), value, fate)


# What came out


class Scored(NamedTuple):
    label: str
    score: float
    review: Review


class Ledger:
    """The demo's own account of its events, each known by the id in its header, from sending to what became of it."""

    def __init__(self) -> None:
        self.delivered = 0
        """Events in: those the broker acknowledged."""
        self.unseen = 0
        """Sent to be skipped: nothing of them comes out."""
        self.labels: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.tombstones = 0
        self.unexpected = 0
        """Records that came out for no event in flight, such as a second result."""
        self.elsewhere: Counter[str] = Counter()
        """What became of events, as "planned → happened", where that was not planned."""
        self.agreeing = 0
        self.recent: deque[Scored] = deque(maxlen=RECENT)
        self._latencies: deque[float] = deque(maxlen=5_000)
        self._in_flight: dict[str, tuple[Message, float]] = {}

    def sent(self, message: Message, now: float) -> None:
        if message.fate == "skipped":
            self.unseen += 1
        else:
            self._in_flight[message.id] = message, now

    def result(self, id: str | None, label: str, score: float, now: float) -> None:
        self.labels[label] += 1
        message = self._arrived(id, "result", now)
        if message and message.review:
            self.agreeing += label == message.review.label
            self.recent.append(Scored(label, score, message.review))

    def dead_letter(self, id: str | None, reason: str, now: float) -> None:
        self.reasons[reason] += 1
        self._arrived(id, reason, now)

    def tombstone(self, id: str | None, now: float) -> None:
        self.tombstones += 1
        self._arrived(id, "tombstone", now)

    def _arrived(self, id: str | None, happened: str, now: float) -> Message | None:
        message, sent_at = self._in_flight.pop(id or "", (None, 0.0))
        if message is None:
            self.unexpected += 1
            return None
        if message.fate != happened:
            self.elsewhere[f"{message.fate} → {happened}"] += 1
        if happened == "result":
            self._latencies.append(now - sent_at)
        return message

    @property
    def results(self) -> int:
        return self.labels.total()

    @property
    def dead_letters(self) -> int:
        return self.reasons.total()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def came_out(self) -> int:
        return self.results + self.dead_letters + self.tombstones

    @property
    def agreement(self) -> float:
        """The share of results with the label that the review's author gave."""
        return self.agreeing / self.results if self.results else 0.0

    def latency(self, share: float) -> float:
        """The quantile of publish-to-result times, in seconds; 0 before there is one."""
        times = sorted(self._latencies)
        return times[min(len(times) - 1, int(len(times) * share))] if times else 0.0


class Speed:
    """Events per second over the last few seconds, from counts taken now and then."""

    def __init__(self, window_s: float = 5) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def at(self, now: float, count: int) -> float:
        self._samples.append((now, count))
        while now - self._samples[0][0] > self._window_s:
            self._samples.popleft()
        since, before = self._samples[0]
        return (count - before) / (now - since) if now > since else 0.0


class Traffic:
    """Kafka as the demo sees it: sends messages, reads what the worker publishes, and enters both in the ledger."""

    def __init__(self, servers: str, ledger: Ledger) -> None:
        """Blocks until the broker has told the partitions."""
        self._ledger = ledger
        client = {"bootstrap.servers": servers, "log_level": 2}
        self._producer = kafka.Producer({**client, "linger.ms": 0, "partitioner": "murmur2_random"})
        # The mock sleeps out an empty fetch even when a record arrives meanwhile: short, or it would count as latency.
        self._consumer = kafka.Consumer(
            {
                **client,
                "group.id": "demo-view",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 5,
            }
        )
        self._consumer.assign(self._partitions(embedded.OUTPUT_TOPIC, embedded.DEAD_LETTER_TOPIC))
        self._worker_group = kafka.Consumer({**client, "group.id": GROUP})

    def _partitions(self, *topics: str) -> list[Any]:
        known = self._producer.list_topics(timeout=10).topics
        return [kafka.TopicPartition(topic, number, 0) for topic in topics for number in known[topic].partitions]

    def send(self, message: Message, now: float) -> None:
        """Does not block."""
        self._ledger.sent(message, now)
        headers: list[tuple[str, str | bytes | None]] = [(ID_HEADER, message.id.encode())]
        self._producer.produce(
            embedded.INPUT_TOPIC, message.value, message.key, headers=headers, on_delivery=self._on_delivery
        )

    def _on_delivery(self, error: Any, message: Any) -> None:
        if error:
            raise DemoError(f"The embedded broker refused an event: {error}.")
        self._ledger.delivered += 1

    def flush(self) -> None:
        """Blocks until every event sent is with the broker, for some seconds at most."""
        if self._producer.flush(10):
            raise DemoError("The embedded broker does not take events any more.")

    def read(self, wait_s: float) -> None:
        """Enters what came out; blocks for ``wait_s`` at most where nothing has."""
        self._producer.poll(0)
        message = self._consumer.poll(wait_s)
        while message is not None:
            if message.error():
                raise DemoError(f"The embedded broker cannot be read: {message.error()}.")
            self._enter(message)
            message = self._consumer.poll(0)

    def _enter(self, message: Any) -> None:
        now = time.monotonic()
        headers = {name: value.decode() for name, value in message.headers() or [] if value is not None}
        id = headers.get(ID_HEADER)
        if message.topic() == embedded.DEAD_LETTER_TOPIC:
            self._ledger.dead_letter(id, headers["error.reason"], now)
        elif message.value() is None:
            self._ledger.tombstone(id, now)
        else:
            result = json.loads(message.value())
            self._ledger.result(id, result["label"], result["score"], now)

    def committed(self) -> int:
        """How many events the worker's group has committed. Blocks for the broker's answer."""
        offsets = self._worker_group.committed(self._partitions(embedded.INPUT_TOPIC), timeout=10)
        return sum(max(0, partition.offset) for partition in offsets)

    def close(self) -> None:
        self._consumer.close()
        self._worker_group.close()


# The reckoning


@dataclass(frozen=True)
class Books:
    """The worker's own account, from its /metrics."""

    consumed: int
    results: int
    dead_letters: int
    tombstones: int
    skipped: int

    @classmethod
    def parse(cls, metrics: str) -> Self:
        """From the text of a scrape. A counter that is not there yet counts 0."""
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                sums[sample.name] += int(sample.value) if sample.name.endswith("_total") else 0
        names = ("records_consumed", "results_published", "dead_letters", "tombstones", "records_skipped")
        return cls(*(sums[f"{METRIC_PREFIX}{name}_total"] for name in names))

    @property
    def sum(self) -> int:
        return self.results + self.dead_letters + self.tombstones + self.skipped


def discrepancies(ledger: Ledger, books: Books, committed: int, exit_code: int) -> list[str]:
    """All that does not add up, a sentence each."""
    pairs = (
        ("events in", ledger.delivered, "the worker consumed", books.consumed),
        ("events in", ledger.delivered, "the worker's outcomes sum to", books.sum),
        ("events in", ledger.delivered, "the offsets committed sum to", committed),
        ("results read", ledger.results, "the worker counts", books.results),
        ("dead letters read", ledger.dead_letters, "the worker counts", books.dead_letters),
        ("tombstones read", ledger.tombstones, "the worker counts", books.tombstones),
        ("records sent to be skipped", ledger.unseen, "the worker counts", books.skipped),
    )
    found = [f"{mine} {what}, but {who} {theirs}." for what, mine, who, theirs in pairs if mine != theirs]
    if ledger.in_flight:
        found.append(f"{ledger.in_flight} of the events never came out.")
    if ledger.unexpected:
        found.append(f"{ledger.unexpected} records came out twice or from nowhere.")
    found += [f"{count} of the events: {what}." for what, count in ledger.elsewhere.items()]
    if exit_code:
        found.append(f"The worker did not drain: it ended with exit code {exit_code}.")
    return found


def summary(ledger: Ledger, books: Books, committed: int) -> str:
    """Both accounts side by side, and their sum in one sentence."""
    rows = (
        ("", "worker's /metrics", "seen by the demo"),
        ("events in", books.consumed, ledger.delivered),
        ("results", books.results, ledger.results),
        ("dead letters", books.dead_letters, ledger.dead_letters),
        ("tombstones forwarded", books.tombstones, ledger.tombstones),
        ("records skipped", books.skipped, "–"),
        ("offsets committed", "–", committed),
    )
    lines = [f"  {name:<22}{theirs!s:>18}{mine!s:>18}" for name, theirs, mine in rows]
    lines += [
        "",
        f"{_count(books.consumed, 'event')} in = {_count(books.results, 'result')}"
        f" + {_count(books.dead_letters, 'dead letter')} + {_count(books.tombstones, 'tombstone')} forwarded"
        f" + {_count(books.skipped, 'record')} skipped",
        f"results: {_labels(ledger)}; {ledger.agreement:.0%} agree with the reviews' own labels",
        f"dead letters: {_reasons(ledger)}",
        f"publish to result: {_latency(ledger)}",
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _labels(ledger: Ledger) -> str:
    return ", ".join(f"{ledger.labels[label]} {label}" for label in LABELS)


def _reasons(ledger: Ledger) -> str:
    most_first = sorted(ledger.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
    return ", ".join(f"{count} {reason}" for reason, count in most_first) or "none"


def _latency(ledger: Ledger) -> str:
    return f"p50 {ledger.latency(0.5) * 1000:.0f} ms, p95 {ledger.latency(0.95) * 1000:.0f} ms"


# What is seen


class View(Protocol):
    """Shows the ledger while it fills; ``show`` is called often and draws when it is time to."""

    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, now: float) -> None: ...


class LinesView:
    """A line every couple of seconds, where there is no terminal to draw on."""

    def __init__(self, console: Console, ledger: Ledger, total: int | None, places: Sequence[str]) -> None:
        self._console, self._ledger, self._total, self._places = console, ledger, total, places
        self._started = self._due = time.monotonic()
        self._speed = Speed()

    def __enter__(self) -> Self:
        for place in self._places:
            _say(self._console, place)
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, now: float) -> None:
        if now < self._due:
            return
        self._due = now + LINE_S
        _say(self._console, self._line(now))

    def _line(self, now: float) -> str:
        ledger = self._ledger
        speed = f"{self._speed.at(now, ledger.came_out):.0f}/s"
        return (
            f"{now - self._started:4.0f} s  {_events_in(ledger, self._total)}, {speed}"
            f" | {ledger.results} results: {_labels(ledger)} | {ledger.dead_letters} dead letters | {_latency(ledger)}"
        )


class LiveView:
    """A picture that is drawn anew some times a second."""

    def __init__(self, console: Console, ledger: Ledger, total: int | None, places: Sequence[str]) -> None:
        self._ledger, self._total, self._places = ledger, total, places
        self._due = 0.0
        self._speed = Speed()
        self._width = min(console.width, 110)
        self._texts = max(0, min(RECENT, console.height - 17))
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self.picture(time.monotonic()), refresh=True)
        self._live.__exit__(None, None, None)

    def show(self, now: float) -> None:
        if now < self._due:
            return
        self._due = now + FRAME_S
        self._live.update(self.picture(now), refresh=True)

    def picture(self, now: float) -> RenderableType:
        """The whole view, no higher than the terminal where that has 17 lines."""
        places = [_line((place, "dim")) for place in self._places]
        parts = (*self._bars(), Text(), self._facts(), Text(), *self._recent(), Text(), *places)
        return Panel(
            Group(self._numbers(now), Text(), *parts),
            title="sentiment-worker demo",
            subtitle="Ctrl-C ends it",
            width=self._width,
            border_style="dim",
        )

    def _numbers(self, now: float) -> RenderableType:
        ledger = self._ledger
        speed = f"{self._speed.at(now, ledger.came_out):.0f} events/s"
        progress = ProgressBar(self._total, ledger.delivered, width=30) if self._total else Text()
        line = Table.grid(expand=True)
        line.add_column()
        line.add_column(justify="center")
        line.add_column(justify="right")
        line.add_row(Text(_events_in(ledger, self._total), style="bold"), progress, Text(speed, style="bold cyan"))
        return line

    def _bars(self) -> Iterator[Text]:
        labels = self._ledger.labels
        most = max(labels.values(), default=1)
        for label in LABELS:
            length = bar(labels[label] / most, max(10, self._width - 22))
            yield _line(f"{label:<9}{labels[label]:>6}  ", (length, COLOURS[label]))

    def _facts(self) -> RenderableType:
        ledger = self._ledger
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True, min_width=17)
        facts.add_row("results", f"{ledger.results}, {ledger.agreement:.0%} agree with the reviews' own labels")
        facts.add_row("dead letters", f"{ledger.dead_letters}: {_reasons(ledger)}")
        facts.add_row("publish to result", f"{_latency(ledger)}; {ledger.in_flight} in flight")
        return facts

    def _recent(self) -> Iterator[Text]:
        shown = list(self._ledger.recent)[-self._texts :] if self._texts else []
        for label, score, review in shown:
            yield _line((f"{label:<9}", COLOURS[label]), f"{score:+.3f}  ", " ".join(review.text.split()))
        for _ in range(self._texts - len(shown)):
            yield Text()


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def bar(share: float, width: int) -> str:
    """A bar as long as its share of the width, in eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _events_in(ledger: Ledger, total: int | None) -> str:
    return f"{ledger.delivered} events in" if total is None else f"{ledger.delivered} of {total} events in"


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(escape(line), style=style, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _waiting(console: Console, line: str, live: bool) -> Iterator[Callable[[str], None]]:
    """Shows that something is awaited; what is called with why, for as long as that is."""
    if live:
        with console.status(escape(line)) as status:
            yield lambda why: status.update(escape(f"{line} ({why})"))
    else:
        _say(console, line)
        yield lambda why: None


# The processes


class Stop:
    """Ctrl-C, SIGTERM or the terminal's end: the first asks for an orderly end, the second ends at once.

    While it is entered, ``asked`` tells of the first; the second raises KeyboardInterrupt, and later ones do nothing,
    so that the processes are ended undisturbed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            return
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextlib.contextmanager
def broker_process(log: Path) -> Iterator[str]:
    """The embedded broker's address; the broker has ended when this has. DemoError when it does not start."""
    with log.open("wb") as errors, _process([sys.executable, "-m", "worker.embedded"], errors, os.environ) as broker:
        assert broker.stdout is not None
        address = broker.stdout.readline().decode().strip()
        if not address:
            raise DemoError("The embedded broker did not start.")
        yield address


@contextlib.contextmanager
def worker_process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The worker with its command's settings alone; it has ended, by force if need be, when this has."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WORKER_")}
    with log.open("wb") as output, _process(command, output, environment, output) as worker:
        yield worker


@contextlib.contextmanager
def _process(
    command: Sequence[str], errors: Any, environment: Mapping[str, str], output: Any = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end ends the broker, whatever becomes of the demo
        stdout=output,
        stderr=errors,
        env=environment,
        process_group=0,  # the terminal's Ctrl-C is for the demo alone, which ends its processes in order
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def worker_command(servers: str, port: int) -> list[str]:
    settings = {
        "bootstrap-servers": servers,
        "input-topics": embedded.INPUT_TOPIC,
        "output-topic": embedded.OUTPUT_TOPIC,
        "dead-letter-topic": embedded.DEAD_LETTER_TOPIC,
        "group-id": GROUP,
        "model": "builtin",
        "cpu-threads": "1",  # so small a network gains nothing from more, and suffers where the machine is busy
        "http-port": str(port),
        "log-format": "json",
        "fetch-max-wait-ms": "20",  # the mock sleeps all of it, even when a record arrives meanwhile
    }
    return [sys.executable, "-m", "worker", "run", *(f"--{name}={value}" for name, value in settings.items())]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def http_get(port: int, path: str) -> tuple[int, str]:
    """Status and body from this machine, past any proxy. Blocks for a few seconds at most; raises OSError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error


def wait_until_ready(worker: subprocess.Popen[bytes], port: int, stop: Stop, tell: Callable[[str], None]) -> None:
    """Blocks until the worker is ready, and tells why it is not yet.

    DemoError when it ends or takes too long; KeyboardInterrupt on stop.
    """
    deadline = time.monotonic() + READY_S
    why = "it does not answer yet"
    while not stop.asked:
        _check_alive(worker)
        with contextlib.suppress(OSError):
            status, body = http_get(port, "/readyz")
            if status == http.HTTPStatus.OK:
                return
            why = body.strip()
        if time.monotonic() > deadline:
            raise DemoError(f"The worker was not ready within {READY_S} s: {why}.")
        tell(why)
        time.sleep(0.1)
    raise KeyboardInterrupt


def _check_alive(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is not None:
        raise DemoError(f"The worker ended by itself with exit code {worker.returncode}.")


def drain(worker: subprocess.Popen[bytes]) -> int:
    """Asks the worker to finish; its exit code. Blocks until it has ended. DemoError when it does not."""
    worker.terminate()
    try:
        return worker.wait(DRAIN_S)
    except subprocess.TimeoutExpired:
        raise DemoError(f"The worker did not end within {DRAIN_S} s of SIGTERM.") from None


# The play


class Play:
    """The demo while broker and worker run: sends, reads and shows in turn, on one thread."""

    def __init__(
        self, *, worker: subprocess.Popen[bytes], port: int, traffic: Traffic, ledger: Ledger, view: View, stop: Stop
    ) -> None:
        self._worker = worker
        self._port = port
        self._traffic = traffic
        self._ledger = ledger
        self._view = view
        self._stop = stop

    def send(self, messages: Iterable[Message], rate: float) -> None:
        """Sends at random moments, ``rate`` a second on average. Blocks until all is sent or an end is asked for."""
        moments = random.Random(7)
        due = time.monotonic()
        for message in messages:
            due += moments.expovariate(rate)
            self._wait_until(due)
            if self._stop.asked:
                break
            self._traffic.send(message, time.monotonic())
        self._traffic.flush()

    def _wait_until(self, due: float) -> None:
        while True:
            left = due - time.monotonic()
            self._watch(max(0.0, min(TICK_S, left)))
            if self._stop.asked or (left <= 0 and self._ledger.in_flight < MOST_IN_FLIGHT):
                return

    def settle(self) -> Books:
        """Blocks until all has come out and the worker says so too, or for ``SETTLE_S``; the worker's last books."""
        deadline = time.monotonic() + SETTLE_S
        books = self._books()
        while (self._ledger.in_flight or books.sum < self._ledger.delivered) and time.monotonic() < deadline:
            self._watch(TICK_S)
            if not self._ledger.in_flight:
                books = self._books()
        return self._books()

    def _watch(self, wait_s: float) -> None:
        self._traffic.read(wait_s)
        self._view.show(time.monotonic())
        _check_alive(self._worker)

    def _books(self) -> Books:
        try:
            return Books.parse(http_get(self._port, "/metrics")[1])
        except OSError as error:
            raise DemoError(f"The worker's /metrics does not answer: {error}.") from error


def perform(options: Options, console: Console, live: bool, stop: Stop, folder: Path) -> bool:
    """The demo from the first process's start to the last one's end. Whether it adds up. Logs go to ``folder``."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(broker_process(folder / "broker.log"))
        port = free_port()
        worker = stack.enter_context(worker_process(worker_command(servers, port), folder / "worker.log"))
        with _waiting(console, "Starting the worker: it loads its model and joins its group ...", live) as tell:
            wait_until_ready(worker, port, stop, tell)
        ledger = Ledger()
        traffic = stack.enter_context(contextlib.closing(Traffic(servers, ledger)))
        messages, total = _programme(options)
        view = (LiveView if live else LinesView)(console, ledger, total, _places(servers, port))
        play = Play(worker=worker, port=port, traffic=traffic, ledger=ledger, view=view, stop=stop)
        with view:
            play.send(messages, options.rate)
            books = play.settle()
        exit_code = drain(worker)
        committed = traffic.committed()
    _say(console, f"\n{summary(ledger, books, committed)}")
    found = discrepancies(ledger, books, committed, exit_code)
    if found:
        _say(console, "\n".join(["It does NOT add up:", *found]), "bold red")
    else:
        _say(console, "It adds up, and the worker drained.", "bold green")
    return not found


def _programme(options: Options) -> tuple[Iterable[Message], int | None]:
    if options.keep_running:
        return endless(reviews(), options.events), None
    messages = lap(reviews(), options.events)
    return messages, len(messages)


def _places(servers: str, port: int) -> Sequence[str]:
    return f"metrics  http://127.0.0.1:{port}/metrics", f"broker   {servers}, topics {', '.join(embedded.TOPICS)}"


def run(options: Options) -> int:
    """The command: 0 where everything adds up and the worker drained, 1 where not, 2 without the extra ``demo``.

    Blocks until the end, or with ``keep_running`` until Ctrl-C; call it from the main thread. Every process it started
    has ended when it returns.
    """
    if kafka is None:
        sys.stderr.write("The demo's broker is not installed; it comes with: pip install 'sentiment-worker[demo]'\n")
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter still sees the rest
    live = sys.stdout.isatty() and not options.plain
    console = Console(no_color=None if live else True, force_terminal=live)
    folder = Path(tempfile.mkdtemp(prefix="sentiment-worker-demo-"))
    try:
        with Stop() as stop:
            adds_up = perform(options, console, live, stop, folder)
    except (DemoError, kafka.KafkaException) as error:
        sys.stderr.write(f"{error}\n{tail(folder / 'worker.log')}")
        adds_up = False
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before it could add up.\n")
        shutil.rmtree(folder)
        return 1
    if adds_up:
        shutil.rmtree(folder)
        return 0
    sys.stderr.write(f"The logs of the broker and the worker are in {folder}.\n")
    return 1


def tail(log: Path, lines: int = 5) -> str:
    """The log's last lines, or nothing where there is no log."""
    try:
        return "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-lines:])
    except OSError:
        return ""
