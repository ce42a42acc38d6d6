"""From events and sentiments to result records. Pure."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Final

import numpy as np
import orjson

from worker.core import cloudevents
from worker.core.cloudevents import mode as _cloud_event_mode
from worker.core.events import (
    CONTENT_TYPE,
    ENRICHED_FIELD,
    TIMESTAMP_HEADER,
    Event,
    Failure,
    Headers,
    Outgoing,
    Record,
    place,
    rows,
)
from worker.core.sentiment import LABELS, Sentiment
from worker.core.timestamps import BEYOND, NO_TIME, first_time, has_timestamp, json_time

_JSON_HEADERS: Final[list[tuple[str, bytes | None]]] = [(CONTENT_TYPE, b"application/json")]
_LABEL_BYTES: Final = {label: orjson.dumps(label) for label in LABELS}
_MILLIONTHS: Final = 1_000_000


class Encoder:
    """Events and sentiments → result bytes. ``group_id`` names the source of results that are CloudEvents.

    ``result_timestamp``: results and tombstones have their input's timestamp (event), or that of their publishing (now).
    """

    def __init__(
        self, *, output_mode: str = "result", output_format: str = "json", group_id: str = "",
        result_timestamp: str = "event",
    ) -> None:  # fmt: skip
        self._is_enriched = output_mode == "enrich"
        self._is_cloud_event = output_format == "cloudevents"
        self._source = cloudevents.source_of(group_id)
        self._is_dated_now = result_timestamp == "now"

    def encode(
        self,
        records: Sequence[Record],
        events: Sequence[Event],
        sentiments: Sequence[Sentiment],
        truncated: Sequence[bool],
        model: str,
        processed_at: str,
    ) -> list[Outgoing | Failure]:
        """The result records of N events of one partition.

        ``model`` is who scored them, name@revision; ``processed_at`` is as of ``iso_time``. The value has the bytes that
        ``orjson.dumps`` makes of ``result_fields``, and takes a third of the time.
        """
        if not records:
            return []
        labels, scores, probabilities = zip(*sentiments, strict=True)
        headers = [record.headers for record in records]
        event_times, timestamps = self._times(records, headers)
        columns = (
            _strings([event.id for event in events]),
            map(_LABEL_BYTES.__getitem__, labels),
            *_decimals(scores, probabilities),
            [b"true" if is_cut else b"false" for is_cut in truncated],
            [record.offset for record in records],
            event_times,
        )
        values: Iterable[bytes] = map(_template(records[0], model, processed_at).__mod__, zip(*columns, strict=True))
        if self._is_enriched:
            values = [_spliced(record, value) for record, value in zip(records, values, strict=True)]
        results: list[Outgoing | Failure] = [
            *rows(
                Outgoing,
                [record.key for record in records],
                values,
                self._headers(records, headers, events, processed_at),
                timestamps,
            )
        ]
        if BEYOND in event_times:
            for place in [place for place, time in enumerate(event_times) if time is BEYOND]:
                results[place] = Failure(
                    "publish", "invalid_timestamp", "the record's timestamp is beyond the year 9999"
                )
        return results

    def tombstone(self, record: Record) -> Outgoing:
        """The null of a key, to go on as it is but for the time, which is as of the results."""
        return tombstone(record)._replace(timestamp=None) if self._is_dated_now else tombstone(record)

    def _times(self, records: Sequence[Record], headers: list[Headers]) -> tuple[list[bytes], list[int | None]]:
        """What stands in the results for their events' times, and the results' own timestamps."""
        timestamps: list[int | None] = [record.timestamp for record in records]
        times = list(map(json_time, timestamps))
        if self._is_dated_now:
            timestamps = [None] * len(records)
        elif NO_TIME in times:
            timestamps = [None if time is NO_TIME else at for at, time in zip(timestamps, times, strict=True)]
        if any(headers) and TIMESTAMP_HEADER in set(map(itemgetter(0), chain.from_iterable(headers))):
            times = [first_time(own) or time for own, time in zip(headers, times, strict=True)]
        return times, timestamps

    def _headers(
        self, records: Sequence[Record], headers: list[Headers], events: Sequence[Event], processed_at: str
    ) -> Iterable[list[tuple[str, bytes | None]]]:
        if self._is_cloud_event:
            return [
                cloudevents.without_attributes(own)
                + cloudevents.attributes(place(record), self._source, event.id, processed_at)
                for record, own, event in zip(records, headers, events, strict=True)
            ]
        if not any(headers):
            return repeat(_JSON_HEADERS)
        return map(_of_the_enriched if self._is_enriched else _as_json, headers)


def _template(record: Record, model: str, processed_at: str) -> bytes:
    """Of the results of one partition; takes what differs between them, as JSON, in order."""
    by, topic, now = (orjson.dumps(word).replace(b"%", b"%%") for word in (model, record.topic, processed_at))
    return (
        b'{"id":%%b,"label":%%b,"score":%%b,'
        b'"probabilities":{"negative":%%b,"neutral":%%b,"positive":%%b},"truncated":%%b,"model":%b,'
        b'"source":{"topic":%b,"partition":%d,"offset":%%d},"event_time":%%b,"processed_at":%b}'
    ) % (by, topic, record.partition, now)


def result_fields(
    id: str, sentiment: Sentiment, truncated: bool, model: str, source: dict[str, Any] | None, event_time: str | None,
    processed_at: str,
) -> dict[str, Any]:  # fmt: skip
    """The result record's fields, numbers with six decimals."""
    negative, neutral, positive = sentiment.probabilities
    return {
        "id": id,
        "label": sentiment.label,
        "score": _six(sentiment.score),
        "probabilities": {LABELS[0]: _six(negative), LABELS[1]: _six(neutral), LABELS[2]: _six(positive)},
        "truncated": truncated,
        "model": model,
        "source": source,
        "event_time": event_time,
        "processed_at": processed_at,
    }


