"""The two accounts, the demo's ledger and the worker's books, and what does not add up between them."""

from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from worker.commands.demo.messages import Message, Review
from worker.core.sentiment import LABELS

METRIC_PREFIX = "sentiment_worker_"
RECENT = 12


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
        f"results: {label_counts(ledger)}; {ledger.agreement:.0%} agree with the reviews' own labels",
        f"dead letters: {reason_counts(ledger)}",
        f"publish to result: {latencies(ledger)}",
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def label_counts(ledger: Ledger) -> str:
    """Every label with its number of results, in one line."""
    return ", ".join(f"{ledger.labels[label]} {label}" for label in LABELS)


def reason_counts(ledger: Ledger) -> str:
    """Every reason with its number of dead letters, the most frequent first, in one line."""
    most_first = sorted(ledger.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
    return ", ".join(f"{count} {reason}" for reason, count in most_first) or "none"


def latencies(ledger: Ledger) -> str:
    """From publish to result: the median and the 95th percentile, in one line."""
    return f"p50 {ledger.latency(0.5) * 1000:.0f} ms, p95 {ledger.latency(0.95) * 1000:.0f} ms"
