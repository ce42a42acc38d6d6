"""Which records the output topics would refuse, so that they are not sent: each refusal costs a producer."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from aiokafka.errors import InvalidTimestampError, MessageSizeTooLargeError, RecordListTooLargeError

from worker.kafka.aiokafka_compat.producer import batch_bytes
from worker.kafka.connection import UNREACHABLE, Connection
from worker.kafka.producer_records import Columns, Indexes, indexes_by_topic
from worker.kafka.topics import TopicLimits, read_limits
from worker.reasons import Reason

log = logging.getLogger(__name__)

LIMITS_AGE_S: Final = 30.0
REFUSAL_VALID_S: Final = 60.0  # how long after a refusal records in doubt are not sent
MOST_GROWTH: Final = 1.01  # of what cannot be compressed, when it is
CLOCK_TOLERANCE_MS: Final = 60_000.0  # by which timestamps of the same clock may differ


class TimestampCheck:
    """Which timestamps a topic refuses, by this machine's clock as far as the broker has confirmed it.

    A record's excess is by how many ms its timestamp is beyond the topic's limits. A record whose excess is larger than
    what the broker is known to accept is in doubt, and is sent alone. Once the broker has refused one, no record in doubt
    is sent for REFUSAL_VALID_S. If this machine's clock is fast, the broker refuses timestamps that seem to be within the
    limits: those, and similar ones, are in doubt from then on, until the broker accepts one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refuses_until = -math.inf
        self.accepted_ms = 0.0  # an excess up to which the broker accepts records, as far as is known

    def refuses(self) -> bool:
        """Whether records in doubt are refused without being sent."""
        return self._clock() < self._refuses_until

    def learn(self, excess_ms: float, *, is_refused: bool, is_one_sided: bool = True) -> None:
        """Notes a broker's answer to a record. With two limits a fast clock does not tell which of them was meant."""
        if not is_refused:
            if excess_ms > self.accepted_ms:
                self.accepted_ms = max(self.accepted_ms, excess_ms + CLOCK_TOLERANCE_MS)
            else:
                self.accepted_ms = max(self.accepted_ms, 0.0)
        elif excess_ms > self.accepted_ms:
            self._refuses_until = self._clock() + REFUSAL_VALID_S
        else:  # this machine's clock is fast, or was set meanwhile
            self.accepted_ms = min(0.0, excess_ms - CLOCK_TOLERANCE_MS) if is_one_sided else 0.0


class RefusedSize(NamedTuple):
    """The size of a record that a topic has refused, and when. A topic may compress anew: then the first size decides."""

    uncompressed_bytes: int
    sent_bytes: int
    at: float  # on the monotonic clock

    def is_valid(self) -> bool:
        return time.monotonic() - self.at <= REFUSAL_VALID_S