def tombstone(record: Record) -> Outgoing:
    """The null of a key, to go on as it is."""
    return Outgoing(record.key, None, list(record.headers), record.timestamp if has_timestamp(record) else None)


def _spliced(record: Record, result: bytes) -> bytes:
    """The input with the result in it; in a structured CloudEvent in its data, for an attribute may be no object."""
    own = record.value or b""
    is_structured = record.headers and _cloud_event_mode(record.headers) == "structured"
    end = cloudevents.end_of_data(own) if is_structured else own.rindex(b"}")
    return b'%s,"%s":%s%s' % (own[:end], ENRICHED_FIELD.encode(), result, own[end:])


def _as_json(headers: Headers) -> list[tuple[str, bytes | None]]:
    """The input's headers with the result's content type in place of theirs. A result is not the event that it is about."""
    if not headers:
        return _JSON_HEADERS
    kept = [header for header in headers if header[0].lower() != CONTENT_TYPE]
    if _cloud_event_mode(headers):
        kept = [header for header in kept if not header[0].startswith(cloudevents.PREFIX)]
    return kept + _JSON_HEADERS


def _of_the_enriched(headers: Headers) -> list[tuple[str, bytes | None]]:
    """A CloudEvent with a field more in its data stays the event that it was."""
    return list(headers) if headers and _cloud_event_mode(headers) else _as_json(headers)


def _six(number: float) -> float:
    return round(number * _MILLIONTHS) / _MILLIONTHS  # of integers: no negative zero


def _decimals(scores: Sequence[float], probabilities: Sequence[tuple[float, ...]]) -> list[list[bytes]]:
    """Scores and probabilities as ``orjson.dumps`` writes what ``_six`` makes of them: four columns."""
    numbers = np.fromiter(chain(scores, *zip(*probabilities, strict=True)), float, 4 * len(scores))
    six = np.rint(numbers * _MILLIONTHS) / _MILLIONTHS + 0.0  # no negative zero
    written = orjson.dumps(six, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
    return [written[begin : begin + len(scores)] for begin in range(0, len(written), len(scores))]


def _strings(words: list[str]) -> list[bytes]:
    """Each as ``orjson.dumps`` writes it."""
    written = orjson.dumps(words)[1:-1].split(b",")
    return written if len(written) == len(words) else [orjson.dumps(word) for word in words]  # one had a comma
