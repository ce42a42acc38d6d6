"""Computes how many worker processes keep one GPU busy, from the time that one process takes for a text. For ``bench``."""

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

PYTHON_FACTOR: Final = 4.1  # a worker without its model takes 9 to 10 µs of CPU for a text, 2.3 to decode and encode it
MEASURED_TEXTS: Final = 1_024  # in one call, because a worker decodes and encodes hundreds of records in one call, too
NOW_MS: Final = 1_800_000_000_000.0


class TextTimes(NamedTuple):
    """The times, in seconds, that one process takes for one text of a backlog. The three run side by side.

    ``tokenize_s`` is time of the tokenizer's thread. ``python_s`` is time under the interpreter's lock: for Kafka, decoding,
    encoding and sending passes to the device. ``device_s`` is time of the device.
    """

    tokenize_s: float
    python_s: float
    device_s: float


class Sharing(NamedTuple):
    """A number of processes on one device, and the texts per second that they score together at most."""

    processes: int
    texts_per_s: float
    is_device_full: bool
    """False if the machine has too few cores for the processes that would keep the device busy."""


def processes_for_device(times: TextTimes, cores: int) -> Sharing:
    """How many processes keep a device busy, but no more than ``cores`` cores can run, and at least one.

    A process scores a text in the longest of the three times, because its stages work side by side. All processes together
    score a text in ``device_s`` at best. Brokers on the same machine need cores besides.
    """
    text_s = max(times)
    wanted = math.ceil(round(text_s / times.device_s, 6))
    runnable = math.floor(round(cores * text_s / (times.tokenize_s + times.python_s), 6))
    processes = max(1, min(wanted, runnable))
    return Sharing(processes, min(processes / text_s, 1 / times.device_s), processes >= wanted)


def python_seconds(texts: Sequence[str]) -> float:
    """An estimate of the seconds that a process takes for Kafka, decoding and encoding, for each of N texts.

    It measures decoding and encoding, and multiplies by PYTHON_FACTOR, because Kafka cannot be measured without a
    broker. Blocks while it measures.
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

    return PYTHON_FACTOR * shortest_run_s(decode_and_encode) / len(texts)


class _Record(NamedTuple):
    """A record as a producer of events would send it."""

    offset: int
    value: bytes
    key: bytes = b"key"
    topic: str = "texts"
    partition: int = 0
    timestamp: int = int(NOW_MS)
    headers: Headers = ()