class OutputLimits:
    """The limits of the topics that are published to, and which records are beyond them.

    ``by_topic`` are the limits as far as they are known. A size that a topic has refused is remembered for REFUSAL_VALID_S:
    where a topic's limit may not be read, each larger record would have to be found by halving its batch. How large a record
    is when compressed is found out only meanwhile, too: it takes as long as to send it.
    """

    def __init__(
        self,
        connection: Connection,
        limits: Mapping[str, TopicLimits],
        *,
        compression_type: str | None,
    ) -> None:
        self.by_topic = limits
        self._connection = connection
        self._compression_type = compression_type
        self._sizes_refused_at: defaultdict[str, float] = defaultdict(lambda: -math.inf)  # by topic
        self._smallest_refused: dict[str, RefusedSize] = {}  # by topic
        self._checks: defaultdict[str, TimestampCheck] = defaultdict(TimestampCheck)  # by topic
        self._read_at = time.monotonic()

    def max_message_bytes(self, topic: str) -> int:
        return self.by_topic.get(topic, TopicLimits()).max_message_bytes

    def refused(self, columns: Columns, indexes: Indexes) -> dict[int, Reason]:
        """Which of the records are known to be refused, and why; notes in ``columns`` those whose timestamp is in doubt."""
        columns.in_doubt.clear()
        refused: dict[int, Reason] = {}
        for topic, some in indexes_by_topic(columns.topics, indexes).items():
            limits = self.by_topic.get(topic, TopicLimits())
            if limits.is_known:
                refused |= self._beyond(topic, limits, columns, some)
            refused |= dict.fromkeys(self._too_large(topic, limits, columns, some), "result_too_large")
        return refused

    async def refused_by_fresh_limits(self, columns: Columns, indexes: Indexes) -> dict[int, Reason]:
        """As ``refused``, but no record is refused by limits that are older than LIMITS_AGE_S and can be read again."""
        refused = self.refused(columns, indexes)
        if refused and await self.refresh(LIMITS_AGE_S):
            refused = self.refused(columns, indexes)
        return refused

    async def refresh(self, older_than_s: float) -> bool:
        """Reads the limits again if they are older than that; returns whether it tried. Raises nothing of Kafka's."""
        if time.monotonic() - self._read_at <= older_than_s:
            return False
        self._read_at = time.monotonic()
        try:
            self.by_topic = await read_limits(self._connection, self.by_topic)
        except UNREACHABLE as error:
            log.debug("the topics' limits could not be read again", extra={"error": type(error).__name__})
        return True

    def until_doubt(self, columns: Columns, topic: str, indexes: Indexes) -> Indexes:
        """The records before the first one whose timestamp is in doubt, or that one alone if it comes first."""
        if columns.in_doubt:
            accepted_ms = self._checks[topic].accepted_ms
            for count, index in enumerate(indexes):
                if index in columns.in_doubt and self._excess_ms(topic, columns, index) > accepted_ms:
                    return indexes[: max(1, count)]
        return indexes

    def learn(self, columns: Columns, topic: str, sent: Indexes, error: BaseException | None) -> None:
        """Learns from a batch's outcome how far this machine's clock is right about timestamps, and what is too large."""
        if isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
            self._sizes_refused_at[topic] = time.monotonic()
            if len(sent) == 1:  # a batch of several says nothing of each
                self._learn_size(topic, columns, sent[0])
        is_refused = isinstance(error, InvalidTimestampError)
        if topic in self.by_topic and (is_refused or (error is None and not columns.in_doubt.isdisjoint(sent))):
            excess_ms = max(self._excess_ms(topic, columns, index) for index in sent)
            is_one_sided = self.by_topic[topic].is_one_sided
            self._checks[topic].learn(excess_ms, is_refused=is_refused, is_one_sided=is_one_sided)

    def _learn_size(self, topic: str, columns: Columns, index: int) -> None:
        refused = RefusedSize(columns.record_bytes(index), self._sent_bytes(columns, index), time.monotonic())
        known = self._smallest_refused.get(topic)
        if known is None or not known.is_valid() or refused.uncompressed_bytes <= known.uncompressed_bytes:
            self._smallest_refused[topic] = refused

    def _beyond(
        self, topic: str, limits: TopicLimits, columns: Columns, indexes: Indexes
    ) -> Iterator[tuple[int, Reason]]:
        """Which of the records are beyond a topic's limits, and why."""
        if not limits.is_log_append_time:
            check = self._checks[topic]
            known = [timestamp for timestamp in columns.timestamps if timestamp is not None]
            if known and max(limits.excess_ms(min(known)), limits.excess_ms(max(known))) > check.accepted_ms:
                beyond = [index for index in indexes if self._excess_ms(topic, columns, index) > check.accepted_ms]
                if check.refuses():
                    yield from ((index, "invalid_timestamp") for index in beyond)
                else:
                    columns.in_doubt.update(beyond)
        if limits.is_compacted and None in columns.keys:
            yield from ((index, "key_required") for index in indexes if columns.keys[index] is None)

    def _too_large(self, topic: str, limits: TopicLimits, columns: Columns, indexes: Indexes) -> Iterator[int]:
        """Which of the records are known to be too large as they are sent."""
        if limits.is_known:
            if self._compression_type and not self._has_refused_a_size(topic):
                return
            limit: float = limits.max_message_bytes
            least = limit / MOST_GROWTH if self._compression_type else limit  # uncompressed
        else:
            smallest = self._smallest_refused.get(topic)
            if smallest is None or not smallest.is_valid():
                return
            limit, least = smallest.sent_bytes - 1, smallest.uncompressed_bytes - 1
        if columns.most_bytes <= least:
            return
        for index in indexes:
            if columns.record_bytes(index) > least and self._sent_bytes(columns, index) > limit:
                yield index

    def _has_refused_a_size(self, topic: str) -> bool:
        """Within REFUSAL_VALID_S."""
        return time.monotonic() - self._sizes_refused_at[topic] <= REFUSAL_VALID_S

    def _sent_bytes(self, columns: Columns, index: int) -> int:
        """The size of a record as a batch of its own, as it is sent."""
        record = (columns.timestamps[index], columns.keys[index], columns.values[index], columns.headers[index])
        return batch_bytes(self._compression_type, *record)

    def _excess_ms(self, topic: str, columns: Columns, index: int) -> float:
        timestamp = columns.timestamps[index]
        return -math.inf if timestamp is None else self.by_topic[topic].excess_ms(timestamp)
