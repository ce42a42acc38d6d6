"""What tests of records, results and dead letters share: a record, an answer of the model, and the result of both."""

from dataclasses import dataclass
from typing import Any

from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Decoded, Event, Failure, Headers, Outgoing
from worker.core.sentiment import Sentiment

CARD = Sentiment("negative", -0.58949463, (0.7870447, 0.4947824, 0.19755007))
MODEL = "cointegrated/rubert-tiny-sentiment-balanced@0123456789ab"
TEN = 1_795_428_000_000  # 2026-11-23T10:00:00.000Z
PROCESSED_AT = "2026-11-23T10:00:00.021Z"
AFTER_YEAR_9999 = 253_402_300_800_000
RESULT = (
    b'{"id":"42","label":"negative","score":-0.589495,'
    b'"probabilities":{"negative":0.787045,"neutral":0.494782,"positive":0.19755},'
    b'"truncated":false,"model":"cointegrated/rubert-tiny-sentiment-balanced@0123456789ab",'
    b'"source":{"topic":"texts","partition":3,"offset":1201},"event_time":"2026-11-23T10:00:00.000Z",'
    b'"processed_at":"2026-11-23T10:00:00.021Z"}'
)
FAILURE = Failure("decode", "too_large", "the text has 6 characters, more than 5")
INVALID_TIMES = (None, b"", b"x", b"-1", b"1.5", b" 1", b"1_0", "١".encode(), b"%d" % AFTER_YEAR_9999, b"9" * 100_000)
MARK = "ZQжщ"  # begins a text, and is in no message of the worker's


@dataclass(frozen=True)
class FakeRecord:
    """A consumed record."""

    value: bytes | None
    key: bytes | None = b"k"
    headers: Headers = ()
    timestamp: int = TEN
    topic: str = "texts"
    partition: int = 3
    offset: int = 1201


def decode(value: bytes | str | None, headers: Headers = (), key: bytes | None = b"k", **options: Any) -> Decoded:
    value = value.encode() if isinstance(value, str) else value
    return Decoder(**options).decode(FakeRecord(value, key=key, headers=headers))


def encode(record: FakeRecord, event: Event, output_mode: str = "result", truncated: bool = False) -> Outgoing:
    [outgoing] = Encoder(output_mode=output_mode).encode([record], [event], [CARD], [truncated], MODEL, PROCESSED_AT)
    assert isinstance(outgoing, Outgoing)
    return outgoing
