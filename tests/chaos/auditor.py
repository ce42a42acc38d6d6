"""Accounts for every event of a run: what is lost, repeated, out of order, or not what it had to become. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, NamedTuple

SAMPLE: Final = 10


class Given(NamedTuple):
    """A record of the input topic, and what has to become of it (see `events.kind_of`)."""

    number: int
    partition: int
    offset: int
    key: bytes | None
    kind: str
    score: float = 0.0


class Seen(NamedTuple):
    """A record of the output or the dead-letter topic: which event it says it is of, and what has become of that.

    `partition` and `offset` are the input record's that it names; None for a tombstone, which names none.
    """

    number: int
    partition: int | None
    offset: int | None
    key: bytes | None
    kind: str
    score: float = 0.0


@dataclass
class Audit:
    """What was found. Counts are of events; `wrong` and the samples say which."""

    events: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    repeats: int = 0  # records beyond the first of their event
    repeated: int = 0  # events with repeats
    disordered: int = 0
    wrong: int = 0
    explained: int | None = None  # repeats that the workers counted as possible, or whose worker ended suddenly
    samples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def repeated_share(self) -> float:
        """Repeats per event."""
        return self.repeats / self.events if self.events else 0.0

    def failures(self, delivery: str) -> list[str]:
        """What breaks the promise of this delivery; empty where it was kept."""
        names = ["lost", "disordered", "wrong"] + (["repeats"] if delivery == "exactly-once" else [])
        found = [(name, getattr(self, name)) for name in names]
        failures = [f"{count} {name}: {'; '.join(self.samples.get(name, []))}" for name, count in found if count]
        if self.explained is not None and self.repeats > self.explained:
            failures.append(f"{self.repeats} repeats, of which nothing explains more than {self.explained}")
        return failures

    def note(self, what: str, words: str) -> None:
        sample = self.samples.setdefault(what, [])
        if len(sample) < SAMPLE:
            sample.append(words)


def audit(given: Iterable[Given], output: Iterable[Seen], dead_letters: Iterable[Seen]) -> Audit:
    """Reads input, output and dead letters once each; each in the order of its partitions and offsets."""
    found = Audit()
    events: dict[int, Given] = {}
    for event in given:
        found.events += 1
        if event.number in events:
            found.wrong += 1
            found.note("wrong", f"event {event.number} is in the input twice: the run itself is at fault")
        events[event.number] = event
    times: dict[int, int] = {}
    last: dict[bytes | None, int] = {}
    outcomes = chain(((seen, True) for seen in output), ((seen, False) for seen in dead_letters))
    for seen, is_ordered in outcomes:
        here = events.get(seen.number)
        fault = "no such event" if here is None else difference(here, seen)
        if here is None or fault:
            found.wrong += 1
            found.note("wrong", f"{seen}: {fault}")
            continue
        times[seen.number] = times.get(seen.number, 0) + 1
        if times[seen.number] > 1:
            found.repeats += 1
            found.note("repeats", f"event {seen.number} ({here.partition}-{here.offset})")
        elif is_ordered:
            if here.number < last.get(here.key, -1):  # in the order of their numbers they were published
                found.disordered += 1
                found.note("disordered", f"event {seen.number} ({here.partition}-{here.offset}) after {last[here.key]}")
            last[here.key] = here.number
        found.kinds[seen.kind] = found.kinds.get(seen.kind, 0) + (times[seen.number] == 1)
    found.repeated = sum(1 for count in times.values() if count > 1)
    for number, event in events.items():
        if number not in times:
            found.lost += 1
            found.note("lost", f"event {number} ({event.partition}-{event.offset}, {event.kind})")
    return found


def difference(given: Given, seen: Seen) -> str:
    """What is wrong with a record that came of an event; empty where nothing is."""
    if seen.kind != given.kind:
        return f"it had to become {given.kind}"
    if seen.key != given.key:
        return f"its key was {given.key!r}"
    if seen.partition is not None and (seen.partition, seen.offset) != (given.partition, given.offset):
        return f"it was {given.partition}-{given.offset}"
    if abs(seen.score - given.score) > 1e-5:
        return f"its score had to be {given.score:.6f}"
    return ""
