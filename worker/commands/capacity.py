"""How many worker processes keep one GPU busy, by what one process spends on a text. ``bench`` prints it."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import orjson

from worker.core.decoder import Decoder
from worker.core.encoder import Encoder
from worker.core.events import Event, Headers
from worker.core.sentiment import Sentiment
from worker.core.timestamps import iso_time
from worker.model.autotune import shortest_run_s

PLUMBING: Final = 4.5  # CPU time of a worker without a model, in times of decoding and encoding: 9 to 10 µs to 2.3
MEASURED_TEXTS: Final = 1_024  # at once, for a worker too decodes and encodes some hundred records at once
NOW_MS: Final = 1_800_000_000_000.0


class TextTimes(NamedTuple):
    """What one process spends on one text of a backlog, in seconds. The three are spent side by side.

    ``tokenize_s``: on the thread of the tokenizer. ``plumbing_s``: under the interpreter's lock, for Kafka, decoding,
    encoding and sending passes to the device. ``device_s``: on the device.
    """

    tokenize_s: float
    plumbing_s: float
    device_s: float


class Sharing(NamedTuple):
    """So many processes on one device, and the texts per second that they score together at most."""

    processes: int
    texts_per_s: float
    is_device_full: bool
    """False where the machine has too few cores for as many processes as the device could serve."""


def processes_for_device(times: TextTimes, cores: int) -> Sharing:
    """How many processes keep a device busy, of those that ``cores`` cores can run; at least one.

    A process scores a text in the longest of the three times, because its stages work side by side. All processes together
    score one in ``device_s``. Brokers on the same machine take cores besides.
    """
    text_s = max(times)
    wanted = math.ceil(round(text_s / times.device_s, 6))
    runnable = math.floor(round(cores * text_s / (times.tokenize_s + times.plumbing_s), 6))
    processes = max(1, min(wanted, runnable))
    return Sharing(processes, min(processes / text_s, 1 / times.device_s), processes >= wanted)


def plumbing_seconds(texts: Sequence[str]) -> float:
    """Seconds that Kafka, decoding and encoding take a process for each of N texts, estimated. Blocks for some of them.

    Without a broker only decoding and encoding can be measured. They are between a fifth and a quarter of the whole.
    """
    texts = texts[:MEASURED_TEXTS]
    records = [_Record(number, orjson.dumps({"id": number, "text": text})) for number, text in enumerate(texts)]
    decoder, encoder = Decoder(), Encoder()
    events = [Event(str(number), text) for number, text in enumerate(texts)]
    sentiments = [Sentiment("neutral", -0.25, (0.4, 0.6, 0.15))] * len(texts)
    truncated = [False] * len(texts)

    def decode_and_encode() -> None:
        decoder.decode_all(records)
        encoder.encode(records, events, sentiments, truncated, "model@revision", iso_time(NOW_MS))

    return PLUMBING * shortest_run_s(decode_and_encode) / len(texts)


class _Record(NamedTuple):
    """A record as a producer of events would send it."""

    offset: int
    value: bytes
    key: bytes = b"key"
    topic: str = "texts"
    partition: int = 0
    timestamp: int = int(NOW_MS)
    headers: Headers = ()
