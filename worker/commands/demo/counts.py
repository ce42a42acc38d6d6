"""What the demo counts, what the worker counts, and where the two do not agree."""

from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from worker.commands.demo.messages import Message, Review
from worker.core.sentiment import LABELS
from worker.printable import counted

METRIC_PREFIX = "sentiment_worker_"
RECENT = 12


class Scored(NamedTuple):
    label: str
    score: float
    review: Review


class DemoCounts:
    """The demo's own counts of its events and their outcomes. An event is known by the id in its header."""

    def __init__(self) -> None:
        self.delivered = 0
        """Events that the broker has acknowledged."""
        self.to_be_skipped = 0
        """Records that the worker should skip: no outcome is published."""
        self.labels: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.tombstones = 0
        self.unmatched = 0
        """Records that the worker published for no event in flight, such as a second result."""
        self.unplanned: Counter[str] = Counter()
        """Outcomes other than the expected ones, as "expected → happened"."""
        self.agreeing = 0
        self.recent: deque[Scored] = deque(maxlen=RECENT)
        self._latencies: deque[float] = deque(maxlen=5_000)
        self._in_flight: dict[str, tuple[Message, float]] = {}

    def sent(self, message: Message, now: float) -> None:
        if message.expected == "skipped":
            self.to_be_skipped += 1
        else:
            self._in_flight[message.id] = message, now

    def result(self, id: str | None, label: str, score: float, now: float) -> None:
        self.labels[label] += 1
        message = self._match(id, "result", now)
        if message and message.review:
            self.agreeing += label == message.review.label
            self.recent.append(Scored(label, score, message.review))

    def dead_letter(self, id: str | None, reason: str, now: float) -> None:
        self.reasons[reason] += 1
        self._match(id, reason, now)

    def tombstone(self, id: str | None, now: float) -> None:
        self.tombstones += 1
        self._match(id, "tombstone", now)

    def _match(self, id: str | None, happened: str, now: float) -> Message | None:
        message, sent_at = self._in_flight.pop(id or "", (None, 0.0))
        if message is None:
            self.unmatched += 1
            return None
        if message.expected != happened:
            self.unplanned[f"{message.expected} → {happened}"] += 1
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
        """The quantile of the times from publishing an event to reading its result, in seconds; 0 before there is one."""
        times = sorted(self._latencies)
        return times[min(len(times) - 1, int(len(times) * share))] if times else 0.0


class Speed:
    """Events per second over the last few seconds, from totals that are passed now and then."""

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
class WorkerCounts:
    """The worker's own counts, from its /metrics."""

    consumed: int
    results: int
    dead_letters: int
    tombstones: int
    skipped: int

    @classmethod
    def parse(cls, metrics: str) -> Self:
        """From the text of a scrape. A missing counter counts as 0."""
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                sums[sample.name] += int(sample.value) if sample.name.endswith("_total") else 0
        names = ("records_consumed", "results_published", "dead_letters", "tombstones", "records_skipped")
        return cls(*(sums[f"{METRIC_PREFIX}{name}_total"] for name in names))

    @property
    def sum(self) -> int:
        return self.results + self.dead_letters + self.tombstones + self.skipped


def discrepancies(counts: DemoCounts, worker_counts: WorkerCounts, committed: int, exit_code: int) -> list[str]:
    """A sentence for each count that does not agree; none if all is well."""
    pairs = (
        ("events in", counts.delivered, "the worker consumed", worker_counts.consumed),
        ("events in", counts.delivered, "the worker's outcomes sum to", worker_counts.sum),
        ("events in", counts.delivered, "the offsets committed sum to", committed),
        ("results read", counts.results, "the worker counts", worker_counts.results),
        ("dead letters read", counts.dead_letters, "the worker counts", worker_counts.dead_letters),
        ("tombstones read", counts.tombstones, "the worker counts", worker_counts.tombstones),
        ("records sent to be skipped", counts.to_be_skipped, "the worker counts", worker_counts.skipped),
    )
    sentences = [f"{demo} {what}, but {whose} {worker}." for what, demo, whose, worker in pairs if demo != worker]
    if counts.in_flight:
        sentences.append(f"{counts.in_flight} of the events never came out.")
    if counts.unmatched:
        sentences.append(f"{counted(counts.unmatched, 'record')} came out twice or from nowhere.")
    sentences += [f"{count} of the events: {what}." for what, count in counts.unplanned.items()]
    if exit_code:
        sentences.append(f"The worker did not drain: it ended with exit code {exit_code}.")
    return sentences


def summary(counts: DemoCounts, worker_counts: WorkerCounts, committed: int) -> str:
    """Both counts side by side, and their sum in one sentence."""
    rows = (
        ("", "worker's /metrics", "seen by the demo"),
        ("events in", worker_counts.consumed, counts.delivered),
        ("results", worker_counts.results, counts.results),
        ("dead letters", worker_counts.dead_letters, counts.dead_letters),
        ("tombstones forwarded", worker_counts.tombstones, counts.tombstones),
        ("records skipped", worker_counts.skipped, "–"),
        ("offsets committed", "–", committed),
    )
    lines = [f"  {name:<22}{worker!s:>18}{demo!s:>18}" for name, worker, demo in rows]
    lines += [
        "",
        f"{counted(worker_counts.consumed, 'event')} in = {counted(worker_counts.results, 'result')}"
        f" + {counted(worker_counts.dead_letters, 'dead letter')}"
        f" + {counted(worker_counts.tombstones, 'tombstone')} forwarded"
        f" + {counted(worker_counts.skipped, 'record')} skipped",
        f"results: {label_counts(counts)}; {counts.agreement:.0%} agree with the reviews' own labels",
        f"dead letters: {reason_counts(counts)}",
        f"publish to result: {latencies(counts)}",
    ]
    return "\n".join(lines)


def label_counts(counts: DemoCounts) -> str:
    """Every label with its number of results, in one line."""
    return ", ".join(f"{counts.labels[label]} {label}" for label in LABELS)


def reason_counts(counts: DemoCounts) -> str:
    """Every reason with its number of dead letters, the most frequent first, in one line."""
    most_first = sorted(counts.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
    return ", ".join(f"{count} {reason}" for reason, count in most_first) or "none"


def latencies(counts: DemoCounts) -> str:
    """From publish to result: the median and the 95th percentile, in one line."""
    return f"p50 {counts.latency(0.5) * 1000:.0f} ms, p95 {counts.latency(0.95) * 1000:.0f} ms"
