"""The data types that travel between the stages: records, events, failures and what is published. Pure."""

from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import repeat
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

Stage = Literal["decode", "infer", "publish"]
Reason = Literal[
    "invalid_json",
    "invalid_utf8",
    "not_an_object",
    "missing_text",
    "text_not_string",
    "empty_text",
    "too_large",
    "field_exists",
    "invalid_cloudevent",
    "inference_failed",
    "invalid_timestamp",
    "result_too_large",
    "key_required",
]
Headers = Sequence[tuple[str, bytes | None]]
Row = TypeVar("Row", bound=tuple[Any, ...])

CONTENT_TYPE: Final = "content-type"
ID_HEADER: Final = "event.id"
COUNT_HEADER: Final = "replay.count"
TIMESTAMP_HEADER: Final = "event.timestamp"  # the first timestamp of a replayed record, ms since 1970 in ASCII
ENRICHED_FIELD: Final = "sentiment"


class Record(Protocol):
    """What is needed of a consumed record; aiokafka's ConsumerRecord fits. The timestamp is in ms, negative for none."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Headers: ...


class Event(NamedTuple):
    """A record whose text can be scored."""

    id: str
    text: str


class Failure(NamedTuple):
    """Why a record becomes a dead letter. The message never holds any of its text."""

    stage: Stage
    reason: Reason
    message: str


class Null(Enum):
    """A record with a null value, or with a null text where the setting ``on_null_text`` is skip."""

    TOMBSTONE = "forwarded as it is: it has a key"
    SKIPPED = "skipped: a null with no key, or a null text, says nothing"


Decoded = Event | Failure | Null


class Outgoing(NamedTuple):
    """A record to publish. ``timestamp`` in ms, None for now. Its headers are a list: aiokafka takes nothing else."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int | None


def rows(kind: type[Row], *columns: Iterable[Any]) -> list[Row]:
    """Named tuples from columns, in half the time that calling ``kind`` for each would take."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns)))  # noqa: B905 - a column may repeat without end


def place(record: Record) -> str:
    return f"{record.topic}-{record.partition}-{record.offset}"
