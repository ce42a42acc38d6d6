"""The data types that travel between the stages: records, events, failures and what is published. Pure.

The documentation's chapter on records describes the formats.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import repeat
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

from worker.reasons import Reason

Stage = Literal["decode", "infer", "publish"]
Headers = Sequence[tuple[str, bytes | None]]

CONTENT_TYPE: Final = "content-type"
ID_HEADER: Final = "event.id"
COUNT_HEADER: Final = "replay.count"
TIMESTAMP_HEADER: Final = "event.timestamp"  # of a replayed record: its first timestamp, in ms since 1970, in ASCII
ENRICHED_FIELD: Final = "sentiment"


class Record(Protocol):
    """A consumed record, as far as it is needed; aiokafka's ConsumerRecord fits.

    The timestamp is in ms since 1970. It is negative or, in Kafka's oldest format, None where the record has none.
    """

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int | None: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class Event(NamedTuple):
    """The id and the text of a record that can be scored."""

    id: str
    text: str


class Failure(NamedTuple):
    """Why a record becomes a dead letter. The message never holds any of the record's text."""

    stage: Stage
    reason: Reason
    message: str


class Null(Enum):
    """What becomes of a record with a null value, or with a null text where the setting ``on_null_text`` is skip."""

    TOMBSTONE = "forwarded: a null value with a key"
    SKIPPED = "skipped: a null value without a key, or a null text"


class TooOld(Enum):
    """A record that is skipped because it is older than the setting ``max_age_s``."""

    WHEN_READ = "it may have waited in Kafka, as after an outage"
    WHEN_WRITTEN = "it was so old when it was written: a clock or its timestamp may be wrong"


Decoded = Event | Failure | Null | TooOld


class Outgoing(NamedTuple):
    """A record to publish: a result, a tombstone, a dead letter or a replayed record.

    The timestamp is in ms since 1970, None for that of its publishing. The headers are a list: aiokafka takes nothing else.
    """

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int | None


NamedTupleT = TypeVar("NamedTupleT", bound=tuple[Any, ...])


def named_tuples(kind: type[NamedTupleT], *columns: Iterable[Any]) -> list[NamedTupleT]:
    """N named tuples from columns of N values, in half the time that N calls of ``kind`` take. A column may be endless."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns)))  # noqa: B905 - a column may be endless


def place(record: Record) -> str:
    """Where a record is, as text; the id of an event that has none."""
    return f"{record.topic}-{record.partition}-{record.offset}"
