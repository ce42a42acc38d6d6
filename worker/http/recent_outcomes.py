"""The newest results and dead letters, as the console shows them."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson

from worker.core import cloudevents
from worker.core.decoder import Decoder
from worker.core.events import ENRICHED_FIELD, Event, Failure, Record
from worker.core.sentiment import Sentiment
from worker.core.timestamps import age_s
from worker.kafka.delivery import Outcome

KEPT: Final = 50  # newest results, and as many dead letters
HELD_BYTES: Final = 2**20  # of records, for a second at most
ID_CHARS: Final = 80
TEXT_CHARS: Final = 240
PROBABILITIES: Final = 8  # of a result: the largest, where its model has more labels

Row = list[Any]


class RecentOutcomes:
    """Keeps rows of the newest results and dead letters, for who looks now and for who will look later.

    A row of ``results`` has time, id, label, score, probabilities by label, latency in ms and text; a row of
    ``dead_letters`` has time, place, stage, reason and message. Times are in seconds since 1970. A text is None unless
    ``texts`` is True.

    ``decoder`` reads ids and texts from the records a second time: for so few that is cheaper than to carry them through
    the pipeline. Probabilities are read from the published result, which has them by label: the model may be another by
    now. ``probabilities`` reads them from a result that is not in JSON. It happens once a second, in ``take``; until then
    the newest results and their records are held.
    """

    def __init__(
        self, decoder: Decoder, *, texts: bool, probabilities: Callable[[bytes], dict[str, float]] | None = None
    ) -> None:
        self.results: deque[Row] = deque(maxlen=KEPT)
        self.dead_letters: deque[Row] = deque(maxlen=KEPT)
        self._decoder = decoder
        self._texts = texts
        self._probabilities = probabilities
        self._new_results: deque[tuple[Record, Sentiment, bytes, float]] = deque(maxlen=KEPT)
        self._new_dead_letters: deque[Row] = deque(maxlen=KEPT)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """The pipeline calls this with outcomes that have just been acknowledged. Takes some 10 µs."""
        now = time.time()
        for outcome in [outcome for outcome in outcomes if outcome.sentiment][-KEPT:]:
            if outcome.sentiment and outcome.producer_record:
                published = outcome.producer_record.record.value or b""
                self._new_results.append((outcome.record, outcome.sentiment, published, now))
        for outcome in [outcome for outcome in outcomes if outcome.failure][-KEPT:]:
            if outcome.failure:
                self._new_dead_letters.append(_dead_letter_row(outcome.record, outcome.failure, now))
        while len(self._new_results) > 1 and self._held_bytes() > HELD_BYTES:
            self._new_results.popleft()

    def take(self) -> tuple[list[Row], list[Row]]:
        """The results and dead letters added since the last call, oldest first. They stay among the newest."""
        held, self._new_results = self._new_results, deque(maxlen=KEPT)
        results = [self._result_row(*each) for each in held]
        dead_letters = list(self._new_dead_letters)
        self._new_dead_letters.clear()
        self.results.extend(results)
        self.dead_letters.extend(dead_letters)
        return results, dead_letters

    def _held_bytes(self) -> int:
        return sum(_bytes(record) + len(published) for record, _, published, _ in self._new_results)

    def _result_row(self, record: Record, sentiment: Sentiment, published: bytes, now: float) -> Row:
        decoded = self._decoder.decode(record)
        id, text = decoded if isinstance(decoded, Event) else ("", "")
        latency_s = age_s(record.timestamp, now)
        read = self._probabilities
        return [
            round(now, 3),
            shortened(id, ID_CHARS),
            sentiment.label,
            None if sentiment.score is None else round(sentiment.score, 3),
            _largest(read(published) if read else _probabilities(record, published)),
            None if latency_s is None else round(1000 * latency_s),
            shortened(text, TEXT_CHARS) if self._texts else None,
        ]


def shortened(text: str, length: int) -> str:
    """At most so many characters, and an ellipsis if there were more."""
    return text if len(text) <= length else text[:length] + "…"


def _probabilities(record: Record, published: bytes) -> dict[str, float]:
    """The probabilities in a published result, which may be a field of the record, or of the data of a CloudEvent."""
    value = orjson.loads(published)
    if record.headers and cloudevents.mode(record.headers) == "structured":
        value = value.get("data", value)
    probabilities: dict[str, float] = value.get(ENRICHED_FIELD, value)["probabilities"]
    return probabilities


def _largest(probabilities: dict[str, float]) -> dict[str, float]:
    """Three decimals of each; of many only the largest, in descending order."""
    named = list(probabilities.items())
    if len(named) > PROBABILITIES:
        named = sorted(named, key=lambda each: -each[1])[:PROBABILITIES]
    return {name: round(probability, 3) for name, probability in named}


def _dead_letter_row(record: Record, failure: Failure, now: float) -> Row:
    place = f"{record.topic}-{record.partition} @ {record.offset}"
    return [round(now, 3), place, failure.stage, failure.reason, failure.message]


def _bytes(record: Record) -> int:
    return len(record.value or b"") + sum(len(value or b"") for _, value in record.headers)
